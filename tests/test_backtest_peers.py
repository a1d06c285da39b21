"""The backtest against engines of others, a loop of ten lines, and perfect foresight in closed form."""

import numpy as np
import pandas as pd
import pytest

from tests.hand_market import market, order, play

CAPITAL, FEE = 100_000.0, 0.001
WIDE = {"market": "perpetual", "leverage": 100.0, "capital": CAPITAL}


def walk(bars: int, seed: int, *, gaps: bool) -> pd.DataFrame:
    """Bars of a random walk, that open where the last one closed unless there are gaps."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, bars)))
    first = np.concatenate([[100.0], close[:-1]]) * (np.exp(rng.normal(0, 0.003, bars)) if gaps else 1)
    reach = 1 + np.abs(rng.normal(0, 0.004, (2, bars)))
    high, low = np.maximum(first, close) * reach[0], np.minimum(first, close) / reach[1]
    return market(*zip(first, high, low, close, strict=True))


def targets(bars: int, seed: int) -> np.ndarray:
    """(bars) whole units wanted at each close; most closes want what the one before wanted."""
    rng = np.random.default_rng(seed)
    changes = rng.random(bars) < 0.3
    wanted = rng.integers(-9, 10, bars)
    return np.where(changes, wanted, 0)[np.maximum.accumulate(np.where(changes, np.arange(bars), 0))]


def bought(wanted: np.ndarray) -> np.ndarray:
    """(bars) units to trade at each open, decided at the close before."""
    return np.diff(np.concatenate([[0, 0], wanted[:-1]]))


def ours(bars: pd.DataFrame, wanted: np.ndarray) -> np.ndarray:
    changes = np.diff(wanted, prepend=0)
    rows = [order(int(bar), size=changes[bar]) for bar in np.flatnonzero(changes)]
    return play(bars, *rows, taker_fee=FEE, **WIDE).equity["equity"].to_numpy()


def in_ten_lines(bars: pd.DataFrame, wanted: np.ndarray) -> np.ndarray:
    cash, units, equity = CAPITAL, 0, []
    for first, close, trade in zip(bars["open"], bars["close"], bought(wanted), strict=True):
        cash -= trade * first + abs(trade) * first * FEE
        units += trade
        equity.append(cash + units * close)
    return np.array(equity)


def of_vectorbt(bars: pd.DataFrame, wanted: np.ndarray) -> np.ndarray:
    vectorbt = pytest.importorskip("vectorbt", reason="bench only: pip install vectorbt==1.2.0")
    size = bought(wanted).astype(float)
    size[size == 0] = np.nan
    how = {"price": bars["open"], "fees": FEE, "init_cash": CAPITAL, "freq": "1h"}
    return vectorbt.Portfolio.from_orders(bars["close"], size, size_type="amount", **how).value().to_numpy()


def of_backtesting(bars: pd.DataFrame, wanted: np.ndarray) -> np.ndarray:
    peer = pytest.importorskip("backtesting", reason="bench only: pip install backtesting==0.6.6")

    class Follow(peer.Strategy):
        def init(self):
            self.changes = np.diff(wanted, prepend=0)

        def next(self):
            change = int(self.changes[len(self.data) - 1])
            if change:
                (self.buy if change > 0 else self.sell)(size=abs(change))

    table = bars.set_index("ts").rename(columns=str.capitalize)
    run = peer.Backtest(table, Follow, cash=CAPITAL, commission=FEE, margin=0.01, finalize_trades=False).run()
    return run["_equity_curve"]["Equity"].to_numpy()


@pytest.mark.parametrize("peer", [in_ten_lines, of_vectorbt, of_backtesting])
@pytest.mark.parametrize("seed", range(4))
def test_market_orders_at_the_next_open(peer, seed):
    bars, wanted = walk(300, seed, gaps=True), targets(300, seed + 100)
    wanted[0] = 0  # backtesting.py does not act on the first bar
    np.testing.assert_allclose(ours(bars, wanted), peer(bars, wanted), rtol=1e-9)


@pytest.mark.parametrize("peer", [in_ten_lines, of_vectorbt])
def test_buy_and_hold(peer):
    bars, wanted = walk(300, 7, gaps=True), np.full(300, 5)
    np.testing.assert_allclose(ours(bars, wanted), peer(bars, wanted), rtol=1e-9)


# Perfect foresight: a signal that knows the next bar earns what the closed form says, and not a cent more


def foresight(bars: pd.DataFrame) -> np.ndarray:
    """(bars - 2) +1 or -1: where the price goes from the open after that close to the open after that."""
    return np.sign(np.diff(bars["open"].to_numpy())[1:])


def changed(signal: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(signal, prepend=np.nan) != 0)


def test_perfect_foresight_without_costs_compounds_every_move():
    bars = walk(400, 1, gaps=False)
    rows = [order(bar, unit="fraction", size=side) for bar, side in enumerate(foresight(bars))]
    result = play(bars, *rows, order(398, unit="close"), **(WIDE | {"leverage": 1.0}))
    prices = bars["open"].to_numpy()[1:]
    assert result.equity["equity"].iloc[-1] == pytest.approx(
        CAPITAL * np.prod(1 + np.abs(prices[1:] / prices[:-1] - 1)), rel=1e-9
    )


def test_perfect_foresight_of_a_spot_buyer_pays_on_every_turn():
    # all of the account buys E / (p (1 + f)) units, and all of them bring p (1 - f)
    bars = walk(400, 2, gaps=True)
    signal = np.append(np.maximum(foresight(bars), 0), 0)
    rows = [order(int(bar), unit="fraction", size=10 * signal[bar]) for bar in changed(signal)]
    result = play(bars, *rows, capital=CAPITAL, taker_fee=FEE)
    prices, held = bars["open"].to_numpy()[1:], signal[:-1] > 0
    turns = (1 - FEE) ** (np.diff(signal) < 0).sum() / (1 + FEE) ** (np.diff(signal, prepend=0) > 0).sum()
    earned = np.prod((prices[1:] / prices[:-1])[held]) * turns
    assert result.equity["equity"].iloc[-1] == pytest.approx(CAPITAL * earned, rel=1e-9)


def test_perfect_foresight_of_one_unit_pays_on_every_turn():
    bars = walk(400, 3, gaps=True)
    signal = np.append(foresight(bars), 0)
    rows = [order(int(bar), unit="position", size=signal[bar]) for bar in changed(signal)]
    result = play(bars, *rows, taker_fee=FEE, half_spread=0.002, **WIDE)
    prices, units = bars["open"].to_numpy()[1:], np.diff(signal, prepend=0)
    paid = prices * (1 + 0.002 * np.sign(units))
    earned = np.abs(np.diff(prices)).sum() - (np.abs(units) * prices * 0.002).sum() - FEE * (np.abs(units) * paid).sum()
    assert result.equity["equity"].iloc[-1] == pytest.approx(CAPITAL + earned, rel=1e-9)


def test_the_same_foresight_one_bar_late_is_no_foresight():
    bars = walk(2_000, 4, gaps=False)
    late = np.sign(np.diff(bars["open"].to_numpy()))[:-1]
    rows = [order(int(bar) + 1, unit="position", size=late[bar]) for bar in changed(late)[:-1]]
    result = play(bars, *rows, **WIDE)
    moves = np.abs(np.diff(bars["open"])).sum()
    assert abs(result.equity["equity"].iloc[-1] - CAPITAL) < 0.1 * moves
