"""The probability of backtest overfitting against a plain loop over halves, as a ratio, side by side in one run.

Both take 5,000 periods of 100 strategies in 16 blocks: 12,870 halves. The peer is what one writes first once block
sums are known to be enough: a loop that adds up each half's sums, with numpy. Memory is that of this process beyond
the returns, for 1,000 strategies. Run it with `make bench`.
"""

import resource
import statistics
import time
from itertools import combinations

import numpy as np
from market import span
from scipy.stats import rankdata

from kallos.evaluation.selection import judge_selection

PERIODS, STRATEGIES, BLOCKS, PAIRS = 5_000, 100, 16, 5


def plain_loop(returns: np.ndarray) -> float:
    """The share of halves whose best strategy ends in the lower half."""
    blocks = returns.reshape(BLOCKS, -1, returns.shape[1])
    sums, squares, n = blocks.sum(axis=1), (blocks**2).sum(axis=1), len(returns) // 2
    every, logits = set(range(BLOCKS)), []
    for chosen in combinations(range(BLOCKS), BLOCKS // 2):
        sides = []
        for side in (list(chosen), list(every - set(chosen))):
            mean, square = sums[side].sum(axis=0) / n, squares[side].sum(axis=0) / n
            sides.append(mean / np.sqrt(square - mean**2))
        share = rankdata(sides[1])[sides[0].argmax()] / (returns.shape[1] + 1)
        logits.append(np.log(share / (1 - share)))
    return float(np.mean(np.array(logits) <= 0))


def seconds(function, returns: np.ndarray) -> tuple[float, float]:
    """Seconds of one call, and what it returned."""
    begun = time.perf_counter()
    found = function(returns)
    return time.perf_counter() - begun, found


def peak_mb() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints the ratio, and the memory of many strategies."""
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(PERIODS // BLOCKS * BLOCKS, STRATEGIES))
    sides = (lambda values: judge_selection(values, n_blocks=BLOCKS).pbo, plain_loop)
    seconds(sides[0], returns)
    pairs = [[seconds(side, returns) for side in sides] for _ in range(PAIRS)]
    assert all(ours[1] == theirs[1] for ours, theirs in pairs), pairs
    ours, theirs = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    ratio = span([own[0] / peer[0] for own, peer in pairs])
    print(
        f"{len(returns):,} periods, {STRATEGIES} strategies, {BLOCKS} blocks: {ours:.3f} s, loop {theirs:.3f} s,",
        end=" ",
    )
    print(f"ratio {ratio}")
    many, before = rng.normal(size=(len(returns), 1_000)), peak_mb()
    spent, _ = seconds(sides[0], many)
    print(f"1,000 strategies: {spent:.2f} s, {peak_mb() - before:.0f} MiB more than before at the peak")


if __name__ == "__main__":
    main()
