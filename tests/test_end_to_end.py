"""The commands of the README as a user types them: from bars to a tuned and trained model with its reports."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import nbformat
import numpy as np
import optuna
import pandas as pd
import pytest

from kallos.models.datasets import load_features_from_db
from kallos.models.parameters import read_params
from kallos.models.trainer import load_trained

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
END = "2022-01-01"
TINY = ["--n-trials", "2", "--folds", "2", "--max-epochs", "2"]


def run(folder: Path, url: str, *command: str, code: int = 0) -> str:
    """What the command printed, run in the folder as a user would; it must leave with the code."""
    environment = os.environ | {"KALLOS_DB_URL": url}
    line = [str(BIN / command[0]), *command[1:]]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def kallos_run(folder: Path, url: str, name: str, *options: str, code: int = 0) -> str:
    """`kallos-run NAME --asset-id BTC OPTIONS`."""
    return run(folder, url, "kallos-run", name, "--asset-id", "BTC", *options, code=code)


def has_no_errors(path: Path) -> nbformat.NotebookNode:
    """The executed notebook, whose cells all ran."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    return notebook


def with_market(folder: Path, url: str) -> tuple[Path, str]:
    """A new working folder, and the database, which now holds a sample market and its features."""
    folder.mkdir()
    kallos_run(folder, url, "sample", "--timeframe", "1d", "--start", "2019-01-01", "--end", "2022-12-31")
    kallos_run(folder, url, "features", "--timeframe", "1d")
    return folder, url


@pytest.fixture
def market(tmp_path, db_url) -> tuple[Path, str]:
    """A working folder, and a database of either kind with a sample market and its features."""
    return with_market(tmp_path / "work", db_url)


