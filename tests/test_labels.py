"""Labels and sample weights against references in plain Python that spell the definitions out, on invented markets."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.schemas import LABELS, check_table
from kallos.data.barriers import Barriers, barrier_unit, triple_barrier, unbroken_runs
from kallos.data.labels import make_labels
from kallos.data.sample import sample_bars
from kallos.data.weights import average_uniqueness, concurrency, return_attribution, sample_weights, time_decay

GRID = st.integers(60, 140).map(lambda cents: cents / 100)  # coarse prices, so that barriers are met exactly and tied


@st.composite
def markets(draw, longest: int = 30) -> pd.DataFrame:
    """Bars of prices on a coarse grid, with gaps and filled bars, whose opens may lie anywhere in the bar."""
    n = draw(st.integers(1, longest))
    rows = draw(st.lists(st.tuples(GRID, GRID, GRID, GRID), min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 3]), min_size=n, max_size=n))
    filled = draw(st.lists(st.sampled_from([False] * 7 + [True]), min_size=n, max_size=n))
    prices = np.array([(pair[0], max(pair), min(pair), pair[1]) for pair in rows])
    ts = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.cumsum(gaps), unit="D")
    columns = dict(zip(("open", "high", "low", "close"), prices.T, strict=True))
    return pd.DataFrame({"ts": ts.as_unit("us"), **columns, "volume": 1.0, "is_filled": filled})


def outcome_by_hand(bars: pd.DataFrame, t: int, unit: float, horizon: int, up: float, down: float):
    """(label, end, price) of a position opened at the close of bar t, or None where there is no label."""
    ahead = range(t, t + horizon + 1)
    if ahead[-1] >= len(bars) or math.isnan(unit) or bars["is_filled"].iloc[t]:
        return None
    for bar in ahead[1:]:
        step = bars["ts"].iloc[bar] - bars["ts"].iloc[bar - 1]
        if step != pd.Timedelta(days=1) or bars["is_filled"].iloc[bar]:
            return None
    entry = bars["close"].iloc[t]
    upper, lower = entry * (1 + up * unit), entry * (1 - down * unit)
    for bar in ahead[1:]:
        opened, high, low = (bars[name].iloc[bar] for name in ("open", "high", "low"))
        if opened >= upper:
            return 1, bar, opened
        if opened <= lower:
            return -1, bar, opened
        if low <= lower:
            return -1, bar, lower
        if high >= upper:
            return 1, bar, upper
    return 0, ahead[-1], bars["close"].iloc[ahead[-1]]


@settings(deadline=None, max_examples=300)
@given(
    markets(),
    st.integers(1, 6),
    st.sampled_from([0.5, 1, 2, math.inf]),
    st.sampled_from([0.5, 1, 2, math.inf]),
    st.data(),
)
def test_triple_barrier_is_what_its_definition_says(bars, horizon, up, down, data):
    units = st.sampled_from([0.1, 0.125, 0.25, 1.0, math.nan])
    unit = np.array(data.draw(st.lists(units, min_size=len(bars), max_size=len(bars))))
    runs = unbroken_runs(bars, timeframe="1d")
    outcome = triple_barrier(bars, unit, horizon=horizon, profit_taking=up, stop_loss=down, runs=runs)
    for t, (label, end, price) in enumerate(zip(*outcome, strict=True)):
        expected = outcome_by_hand(bars, t, unit[t], horizon, up, down)
        if expected is None:
            assert (label, end) == (0, -1) and np.isnan(price)
        else:
            assert (label, end, price) == expected


@st.composite
def label_spans(draw) -> tuple[np.ndarray, np.ndarray, int]:
    """(start, end, number of bars), in order of the starts."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=15))
    start = np.array(sorted(first for first, _ in pairs))
    end = start + np.array([length for _, length in pairs])
    return start, end, int(end.max()) + 1 + draw(st.integers(0, 3))


