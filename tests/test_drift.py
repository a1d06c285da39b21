"""Drift: the rate of false alarms that is promised, changes that are found, the command from bundle to answer."""

import io
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy.stats import binom, ks_2samp

from kallos.core.errors import KallosError
from kallos.core.runs import read_json
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference.bundle import load_bundle
from kallos.inference.bundle_files import seal
from kallos.inference.column_drift import column_drift
from kallos.inference.drift import measure_drift
from kallos.inference.drift_runs import run_drift
from kallos.inference.drift_sources import DriftSettings
from tests.bundles import FEATURES, bundle_contents, small_bars
from tests.drift_markets import delay, quiet_check, wilder
from tests.study_runs import assert_refused, run_command, start_command

RATE, WINDOW = 0.05, 33
END, MOMENT = "2024-05-31", "2024-06-01"


# The promise


def assert_in_band(alarms: int, runs: int) -> None:
    """The alarms lie within the 95 % band of the rate that is claimed."""
    low, high = binom.interval(0.95, runs, RATE)
    assert low <= alarms <= high, f"{alarms} alarms of {runs} quiet runs, {low:.0f} to {high:.0f} expected"


def test_quiet_markets_give_few_alarms():
    checks = [quiet_check(seed) for seed in range(30)]
    assert {check.rate for check in checks} == {RATE} and {check.rows for check in checks} == {WINDOW}
    assert all(len(check.features) == 5 and len(check.performance) == 7 and not check.notes for check in checks)
    assert_in_band(sum(check.fired for check in checks), 30)


@pytest.mark.soak
def test_false_alarms_of_200_quiet_runs_lie_in_the_band_of_the_rate():
    assert_in_band(sum(quiet_check(seed).fired for seed in range(200)), 200)


@pytest.mark.soak
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_other_rates_hold_too(rate: float):
    alarms = sum(quiet_check(seed, rate=rate).fired for seed in range(200, 400))
    low, high = binom.interval(0.95, 200, rate)
    assert low <= alarms <= high


def test_independent_p_values_would_cry_wolf():
    """Why they are not used: of quiet windows most would be an alarm."""
    from tests.drift_markets import KEPT, WARM, market, rows_of

    table = rows_of(market(WARM + KEPT + 150, seed=0))
    past, starts = table["rsi"].to_numpy()[:900], range(900, 1100, 33)
    naive = [ks_2samp(past, table["rsi"].to_numpy()[start : start + 33]).pvalue < 0.05 for start in starts]
    assert np.mean(naive) > 0.3


@pytest.mark.parametrize("kind", ["wilder", "reversed"])
def test_a_planted_change_fires_within_a_window(kind: str):
    delays = [delay(kind, seed, step=3) for seed in range(4)]
    assert max(delays) <= WINDOW and np.median(delays) <= 24


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["wilder", "reversed"])
def test_planted_changes_of_40_markets_fire_within_a_window(kind: str):
    delays = [delay(kind, seed) for seed in range(40)]
    print(kind, sorted(delays))
    assert max(delays) <= WINDOW and np.median(delays) <= 15


def test_the_rate_does_not_grow_with_the_number_of_features():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(60):
        shared, own = rng.normal(size=(900, 1)), rng.normal(size=(900, 30))
        rows = np.cumsum(shared + own, axis=0)
        rows[15:] -= rows[:-15].copy()  # sums of fifteen steps
        found = column_drift(rows[100:800], rows[-30:], names=[f"f{n}" for n in range(30)], rate=0.1)
        alarms += found["fired"].any()
    assert alarms <= binom.ppf(0.999, 60, 0.1)


# A bundle, and bars after its training


