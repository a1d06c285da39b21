"""`kallos-run all`, as a person runs it: every file of the checklist, a part that fails, runs that are stopped."""

import json
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from urllib.request import urlopen

import pandas as pd
import psutil
import pytest

from kallos.core.runs import file_hash, read_json, verify_manifest
from kallos.core.schemas import FORECASTS, check_table
from kallos.data.run_index import list_runs
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, write_bars
from kallos.data.tables import connect
from kallos.inference.bundle import load_bundle
from kallos.workflow.deliverables import checklist
from kallos.workflow.part_runs import read_part
from kallos.workflow.parts import digest_of, is_current, parts_of, read_steps
from kallos.workflow.pipeline_settings import PipelineSettings
from kallos.workflow.settings import read_settings
from kallos.workflow.steps import Work, clear_step, do_step, inputs_of
from tests import pipelines as p

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PARTS = ("1d",)
PRICED = ("open", "high", "low", "close", "quote_asset_volume", "taker_buy_quote_asset_volume")


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A finished run of one part, shared by all test processes."""
    return p.finished_run(p.shared(tmp_path_factory) / "pipeline", PARTS)


@pytest.fixture(scope="session")
def both(tmp_path_factory) -> Path:
    """A finished run of both parts of the showcase."""
    return p.finished_run(p.shared(tmp_path_factory) / "both", ("12h", "1d"))


def test_a_run_leaves_all_that_it_owes(whole):
    found = p.summary(whole)
    assert (found["status"], found["exit_code"]) == ("done", 0)
    assert all(line["ok"] for line in found["checklist"])
    assert {path.name for path in whole.iterdir()} >= {"summary.json", "run.log", "manifest.json", "index.html", *PARTS}
    manifest = verify_manifest(whole / "manifest.json")
    assert {*manifest["data"]} == {*PARTS}
    assert {*manifest["data"]["1d"]} == {"bars", "features", "seen"}
    looks = read_json(whole.parent / "BTC_1d_test_looks.json")["looks"]
    assert len(looks) == 1 and len(looks[0]["strategies"]) == 1
    assert looks[0]["rows"] == len(pd.read_parquet(whole / "1d" / "preds_test.parquet"))
    runs = list_runs(connect(f"sqlite:///{whole.parents[1] / 'kallos.db'}"))
    assert runs.loc[runs["run_id"] == "whole", "status"].tolist() == ["done"]


def test_a_file_that_was_changed_or_lost_is_found_by_the_checklist(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "whole")
    (copy / "1d" / "trades.csv").write_text("a,b\n1,2\n")
    (copy / "1d" / "model.pt").write_bytes(b"x")
    (copy / "1d" / "equity_curve.png").unlink()
    notebook = json.loads((copy / "1d" / "tune.ipynb").read_text())
    cell = next(cell for cell in notebook["cells"] if cell.get("outputs"))
    cell["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}]
    (copy / "1d" / "tune.ipynb").write_text(json.dumps(notebook))
    card = copy / "1d" / "bundle" / "card.md"
    card.write_text(card.read_text() + " ")
    wrong = {line.path: line.why for line in checklist(read_part(copy, "1d")) if not line.ok}
    assert {*wrong} == {f"1d/{name}" for name in ("trades.csv", "model.pt", "equity_curve.png", "tune.ipynb", "bundle")}


def test_the_dashboard_finds_the_study_of_a_run_with_its_notes(whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(whole.parents[1], "dashboard", "whole/1d", "--port", port)
    try:
        studies, end = None, time.monotonic() + 60
        while studies is None and time.monotonic() < end:
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as page:
                studies = json.load(page)["study_summaries"]
            time.sleep(0.2)
        with urlopen(f"http://127.0.0.1:{port}/api/studies/{studies[0]['study_id']}", timeout=5) as page:
            found = json.load(page)
    finally:
        server.kill()
    assert studies[0]["study_name"] == "linear_BTC_1d_log_return_h1"
    assert "The best is number" in found["note"]["body"] and "| model | linear |" in found["note"]["body"]
    assert all("against the naive forecast" in trial["note"]["body"] for trial in found["trials"])


def market_goes_on(folder: Path) -> None:
    """Adds the bars of a further day to the folder's database."""
    engine, key = connect(f"sqlite:///{folder / 'kallos.db'}"), {"asset_id": "BTC", "timeframe": "12h"}
    last = read_bars(engine, **key).tail(2)
    write_bars(engine, last.assign(ts=last["ts"] + pd.Timedelta("1D")), **key)
    engine.dispose()