@given(label_spans(), st.integers(0, 2**32 - 1), st.floats(-0.9, 1))
def test_weights_are_what_their_definitions_say(given_spans, seed, oldest):
    start, end, n = given_spans
    returns = np.random.default_rng(seed).normal(size=n)
    spans = [range(first + 1, last + 1) for first, last in zip(start, end, strict=True)]
    count = [sum(bar in span for span in spans) for bar in range(n)]
    unique = [sum(1 / count[bar] for bar in span) / len(span) for span in spans]
    attributed = [abs(sum(returns[bar] / count[bar] for bar in span)) for span in spans]
    assert concurrency(start, end, bars=n).tolist() == count
    np.testing.assert_allclose(average_uniqueness(start, end), unique, rtol=1e-12)
    np.testing.assert_allclose(return_attribution(start, end, log_returns=returns), attributed, atol=1e-12)
    decay = time_decay(np.array(unique), oldest=oldest)
    np.testing.assert_allclose(decay, decay_of_afml(unique, oldest), atol=1e-9)
    for weighting, raw in (("uniqueness", unique), ("return_attribution", attributed)):
        weights = sample_weights(start, end, log_returns=returns, weighting=weighting, oldest=oldest)
        expected = np.array(raw) * decay
        np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-7, atol=1e-9)


def decay_of_afml(weights: list[float], oldest: float) -> np.ndarray:
    """Snippet 4.11 of Advances in Financial Machine Learning, line by line."""
    cumulated = np.cumsum(weights)
    slope = (1.0 - oldest) / cumulated[-1] if oldest >= 0 else 1.0 / ((oldest + 1) * cumulated[-1])
    factor = 1.0 - slope * cumulated[-1] + slope * cumulated
    factor[factor < 0] = 0
    return factor


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 50), st.integers(130, 299), st.integers(1, 12), st.booleans())
def test_nothing_after_t1_changes_a_label(seed, cut, horizon, with_barriers):
    bars = sample_bars(start="2024-01-01", end="2024-10-26", seed=seed)
    wild = bars.copy()
    wild.loc[cut:, ["open", "high", "low", "close"]] *= 2
    barriers = Barriers() if with_barriers else None
    settled = {"timeframe": "1d", "horizons": [horizon], "barriers": barriers}
    columns = ["ts", *(f"{name}_h{horizon}" for name in ("label", "return", "t1"))]
    before, after, early = (make_labels(b, **settled)[columns] for b in (bars, wild, bars[:cut]))
    known = before[f"t1_h{horizon}"] <= bars["ts"].iloc[cut - 1] + pd.Timedelta("1D")
    pd.testing.assert_frame_equal(after[known], before[known], check_exact=True)
    pd.testing.assert_frame_equal(early, before[: len(early)], check_exact=True)


def test_the_volatility_does_not_depend_on_where_the_download_began():
    bars = sample_bars(start="2020-01-01", end="2024-12-31")
    whole = barrier_unit(bars, timeframe="1d", horizon=5)
    for begin in (1, 77, 800):
        late = barrier_unit(bars[begin:].reset_index(drop=True), timeframe="1d", horizon=5)
        np.testing.assert_allclose(late[100:], whole[begin + 100 :], rtol=1e-9)


@pytest.mark.skipif("KALLOS_REAL_DATA" not in os.environ, reason="KALLOS_REAL_DATA names no folder of market data")
def test_labels_of_a_real_market():
    frame = pd.read_parquet(Path(os.environ["KALLOS_REAL_DATA"]) / "bars" / "BTCUSDT_perp_15m.parquet")
    bars = frame.rename(columns={"timestamp": "ts"}).assign(ts=lambda b: b["ts"].dt.tz_localize("UTC"))[:20_000]
    labels = check_table(make_labels(bars, timeframe="15m", horizons=[1, 20, 96]), LABELS, what="labels")
    for horizon in (1, 20, 96):
        shares = labels[f"label_h{horizon}"].value_counts(normalize=True)
        assert shares.min() > 0.15 and abs(shares[1] - shares[-1]) < 0.1
        assert labels[f"sample_weight_h{horizon}"].mean() == pytest.approx(1)
        assert (
            (np.sign(labels[f"return_h{horizon}"]) == labels[f"label_h{horizon}"])
            .loc[labels[f"label_h{horizon}"].isin([-1, 1])]
            .all()
        )
