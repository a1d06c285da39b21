"""What the benchmarks of tuning share: a market in a database, the settings of a study, figures in words.

It defines and runs nothing.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kallos.core.config import TuneSettings
from kallos.core.devices import resolve_device
from kallos.data.features import compute_features
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.models.datasets import DartsFold, load_table
from kallos.models.fits import FitPlan, fit_fold
from kallos.models.layouts import study_layout
from kallos.models.validation import prepare_fold

RECORDS = Path(__file__).resolve().parents[2] / "data" / "bench"
END = "2024-11-05"  # by then 2,200 daily rows have all their features
MIDDLING = {
    "hidden_dim": 90, "n_rnn_layers": 2, "dropout": 0.2, "batch_size": 64,
    "input_chunk_length": 50, "learning_rate": 1e-3,
}  # fmt: skip


def store_market(bars: pd.DataFrame, url: str, *, timeframe: str = "1d") -> str:
    """The URL of the database, which now holds the bars and their features as BTC."""
    engine = connect(url)
    write_bars(engine, bars, asset_id="BTC", timeframe=timeframe, venue="bench")
    write_features(engine, compute_features(bars, timeframe=timeframe), asset_id="BTC", timeframe=timeframe)
    engine.dispose()
    return url


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Gives the parser what a study of every benchmark has."""
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--end-date", default=END)


def study_settings(options: argparse.Namespace, folder: Path, **more) -> TuneSettings:
    """The settings of a study of GRUs on the CPU, in a folder of its own."""
    sizes = {"n_trials": options.trials, "folds": options.folds, "max_epochs": options.epochs}
    where = {"asset_id": "BTC", "end_date": options.end_date, "output_path": str(folder), "device": "cpu"}
    return TuneSettings.from_values({"model_name": "gru", **where, **sizes, **more})


def folds_of(settings: TuneSettings, url: str) -> list[DartsFold]:
    """The study's folds, prepared."""
    table = load_table(settings, url)
    return [prepare_fold(table, bounds, settings=settings) for bounds in study_layout(table, settings)]


def warm_up(settings: TuneSettings, url: str) -> None:
    """Fits one fold for an epoch: what is compiled then is kept on disk for every later process."""
    plan = FitPlan(n_epochs=1, device=resolve_device("cpu"))
    fit_fold(folds_of(settings, url)[0], MIDDLING, settings=settings, plan=plan, seed=0)


def span(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