def test_a_finished_run_that_is_resumed_keeps_everything_though_the_market_goes_on(whole, tmp_path):
    folder = shutil.copytree(whole.parents[1], tmp_path / "copy")
    market_goes_on(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "reports" / "whole").rglob("model.pt")}
    assert len(before) == len(PARTS)
    p.kallos(folder, "all", "--resume", "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for part in PARTS:
        assert p.hashes(folder / "reports" / "whole" / part) == p.hashes(whole / part)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    """A finished run of one part that forecasts classes."""
    return p.labelled_run(p.shared(tmp_path_factory) / "labelled", "label")


def whole_and_judged_as_trained(run: Path, target: str) -> None:
    """The run leaves all that it owes, and the test rows judged the very model that it delivers."""
    found = p.summary(run)
    assert (found["status"], found["exit_code"]) == ("done", 0), found["parts"]
    assert all(line["ok"] for line in found["checklist"])
    assert {*verify_manifest(run / "manifest.json")["data"]["1d"]} == {"bars", "features", "seen", "tables"}
    forecasts = check_table(pd.read_parquet(run / "1d" / "preds_test.parquet"), FORECASTS, what="the forecasts")
    tables = read_json(run / "1d" / "steps" / "tables" / "manifest.json")["data"]
    assert (forecasts["target"] == target).all() and forecasts["ts"].min() >= pd.Timestamp(tables["test"]["first"])
    bundle = load_bundle(run / "1d" / "bundle")
    assert (bundle.target, bundle.horizon) == (target, 3)
    assert bundle.manifest["evaluation"]["same_model"] is True
    trained = read_json(next((run / "1d" / "steps").glob("*BTC_manifest.json")))
    assert trained["data"]["features"]["last"] <= str(tables["val"]["last"])
    said = {name: (run / "1d" / f"{name}.html").read_text(encoding="utf8") for name in ("train", "evaluate")}
    assert "No row is left here to judge this model by" in said["train"]
    assert "the training and the validation table" in said["evaluate"]


def test_a_run_of_classes_leaves_all_that_it_owes(labelled):
    whole_and_judged_as_trained(labelled, "label")
    figures, page = p.summary(labelled)["parts"]["1d"], (labelled / "index.html").read_text(encoding="utf8")
    assert 0 < figures["metrics_test"]["brier"] < 1.5 and "rmse" not in figures["metrics_test"]
    assert figures["backtest"]["trades"] > 0
    assert "Brier score, model" in page and "RMSE" not in page
    runs = list_runs(connect(f"sqlite:///{labelled.parents[1] / 'kallos.db'}"))
    assert runs.loc[runs["run_id"] == "label", "status"].tolist() == ["done"]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_network_forecasts_returns_of_labels_in_a_run(tmp_path):
    run = p.labelled_run(tmp_path, "return")
    whole_and_judged_as_trained(run, "return")
    assert "gives the same numbers again, to the last bit, in 1d" in p.kallos(tmp_path, "reproduce", "return")


def test_a_table_that_is_lost_is_made_again_and_nothing_else(labelled, tmp_path):
    folder = shutil.copytree(labelled.parents[1], tmp_path / "copy")
    part = read_part(folder / "reports" / "label", "1d")
    work, steps = Work(part, f"sqlite:///{folder / 'kallos.db'}"), read_steps(part)
    wanted = {name: digest_of(inputs_of(work, name)) for name in steps}
    assert all(is_current(part, steps[name], wanted[name]) for name in steps)
    (part.steps / "tables" / "val.parquet").unlink()
    (part.steps / "tables" / "test.parquet").write_bytes(b"another")
    assert not is_current(part, steps["data"], wanted["data"])
    do_step(work, "data")
    assert {name: digest_of(inputs_of(work, name)) for name in steps} == wanted
    for name in ("train", "val", "test"):
        table = f"steps/tables/{name}.parquet"
        assert file_hash(part.folder / table) == steps["data"]["outputs"][table]


def same_as_shown(run: Path, root: Path, part: str) -> None:
    """The part's numbers are those of the showcase, up to what another processor rounds otherwise."""
    was, now = (read_json(one / part / "metrics_test.json")["test"] for one in (root / "reports" / "showcase", run))
    assert was["n"] == now["n"]
    for name in ("rmse", "rmse_naive", "skill", "directional_accuracy"):
        assert now[name] == pytest.approx(was[name], rel=1e-3, abs=1e-4), (part, name)


def test_the_numbers_are_those_of_the_showcase(whole, root):
    same_as_shown(whole, root, "1d")


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_the_numbers_of_both_parts_are_those_of_the_showcase(both, root):
    for part in ("12h", "1d"):
        same_as_shown(both, root, part)


def test_the_showcase_is_small(root):
    listed = subprocess.run(
        ["git", "ls-files", "reports/showcase"], cwd=root, capture_output=True, text=True, check=True
    )
    assert 20 < len(files := listed.stdout.split()) < 100
    assert sum((root / file).stat().st_size for file in files) < 3e6


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that have something to do with the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) or process.cwd().startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start(folder: Path, *words: object) -> subprocess.Popen:
    """`kallos-run` in that folder, left to itself."""
    with (folder / "said.txt").open("a") as said:
        how = {"stdout": said, "stderr": said, "start_new_session": True, "env": p.environment(folder), "cwd": folder}
        return subprocess.Popen([p.KALLOS, *map(str, words)], **how)


