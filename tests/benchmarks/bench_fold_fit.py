"""One fold's fit through kallos against the same network in a bare PyTorch loop, as a ratio, side by side in one run.

Both sides train a GRU on the same rows, with the same batches an epoch, the same optimizer, the same number of epochs
and a validation pass after each; the bare loop has its windows ready as tensors. Run it with `make bench`.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kallos.core.config import TuneSettings
from kallos.core.devices import resolve_device
from kallos.data.features import compute_features
from kallos.data.files import read_bars_file
from kallos.data.sample import sample_bars
from kallos.data.splits import WalkForwardSplit
from kallos.models.architectures import longest_input
from kallos.models.datasets import DartsFold, add_target, calculate_dynamic_wf_kwargs
from kallos.models.validation import FitPlan, fit_fold, prepare_fold

CHUNK, BATCH, LEARNING_RATE = 50, 64, 1e-3


def load_bars() -> tuple[str, pd.DataFrame]:
    """Real daily bars where KALLOS_REAL_DATA is set, else the sample market."""
    folder = os.environ.get("KALLOS_REAL_DATA")
    if folder is None:
        return "sample market", sample_bars(timeframe="1d", seed=0)
    path = Path(folder) / "bars" / "BTCUSDT_spot_1d.csv.gz"
    return path.name, read_bars_file(path, timeframe="1d")


class BareGRU(nn.Module):
    """The network of darts' BlockRNNModel: a GRU and a linear layer on its last state."""

    def __init__(self, n_inputs: int, hidden: int):
        super().__init__()
        self.rnn, self.fc = nn.GRU(n_inputs, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, chunk, inputs) -> (batch, 1)."""
        return self.fc(self.rnn(x)[0][:, -1])


def windows(target, features, skip: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows of a segment as (n, CHUNK, inputs), and the target one bar after each as (n, 1)."""
    values = torch.from_numpy(target.values()[skip:]), torch.from_numpy(features.values()[skip:])
    both = torch.cat(values, dim=1)
    return both.unfold(0, CHUNK, 1)[:-1].transpose(1, 2).contiguous(), values[0][CHUNK:]


def bare_fit(fold: DartsFold, hidden: int, epochs: int) -> float:
    """Seconds of the bare loop."""
    begun = time.perf_counter()
    torch.manual_seed(0)
    x, y = windows(*fold.train[0])
    val_x, val_y = windows(*fold.val[0], skip=fold.lookback - CHUNK)
    network = BareGRU(x.shape[2], hidden)
    optimizer, loss = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE), nn.MSELoss()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(network(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            for part_x, part_y in zip(val_x.split(BATCH), val_y.split(BATCH), strict=True):
                loss(network(part_x), part_y)
    return time.perf_counter() - begun


def kallos_fit(fold: DartsFold, hidden: int, epochs: int, settings: TuneSettings) -> float:
    """Seconds of the same fit through `kallos.models.validation`."""
    hyperparameters = {
        "hidden_dim": hidden, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": BATCH,
        "input_chunk_length": CHUNK, "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    plan = FitPlan(n_epochs=epochs, patience=epochs, device=resolve_device("cpu"))
    return fit_fold(fold, hyperparameters, settings=settings, plan=plan, seed=0).seconds


def main() -> None:
    """Prints one line a hidden size: medians of both sides, and the median and range of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as kallos does
    source, bars = load_bars()
    settings = TuneSettings.from_values({"asset_id": "BTC", "end_date": "2026-01-01"})
    table = add_target(compute_features(bars, timeframe="1d").set_index("ts"), settings.target_col, timeframe="1d")
    layout = calculate_dynamic_wf_kwargs(len(table), input_chunk_length=longest_input(settings))
    fold = prepare_fold(table, WalkForwardSplit(**layout).bounds(len(table))[-1], settings=settings)
    print(f"last of 5 folds of {source}: {len(fold.train[0][0])} training rows, {options.epochs} epochs,", end=" ")
    print(f"one thread, {options.repeats} pairs")
    for hidden in (32, 64, 128):
        pairs = []
        for repeat in range(options.repeats + 1):
            pair = kallos_fit(fold, hidden, options.epochs, settings), bare_fit(fold, hidden, options.epochs)
            pairs += [pair] if repeat else []  # the first pair warms up
        ratios = sorted(ours / bare for ours, bare in pairs)
        ours, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"hidden {hidden:>3}: kallos {ours:.2f} s, bare {bare:.2f} s, ratio {ratio}")


if __name__ == "__main__":
    main()
