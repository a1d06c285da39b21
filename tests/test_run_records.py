"""Finished runs: found, compared, pruned and repeated; what differs is named, and what must not be touched stays."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kallos import runs_commands
from kallos.core.errors import ArtifactError, ConfigError
from kallos.core.runs import read_json, write_json
from kallos.data.refresh import refresh_features
from kallos.data.run_index import list_runs, record_run
from kallos.data.store import read_bars, write_bars, write_features
from kallos.data.tables import connect
from kallos.workflow.data_fingerprints import changed_tables
from kallos.workflow.pruning import prune_runs
from kallos.workflow.reproduction import reproduce
from kallos.workflow.run_comparison import compare_runs
from kallos.workflow.run_differences import compare_folders
from kallos.workflow.run_records import LOCK, find_runs, open_run
from tests.pipeline_runs import SETTINGS, end_run, leave_run, vouch_again
from tests.study_runs import write_market


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a market's database, a run of a linear model and one of a network."""
    folder = tmp_path_factory.mktemp("made")
    url = f"sqlite:///{folder / 'kallos.db'}"
    write_market(url)
    for name in ("linear", "gru"):
        settings = SETTINGS | {"model": {"name": name}, "paths": {"reports": str(folder / "reports")}}
        leave_run(url, settings, f"2024-{name}")
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def url_of(place: Path) -> str:
    return f"sqlite:///{place / 'kallos.db'}"


@pytest.fixture
def twins(place) -> tuple[Path, Path]:
    """The folder of the linear model's run, and a second one of the same numbers."""
    first = place / "reports" / "2024-linear"
    return first, Path(shutil.copytree(first, place / "reports" / "2024-twin"))


def differences(twins, *, file: str) -> list[str]:
    """The places that differ after the second run's file was changed, all of which must be in that file."""
    vouch_again(twins[1])
    found = compare_folders(*twins, parts=["1d"])
    assert {(one.part, one.file) for one in found} == {("1d", file)}
    return [one.text() for one in found]


# Repeating a run


@pytest.mark.parametrize("name", ["linear", "gru"])
def test_a_run_that_is_repeated_gives_the_same_numbers(place, name):
    run = open_run(place / "reports", f"2024-{name}")
    found = reproduce(run, db=url_of(place), run_again=lambda s, run_id: leave_run(url_of(place), s, run_id))
    assert found.same and not found.notes, found
    assert found.again == place / "reports" / f"2024-{name}_again"
    assert found.sentence == f"Yes: 2024-{name} gives the same numbers again, to the last bit, in 1d."
    again = lambda s, run_id: leave_run(url_of(place), s | {"seed": 4}, run_id)  # noqa: E731
    found = reproduce(run, db=url_of(place), run_again=again)
    files = {one.file for one in found.differences}
    expected = {"metrics_test.json", "backtest_metrics.json", "preds_test.parquet", "trades.csv", "equity.csv"}
    assert not found.same and files == expected | ({"model.pt.ckpt"} if name == "gru" else set())
    assert found.again.name == f"2024-{name}_again2"


def test_data_that_one_bar_changed_are_named_by_table_and_nothing_is_run(place):
    url, key = url_of(place), {"asset_id": "BTC", "timeframe": "1d"}
    run, engine = open_run(place / "reports", "2024-linear"), connect(url)
    bars = read_bars(engine, **key)
    changed = bars.assign(volume=bars["volume"].where(bars.index != 900, bars["volume"] * 2))
    write_bars(engine, changed, **key)
    found = reproduce(run, db=url, run_again=lambda *asked: pytest.fail("it was run"))
    assert not found.same and found.again is None
    assert found.tables[0] == "1d bars: the same 1461 times, but other values"
    assert found.tables[1].startswith("1d features: the features of BTC 1d are older than its bars")
    refresh_features(engine, **key, full=True)
    assert changed_tables(run.manifest, url)[1] == "1d features: the same 1161 times, but other values"
    engine.dispose()


