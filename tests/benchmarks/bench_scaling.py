"""What a study costs: with one worker and with two, beside its fits, and by rows and folds, in time and memory.

The parts: `workers`, the same unpruned study with 1 and 2 workers, on SQLite and on PostgreSQL, and the share of the
time of one worker that is not spent in fits and forecasts; `cost`, seconds a trial and the peak memory of a worker
process for one middling network, against bars of the sample market and folds. Run it with `make bench`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import joblib
import optuna
import pandas as pd
from bench_fold_fit import load_bars
from bench_ingest import postgres
from market import MIDDLING, add_study_options, store_market, study_settings, warm_up
from optuna.trial import TrialState, create_trial

from kallos.core.columns import timeframe_delta
from kallos.core.config import TuneSettings, as_parameters, study_name
from kallos.core.errors import DataError
from kallos.data.sample import sample_bars
from kallos.models.architectures import MODELS
from kallos.models.budget import finished_trials
from kallos.models.datasets import load_table
from kallos.models.layouts import study_identity
from kallos.models.rounds import validate_in_turns
from kallos.models.storages import local_study, study_storage
from kallos.models.studies import open_study
from kallos.models.tuner import tune, work

LONG = 75_840  # bars of 15m, 790 days
LIMITS = {"1d": 1024, "15m": 2048}  # MiB
CHILD = """
import json, sys
from kallos.models.tuner import work
work(**json.load(sys.stdin))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


class Outside:
    """Seconds spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


@contextmanager
def fit_clock() -> Iterator[list[float]]:
    """A list that gets the seconds of fits and forecasts of each trial run in this process by the block."""
    spent = []

    def timed(folds, hyperparameters, *, plan, on_round, **how):
        outside, begun = Outside(), time.perf_counter()
        plan = replace(plan, on_epoch=outside.of(plan.on_epoch))
        try:
            return validate_in_turns(folds, hyperparameters, plan=plan, on_round=outside.of(on_round), **how)
        finally:
            spent.append(time.perf_counter() - begun - outside.seconds)

    with mock.patch("kallos.models.tuner.validate_in_turns", timed):
        yield spent


def seconds_of(study: optuna.Study) -> float:
    """From the beginning of the first trial to the end of the last."""
    trials = finished_trials(study)
    begun, ended = min(t.datetime_start for t in trials), max(t.datetime_complete for t in trials)
    return (ended - begun).total_seconds()


def run_study(settings: TuneSettings, url: str) -> tuple[float, float]:
    """Seconds of a study: of `tune`, and net of what comes before its first trial and after its last."""
    begun = time.perf_counter()
    study = tune(settings, db=url, progress=sys.stderr.isatty())
    return time.perf_counter() - begun, seconds_of(study)


def overhead(settings: TuneSettings, url: str, *, shared: bool) -> float:
    """The share of a worker's time not spent in fits and forecasts; `shared` keeps a local study in a journal."""
    home = local_study(settings, shared=shared) if url.startswith("sqlite") else nullcontext()
    with home, fit_clock() as spent:
        work(settings, db=url)
        name, storage = study_name(settings), study_storage(settings, url)
        return 1 - sum(spent) / seconds_of(optuna.load_study(study_name=name, storage=storage))


def compare_workers(options: argparse.Namespace, url: str, folder: Path, *, name: str) -> None:
    """Prints the gain of a second worker, and what lies beside the fits of one."""

    def settings(label: str, n_jobs: int) -> TuneSettings:
        how = {"study_name": label, "n_jobs": n_jobs, "pruner": "none"}
        return study_settings(options, folder / name / label, **how)

    (gross_1, net_1), (gross_2, net_2) = (run_study(settings(f"workers_{n}", n), url) for n in (1, 2))
    print(f"{name}: 1 worker {gross_1:.1f} s, 2 workers {gross_2:.1f} s, ratio {gross_1 / gross_2:.2f};", end=" ")
    print(f"between first and last trial {net_1:.1f} and {net_2:.1f} s, ratio {net_1 / net_2:.2f}", flush=True)
    for storage in ("SQLite", "journal") if url.startswith("sqlite") else ("PostgreSQL",):
        share = overhead(settings(f"overhead_{storage}", 1), url, shared=storage == "journal")
        print(f"{name}: beside the fits, with the study in {storage}, {share:.2%} of a worker's time", flush=True)