def _honest(files: dict[str, bytes], manifest: dict, folder: Path) -> Path:
    """The bundle with a reference of its own forecasts: its weights are random, so it has not seen any row."""
    path = folder / manifest["id"]
    path.mkdir()
    write = lambda: [(path / name).write_bytes(content) for name, content in seal(manifest, files).items()]  # noqa: E731
    write()
    bars = small_bars()
    rows = load_bundle(path).predict(bars, since=bars["ts"].iloc[0])
    rows["y_true"] = np.log(bars["close"]).diff().shift(-1).to_numpy()[-len(rows) :]
    rows = rows[(rows["status"] == "ok") & rows["y_true"].notna()]
    with np.load(io.BytesIO(files["reference.npz"])) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    kept |= {"forecasts": rows["y_pred"].to_numpy(), "forecast_ts": pd.DatetimeIndex(rows["ts"]).as_unit("us").asi8}
    wrong = {"forecast_errors": "y_pred", "naive_errors": "y_naive"}
    held = io.BytesIO()
    np.savez_compressed(held, **kept | {key: (rows[said] - rows["y_true"]).to_numpy() for key, said in wrong.items()})
    files["reference.npz"] = held.getvalue()
    write()
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a bundle, bars that go on as they did, and bars that change in May."""
    folder = tmp_path_factory.mktemp("watched")
    manifest, files = bundle_contents()
    _honest(files, manifest, folder)
    first = small_bars()["ts"].iloc[0]
    bars = sample_bars(timeframe="1d", start=str(first.date()), end=END, seed=0)
    bars.to_parquet(folder / "BTC_1d.parquet")
    start = int(bars["ts"].searchsorted(pd.Timestamp("2024-05-01", tz="UTC")))
    (folder / "wild").mkdir()
    wilder(bars, first=start, times=10).to_parquet(folder / "wild" / "BTC_1d.parquet")
    return folder


def settings(place: Path, **more: object) -> DriftSettings:
    """A check of the quiet bars."""
    values = {"bundle": place / "small_BTC_1d", "bars": [str(place / "BTC_1d.parquet")], "now": MOMENT}
    return DriftSettings.from_values(values | {"output_path": place / "drift"} | more)


def test_the_sample_market_goes_on_after_the_training(place):
    old, new = small_bars(), pd.read_parquet(place / "BTC_1d.parquet")
    pd.testing.assert_frame_equal(old, new.head(len(old)), check_freq=False)


def test_a_quiet_market_gives_exit_code_0_and_its_files(place):
    words = ["--bundle", "small_BTC_1d", "--bars", "BTC_1d.parquet", "--now", MOMENT, "--no-report"]
    said = run_command(place, "drift", *words)
    assert said.startswith("No drift: over the last ") and "drift/small_BTC_1d.json" in said
    found = read_json(place / "drift" / "small_BTC_1d.json")
    assert found["sentence"] in said and found["fired"] is False and found["false_alarm_rate"] == RATE
    assert found["bundle"] == load_bundle(place / "small_BTC_1d").digest and found["at"].startswith(MOMENT)
    assert {*found["features"]} == {*FEATURES} and found["window"]["last"].startswith(MOMENT)
    rsi = found["features"]["rsi"]
    assert 0 < rsi["psi"] < rsi["threshold"] and 0 < rsi["ks"] < rsi["ks_threshold"] and rsi["fired"] is False
    assert {"chi_square", "chi_square_threshold"} <= {*found["features"]["hour_sine"]}  # one value, a category
    assert found["data"]["age_bars"] == 0 and not found["data"]["fired"] and found["performance"]["rmse"]["recent"] > 0
    families = text_string_to_metric_families((place / "drift" / "small_BTC_1d.prom").read_text())
    samples = {(s.name, s.labels.get("column")): s.value for family in families for s in family.samples}
    assert samples["kallos_drift_psi", "rsi"] == pytest.approx(rsi["psi"]) and samples["kallos_drift_fired", None] == 0


@pytest.mark.slow
def test_a_changed_market_gives_exit_code_5_and_a_page(place):
    words = ["--bundle", "small_BTC_1d", "--bars", "wild", "--now", MOMENT, "--output-path", "seen"]
    process = start_command(place, "drift", *words)
    said, problem = process.communicate(timeout=240)
    assert process.returncode == 5, said + problem
    assert said.startswith("Drift over the last ") and "something has drifted" in problem
    found = read_json(place / "seen" / "small_BTC_1d.json")
    assert found["fired"] and found["performance"]["rmse"]["fired"] and found["features"]["log_return_7"]["fired"]
    page = nbformat.read(place / "seen" / "small_BTC_1d.ipynb", 4)
    assert not [one for cell in page.cells for one in cell.get("outputs", []) if one.output_type == "error"]
    html = (place / "seen" / "small_BTC_1d.html").read_text()
    assert found["sentence"].split(":")[0] in html and html.count("Plotly.newPlot") >= 8


def test_stored_forecasts_give_the_same_answer(place):
    run_command(place, "predict", "--bundle", "small_BTC_1d", "--bars", "BTC_1d.parquet", "--now", MOMENT)
    asked = run_drift(settings(place)).record
    stored = run_drift(settings(place, forecasts=place / "forecasts")).record
    for kind in ("forecasts", "performance", "features"):
        assert json.dumps(stored[kind]) == json.dumps(asked[kind])


def test_bars_of_the_database_give_the_same_answer(place, tmp_path):
    url = f"sqlite:///{tmp_path}/kallos.db"
    engine = connect(url)
    write_bars(engine, pd.read_parquet(place / "BTC_1d.parquet"), asset_id="BTC", timeframe="1d", venue="sample")
    engine.dispose()
    there = run_drift(settings(place, bars=[], output_path=tmp_path), db=url).record
    assert there["features"] == run_drift(settings(place)).record["features"]


def test_the_same_check_twice_writes_the_same_bytes(place, tmp_path):
    contents = []
    for name in ("one", "two"):
        run = run_drift(settings(place, output_path=tmp_path / name))
        contents.append([path.read_bytes() for path in run.files.values()])
    assert contents[0] == contents[1] and len(contents[0]) == 2


def test_a_feed_that_stands_still_fires(place):
    run = run_drift(settings(place, now="2024-06-20"))
    assert run.drift.fired and "the newest bar of BTC closed 19.0 bars ago" in run.drift.sentence
    assert not run.drift.features["fired"].any() and run.record["data"]["fired"]


def test_holes_in_the_feed_fire_and_forecasts_that_are_missing_are_counted(place, tmp_path):
    bars = pd.read_parquet(place / "BTC_1d.parquet")
    bars.drop(index=bars.index[-12:-6]).to_parquet(tmp_path / "BTC_1d.parquet")
    run = run_drift(settings(place, bars=[str(tmp_path / "BTC_1d.parquet")]))
    assert run.record["data"]["missing"] > 0.1 and "of the bars of BTC are missing" in run.drift.sentence
    assert any("have no forecast (" in note for note in run.record["notes"])


def test_a_bundle_that_was_not_evaluated_has_no_performance_to_compare_with(place, tmp_path):
    manifest, files = bundle_contents()
    with np.load(io.BytesIO(files["reference.npz"])) as arrays:
        kept = {name: arrays[name] for name in arrays.files} | {"forecasts_are": np.array("in sample")}
    held = io.BytesIO()
    np.savez_compressed(held, **kept)
    path = tmp_path / "small"
    path.mkdir()
    for name, content in seal(manifest, files | {"reference.npz": held.getvalue()}).items():
        (path / name).write_bytes(content)
    found = run_drift(settings(place, bundle=path, output_path=tmp_path)).record
    assert not found["performance"] and not found["forecasts"]
    assert any("evaluate the model and bundle it again" in note for note in found["notes"])


# What is refused


REFUSED = {
    "rows that the model has seen": ({"now": "2024-01-10"}, "20 rows that the model has not seen"),
    "a moment before all bars": ({"now": "2001-01-01"}, "no bar of BTC had closed"),
    "forecasts of nobody": ({"forecasts": "nowhere.parquet"}, "there is no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_checked_is_refused(place, case):
    more, message = REFUSED[case]
    with pytest.raises(KallosError, match=message) as caught:
        run_drift(settings(place, **more))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundle", "nowhere"], "cannot read the bundle"),
        (["--bundle", "small_BTC_1d", "--bars", "BTC_1d.parquet", "--rows", 5], "rows: Input should be greater than"),
        (["--bundle", "small_BTC_1d", "--bars", "BTC_1d.parquet", "--rate", 0.9], "rate: Input should be less than"),
        (["--bundle", "small_BTC_1d", "--bars", "x.csv", "--db-url", "sqlite:///y"], "files or from a database"),
    ],
)
def test_wrong_words_leave_with_code_2(place, words, message):
    assert_refused(place, "drift", *words, "--no-report", message=message)


def test_a_changed_byte_of_the_reference_is_refused(place, tmp_path):
    manifest, files = bundle_contents()
    sealed = seal(manifest, files)
    path = tmp_path / "small"
    path.mkdir()
    for name, content in sealed.items():
        (path / name).write_bytes(content[:-1] + b"x" if name == "reference.npz" else content)
    with pytest.raises(KallosError, match="is not the file that the manifest vouches for"):
        run_drift(settings(place, bundle=path))


def test_nothing_that_a_service_must_not_load_is_loaded():
    code = "import sys, kallos.inference.drift, kallos.inference.drift_files; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "darts", "scipy", "sklearn", "numba", "sqlalchemy", "pandera", "plotly"}
    assert not heavy & {name.split(".")[0] for name in found}


def test_a_frozen_feature_fires_and_a_constant_one_does_not():
    rng = np.random.default_rng(0)
    rows = np.c_[rng.normal(size=1000), np.full(1000, 3.0)]
    same = column_drift(rows[:900], rows[-40:], names=["a", "b"], rate=0.05)
    assert not same["fired"].any()
    stuck = np.c_[np.full(40, 0.1), np.full(40, 4.0)]
    assert column_drift(rows[:900], stuck, names=["a", "b"], rate=0.05)["fired"].all()


def test_measuring_changes_nothing_that_was_given():
    check = quiet_check(1)
    again = quiet_check(1)
    pd.testing.assert_frame_equal(check.features, again.features)
    assert check.sentence == again.sentence and measure_drift.__module__ == "kallos.inference.drift"