def test_features_alone_and_more_bars_and_no_bars_are_told_apart(place):
    url, key = url_of(place), {"asset_id": "BTC", "timeframe": "1d"}
    manifest, engine = open_run(place / "reports", "2024-linear").manifest, connect(url)
    from kallos.data.store import read_features

    features = read_features(engine, **key)
    write_features(engine, features.assign(rsi=features["rsi"] + 1e-9), **key)
    assert changed_tables(manifest, url) == [f"1d features: the same {len(features)} times, but other values"]
    write_features(engine, features.assign(mfi=0.0), **key)  # a feature that the settings do not use
    assert changed_tables(manifest, url) == []
    bars = read_bars(engine, **key)
    write_bars(engine, bars.tail(1).assign(ts=bars["ts"].iloc[-1] + pd.Timedelta(days=1)), **key)
    assert changed_tables(manifest, url)[0] == "1d bars: 1462 rows, the run read 1461"
    write_bars(engine, bars, asset_id="ETH", timeframe="1d")
    with_eth = {"data": {"1d": {"bars": manifest["data"]["1d"]["bars"] | {"asset_id": "XRP"}}}}
    assert "1d bars: no bars of 'XRP' in '1d'" in changed_tables(with_eth, url)[0]
    engine.dispose()


def test_a_part_that_fails_now_is_a_difference_and_one_that_failed_then_is_a_note(place):
    run = open_run(place / "reports", "2024-linear")

    def fails(settings: dict, run_id: str) -> Path:
        folder = place / "reports" / run_id
        return end_run(folder, settings, status="failed", parts={"1d": {"status": "failed"}})

    found = reproduce(run, db=url_of(place), run_again=fails)
    assert [one.text() for one in found.differences] == ["1d/summary.json, status: 'done' before, 'failed' now"]
    run.parts["4h"] = {"status": "failed"}
    found = reproduce(run, db=url_of(place), run_again=lambda s, run_id: leave_run(url_of(place), s, run_id))
    assert found.same and found.notes == ["4h: failed the first time, not compared"]


# Each kind of difference


def test_two_folders_of_the_same_numbers_do_not_differ(twins):
    write_json(twins[1] / "1d" / "optuna_best.json", read_json(twins[1] / "1d" / "optuna_best.json") | {"seconds": 9.9})
    vouch_again(twins[1])
    assert compare_folders(*twins, parts=["1d"]) == []


def test_a_figure(twins):
    file = twins[1] / "1d" / "metrics_test.json"
    write_json(file, read_json(file) | {"rmse": np.nextafter(1.03, 2)})
    assert differences(twins, file="metrics_test.json") == [
        "1d/metrics_test.json, rmse: 1.03 before, 1.0300000000000002 now"
    ]


def test_one_bit_of_a_forecast(twins):
    file = twins[1] / "1d" / "preds_test.parquet"
    rows = pd.read_parquet(file)
    rows.loc[17, "y_pred"] = np.nextafter(rows.loc[17, "y_pred"], 9)
    rows.to_parquet(file)
    (said,) = differences(twins, file="preds_test.parquet")
    assert said.startswith("1d/preds_test.parquet, row 17, y_pred (1 of 40 rows differ, y_pred by up to ")


def test_a_trade_that_is_missing_and_an_account_that_ends_otherwise(twins):
    trades, equity = (twins[1] / "1d" / name for name in ("trades.csv", "equity.csv"))
    kept = trades.read_text()
    trades.write_text("\n".join(kept.splitlines()[:-1]) + "\n")
    assert differences(twins, file="trades.csv") == ["1d/trades.csv, number of rows: 5 before, 4 now"]
    trades.write_text(kept)
    equity.write_text(equity.read_text().replace(",linear,", ",gru,", 1))
    (said,) = differences(twins, file="equity.csv")
    assert said == "1d/equity.csv, row 0, model (1 of 40 rows differ): 'linear' before, 'gru' now"


def test_a_weight_of_a_linear_model_and_a_number_of_a_scaler(twins):
    model, scaler = twins[1] / "1d" / "model.pt", twins[1] / "1d" / "scaler.pkl"
    kept, fitted = model.read_bytes(), pickle.loads(model.read_bytes())
    inner = getattr(fitted.model, "estimator", None) or fitted.model
    inner.coef_ = inner.coef_ * 2
    model.write_bytes(pickle.dumps(fitted))
    assert any("coef_" in said for said in differences(twins, file="model.pt"))
    model.write_bytes(kept)
    scaling = pickle.loads(scaler.read_bytes())
    scaling.target_scaler.mean_[0] += 1e-15
    scaler.write_bytes(pickle.dumps(scaling))
    assert any("mean_[0] (1 of 1 differ" in said for said in differences(twins, file="scaler.pkl"))


