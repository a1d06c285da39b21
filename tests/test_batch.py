"""Forecasts of long histories: the same rows in chunks as at once, from files as from a database, new after old."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference.bar_arrays import arrays_of
from kallos.inference.batch import predict_chunks, write_forecasts
from kallos.inference.bundle import Bundle, golden_example, load_bundle
from kallos.inference.bundle_files import BundleFiles, seal, zip_bytes
from kallos.inference.onnx_export import merge_onnx
from kallos.inference.packed_models import read_packed_model
from kallos.inference.recipes import describe_feature
from tests.bundles import bundle_contents, small_bars

START = "import sys; from kallos.main import main; sys.argv[0] = 'kallos-run'; main()"
SCALE = 0.01  # of the target
LONGER = {"1m": "rsi_3m", "1h": "rsi_2h", "4h": "rsi_8h"}  # a feature that looks back further than all others


def _part(place: int, asset_id: str, timeframe: str, seed: int) -> tuple[dict, bytes, list, dict]:
    """The member, graph, features and scaler of one asset, under its label."""
    manifest, files = bundle_contents(seed=seed + place, asset_id=asset_id, timeframe=timeframe)
    (member,), (numbers,) = manifest["members"], json.loads(files["scaler.json"]).values()
    names = [LONGER[timeframe] if name == "log_return_7" else name for name in member["features"]]
    numbers[LONGER[timeframe]] = numbers["rsi"]
    member |= {"label": f"small@{asset_id}", "features": names, "output": f"forecast_{place}"}
    member |= {"inputs": [f"target_{place}", f"features_{place}"]}
    return member, files["model.onnx"], [describe_feature(name).as_json() for name in names], numbers


def bundle_of(
    folder: Path, name: str = "small_BTC_1h", *, assets: tuple = ("BTC",), timeframe: str = "1h", seed: int = 0
) -> Path:
    """A zipped bundle of a small model an asset, with their mean if there are several."""
    members, graphs, recipes, numbers = zip(*(_part(i, a, timeframe, seed) for i, a in enumerate(assets)), strict=True)
    manifest, files = bundle_contents(asset_id=assets[0], timeframe=timeframe, name=name)
    labels, k = [member["label"] for member in members], len(assets)
    rule = {"models": labels, "rule": "weights", "weights": [1 / k] * k, "intercept": 0.0, "n_rows": 0}
    manifest |= {"members": [*members], "combination": rule if k > 1 else None, "assets": [*assets]}
    files["model.onnx"] = merge_onnx([*graphs]) if k > 1 else graphs[0]
    files["features.json"] = json.dumps(dict(zip(labels, recipes, strict=True))).encode()
    files["scaler.json"] = json.dumps(dict(zip(labels, numbers, strict=True))).encode()
    packed, bars = read_packed_model(BundleFiles(manifest, files, "")), small_bars(timeframe=timeframe)
    arrays = {asset: arrays_of(bars, columns=packed.columns_of[asset], what="bars") for asset in assets}
    files["golden.json"] = json.dumps(golden_example(packed, arrays, tolerance=1e-6)).encode()
    path = folder / f"{name}_bundle.zip"
    path.write_bytes(zip_bytes(seal(manifest | {"bars_needed": packed.bars_needed}, files)))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def bundle(packed: Path) -> Bundle:
    return load_bundle(packed)


@pytest.fixture(scope="module")
def market() -> pd.DataFrame:
    """Five months of hours."""
    return sample_bars(timeframe="1h", start="2023-01-01", end="2023-05-31")


def eth_market() -> pd.DataFrame:
    return sample_bars(timeframe="1h", start="2023-01-01", end="2023-05-31", seed=5)


def with_holes(bars: pd.DataFrame, gaps: list[tuple[int, int]], filled: list[tuple[int, int]]) -> pd.DataFrame:
    """The bars without some, and with some that nobody printed; places are in thousandths."""
    n, kept, marked = len(bars), np.ones(len(bars), bool), np.zeros(len(bars), bool)
    for at, length in gaps:
        kept[at * n // 1000 :][:length] = False
    for at, length in filled:
        marked[at * n // 1000 :][:length] = True
    return bars.assign(is_filled=marked)[kept].reset_index(drop=True)


def feed_of(bars: pd.DataFrame, rows: int):
    return lambda after, overlap: (bars.iloc[start : start + rows] for start in range(0, len(bars), rows))


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal in every word and time; numbers to a millionth of the target's standard deviation."""
    numbers = expected.select_dtypes("float64").columns
    pd.testing.assert_frame_equal(found.drop(columns=numbers), expected.drop(columns=numbers))
    np.testing.assert_allclose(found[numbers], expected[numbers], rtol=0, atol=1e-6 * SCALE)


# The same rows, however they are asked for

