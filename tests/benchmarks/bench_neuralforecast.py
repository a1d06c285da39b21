"""A trial on one fold through kallos against neuralforecast's GRU of the same configuration, side by side in one run.

neuralforecast's AutoGRU fits this very GRU once a trial; what its search adds around a fit is left out. Both sides have
the same layers, rows, windows a batch, batches an epoch, optimizer, most epochs and patience, on one thread; kallos'
time holds its forecasts of the validation window and its score, neuralforecast's its fit alone. Where their early
stopping differs they train a different number of epochs, so that the ratio of an epoch is shown too. Run it with
`make bench`.
"""

import argparse
import logging
import math
import time
import warnings
from typing import Any

import optuna
import pandas as pd
import torch
from bench_fold_fit import load_bars
from market import END, span
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MSE
from neuralforecast.models import GRU

from kallos.core.config import TuneSettings
from kallos.core.devices import quiet_lightning, resolve_device
from kallos.data.features import compute_features
from kallos.data.splits import WalkForwardSplit
from kallos.models.architectures import MODELS, longest_input
from kallos.models.datasets import DartsFold, add_target, calculate_dynamic_wf_kwargs
from kallos.models.fits import FitPlan
from kallos.models.validation import prepare_fold, run_fold

PATIENCE = 5


def last_fold(settings: TuneSettings) -> tuple[str, DartsFold]:
    """Where the bars are from, and the last of five folds."""
    source, bars = load_bars()
    table = compute_features(bars, timeframe="1d").set_index("ts").loc[: settings.end_date]
    table = add_target(table, settings.target_col, timeframe="1d")
    layout = calculate_dynamic_wf_kwargs(len(table), input_chunk_length=longest_input(settings))
    return source, prepare_fold(table, WalkForwardSplit(**layout).bounds(len(table))[-1], settings=settings)


def configurations(count: int) -> list[dict[str, Any]]:
    """Draws from kallos' space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(MODELS["gru"].space).params for _ in range(count)]


def long_frame(fold: DartsFold) -> tuple[pd.DataFrame, list[str], int]:
    """The fold's last stretch as neuralforecast wants it, its features, and the rows of the validation window."""
    joined = []
    for train, val in zip(fold.train[-1], fold.val[0], strict=True):
        joined.append(train.append(val.drop_before(train.end_time())).to_dataframe())
    target, features = joined
    frame = features.assign(y=target.iloc[:, 0], unique_id="BTC").rename_axis("ds").reset_index()
    return frame, list(features.columns), len(fold.val[0][0]) - fold.lookback


def kallos_trial(fold: DartsFold, params: dict, epochs: int, settings: TuneSettings) -> tuple[float, int, float]:
    """Seconds, epochs and RMSE in scaled units."""
    plan, begun = FitPlan(n_epochs=epochs, patience=PATIENCE, device=resolve_device("cpu")), time.perf_counter()
    result = run_fold(fold, params, settings=settings, plan=plan, seed=0)
    return time.perf_counter() - begun, len(result.fit.history), result.score


def network(params: dict[str, Any], features: list[str], steps: int, epochs: int) -> GRU:
    """neuralforecast's GRU with a linear layer on its last state."""
    shape = {"encoder_hidden_size": params["hidden_dim"], "encoder_n_layers": params["n_rnn_layers"]}
    shape |= {"encoder_dropout": params["dropout"] if params["n_rnn_layers"] > 1 else 0.0, "decoder_layers": 1}
    batches = {"windows_batch_size": params["batch_size"], "max_steps": steps * epochs, "val_check_steps": steps}
    how = {"learning_rate": params["learning_rate"], "early_stop_patience_steps": PATIENCE, "random_seed": 0}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet}
    data = {"input_size": params["input_chunk_length"], "hist_exog_list": features, "scaler_type": "identity"}
    return GRU(h=1, loss=MSE(), **data, **shape, **batches, **how, **trainer)


def neuralforecast_trial(fold: DartsFold, params: dict, epochs: int) -> tuple[float, int, float]:
    """Seconds, epochs and the lowest RMSE in scaled units."""
    frame, features, val_size = long_frame(fold)
    windows = len(fold.train[-1][0]) - params["input_chunk_length"]
    begun = time.perf_counter()
    model = network(params, features, math.ceil(windows / params["batch_size"]), epochs)
    forecaster = NeuralForecast(models=[model], freq="D")
    forecaster.fit(frame, val_size=val_size)
    seconds, losses = time.perf_counter() - begun, [loss for _, loss in forecaster.models[0].valid_trajectories]
    return seconds, len(losses), min(losses) ** 0.5


def show(params: dict[str, Any], sides: tuple[tuple, tuple]) -> tuple[float, float]:
    """Prints one line a configuration; the ratios of a trial and of an epoch."""
    (ours, our_epochs, score), (theirs, their_epochs, their_score) = sides
    ratio, by_epoch = theirs / ours, theirs / their_epochs / (ours / our_epochs)
    shape = f"hidden {params['hidden_dim']:>3}, {params['n_rnn_layers']} layers, chunk {params['input_chunk_length']}"
    mine = f"kallos {ours:.1f} s, {our_epochs} epochs, score {score:.4f}"
    peer = f"neuralforecast {theirs:.1f} s, {their_epochs} epochs, score {their_score:.4f}"
    print(f"{shape}: {mine}; {peer}; ratio {ratio:.2f}, of an epoch {by_epoch:.2f}", flush=True)
    return ratio, by_epoch


def main() -> None:
    """Prints one line a configuration, and the median and range of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    quiet_lightning()
    warnings.filterwarnings("ignore", module="neuralforecast|utilsforecast|pytorch_lightning|lightning_fabric")
    logging.getLogger("lightning_fabric.utilities.seed").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    settings = TuneSettings.from_values({"asset_id": "BTC", "end_date": END})
    source, fold = last_fold(settings)
    print(f"last of 5 folds of {source}: {len(fold.train[-1][0])} training rows, up to {options.epochs} epochs")
    warm_up = configurations(1)[0]
    kallos_trial(fold, warm_up, 1, settings)
    neuralforecast_trial(fold, warm_up, 1)
    ratios = []
    for params in configurations(options.configurations):
        sides = kallos_trial(fold, params, options.epochs, settings), neuralforecast_trial(fold, params, options.epochs)
        ratios.append(show(params, sides))
    trial, epoch = (span(side) for side in zip(*ratios, strict=True))
    print(f"neuralforecast's time over kallos': a trial {trial}, an epoch {epoch}")


if __name__ == "__main__":
    main()
