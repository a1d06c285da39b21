"""A training pass of the fast recurrent layers against PyTorch's own, as a ratio, side by side in one run.

All sides run forward and backward on the same windows with the same weights, one thread, the loss on the last output
as in darts' BlockRNNModel; passes alternate. A ratio of 2 means that PyTorch takes twice as long. Mixed precision is
measured where the processor has it. Run it with `make bench`.
"""

import argparse
import gc
import itertools
import statistics
import time

import torch
from market import span
from torch import nn

from kallos.core.devices import has_bf16_products
from kallos.models.recurrent import FastGRU, FastLSTM, MixedGRU, MixedLSTM

STEPS, INPUTS = 50, 6
LAYERS = {"GRU": (nn.GRU, FastGRU, MixedGRU), "LSTM": (nn.LSTM, FastLSTM, MixedLSTM)}


def seconds(layer: nn.RNNBase, x: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    layer.zero_grad()
    begun = time.perf_counter()
    layer(x)[0][:, -1].sum().backward()
    return time.perf_counter() - begun


def compare(name: str, hidden: int, n_layers: int, batch: int, budget: float) -> list[float]:
    """Prints one line: PyTorch's median, and each other side's with the median and range of its ratio; the medians."""
    kinds = LAYERS[name] if has_bf16_products() else LAYERS[name][:2]
    layers = [kind(INPUTS, hidden, n_layers, batch_first=True) for kind in kinds]
    x = torch.randn(batch, STEPS, INPUTS)
    first = [seconds(layer, x) for layer in layers * 2]  # warms up, and compiles if need be
    repeats = max(5, int(budget / sum(first[len(layers) :])))
    bare, *ours = zip(*[[seconds(layer, x) for layer in layers] for _ in range(repeats)], strict=True)
    ratios = [sorted(plain / own for plain, own in zip(bare, side, strict=True)) for side in ours]
    told = [f"{statistics.median(bare) * 1e3:>10.2f}"]
    for side, ratio in zip(ours, ratios, strict=True):
        told.append(f"{statistics.median(side) * 1e3:>9.2f}   {span(ratio):<22}")
    print(f"{name:>4} {hidden:>6} {n_layers:>6} {batch:>5}", *told)
    return [statistics.median(ratio) for ratio in ratios]


def main() -> None:
    """Prints one line a size, and the median and range of each kind's ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each size")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as kallos does
    gc.disable()
    print(f"{STEPS} steps of {INPUTS} inputs, one thread")
    print("kind hidden layers batch PyTorch ms kallos ms   ratio                     mixed ms   ratio")
    for name in LAYERS:
        grid = itertools.product((32, 64, 128, 256), (1, 2, 4), (32, 64, 128))
        sides = zip(*[compare(name, *sizes, options.budget) for sizes in grid], strict=True)
        for side, ratios in zip(("in full", "mixed"), sides, strict=False):
            print(f"{name}, {side}: median {span(ratios)}")


if __name__ == "__main__":
    main()