PLACES = st.lists(st.tuples(st.integers(0, 999), st.integers(1, 30)), max_size=3)


@settings(max_examples=10, deadline=None)
@given(
    gaps=PLACES,
    filled=PLACES,
    rows=st.sampled_from([11, 60, 400, 5000]),
    n=st.integers(900, 1800),
    jobs=st.integers(1, 3),
)
def test_chunks_give_the_rows_of_one_call(
    bundle: Bundle, market: pd.DataFrame, gaps: list, filled: list, rows: int, n: int, jobs: int
):
    bars = with_holes(market[:n], gaps, filled)
    expected = bundle.predict(bars, since=bars["ts"].iloc[0])
    found = pd.concat(predict_chunks(bundle, {"BTC": feed_of(bars, rows)}, n_jobs=jobs), ignore_index=True)
    assert_same(found, expected)
    assert (found["y_pred"].notna() == (found["status"] == "ok")).all()
    assert ((found["reason"] == "") == (found["status"] == "ok")).all()


def test_a_row_is_the_forecast_of_its_one_window(bundle: Bundle, market: pd.DataFrame):
    bars = with_holes(market, [(300, 2)], [(700, 3)])
    found = pd.concat(predict_chunks(bundle, {"BTC": feed_of(bars, 700)}), ignore_index=True)
    ends = np.random.default_rng(0).integers(1, len(bars) + 1, 200)
    arrays = arrays_of(bars, columns=bundle.columns, what="bars")
    answers = [bundle.forecast({name: column[:end] for name, column in arrays.items()}) for end in ends]
    alone = pd.DataFrame(answers)[["y_pred", "y_naive", "y_lower", "y_upper", "status", "reason"]]
    assert_same(found.iloc[ends - 1][[*alone]].reset_index(drop=True), alone)
    assert 50 < (alone["status"] == "ok").sum() < 200


@pytest.mark.parametrize("rows", [(100, 37), (5000, 800), (16, 5000)])
def test_several_assets_that_begin_and_end_at_other_times(tmp_path: Path, market: pd.DataFrame, rows: tuple):
    bundle = load_bundle(bundle_of(tmp_path, "mean_BTC_1h", assets=("BTC", "ETH")))
    other = eth_market()
    bars = {"BTC": with_holes(market, [(500, 5)], []), "ETH": with_holes(other[300:-200], [(600, 4)], [(800, 2)])}
    expected = bundle.predict(bars, since=bars["BTC"]["ts"].iloc[0])
    feeds = {asset: feed_of(table, size) for (asset, table), size in zip(bars.items(), rows, strict=True)}
    found = pd.concat(predict_chunks(bundle, feeds), ignore_index=True)
    assert_same(found, expected)
    assert {*found["status"]} == {"ok", "gap", "too_short"}


# The command


def predict(*words: object, folder: Path, code: int = 0) -> subprocess.CompletedProcess:
    """What `kallos-run predict` said in the folder."""
    command = [sys.executable, "-c", START, "predict", *map(str, words)]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == code, said.stdout + said.stderr
    return said


@pytest.fixture
def shop(tmp_path: Path, packed: Path, market: pd.DataFrame) -> Path:
    """A folder with bars of two assets, and a bundle for each."""
    (tmp_path / "bars").mkdir()
    market.to_parquet(tmp_path / "bars" / "BTC_1h.parquet")
    eth_market().to_csv(tmp_path / "bars" / "ETH_1h.csv", index=False)
    (tmp_path / "btc.zip").write_bytes(packed.read_bytes())
    bundle_of(tmp_path, "small_ETH_1h", assets=("ETH",), seed=1).rename(tmp_path / "eth.zip")
    return tmp_path


def test_files_and_database_give_the_same_forecasts(shop: Path, market: pd.DataFrame, db_url: str):
    bundles = ["--bundle", "btc.zip", "--bundle", "eth.zip"]
    said = predict(*bundles, "--bars", "bars", "--n-jobs", 2, folder=shop)
    assert not said.stderr, "a progress bar without a terminal"
    for part in ("small_BTC_1h", "small_ETH_1h", "too_short", "stale: the newest bar closed at 2023-06-01", "Next:"):
        assert part in said.stdout, said.stdout
    engine = connect(db_url)
    for asset, bars in (("BTC", market), ("ETH", eth_market())):
        write_bars(engine, bars, asset_id=asset, timeframe="1h")
    engine.dispose()
    predict(*bundles, "--db-url", db_url, "--output-path", "stored", folder=shop)
    for name in ("small_BTC_1h.parquet", "small_ETH_1h.parquet"):
        whole = pd.read_parquet(shop / "forecasts" / name)
        pd.testing.assert_frame_equal(whole, pd.read_parquet(shop / "stored" / name))
        assert len(whole) == len(market) and whole["ts"].is_monotonic_increasing and whole["ts"].is_unique
    expected = load_bundle(shop / "btc.zip").predict(market, since=market["ts"].iloc[0])
    assert_same(pd.read_parquet(shop / "forecasts" / "small_BTC_1h.parquet").drop(columns="bundle"), expected)
    assert len(pd.read_parquet(shop / "forecasts")) == 2 * len(market)


