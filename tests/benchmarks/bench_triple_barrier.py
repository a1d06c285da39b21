"""The triple barrier on a million bars against a bare numba loop, as a ratio, side by side in one run.

Both give the label, the bar at which the position ended and the price; the bare loop knows no gaps, no bars that open
beyond a barrier, and no missing volatility. Run it with `make bench`.
"""

import argparse
import statistics
import time

import numpy as np
from numba import njit

from kallos.data.barriers import barrier_unit, triple_barrier, unbroken_runs
from kallos.data.sample import sample_bars


@njit
def bare_triple_barrier(high, low, close, unit, horizon):
    n = len(close)
    label, end, price = np.zeros(n, np.int8), np.full(n, -1), np.full(n, np.nan)
    for t in range(n - horizon):
        upper, lower = close[t] * (1 + unit[t]), close[t] * (1 - unit[t])
        end[t], price[t] = t + horizon, close[t + horizon]
        for bar in range(t + 1, t + horizon + 1):
            if low[bar] <= lower:
                label[t], end[t], price[t] = -1, bar, lower
                break
            if high[bar] >= upper:
                label[t], end[t], price[t] = 1, bar, upper
                break
    return label, end, price


def main() -> None:
    """Prints the medians of both sides, and the median and range of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--bars", type=int, default=1_000_000)
    parser.add_argument("--horizon", type=int, default=20)
    options = parser.parse_args()
    bars = sample_bars(timeframe="1m", start="2022-01-01", end="2024-12-31")[: options.bars]
    unit = barrier_unit(bars, timeframe="1m", horizon=options.horizon)
    runs = unbroken_runs(bars, timeframe="1m")
    columns = {name: np.ascontiguousarray(bars[name]) for name in ("open", "high", "low", "close")}
    arrays = [columns[name] for name in ("high", "low", "close")]
    pairs = []
    for repeat in range(options.repeats + 1):
        begun = time.perf_counter()
        ours = triple_barrier(columns, unit, horizon=options.horizon, runs=runs)
        between = time.perf_counter()
        theirs = bare_triple_barrier(*arrays, unit, options.horizon)
        pairs += [(between - begun, time.perf_counter() - between)] if repeat else []  # the first pair compiles
    known = ours.end >= 0
    assert (ours.label[known] == theirs[0][known]).mean() > 0.999  # they differ only where a bar opens beyond a barrier
    ratios = sorted(mine / bare for mine, bare in pairs)
    mine, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{len(bars):,} bars, horizon {options.horizon}, {options.repeats} pairs")
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    speed = f"{len(bars) / mine / 1e6:.0f} million bars/s"
    print(f"kallos {mine * 1e3:.1f} ms ({speed}), bare {bare * 1e3:.1f} ms, ratio {ratio}, at most 1.2 wanted")


if __name__ == "__main__":
    main()
