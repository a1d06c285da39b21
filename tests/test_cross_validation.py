"""cv, walk-forward and cpcv by the real command line: what they write, what a kill leaves, what they refuse."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from distributed import LocalCluster

from kallos.core.runs import read_json, verify_manifest, write_json
from tests.study_runs import END, assert_refused, run_command, start_command, write_market

WHAT = ["--asset-id", "BTC", "--end-date", END, "--params-file", "best.json"]
LINEAR = {"model_name": "linear", "hyperparameters": {"input_chunk_length": 5, "alpha": 10.0}}
NETWORK = {
    "model_name": "gru",
    "hyperparameters": {
        "input_chunk_length": 30, "hidden_dim": 8, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 64,
        "learning_rate": 1e-3,
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with a small market in its database."""
    (tmp_path / "data").mkdir()
    write_market(f"sqlite:///{tmp_path}/data/kallos.db")
    return tmp_path


def start(folder: Path, *words: object, params: dict = LINEAR) -> subprocess.Popen:
    """The command line in that folder, with the parameters in its best.json."""
    write_json(folder / "best.json", params)
    return start_command(folder, *words)


def run(folder: Path, *words: object, params: dict = LINEAR) -> str:
    write_json(folder / "best.json", params)
    return run_command(folder, *words)


@pytest.mark.slow
def test_the_three_commands_write_forecasts_and_a_verdict(folder):
    said = run(folder, "cv", *WHAT, "--n-splits", 4)
    assert "4 folds" in said and "1 path\n" in said and "skill" in said.lower()
    out = folder / "linear_BTC_cv"
    assert verify_manifest(out / "manifest.json")["kind"] == "cv"
    forecasts = pd.read_parquet(out / "forecasts.parquet")
    assert forecasts["target_ts"].is_unique and forecasts["target_ts"].max() <= pd.Timestamp(END, tz="UTC")
    metrics = read_json(out / "metrics.json")
    assert metrics["sentence"] in said and len(metrics["folds"]) == 4
    assert metrics["paths"][0]["n"] == metrics["pooled"][0]["n"] == len(forecasts)
    assert metrics["intervals"]["learn_from"] == "others"
    assert 0.8 < metrics["intervals"]["paths"][0]["coverage"] <= 1
    names = {page.stem for page in (out / "figures").glob("*.html")}
    assert names == {"skill", "paths", "residuals", "calibration", "coverage"}
    assert (out / "figures" / "plotly.min.js").stat().st_size > 1_000_000
    assert all(f"linear_BTC_cv/figures/{name}.html" in said for name in names)
    said = run(folder, "walk-forward", *WHAT, "--refit-every", 100, "--n-jobs", 2)
    assert "linear_BTC_walk-forward" in said
    assert read_json(folder / "linear_BTC_walk-forward" / "metrics.json")["intervals"]["learn_from"] == "past"
    said = run(folder, "cpcv", *WHAT, "--n-groups", 5)
    assert "10 folds" in said and "4 paths" in said and "of 4 paths beat the naive forecast" in said
    assert len(read_json(folder / "linear_BTC_cpcv" / "metrics.json")["paths"]) == 4


@pytest.mark.slow
def test_a_killed_run_is_completed_without_fitting_again_what_was_done(folder):
    words = ("cpcv", *WHAT, "--n-groups", 6, "--max-epochs", 20, "--n-jobs", 2)
    process = start(folder, *words, params=NETWORK)
    kept = folder / "gru_BTC_cpcv" / "folds"
    while process.poll() is None and (not kept.exists() or len([*kept.glob("*.parquet")]) < 3):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in kept.glob("[!.]*.parquet")}
    assert 3 <= len(done) < 15
    assert not (kept.parent / "forecasts.parquet").exists()
    run(folder, *words, params=NETWORK)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len([*kept.glob("[!.]*.parquet")]) == 15
    whole = ("--output-path", "whole", "--n-jobs", 1)
    run(folder, *words[:-2], *whole, params=NETWORK)
    ours, theirs = (pd.read_parquet(f / "gru_BTC_cpcv" / "forecasts.parquet") for f in (folder, folder / "whole"))
    assert ours.equals(theirs)


@pytest.mark.slow
def test_the_workers_of_a_dask_cluster_give_what_one_process_gives(folder):
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        run(folder, "cpcv", *WHAT, "--n-groups", 4, "--dask-scheduler", cluster.scheduler_address)
    run(folder, "cpcv", *WHAT, "--n-groups", 4, "--output-path", "whole")
    ours, theirs = (pd.read_parquet(f / "linear_BTC_cpcv" / "forecasts.parquet") for f in (folder, folder / "whole"))
    assert ours["fold"].nunique() == 6 and ours.equals(theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cpcv", *WHAT, "--n-groups", 30, "--n-test-groups", 10), "more than 20,000 splits; got '30,045,015'"),
        (("cpcv", *WHAT, "--n-groups", 3, "--n-test-groups", 3), "3 test groups are too many"),
        (("walk-forward", *WHAT, "--refit-every", 5000), "5000 rows to a fit are more than"),
        (("cv", *WHAT, "--n-splits", 1), "n_splits: Input should be greater than or equal to 2, got 1"),
        (("cv", *WHAT, "--n-jobs", 0), "n_jobs: must be 1 or more"),
        (("cv", *WHAT, "--model-name", "gru"), "was tuned for something else: model_name"),
        (("cv", *WHAT[:2], *WHAT[4:]), "end_date is required"),
        (("cv", *WHAT, "--dask-scheduler", "tcp://127.0.0.1:1"), "no Dask scheduler answers"),
        (("cv", *WHAT, "--dask-scheduler", "nonsense"), "no Dask scheduler answers (ValueError)"),
        (("walk-forward", *WHAT, "--first-train-share", "0.995", "--refit-every", "2"), "a verdict needs 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value[:1] + value[7:])),
)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, folder):
    write_json(folder / "best.json", LINEAR)
    assert_refused(folder, *words, message=message)