def test_tune_and_train_with_their_reports(tmp_path, postgres_url, postgres_kwargs):
    folder, url = with_market(tmp_path / "work", postgres_url)  # on SQLite, papermill runs the same notebooks below
    what = ["--model-name", "gru", "--end-date", END]
    said = kallos_run(folder, url, "tune", *what, *TINY, "--optuna-schema", "studies_of_test")
    assert "On the folds that chose it: " in said
    best = json.loads((folder / "gru_BTC_best_params.json").read_text())
    assert set(best["hyperparameters"]) == {
        *("hidden_dim", "n_rnn_layers", "dropout", "batch_size", "input_chunk_length", "learning_rate")
    }
    assert 1 <= best["n_epochs"] <= 2
    study = optuna.load_study(study_name=best["study_name"], storage=f"sqlite:///{folder / 'optuna.db'}")
    assert len(study.trials) == 2
    report = has_no_errors(folder / "gru_BTC_tune.ipynb")
    drawn = [
        o
        for cell in report.cells
        for o in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    assert len(drawn) >= 6
    params = ["--params-file", "gru_BTC_best_params.json", "--output-path", "production_models"]
    kallos_run(folder, url, "train", *what, *params)
    made = {path.name for path in (folder / "production_models").iterdir()}
    assert {
        "gru_BTC.pt",
        "gru_BTC.pt.ckpt",
        "gru_BTC_scaler.pkl",
        "gru_BTC_manifest.json",
        "gru_BTC_train.html",
    } <= made
    has_no_errors(folder / "production_models" / "gru_BTC_train.ipynb")
    model, transformer, manifest = load_trained(folder / "production_models" / "gru_BTC_manifest.json")
    assert manifest["data"]["features"]["last"].startswith("2022-01-01T00:00")
    assert model.input_chunk_length == best["hyperparameters"]["input_chunk_length"]
    table = load_features_from_db("BTC", END, url)
    assert np.isfinite(transformer.transform(table.assign(log_return=0.0)).to_numpy()).all()
    secret = postgres_kwargs["postgres_password"].encode()
    assert not [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_no_report_leaves_the_study_in_the_output_path(market):
    folder, url = market
    what = ["--model-name", "linear", "--end-date", END, "--output-path", "out", "--no-report"]
    kallos_run(folder, url, "tune", *what, "--n-trials", "2", "--folds", "2", "--start-date", "2020-01-01")
    params = ["--params-file", "out/linear_BTC_best_params.json"]
    kallos_run(folder, url, "train", *what, *params)
    made = {path.name for path in (folder / "out").iterdir()}
    assert {"linear_BTC_best_params.json", "optuna.db", "linear_BTC.pt", "linear_BTC_scaler.pkl"} <= made
    assert not list((folder / "out").glob("*.ipynb"))
    manifest = load_trained(folder / "out" / "linear_BTC_manifest.json")[2]
    assert manifest["data"]["features"]["first"].startswith("2020-01-03")  # the first return, known at the second close
    judged = ["--schemes", "cv", "--n-splits", "2", "--importance-repeats", "0", "--last-date", "2022-07-01"]
    kallos_run(folder, url, "evaluate", *what, *params, *judged)
    forecasts = pd.read_parquet(folder / "out" / "linear_BTC_evaluation" / "test_forecasts.parquet")
    assert forecasts["target_ts"].max() == pd.Timestamp("2022-07-01", tz="UTC")
    assert read_params(folder / params[1])["start_date"].startswith("2020-01-01")
    said = kallos_run(folder, url, "tune", *what, "--start-date", "2022-02-01", code=2)
    assert "start_date must be before end_date, 2022-01-01 00:00" in said


@pytest.fixture
def sqlite_market(tmp_path) -> tuple[Path, str]:
    """The same on SQLite alone."""
    return with_market(tmp_path / "work", f"sqlite:///{tmp_path / 'kallos.db'}")


def test_papermill_runs_the_notebooks(sqlite_market, root):
    folder, url = sqlite_market
    reports = folder / "reports" / "BTC" / "1d"
    reports.mkdir(parents=True)
    what = ["-p", "asset_id", "BTC", "-p", "model_name", "linear", "-p", "end_date", END]
    tune = ["papermill", str(root / "nbs/tune.ipynb"), "reports/BTC/1d/linear_BTC_tune.ipynb", *what]
    run(folder, url, *tune, "-p", "n_trials", "2", "-p", "folds", "2")
    has_no_errors(reports / "linear_BTC_tune.ipynb")
    params = "reports/BTC/1d/linear_BTC_best_params.json"
    train = ["papermill", str(root / "nbs/train.ipynb"), "reports/BTC/1d/linear_BTC_train.ipynb", *what]
    run(folder, url, *train, "-p", "params_file", params)
    has_no_errors(reports / "linear_BTC_train.ipynb")
    load_trained(reports / "linear_BTC_manifest.json")
    assert len(optuna.load_study(study_name=None, storage=f"sqlite:///{reports / 'optuna.db'}").trials) == 2
    said = run(folder, url, *tune, "-p", "n_trails", "2", code=1)
    assert "the notebook has no such parameter; got 'n_trails'" in said


def test_ctrl_c_leaves_a_study_that_goes_on(sqlite_market):
    folder, url = sqlite_market
    line = [
        "tune",
        "--asset-id",
        "BTC",
        "--model-name",
        "linear",
        "--end-date",
        END,
        "--n-trials",
        "400",
        "--folds",
        "2",
    ]
    environment = os.environ | {"KALLOS_DB_URL": url}
    command = [str(BIN / "kallos-run"), *line]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    while not finished(folder / "optuna.db"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 3
    assert "the same command resumes it" in said
    assert "Traceback" not in said
    done = finished(folder / "optuna.db")
    assert 1 <= done < 400
    line[line.index("400")] = str(done + 2)
    run(folder, url, "kallos-run", *line)
    assert finished(folder / "optuna.db") == done + 2


def finished(file: Path) -> int:
    """The number of completed trials in the file; 0 as long as there is no file or no table.

    Read by SQLite alone: Optuna would create the tables that the process under test is creating.
    """
    if not file.exists():
        return 0
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:  # no table yet, or locked
            return 0


def test_real_daily_bars(tmp_path, db_url, real_data):
    file = str(real_data / "bars" / "BTCUSDT_spot_1d.csv.gz")
    kallos_run(tmp_path, db_url, "ingest", file, "--timeframe", "1d", "--venue", "binance", "--quote", "USDT")
    kallos_run(tmp_path, db_url, "features", "--timeframe", "1d")
    what = ["--model-name", "linear", "--end-date", "2023-01-01", "--no-report"]
    kallos_run(tmp_path, db_url, "tune", *what, "--n-trials", "2", "--folds", "3")
    kallos_run(tmp_path, db_url, "train", *what, "--params-file", "linear_BTC_best_params.json")
    _, _, manifest = load_trained(tmp_path / "linear_BTC_manifest.json")
    assert manifest["data"]["features"]["last"].startswith("2023-01-01T00:00")