@pytest.mark.parametrize("stored", [False, True])
def test_runs_one_after_the_other_make_the_file_of_one_run(shop: Path, market: pd.DataFrame, stored: bool):
    ends = ["2023-02-20", "2023-02-20 01:00", "2023-03-15 12:30", "2023-06-01"]
    url = f"sqlite:///{shop / 'kallos.db'}"
    write_bars(connect(url), market, asset_id="BTC", timeframe="1h")
    source = ["--db-url", url] if stored else ["--bars", "bars/BTC_1h.parquet"]
    for end in ends:
        predict("--bundle", "btc.zip", *source, "--now", end, folder=shop)
        newest = pd.read_parquet(shop / "forecasts" / "small_BTC_1h.parquet")["ts"].iloc[-1]
        assert newest == pd.Timestamp(end, tz="UTC").floor("h")
    predict("--bundle", "btc.zip", *source, "--output-path", "whole", folder=shop)
    grown, whole = (pd.read_parquet(shop / name / "small_BTC_1h.parquet") for name in ("forecasts", "whole"))
    assert_same(grown, whole)
    before = (shop / "whole" / "small_BTC_1h.parquet").stat()
    said = predict("--bundle", "btc.zip", *source, "--output-path", "whole", folder=shop)
    assert "nothing new: the file goes to 2023-06-01 00:00 UTC" in said.stdout
    assert (shop / "whole" / "small_BTC_1h.parquet").stat() == before


def test_a_bundle_that_fails_does_not_stop_the_others(shop: Path, packed: Path):
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 1
    (shop / "bad.zip").write_bytes(data)
    bundle_of(shop, "small_SOL_1h", assets=("SOL",)).rename(shop / "sol.zip")
    bundle_of(shop, "small_BTC_4h", timeframe="4h").rename(shop / "four.zip")
    others = ["--bundle", "bad.zip", "--bundle", "sol.zip", "--bundle", "four.zip"]
    said = predict(*others, "--bundle", "eth.zip", "--bars", "bars", folder=shop, code=4)
    assert [path.name for path in (shop / "forecasts").iterdir()] == ["small_ETH_1h.parquet"]
    for reason in ("bad.zip: ", "no file says that it holds SOL at 1h", "no file says that it holds BTC at 4h"):
        assert reason in said.stderr, said.stderr
    assert "3 of 4 bundles gave no forecasts" in said.stderr
    predict(*others, "--bars", "bars", folder=shop, code=2)
    alone = predict("--bundle", "four.zip", "--bars", f"BTC={shop / 'bars' / 'BTC.parquet'}", folder=shop, code=2)
    assert "there is no such file" in alone.stderr
    (shop / "bars" / "BTC_1h.parquet").rename(shop / "BTC.parquet")
    wrong = predict("--bundle", "four.zip", "--bars", "BTC.parquet", folder=shop, code=2)
    assert "most bars are 1h apart, not 4h" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_what_a_call_must_not_be(shop: Path):
    btc = ["--bundle", "btc.zip"]
    for words, reason in {
        (*btc, *btc, "--bars", "bars"): "two bundles have one id",
        (*btc, "--bars", "bars", "--db-url", "sqlite:///x.db"): "bars come from files or from a database",
        (*btc, "--bars", "bars", "--level", "0.8"): "the bundle has no interval of this level",
        (*btc, "--bars", "nothing"): "there is no such file",
        (*btc, "--db-url", "sqlite:///none.db"): "there is no such database",
        (*btc, "--bars", "bars", "--now", "soon"): "this is no date",
    }.items():
        assert reason in predict(*words, folder=shop, code=2).stderr, words
    assert not (shop / "forecasts").exists()


def test_stale_bars_are_told_and_fail_where_asked(shop: Path):
    words = ["--bundle", "btc.zip", "--bars", "bars", "--now", "2023-06-01 03:00"]
    assert "3 bars of 1h before 2023-06-01 03:00 UTC" in predict(*words, folder=shop).stdout
    assert "stale:" not in predict(*words, "--stale-after", 3, folder=shop).stdout
    assert "too old" in predict(*words, "--fail-when-stale", folder=shop, code=5).stderr


