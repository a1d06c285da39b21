"""The plain loop of darts and Optuna, as the usual recipe has it: the peer of kallos' tuning.

It defines and runs nothing. One process of one thread takes fold after fold: darts' own `fit` with early stopping on
the fold's validation loss, the best checkpoint read back from disk, `historical_forecasts` over the validation window,
and the mean over folds of the RMSE, in scaled units, told to Optuna. From kallos come the scaled folds and the search
space. Trials are recorded in a JSON file, because they take long.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel
from pytorch_lightning.callbacks import EarlyStopping
from torch import nn

from kallos.core.config import TuneSettings
from kallos.core.devices import quiet_lightning
from kallos.models.architectures import suggest_hyperparameters
from kallos.models.datasets import DartsFold
from kallos.models.fits import trim

PATIENCE = 5
GRU = TuneSettings.from_values({"asset_id": "BTC", "end_date": "2024-01-01"})  # with the space that kallos searches


@dataclass(frozen=True)
class PlainTrial:
    """What one trial of the plain loop took and gave."""

    params: dict[str, Any]
    seconds: float
    fold_scores: list[float]  # RMSE in scaled units
    epochs: list[int]  # that each fold trained

    @property
    def score(self) -> float:
        """The mean over folds."""
        return float(np.mean(self.fold_scores))


def network(params: dict[str, Any], name: str, *, n_epochs: int, seed: int, folder: str) -> BlockRNNModel:
    """An unfitted GRU of the recipe."""
    values = {key: value for key, value in params.items() if key != "learning_rate"}
    values["dropout"] = params["dropout"] if params["n_rnn_layers"] > 1 else 0.0  # PyTorch ignores it, and warns
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = {"accelerator": "cpu", "callbacks": [EarlyStopping("val_loss", patience=PATIENCE)], **quiet}
    kept = {"save_checkpoints": True, "force_reset": True, "work_dir": folder, "model_name": name}
    how = {"n_epochs": n_epochs, "random_state": seed, "optimizer_kwargs": {"lr": params["learning_rate"]}}
    loss = nn.MSELoss()
    return BlockRNNModel(
        model="GRU", output_chunk_length=1, loss_fn=loss, pl_trainer_kwargs=trainer, **values, **how, **kept
    )


def plain_fold(fold: DartsFold, params: dict[str, Any], **how) -> tuple[float, int]:
    """The fold's RMSE in scaled units, and the epochs it trained."""
    name, folder = f"fold{fold.fold}", how["folder"]
    series, covariates = (list(side) for side in zip(*fold.train, strict=True))
    val = trim(fold.val, fold.lookback - params["input_chunk_length"])
    val_series, val_covariates = (list(side) for side in zip(*val, strict=True))
    model = network(params, name, **how)
    model.fit(
        series, past_covariates=covariates, val_series=val_series, val_past_covariates=val_covariates, verbose=False
    )
    best = BlockRNNModel.load_from_checkpoint(name, work_dir=folder, best=True)
    window = {"retrain": False, "last_points_only": True, "show_warnings": False}
    forecasts = best.historical_forecasts(val_series, past_covariates=val_covariates, forecast_horizon=1, **window)
    return rmse_over(val_series, forecasts), model.epochs_trained


def rmse_over(truth: list[TimeSeries], forecasts: list[TimeSeries]) -> float:
    """The root mean squared error over all segments."""
    pairs = [(t.slice_intersect(f).values(), f.values()) for t, f in zip(truth, forecasts, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate([(t - f) ** 2 for t, f in pairs]))))


def objective(trial: optuna.Trial, folds: list[DartsFold], n_epochs: int, seed: int) -> float:
    """The mean over folds; the trial keeps what made it."""
    params, begun = suggest_hyperparameters(trial, GRU), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kallos-plain-") as folder:
        how = {"n_epochs": n_epochs, "seed": seed, "folder": folder}
        scores, epochs = zip(*[plain_fold(fold, params, **how) for fold in folds], strict=True)
    trial.set_user_attr("kept", asdict(PlainTrial(params, time.perf_counter() - begun, list(scores), list(epochs))))
    return float(np.mean(scores))


def plain_trials(
    suggestions: Sequence[dict[str, Any]], folds: list[DartsFold], *, n_epochs: int, seed: int, record: Path
) -> list[PlainTrial]:
    """The trials of these hyperparameters, taken from the record where it has them, else run and recorded."""
    quiet_lightning()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = json.loads(record.read_text()) if record.exists() else {}
    run, study, found = partial(objective, folds=folds, n_epochs=n_epochs, seed=seed), optuna.create_study(), []
    rows = sum(len(target) for target, _ in folds[-1].train)
    for params in suggestions:
        about = {"rows": rows, "folds": len(folds), "epochs": n_epochs, "seed": seed}
        key = json.dumps(params | about, sort_keys=True)
        if key not in known:
            study.enqueue_trial(params)
            study.optimize(run, n_trials=1)
            known[key] = study.trials[-1].user_attrs["kept"]
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(known, indent=1))
        found.append(PlainTrial(**known[key]))
    return found