def workers_part(options: argparse.Namespace, folder: Path) -> None:
    """Prints the workers' lines for both databases."""
    source, bars = load_bars()
    print(f"{source}, {options.folds} folds, up to {options.epochs} epochs, {options.trials} trials,", end=" ")
    print(f"{joblib.cpu_count()} cores", flush=True)
    url = store_market(bars, f"sqlite:///{folder}/kallos.db")
    warm_up(study_settings(options, folder), url)
    compare_workers(options, url, folder, name="sqlite")
    with postgres() as url:
        compare_workers(options, store_market(bars, url), folder, name="postgresql")


def long_market(rows: int, folder: Path) -> tuple[str, str]:
    """The URL of a sample market of so many bars, and its timeframe: 1d while there are days enough."""
    timeframe = "1d" if rows <= 2_900 else "15m"
    end = pd.Timestamp("2018-01-01") + rows * timeframe_delta(timeframe)
    bars = sample_bars(timeframe=timeframe, start="2018-01-01", end=end.strftime("%Y-%m-%d"))
    return store_market(bars.head(rows), f"sqlite:///{folder}/{rows}.db", timeframe=timeframe), timeframe


def open_fixed(settings: TuneSettings, url: str) -> optuna.Study:
    """A new study whose only slot is given the middling network, as if a worker had lost it."""
    identity, storage = study_identity(load_table(settings, url), settings), study_storage(settings, url)
    study = open_study(settings, identity=identity, storage=storage)
    about = {"slot": 0, "worker": "bench", "claim": "bench", "lost": "it was never run"}
    lost = {"state": TrialState.FAIL, "params": MIDDLING, "distributions": MODELS["gru"].space, "user_attrs": about}
    study.add_trial(create_trial(**lost))
    return study


def run_worker(settings: TuneSettings, url: str) -> tuple[float, float]:
    """Seconds of the middling trial in a worker process of its own, and the process' peak memory in MiB."""
    study = open_fixed(settings, url)
    job = json.dumps({"settings": as_parameters(settings), "db": url})
    how = {"input": job, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "text": True}
    said = subprocess.run([sys.executable, "-c", CHILD], check=True, **how).stdout
    (trial,) = finished_trials(study)
    assert trial.params == MIDDLING and trial.state == TrialState.COMPLETE, trial.user_attrs
    return trial.duration.total_seconds(), int(said.split()[-1]) / 1024


def cost_part(options: argparse.Namespace, folder: Path) -> None:
    """Prints one line a number of bars and folds."""
    shape = f"hidden {MIDDLING['hidden_dim']}, {MIDDLING['n_rnn_layers']} layers, {options.cost_epochs} epochs"
    print(f"sample market, one worker of one thread, {shape}")
    print("  bars            folds   s a trial   peak MiB of a worker")
    options = argparse.Namespace(**vars(options) | {"trials": 1, "epochs": options.cost_epochs})
    for number, rows in enumerate(options.rows):
        url, timeframe = long_market(rows, folder)
        if number == 0:
            sized = argparse.Namespace(**vars(options) | {"folds": min(options.cost_folds)})
            warm_up(study_settings(sized, folder, timeframe=timeframe), url)
        cases = [(folds, None) for folds in options.cost_folds]
        for folds, most in cases + ([(options.folds, options.most)] if rows >= LONG else []):
            sized = argparse.Namespace(**vars(options) | {"folds": folds, "end_date": "2026-12-31"})
            how = {"timeframe": timeframe, "pruner": "none", "max_samples_per_epoch": most}
            settings = study_settings(sized, folder / f"{rows}_{folds}_{most}", **how)
            try:
                seconds, peak = run_worker(settings, url)
            except DataError as error:
                print(f"  {rows:>7,} of {timeframe:>3} {folds:>8}   {error}", flush=True)
                continue
            note = f", {most:,} windows an epoch" if most else ""
            limit = f"limit {LIMITS[timeframe]:,}{note}"
            print(f"  {rows:>7,} of {timeframe:>3} {folds:>8} {seconds:>11.1f} {peak:>10.0f}, {limit}", flush=True)


def main() -> None:
    """Prints the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--parts", nargs="+", choices=("workers", "cost"), default=["workers", "cost"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 2_200, 15_000, LONG], help="bars of the table")
    parser.add_argument("--cost-folds", nargs="+", type=int, default=[3, 5, 10], help="folds of the table")
    parser.add_argument("--cost-epochs", type=int, default=1)
    parser.add_argument("--most", type=int, default=4096, help="windows an epoch in the longest series' last line")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="kallos-bench-") as folder:
        for part in options.parts:
            {"workers": workers_part, "cost": cost_part}[part](options, Path(folder))


if __name__ == "__main__":
    main()
