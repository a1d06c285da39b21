"""A training pass of the fast recurrent layers against PyTorch's own, as a ratio, side by side in one run.

Both sides run forward and backward on the same windows with the same weights, one thread, the loss on the last output
as in darts' BlockRNNModel; passes alternate. A ratio of 2 means that PyTorch takes twice as long. Run it with
`make bench`.
"""

import argparse
import gc
import itertools
import statistics
import time

import torch
from torch import nn

from kallos.models.recurrent import FastGRU, FastLSTM

STEPS, INPUTS = 50, 6
LAYERS = {"GRU": (nn.GRU, FastGRU), "LSTM": (nn.LSTM, FastLSTM)}


def seconds(layer: nn.RNNBase, x: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    layer.zero_grad()
    begun = time.perf_counter()
    layer(x)[0][:, -1].sum().backward()
    return time.perf_counter() - begun


def compare(name: str, hidden: int, n_layers: int, batch: int, budget: float) -> float:
    """Prints one line, the medians of both sides and the median and range of their ratio, and returns that median."""
    plain, fast = (kind(INPUTS, hidden, n_layers, batch_first=True) for kind in LAYERS[name])
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(batch, STEPS, INPUTS)
    first = [seconds(layer, x) for layer in (plain, fast, plain, fast)]  # warms up, and compiles if need be
    repeats = max(5, int(budget / sum(first[2:])))
    pairs = [(seconds(plain, x), seconds(fast, x)) for _ in range(repeats)]
    ratios = sorted(bare / ours for bare, ours in pairs)
    bare, ours = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{name:>4} {hidden:>6} {n_layers:>6} {batch:>5} {bare:>10.2f} {ours:>9.2f}   {ratio}")
    return statistics.median(ratios)


def main() -> None:
    """Prints one line a size, and the median and range of each kind's ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each size")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as kallos does
    gc.disable()
    print(f"{STEPS} steps of {INPUTS} inputs, one thread")
    print("kind hidden layers batch PyTorch ms kallos ms   ratio")
    for name in LAYERS:
        grid = itertools.product((32, 64, 128, 256), (1, 2, 4), (32, 64, 128))
        ratios = sorted(compare(name, *sizes, options.budget) for sizes in grid)
        print(f"{name}: median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
