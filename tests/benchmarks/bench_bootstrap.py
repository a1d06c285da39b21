"""The stationary bootstrap of a skill against a bare gather, as a ratio, side by side in one run.

Both draw 10,000 histories of 10,000 rows in blocks of ten rows in the mean and take the means of two columns of
squared errors. The peer is the definition, compiled by numba: row by row, a new block or the next row, and a look-up.
Run it with `make bench`.
"""

import statistics
import time

import numpy as np
from market import span
from numba import njit

from kallos.evaluation.bootstrap import resample_means

ROWS, RESAMPLES, LENGTH, PAIRS = 10_000, 10_000, 10, 5


@njit(nogil=True)
def gather(columns: np.ndarray, length: float, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(n_resamples, k) means of drawn histories."""
    n, means = len(columns), np.zeros((n_resamples, columns.shape[1]))
    for resample in range(n_resamples):
        row, total = int(rng.random() * n), means[resample]
        for _ in range(n):
            for k in range(len(total)):
                total[k] += columns[row, k]
            row = int(rng.random() * n) if rng.random() < 1 / length else (row + 1) % n
        total /= n
    return means


def main() -> None:
    """Prints the medians of both sides, and the median and range of their ratio."""
    columns = np.random.default_rng(0).normal(size=(ROWS, 2)) ** 2

    def ours() -> np.ndarray:
        return resample_means(columns, block_length=LENGTH, n_resamples=RESAMPLES)

    def theirs() -> np.ndarray:
        return gather(columns, LENGTH, RESAMPLES, np.random.default_rng(0))

    spreads, times = [side().std(axis=0) for side in (ours, theirs)], []
    np.testing.assert_allclose(*spreads, rtol=0.05)  # the same distribution, and both are compiled now
    for _ in range(PAIRS):
        marks = [time.perf_counter()]
        for side in (ours, theirs):
            side()
            marks.append(time.perf_counter())
        times.append(np.diff(marks))
    own, peer = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = span([one / other for one, other in times], 3)
    print(f"{RESAMPLES:,} histories of {ROWS:,} rows: {own:.3f} s, gather {peer:.3f} s, ratio {ratio}")


if __name__ == "__main__":
    main()