def test_no_research_library_is_loaded(shop: Path):
    watched = "torch darts sklearn scipy sqlalchemy pandera optuna plotly numba"
    code = f"""{START.replace("main()", "")}
try:
    main()
finally:
    print("loaded:", *[name for name in "{watched}".split() if name in sys.modules])"""
    command = [sys.executable, "-c", code, "predict", "--bundle", "btc.zip", "--bars", "bars"]
    said = subprocess.run(command, cwd=shop, capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.splitlines()[-1] == "loaded:", said.stdout


# Crashes and size

ENDLESS = """import sys, time
import pandas as pd
from kallos.inference.batch import write_forecasts
from kallos.inference.bundle import load_bundle
from kallos.data.sample import sample_bars

bars = sample_bars(timeframe="1h", start="2023-06-01", end="2023-12-31")
def slowly(after, overlap):
    for start in range(0, len(bars), 50):
        time.sleep(0.05)
        yield bars[start : start + 50]
write_forecasts(load_bundle("btc.zip"), {"BTC": slowly}, folder="forecasts")
"""


def test_killed_in_the_middle_the_old_file_stands(shop: Path):
    predict("--bundle", "btc.zip", "--bars", "bars", folder=shop)
    path = shop / "forecasts" / "small_BTC_1h.parquet"
    before = path.read_bytes()
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=shop)
    deadline = time.monotonic() + 60
    while not (half := [*path.parent.glob(".small*.tmp")]) or half[0].stat().st_size < len(before) // 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == before and pq.ParquetFile(path).metadata.num_rows == 3624
    said = predict("--bundle", "btc.zip", "--bars", "bars", folder=shop)
    assert "nothing new" in said.stdout


PEAK = """import sys
from pathlib import Path
from kallos.inference.bar_feeds import file_chunks
from kallos.inference.bar_files import files_of, given_files
from kallos.inference.batch import write_forecasts
from kallos.inference.bundle import load_bundle

one = {"asset_id": "BTC", "timeframe": "1m"}
files = files_of(given_files([sys.argv[2]]), **one)
feed = lambda after, overlap: file_chunks(files, **one)
report = write_forecasts(load_bundle(sys.argv[1]), {"BTC": feed}, folder=sys.argv[3], n_jobs=2)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(report.rows, int(status["VmHWM"].split()[0]) / 1024)  # getrusage would tell that of the parent
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    path, found = bundle_of(tmp_path, timeframe="1m"), {}
    for years in (1, 3):
        folder = tmp_path / str(years)
        folder.mkdir()
        bars = sample_bars(timeframe="1m", start="2021-01-01", end=f"{2020 + years}-12-31")
        bars.to_parquet(folder / "BTC_1m.parquet", row_group_size=100_000)
        command = [sys.executable, "-c", PEAK, str(path), str(folder / "BTC_1m.parquet"), str(folder)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True).stdout.split()
        assert int(said[0]) == len(bars)
        found[years] = float(said[1])
    assert found[3] < found[1] + 80, found  # the rows that came to it are 80 MiB as bars alone, 200 MiB as forecasts


# What is in the file


def test_another_bundle_goes_on_after_the_old_one(shop: Path, market: pd.DataFrame):
    predict("--bundle", "btc.zip", "--bars", "bars", "--now", "2023-04-01", folder=shop)
    bundle_of(shop, seed=9).rename(shop / "newer.zip")
    said = predict("--bundle", "newer.zip", "--bars", "bars", folder=shop)
    assert "the bundle has changed: rows until 2023-04-01 00:00 UTC are those of bundle" in said.stdout
    rows = pd.read_parquet(shop / "forecasts" / "small_BTC_1h.parquet")
    made = {name: load_bundle(shop / f"{name}.zip") for name in ("btc", "newer")}
    assert rows.groupby("bundle", sort=False)["ts"].agg(["min", "max"]).index.tolist() == [
        b.digest for b in made.values()
    ]
    for one in made.values():
        mine = rows[rows["bundle"] == one.digest].reset_index(drop=True)
        expected = one.predict(market, since=mine["ts"].iloc[0] - pd.Timedelta("1h"))[: len(mine)]
        assert_same(mine.drop(columns="bundle"), expected)
    predict("--bundle", "newer.zip", "--bars", "bars", "--full", folder=shop)
    assert pd.read_parquet(shop / "forecasts" / "small_BTC_1h.parquet")["bundle"].unique().tolist() == [
        made["newer"].digest
    ]


def test_a_bar_that_has_not_closed_is_not_asked_about(shop: Path, bundle: Bundle, market: pd.DataFrame):
    now = market["ts"].iloc[-1] + pd.Timedelta("59min")
    report = write_forecasts(bundle, {"BTC": feed_of(market, 500)}, folder=shop / "x", now=now)
    assert report.last == market["ts"].iloc[-1] and report.rows == len(market) - 1
    assert report.in_sample == report.rows
