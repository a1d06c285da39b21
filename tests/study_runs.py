"""What the tests of studies share: a small market, a real `kallos-run tune` in a process of its own, its workers."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import optuna
import psutil

from kallos.core.config import TuneSettings, study_name
from kallos.data.features import compute_features
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.models.budget import finished_trials
from kallos.models.datasets import load_table
from kallos.models.layouts import study_layout
from kallos.models.storages import study_storage
from kallos.models.tuner import replay
from kallos.models.validation import prepare_fold

END = "2022-06-30"
SMALL = {"asset_id": "BTC", "end_date": END, "model_name": "linear", "folds": 2, "max_epochs": 2}


def write_market(url: str) -> None:
    """Puts a small sample market with its features into the database."""
    bars = sample_bars(timeframe="1d", start="2019-01-01", end="2022-12-31", seed=1)
    engine = connect(url)
    write_bars(engine, bars, asset_id="BTC", timeframe="1d", venue="sample")
    write_features(engine, compute_features(bars, timeframe="1d"), asset_id="BTC", timeframe="1d")
    engine.dispose()


def small_settings(folder: Path, **more) -> TuneSettings:
    """The settings of a small study that is kept in the folder."""
    return TuneSettings.from_values(SMALL | {"output_path": str(folder)} | more)


def start_tune(url: str, settings: TuneSettings, *, cwd: Path | None = None, **options) -> subprocess.Popen:
    """A real `kallos-run tune --no-report` of the settings, in a process of its own."""
    names = (
        "model_name",
        "asset_id",
        "n_trials",
        "folds",
        "max_epochs",
        "n_jobs",
        "pruner",
        "output_path",
        "study_name",
    )
    values = {name: value for name in names if (value := getattr(settings, name)) is not None} | options
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).with_name("kallos-run")), "tune", "--no-report", "--end-date", END, *words]
    environment = os.environ | {"KALLOS_DB_URL": url}
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def start_command(folder: Path, *words: object) -> subprocess.Popen:
    """A real `kallos-run` with these words, in that folder and without a database, in a process group of its own."""
    command = [str(Path(sys.executable).with_name("kallos-run")), *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def run_command(folder: Path, *words: object) -> str:
    """What the command printed; it must succeed, and leave nothing behind that it complains of."""
    process = start_command(folder, *words)
    said, problem = process.communicate(timeout=240)
    assert process.returncode == 0, problem
    assert "Traceback" not in problem and "leaked" not in problem, problem
    return said


def assert_refused(folder: Path, *words: object, message: str) -> None:
    """The command must print nothing but one message with this in it, and leave with exit code 2."""
    process = start_command(folder, *words)
    said, problem = process.communicate(timeout=100)
    assert process.returncode == 2 and said == "", problem
    assert message in problem and problem.splitlines()[-1].startswith("kallos-run: ") and "Traceback" not in problem


@cache
def _server(url: str, schema: str) -> optuna.storages.BaseStorage:
    return study_storage(small_settings(Path(), optuna_schema=schema), url)


def study_of(url: str, settings: TuneSettings) -> optuna.Study:
    """The study of the settings, wherever it is at the moment, once it exists."""
    while True:
        storage = _server(url, settings.optuna_schema) if url.startswith("postgresql") else study_storage(settings, url)
        if study_name(settings) in optuna.get_all_study_names(storage):
            return optuna.load_study(study_name=study_name(settings), storage=storage)
        time.sleep(0.1)


def is_spent(url: str, settings: TuneSettings) -> bool:
    """Whether every slot of the budget is filled, none twice and with no parameters twice, or says what is wrong."""
    trials = finished_trials(study_of(url, settings))
    assert sorted(trial.user_attrs["slot"] for trial in trials) == list(range(settings.n_trials))
    return len({tuple(sorted(trial.params.items())) for trial in trials}) == settings.n_trials


def replays(url: str, settings: TuneSettings) -> bool:
    """Whether every trial of the study gives its score again, to the bit, when it is run alone."""
    table = load_table(settings, url)
    folds = [prepare_fold(table, bounds, settings=settings) for bounds in study_layout(table, settings)]
    trials = finished_trials(study_of(url, settings))
    return [replay(trial, folds, settings=settings) for trial in trials] == [trial.value for trial in trials]


def running(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that run at the moment."""
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The living worker processes of the run."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # a zombie is none either
            found += [child] if "serve" in " ".join(child.cmdline()) else []
    return found


def kill_workers(process: subprocess.Popen, url: str, settings: TuneSettings, kills: int, seed: int = 0) -> int:
    """Kills so many random workers of the run while trials run; returns how many it got before the study was spent."""
    rng, done = random.Random(seed), 0
    while process.poll() is None and done < kills:
        study = study_of(url, settings)
        workers = workers_of(process)
        if len(finished_trials(study)) >= settings.n_trials or not workers or not running(study):
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0, 4.0) if kills > 3 else rng.uniform(0, 1.0))
        victim = rng.choice(workers)
        if victim.is_running():
            victim.send_signal(signal.SIGKILL)
            done += 1
    return done