def test_a_weight_of_a_network(place):
    first = place / "reports" / "2024-gru"
    second = Path(shutil.copytree(first, place / "reports" / "2024-other"))
    file = second / "1d" / "model.pt.ckpt"
    saved = torch.load(file, weights_only=False)
    saved["state_dict"]["rnn.bias_ih_l0"][3] += 0.5
    torch.save(saved, file)
    (said,) = differences((first, second), file="model.pt.ckpt")
    assert said.startswith("1d/model.pt.ckpt, rnn.bias_ih_l0[3] (1 of 12 differ, by up to 0.5)")


def test_a_file_that_is_not_as_its_run_left_it_is_never_opened(twins):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle that nobody vouches for was opened",)

    (twins[1] / "1d" / "scaler.pkl").write_bytes(pickle.dumps(Bomb()))
    (twins[0] / "1d" / "trades.csv").unlink()
    found = {one.file: (one.expected, one.found) for one in compare_folders(*twins, parts=["1d"])}
    assert found == {"scaler.pkl": ("as made", "changed since the run"), "trades.csv": ("missing", "as made")}


# Finding and comparing


def test_a_run_is_found_by_the_beginning_of_its_id(place):
    reports = place / "reports"
    assert open_run(reports, "2024-l").run_id == "2024-linear"
    for wrong, message in {"2024": "2 runs begin so", "2025": "There are 2024-linear, 2024-gru"}.items():
        with pytest.raises(ArtifactError, match=message):
            open_run(reports, wrong)
    (reports / "2024-gru" / "manifest.json").write_text('{"schema": 1, "kind": "train"}')
    with pytest.raises(ArtifactError, match=r"manifest.json of 2024-gru is of another make"):
        open_run(reports, "2024-gru")
    (reports / "2024-gru" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest.json; got '2024-gru, done'"):
        open_run(reports, "2024-gru")
    (reports / "2024-gru" / "summary.json").write_text("{")
    assert [run.run_id for run in find_runs(reports)] == ["2024-linear"]


def test_runs_side_by_side(place):
    settings = open_run(place / "reports", "2024-linear").manifest["settings"]
    for number, skill in enumerate((0.1, 0.3, 0.2)):
        figures = {"skill": skill, "rmse": 2 - skill, "n": 10 + number}
        end_run(place / "reports" / f"other{number}", settings | {"hpo": {"trials": number}}, skill=figures)
    runs = [open_run(place / "reports", f"other{number}") for number in range(3)]
    found = compare_runs(runs)
    assert found.settings.to_dict("index") == {"hpo.trials": {"other0": "0", "other1": "1", "other2": "2"}}
    assert found.figures["better"].to_dict() == {("1d", "n"): "", ("1d", "rmse"): "other1", ("1d", "skill"): "other1"}
    with pytest.raises(ConfigError, match="only runs that are not the same"):
        compare_runs([runs[0], runs[0]])


# Pruning


_HOLD = """import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)"""


def test_what_runs_or_is_shown_or_is_no_run_is_never_pruned(place):
    reports, engine = place / "reports", connect(url_of(place))
    shutil.copytree(reports / "2024-gru", reports / "showcase")
    (reports / "BTC").mkdir()
    write_json(reports / "BTC" / "summary.json", {"total": 3})
    elsewhere = Path(shutil.copytree(reports / "2024-gru", place / "elsewhere"))
    (reports / "link").symlink_to(elsewhere)
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, reports / "2024-gru" / LOCK], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert open_run(reports, "2024-gru").status == "running"
    with pytest.raises(ArtifactError, match="still at work; got '2024-gru'"):
        reproduce(open_run(reports, "2024-gru"), run_again=lambda *asked: pytest.fail("it was run"))
    found = prune_runs(reports, keep=0, dry_run=False, engine=engine)
    assert list(found.runs) == ["2024-linear"] and set(found.passed_over) == {"2024-gru", "showcase"}
    assert {path.name for path in reports.iterdir()} == {"2024-gru", "showcase", "BTC", "link"}
    assert (elsewhere / "manifest.json").exists()
    holder.kill()
    holder.wait()
    write_json(reports / "2024-gru" / "summary.json", {"run_id": "2024-gru", "status": "running", "parts": {}})
    assert find_runs(reports)[0].status in ("interrupted", "done")
    assert list(prune_runs(reports, failed=True, dry_run=False).runs) == ["2024-gru"]
    engine.dispose()