def stopped_and_resumed(folder: Path, whole: Path, kept: str, *more: object, stops: int, seed: int) -> None:
    """Stops a run at random moments; of its two parts one fails, and the one that is kept ends as in the whole run."""
    rng, steps = random.Random(seed), p.summary(whole)["parts"][kept]["steps"].values()
    between, broken = sum(step["seconds"] for step in steps) / stops, p.OTHER[kept]
    wrong = ("--set", f"per_timeframe.{broken}.split.folds=500")  # more folds than there are rows for
    begin = ("--config", p.SHOWCASE, "--run-id", "stopped", *wrong, *more)
    run = p.with_market(folder) / "reports" / "stopped"
    words = begin
    for number in range(stops):
        process = start(folder, "all", *words)
        time.sleep(10 + rng.uniform(0, 1.2) * between)
        gently = number % 3 == 1
        process.send_signal(signal.SIGINT if gently else signal.SIGKILL)
        code = process.wait(timeout=120)
        assert code in ((3, 4) if gently else (4, -9)), (folder / "said.txt").read_text()
        words = ("--resume", "stopped") if (run / "manifest.json").exists() else begin
    said = p.kallos(folder, "all", *words, code=4)
    assert f"{broken} failed" in said
    found = p.summary(run)
    assert {name: part["status"] for name, part in found["parts"].items()} == {broken: "failed", kept: "done"}
    assert found["parts"][broken]["error"]["step"] == "preflight"
    assert "500 folds" in found["parts"][broken]["error"]["message"]
    assert all(line["ok"] for line in found["checklist"] if line["path"].startswith(f"{kept}/"))
    assert p.hashes(run / kept) == p.hashes(whole / kept)


