"""Combinatorial purged splits through kallos against skfolio's, as a ratio, side by side in one run.

Both sides make all 252 splits of 10 groups with 5 tested over 100,000 rows and hand out the integer row numbers.
skfolio purges by a number of rows, so kallos is first given the same purge as a horizon, and the splits must be equal;
then it does its own work, with a label end for each row, an input window and an embargo of a length of time. Run it
with `make bench`.
"""

import argparse
import statistics
import time

import numpy as np
import pandas as pd
from skfolio.model_selection import CombinatorialPurgedCV as SkfolioCV

from kallos.data.purged import CombinatorialPurgedCV

GROUPS, TESTED, ROWS, HORIZON, EMBARGO = 10, 5, 100_000, 5, 100


def seconds(cv, X) -> float:
    """Seconds to make all splits, each dropped before the next."""
    begun = time.perf_counter()
    for _ in cv.split(X):
        pass
    return time.perf_counter() - begun


def by_label_end(ts: pd.DatetimeIndex) -> CombinatorialPurgedCV:
    """Labels that end after 1 to 20 bars, an input window of 50, an embargo of five days."""
    bars = np.random.default_rng(0).integers(1, 21, len(ts))
    t1 = pd.Series(ts + pd.to_timedelta(bars, unit="h"), index=ts)
    return CombinatorialPurgedCV(GROUPS, TESTED, t1=t1, lookback=50, embargo="5D")


def check_equal(ours: CombinatorialPurgedCV, theirs: SkfolioCV, X) -> None:
    """Exits unless both sides make the same splits; skfolio tests groups that lie beside one another one by one."""
    for (train, test), (peer_train, peer_tests) in zip(ours.split(X), theirs.split(X), strict=True):
        if not (np.array_equal(train, peer_train) and np.array_equal(test, np.concatenate(peer_tests))):
            raise SystemExit("the two sides make different splits")


def main() -> None:
    """Prints a line a splitter: the medians of both sides, and the median and range of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ts = pd.date_range("2014-01-01", periods=ROWS, freq="1h", tz="UTC")
    X = pd.DataFrame({"close": np.zeros(ROWS)}, index=ts)
    skfolio = SkfolioCV(n_folds=GROUPS, n_test_folds=TESTED, purged_size=HORIZON, embargo_size=EMBARGO)
    counted = CombinatorialPurgedCV(GROUPS, TESTED, horizon=HORIZON, embargo=EMBARGO)
    check_equal(counted, skfolio, X)
    splits = f"{counted.get_n_splits()} splits of {ROWS:,} rows"
    print(f"{splits}: {GROUPS} groups, {TESTED} of them tested; {options.repeats} pairs")
    for name, cv in {"by rows, as skfolio": counted, "by label end and window": by_label_end(ts)}.items():
        pairs = [(seconds(cv, X), seconds(skfolio, X)) for _ in range(options.repeats + 1)][1:]  # the first warms up
        ratios = sorted(ours / peer for ours, peer in pairs)
        ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name}: kallos {ours:.3f} s, skfolio {peer:.3f} s, ratio {ratio}")


if __name__ == "__main__":
    main()