def test_age_number_and_failure_must_all_be_met_and_rows_go_too(db_url, tmp_path):
    engine, reports = connect(db_url), tmp_path / "reports"
    now = pd.Timestamp.now("UTC")
    for days in (1, 10, 40, 50):
        status, at = "failed" if days == 50 else "done", (now - pd.Timedelta(days=days)).isoformat()
        end_run(reports / f"r{days}", SETTINGS, status=status, started_at=at)
        record_run(engine, {"run_id": f"r{days}", "folder": reports / f"r{days}", "created_at": at, "status": status})
    record_run(engine, {"run_id": "lost", "folder": reports / "lost", "created_at": now})
    record_run(engine, {"run_id": "afar", "folder": tmp_path / "afar" / "r9", "created_at": now})
    names = lambda **which: list(prune_runs(reports, **which).runs)  # noqa: E731
    assert names(keep=2) == ["r40", "r50"]
    assert names(older_than_days=5) == ["r10", "r40", "r50"]
    assert names(keep=3, older_than_days=5) == ["r50"] == names(failed=True)
    assert names(keep=4, failed=True) == [] and len(find_runs(reports)) == 4
    size = sum(path.stat().st_size for path in (reports / "r50").iterdir())
    found = prune_runs(reports, failed=True, dry_run=False, engine=engine)
    assert (found.bytes, found.gone) == (size, ["lost"])
    assert set(list_runs(engine)["run_id"]) == {"r1", "r10", "r40", "afar"}
    assert not [path for path in reports.iterdir() if path.name.startswith(".")]
    engine.dispose()


# The command line


def kallos_run(place: Path, *words: object, code: int = 0) -> str:
    """What the command printed, in a process of its own; it must leave with the code."""
    command = [str(Path(sys.executable).with_name("kallos-run")), *map(str, words)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_list_compare_and_prune_as_they_are_typed(place):
    engine = connect(url_of(place))
    record_run(engine, {"run_id": "lost", "folder": place / "reports/lost", "created_at": "2024-01-01"})
    here = {"reports": place / "reports", "db_url": url_of(place)}
    typed = ("--reports", here["reports"], "--db-url", here["db_url"])
    said = kallos_run(place, "runs", "list", *typed)
    assert said.splitlines()[1].split() == ["run_id", "status", "began", "seconds", "skill"] and "│" not in said
    assert "running, its folder is gone" in said
    listed = json.loads(runs_commands.runs_list(here).as_json())
    assert [one["run_id"] for one in listed] == ["2024-linear", "2024-gru", "lost"]
    compared = runs_commands.runs_compare({"reports": here["reports"], "run_ids": ["2024-l", "2024-g"]})
    assert compared.text().splitlines()[2].split() == ["model.name", "linear", "gru"]
    assert "--failed" in kallos_run(place, "runs", "prune", *typed, code=2)
    pruned = runs_commands.runs_prune(here | {"keep": 0, "yes": True, "dry_run": True})
    assert "2 runs would be removed" in pruned.text() and len(find_runs(here["reports"])) == 2
    said = kallos_run(place, "runs", "prune", "--keep", 1, "--yes", *typed)
    assert "2024-gru: removed" in said and "lost: its folder is gone; its row in the index removed" in said
    assert [run.run_id for run in find_runs(here["reports"])] == ["2024-linear"]
    engine.dispose()


def test_a_table_on_a_terminal_has_a_frame(place):
    found = runs_commands.runs_list({"reports": place / "reports", "db_url": url_of(place)})
    assert "┃" in found.text(columns=100) and "┃" not in found.text()


def test_the_exit_code_of_a_reproduction_says_whether_it_is_the_same(place, monkeypatch):
    given = {"run_id": "2024-linear", "reports": place / "reports", "db_url": url_of(place)}
    found = {}
    for seed in (3, 4):
        again = lambda s, run_id, seed=seed: leave_run(url_of(place), s | {"seed": seed}, run_id)  # noqa: E731
        monkeypatch.setattr(runs_commands, "_run_again", lambda first, db, again=again: again)
        found[seed] = runs_commands.reproduce(dict(given))
    assert found[3].failure is None and "Yes: 2024-linear gives the same numbers again" in found[3].text()
    assert isinstance(found[4].failure, runs_commands.NotReproduced) and found[4].failure.exit_code == 5
    assert "1d/backtest_metrics.json, sharpe: 3.0 before, 4.0 now" in found[4].text()
    assert 4.0 in [one["found"] for one in json.loads(found[4].as_json())["differences"]]
    assert "no such run" in kallos_run(place, "reproduce", "2019", "--reports", place / "reports", code=2)