def test_a_killed_run_ends_as_if_it_never_had_been_and_its_failed_part_leaves_the_other_whole(whole, tmp_path):
    stopped_and_resumed(tmp_path / "killed", whole, "1d", stops=2, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_run_that_was_killed_ten_times_ends_as_if_it_never_had_been(whole, tmp_path):
    stopped_and_resumed(tmp_path / "killed", whole, "1d", stops=10, seed=2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_network_that_two_workers_tune_is_killed_ten_times(both, tmp_path):
    stopped_and_resumed(tmp_path / "killed", both, "12h", "--workers-n-jobs", 2, stops=10, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_run_can_be_reproduced_until_a_bar_changes(both, tmp_path):
    folder = shutil.copytree(both.parents[1], tmp_path / "copy")
    with closing(sqlite3.connect(folder / "kallos.db")) as database:
        last = database.execute("SELECT MAX(ts) FROM bars WHERE timeframe = '12h'").fetchone()  # that the run has seen
    market_goes_on(folder)
    assert "gives the same numbers again, to the last bit, in 12h, 1d" in p.kallos(folder, "reproduce", "whole")
    with closing(sqlite3.connect(folder / "kallos.db")) as database, database:
        change = "UPDATE bars SET volume = volume * 1.01 WHERE timeframe = '12h' AND ts = ?"
        assert database.execute(change, last).rowcount == 1
    said = p.kallos(folder, "reproduce", "whole", code=5)
    assert "12h bars" in said
    assert "1d bars" not in said


def test_nothing_that_a_killed_run_began_outlives_it(tmp_path):
    folder = p.with_market(tmp_path / "killed")
    process = start(folder, "all", "--config", p.SHOWCASE, "--run-id", "killed")
    tune = folder / "reports" / "killed" / "12h" / "steps" / "state.json"
    end = time.monotonic() + 120
    while "tune" not in (read_json(tune)["steps"] if tune.exists() else {}) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(6)
    alive = [one for one in processes_of(folder) if one.pid != process.pid]
    assert alive
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(alive, timeout=30)
    assert not left, [one.cmdline() for one in left]


def with_noise(whole: Path, folder: Path) -> str:
    """The URL of the run's database with every bar after the run's end date changed."""
    folder.mkdir()
    shutil.copy(whole.parents[1] / "kallos.db", folder)
    end = pd.Timestamp(read_json(whole / "1d" / "steps" / "data.json")["end_date"])
    factor = "(1 + 0.1 * ((ts / 43200000 * 7919) % 100) / 100.0)"  # another one for each bar, which stays a bar
    noise = ", ".join(f"{name} = {name} * {factor}" for name in PRICED)
    with closing(sqlite3.connect(folder / "kallos.db")) as database, database:
        changed = database.execute(f"UPDATE bars SET {noise} WHERE ts >= ?", (end.value // 10**6,)).rowcount
        database.execute("UPDATE series SET stale_from = 0")
    assert changed > 100
    return f"sqlite:///{folder / 'kallos.db'}"


def same_before_the_evaluation(whole: Path, folder: Path, settings: PipelineSettings) -> list[dict]:
    """The records of the data of the run and of one on other test rows, which trains the same model to the bit."""
    url, part = with_noise(whole, folder), parts_of(settings, folder / "reports" / "noise")[0]
    for step in ("preflight", "data", "tune", "train"):
        do_step(Work(part, url), step)
    ours = whole / "1d"
    seen = [read_json(one / "steps" / "data.json") for one in (ours, part.folder)]
    assert seen[0]["features"]["fingerprint"] != seen[1]["features"]["fingerprint"]
    assert seen[0]["seen"]["fingerprint"] == seen[1]["seen"]["fingerprint"]
    for name in ("optuna_best.json", "model.pt", "scaler.pkl"):
        assert file_hash(ours / name) == file_hash(part.folder / name), name
    return seen


def test_noise_in_the_test_rows_changes_nothing_before_the_evaluation(whole, tmp_path):
    settings = read_settings(p.SHOWCASE, overrides={"timeframes": ["1d"]})
    same_before_the_evaluation(whole, tmp_path / "noise", settings)


def test_noise_in_the_test_table_changes_nothing_before_the_evaluation(labelled, tmp_path):
    settings = read_settings(p.labelled_settings(tmp_path, "label"))
    one, other = (record["tables"] for record in same_before_the_evaluation(labelled, tmp_path / "noise", settings))
    assert [one[name] == other[name] for name in ("train", "val", "test")] == [True, True, False]


def test_runs_in_one_postgresql_schema_have_studies_of_their_own(postgres_url, tmp_path):
    engine = connect(postgres_url)
    write_bars(engine, sample_bars(timeframe="1d", start="2023-01-01"), asset_id="BTC", timeframe="1d", venue="sample")
    typed = {"timeframes": ["1d"], "hpo.trials": 2, "hpo.optuna_schema": "pipeline"}
    works = []
    for run, more in {"one": {}, "two": {"seed": 1}}.items():
        part = parts_of(read_settings(p.SHOWCASE, overrides=typed | more), tmp_path / run)[0]
        works.append(work := Work(part, postgres_url))
        for step in ("preflight", "data", "tune"):
            do_step(work, step)
    best = [read_json(work.part.folder / "optuna_best.json") for work in works]
    names = [one["study_name"].rpartition("_")[0] for one in best]  # which ends with a digest of the folder
    assert names == [f"linear_BTC_1d_log_return_h1_{run}" for run in ("one", "two")]
    assert best[0]["hyperparameters"] != best[1]["hyperparameters"]
    assert (works[1].part.folder / "optuna.db").is_file()
    clear_step(works[1], "tune")
    do_step(works[1], "tune")
    again = read_json(works[1].part.folder / "optuna_best.json")
    assert again == best[1]


def test_two_assets_side_by_side_with_parameters_that_were_searched_before(tmp_path):
    for seed, asset in enumerate(("BTC", "ETH")):
        p.kallos(tmp_path, "sample", "--asset-id", asset, "--timeframe", "1d", "--start", "2023-01-01", "--seed", seed)
    (tmp_path / "best.json").write_text(json.dumps({"hyperparameters": {"input_chunk_length": 3, "alpha": 1.0}}))
    what = ("--assets", "BTC,ETH", "--timeframes", "1d", "--workers-at-once", 2)
    p.kallos(
        tmp_path,
        "all",
        "--config",
        p.SHOWCASE,
        "--run-id",
        "two",
        *what,
        "--hpo-skip",
        "--hpo-params-file",
        "best.json",
    )
    run = tmp_path / "reports" / "two"
    found = p.summary(run)
    assert {name: part["status"] for name, part in found["parts"].items()} == {"BTC/1d": "done", "ETH/1d": "done"}
    assert all(line["ok"] for line in found["checklist"]) and not list(run.rglob("tune.ipynb"))
    assert file_hash(run / "BTC" / "1d" / "model.pt") != file_hash(run / "ETH" / "1d" / "model.pt")
    for asset in ("BTC", "ETH"):
        forecasts = pd.read_parquet(run / asset / "1d" / "preds_test.parquet")
        assert {*forecasts["asset_id"]} == {asset}
        assert len(read_json(run.parent / f"{asset}_1d_test_looks.json")["looks"]) == 1
