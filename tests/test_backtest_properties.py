"""What must hold of the backtest whatever the market, the orders and the account are."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from kallos.core.errors import KallosError
from kallos.evaluation.simulation import AccountSettings, simulate
from tests.hand_market import FREE, START, market, opens, order, order_table, play

BARS, STEP = 48, pd.Timedelta("1h")
KINDS = ["market", "limit", "stop", "stop_limit", "take_profit", "trailing_stop"]
FLOWS = ["fees", "funding", "borrow", "liquidation"]
OFF_BAR = ["limit", "take_profit", "stop_limit"]  # may be filled at their own level where the price jumped over it

seeds = given(seed=st.integers(0, 2**32 - 1))
# a seed cannot be made simpler: no shrinking
ONCE = [Phase.explicit, Phase.generate]
few = settings(max_examples=12, deadline=None, derandomize=True, database=None, phases=ONCE)


def random_bars(rng: np.random.Generator, *, whole: bool = False) -> pd.DataFrame:
    """Bars with jumps between them; unless `whole`, some are missing, some without volume, some printed by nobody."""
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.02, BARS)))
    first = np.concatenate([[100.0], close[:-1]]) * np.exp(rng.normal(0, 0.01, BARS) * (rng.random(BARS) < 0.4))
    reach = 1 + np.abs(rng.normal(0, 0.01, (2, BARS)))
    high, low = np.maximum(first, close) * reach[0], np.minimum(first, close) / reach[1]
    volume = rng.uniform(50, 500, BARS) * (whole | (rng.random(BARS) > 0.08))
    bars = market(*zip(first, high, low, close, strict=True), volume=volume)
    if whole:
        return bars
    bars["is_filled"] = rng.random(BARS) < 0.05
    kept = (rng.random(BARS) > 0.08) | (np.arange(BARS) < 4)
    return bars[kept].reset_index(drop=True)


def random_order(rng: np.random.Generator, asset: str, bar: int, close: float, unit: str | None) -> dict:
    unit = unit or rng.choice(["fraction", "position", "units", "close"])
    size = rng.normal(0, 1.0 if unit == "fraction" else 40)
    one = order(bar, str(rng.choice(KINDS, p=[0.4, *[0.12] * 5])), size, str(unit), asset)
    one["price"] = close * np.exp(rng.normal(0, 0.02))
    one["limit_price"] = one["price"] * np.exp(rng.normal(0, 0.01))
    one["trail"] = rng.uniform(0.005, 0.05)
    for name in ("stop_loss", "take_profit", "trailing_stop"):
        one[name] = rng.uniform(0.005, 0.06) if rng.random() < 0.3 else np.nan
    one["expires"] = int(rng.integers(1, 8)) if rng.random() < 0.3 else np.nan
    one["replaces"] = bool(rng.random() < 0.5)
    return one


def random_orders(rng: np.random.Generator, bars: dict, often: float = 0.3, unit: str | None = None) -> pd.DataFrame:
    rows = []
    for asset, table in bars.items():
        places = ((table["ts"] - START) // STEP).to_numpy()
        for place, close in zip(places, table["close"], strict=True):
            if rng.random() < often:
                rows.append(random_order(rng, asset, int(place), close, unit))
    return order_table(rows or [order(0, size=1.0)])


def random_account(rng: np.random.Generator, **fixed) -> AccountSettings:
    kind = str(rng.choice(["spot", "perpetual"]))
    drawn = {
        "market": kind,
        "maker_fee": rng.uniform(0, 0.002),
        "taker_fee": rng.uniform(0, 0.002),
        "half_spread": rng.uniform(0, 0.001),
        "slippage": rng.uniform(0, 0.001),
        "slippage_volatility": rng.uniform(0, 0.2),
        "slippage_volume": rng.uniform(0, 0.1),
        "volume_limit": rng.choice([None, 0.1, 0.5]),
        "borrow_rate": 0.1 if kind == "spot" and rng.random() < 0.5 else None,
        "leverage": float(rng.choice([1.0, 3.0, 10.0])),
        "min_notional": float(rng.choice([0.0, 200.0])),
        "tick": float(rng.choice([0.0, 0.05])),
        "lot": float(rng.choice([0.0, 0.25])),
        "delay": int(rng.choice([0, 0, 1, 2])),
    }
    drawn |= fixed
    if drawn["market"] == "spot" and drawn["borrow_rate"] is None:
        drawn["leverage"] = 1.0
    return AccountSettings(**drawn)


def allowed(orders: pd.DataFrame, account: AccountSettings) -> pd.DataFrame:
    """The orders, none of which wants a short position where nothing can be borrowed."""
    wants = orders["unit"].isin(["fraction", "position"])
    if account.market == "perpetual" or account.borrow_rate is not None:
        return orders
    return orders.assign(size=orders["size"].mask(wants, orders["size"].abs()))


def random_rates(rng: np.random.Generator, bars: dict) -> dict:
    due = opens(range(0, BARS, 4)) + pd.Timedelta(str(rng.choice(["0s", "4ms", "30min"])))
    return {name: pd.DataFrame({"ts": due, "rate": rng.normal(0, 0.002, len(due))}) for name in bars}


def scene(seed: int, **fixed) -> tuple:
    """(bars, orders, account, funding): one to three assets, orders of every kind, any account."""
    rng = np.random.default_rng(seed)
    bars = {name: random_bars(rng) for name in "ABC"[: rng.integers(1, 4)]}
    account = random_account(rng, **fixed)
    return bars, allowed(random_orders(rng, bars), account), account, random_rates(rng, bars)


def run(bars, orders, account, funding=None):
    rates = funding if account.market == "perpetual" else None
    return simulate(bars, orders, account, timeframe="1h", funding=rates)


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True), check_exact=True)


def closes(bars: dict, equity: pd.DataFrame) -> pd.DataFrame:
    """(bars, assets) the last close that each asset had at each row of the equity."""
    known = {name: table.assign(ts=table["ts"] + STEP).set_index("ts")["close"] for name, table in bars.items()}
    return pd.DataFrame(known).reindex(pd.DatetimeIndex(equity["ts"])).ffill()


# The books


@few
@seeds
def test_the_books_close(seed):
    bars, orders, account, funding = scene(seed)
    result = run(bars, orders, account, funding)
    equity, fills = result.equity, result.fills
    paid = (fills["units"] * fills["price"]).groupby(fills["ts"] + STEP).sum()
    paid = paid.reindex(pd.DatetimeIndex(equity["ts"]), fill_value=0.0).to_numpy()
    cash = account.capital - np.cumsum(paid + equity[FLOWS].sum(axis=1).to_numpy())
    size = 1e-9 * (account.capital + fills["notional"].sum())
    np.testing.assert_allclose(equity["cash"], cash, rtol=0, atol=size)
    held = pd.DataFrame({name: equity[f"units_{name}"].to_numpy() for name in bars})
    worth = (held * closes(bars, equity).fillna(0).to_numpy()).to_numpy()
    np.testing.assert_allclose(equity["position_value"], worth.sum(axis=1), rtol=0, atol=size)
    np.testing.assert_allclose(equity["equity"], equity["cash"] + worth.sum(axis=1), rtol=0, atol=size)
    assert result.trades["net_pnl"].sum() == pytest.approx(equity["equity"].iloc[-1] - account.capital, abs=size)


@few
@seeds
def test_units_are_the_sum_of_the_fills(seed):
    bars, orders, account, funding = scene(seed)
    result = run(bars, orders, account, funding)
    for name in bars:
        mine = result.fills[result.fills["asset_id"] == name]
        steps = mine.groupby(mine["ts"] + STEP)["units"].sum()
        units = steps.reindex(pd.DatetimeIndex(result.equity["ts"]), fill_value=0.0).cumsum()
        np.testing.assert_allclose(
            result.equity[f"units_{name}"], units, rtol=0, atol=1e-9 * (1 + mine["units"].abs().sum())
        )


@few
@seeds
def test_each_cost_is_the_sum_over_the_fills(seed):
    bars, orders, account, funding = scene(seed)
    result = run(bars, orders, account, funding)
    equity, fills = result.equity, result.fills
    for name, column in {"fees": "fee", "spread": "spread", "slippage": "slippage"}.items():
        assert equity[name].sum() == pytest.approx(fills[column].sum(), rel=1e-9, abs=1e-9)
        assert (fills[column] >= -1e-9).all()
    for name in ("fees", "spread", "slippage", "funding", "borrow"):
        assert result.trades[name].sum() == pytest.approx(equity[name].sum(), rel=1e-9, abs=1e-6)
    dearer = fills["units"].abs() * (fills["price"] - fills["base_price"]).abs()
    np.testing.assert_allclose(fills["spread"] + fills["slippage"], dearer, rtol=1e-9, atol=1e-6)
    rate = np.where(fills["liquidity"] == "maker", account.maker_fee, account.taker_fee)
    traded = fills["reason"] != "liquidation"
    np.testing.assert_allclose(fills["fee"][traded], (rate * fills["notional"])[traded], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fills["notional"], (fills["units"] * fills["price"]).abs(), rtol=1e-12)


# What a fill may be


@few
@seeds
def test_every_fill_was_possible(seed):
    bars, orders, account, funding = scene(seed)
    result = run(bars, orders, account, funding)
    for fill in result.fills.itertuples():
        bar = bars[fill.asset_id].set_index("ts").loc[fill.ts]
        side = np.sign(fill.units)
        assert bar["volume"] > 0
        assert not bar["is_filled"]
        assert side * (fill.price - fill.base_price) >= -1e-9
        assert fill.base_price >= bar["low"] - 1e-9 if side > 0 else fill.base_price <= bar["high"] + 1e-9
        if fill.reason not in OFF_BAR:
            assert bar["low"] - 1e-9 <= fill.base_price <= bar["high"] + 1e-9
        if fill.liquidity == "maker":
            assert fill.price == fill.base_price
        if fill.reason != "liquidation":
            assert fill.decided_ts + account.delay * STEP <= fill.ts


@few
@seeds
def test_a_limit_is_never_filled_at_a_worse_price(seed):
    bars, orders, account, funding = scene(seed, tick=0.0)
    fills = run(bars, orders, account, funding).fills
    for fill in fills[fills["reason"].isin(["limit", "stop_limit"]) & (fills["order"] >= 0)].itertuples():
        one = orders.iloc[fill.order]
        level = one["limit_price"] if one["kind"] == "stop_limit" else one["price"]
        assert np.sign(fill.units) * (level - fill.price) >= -1e-9


@few
@seeds
def test_no_fill_after_expiry_and_none_of_more_than_was_asked(seed):
    bars, orders, account, funding = scene(seed)
    result = run(bars, orders, account, funding)
    own = result.fills[(result.fills["order"] >= 0) & (result.fills["kind"] != "bracket")]
    asked = orders.loc[orders["unit"] == "units", "size"]
    filled = own[own["reason"] == own["order"].map(orders["kind"])].groupby("order")["units"].sum()
    for row, size in asked.items():
        assert abs(filled.get(row, 0.0)) <= abs(size) * (1 + 1e-9)
    for fill in own[own["reason"] == "limit"].itertuples():
        one, times = orders.iloc[fill.order], bars[fill.asset_id]["ts"]
        if one["kind"] == "limit" and one["expires"] > 0:
            assert times.between(one["ts"] + account.delay * STEP, fill.ts).sum() <= one["expires"]


@few
@seeds
def test_volume_is_shared_by_all_fills_of_a_bar(seed):
    bars, orders, account, funding = scene(seed, volume_limit=0.05, leverage=10.0)
    fills = run(bars, orders, account, funding).fills.query("reason != 'liquidation'")
    for (asset, ts), units in fills.groupby(["asset_id", "ts"])["units"]:
        volume = bars[asset].set_index("ts")["volume"].loc[ts]
        assert units.abs().sum() <= 0.05 * volume * (1 + 1e-9)


@few
@seeds
def test_spot_without_leverage_never_owes(seed):
    bars, orders, account, funding = scene(seed, market="spot", leverage=1.0, borrow_rate=None)
    equity = run(bars, orders, account, funding).equity
    assert (equity["cash"] >= -1e-9 * account.capital).all()
    assert (equity.filter(like="units_") >= -1e-9).all(axis=None)


# No look at what comes later


def assert_prefix(longer, shorter, moment: pd.Timestamp) -> None:
    """Both runs show the same up to the close at that moment."""
    same(longer.equity[longer.equity["ts"] <= moment], shorter.equity[shorter.equity["ts"] <= moment])
    same(longer.fills[longer.fills["ts"] < moment], shorter.fills[shorter.fills["ts"] < moment])


@few
@given(seed=st.integers(0, 2**32 - 1), row=st.integers(8, BARS - 2))
def test_a_run_cut_short_is_the_beginning_of_the_run(seed, row):
    bars, orders, account, funding = scene(seed)
    moment = opens([row])[0]
    known = {name: table[table["ts"] < moment].reset_index(drop=True) for name, table in bars.items()}
    rates = {name: table[table["ts"] < moment] for name, table in funding.items()}
    early = orders[orders["ts"] <= moment].reset_index(drop=True)
    if early.empty:
        return
    cut = run(known, early, account, rates)
    assert len(cut.equity) == (cut.equity["ts"] <= moment).sum()
    assert_prefix(run(bars, orders, account, funding), cut, moment)


@few
@given(seed=st.integers(0, 2**32 - 1), row=st.integers(4, BARS - 4), how=st.sampled_from(["shuffled", "reversed"]))
def test_what_comes_later_changes_nothing_before(seed, row, how):
    bars, orders, account, funding = scene(seed)
    moment, rng = opens([row])[0], np.random.default_rng(seed)
    other = {}
    for name, table in bars.items():
        late = np.flatnonzero(table["ts"] >= moment)
        order_of = late[::-1] if how == "reversed" else rng.permutation(late)
        other[name] = table.copy()
        other[name].iloc[late, 1:] = table.iloc[order_of, 1:].to_numpy()
        other[name] = other[name].astype(table.dtypes)
    assert_prefix(run(bars, orders, account, funding), run(other, orders, account, funding), moment)


@few
@seeds
def test_the_same_run_twice_is_the_same(seed):
    first, second = run(*scene(seed)), run(*scene(seed))
    for name in ("equity", "fills", "trades", "orders"):
        same(getattr(first, name), getattr(second, name))


@few
@seeds
def test_the_inputs_are_left_as_they_were(seed):
    bars, orders, account, funding = scene(seed)
    run(bars, orders, account, funding)
    before = scene(seed)
    same(orders, before[1])
    for name, table in bars.items():
        same(table, before[0][name])


# Costs and scales

COSTS = {
    "taker_fee": (0.0005, 0.002),
    "half_spread": (0.0, 0.001),
    "slippage": (0.0, 0.002),
    "slippage_volatility": (0.0, 0.3),
    "slippage_volume": (0.0, 0.2),
    "tick": (0.0, 0.05),
}


@pytest.mark.parametrize("cost", COSTS)
@settings(few, max_examples=5)
@seeds
def test_more_cost_is_never_more_equity(cost, seed):
    rng = np.random.default_rng(seed)
    bars = {"A": random_bars(rng)}
    orders = random_orders(rng, bars, unit="units").assign(kind="market")[["ts", "asset_id", "kind", "unit", "size"]]
    wide = {"market": "perpetual", "leverage": 100.0, "capital": 1e6} | FREE
    cheap, dear = (run(bars, orders, AccountSettings(**(wide | {cost: value}))) for value in COSTS[cost])
    np.testing.assert_array_equal(cheap.fills["units"], dear.fills["units"])
    assert (dear.equity["equity"] <= cheap.equity["equity"] + 1e-9 * 1e6).all()


@pytest.mark.parametrize(("factor", "rtol"), [(2.0**7, 0), (2.0**-5, 0), (3.7, 1e-9), (0.001, 1e-9)])
@settings(few, max_examples=8)
@seeds
def test_prices_and_capital_in_another_currency(factor, rtol, seed):
    bars, orders, account, funding = scene(seed, tick=0.0, lot=0.0, min_notional=0.0)
    plain = run(bars, orders, account, funding)
    dearer = {
        name: table.assign(**{one: table[one] * factor for one in ("open", "high", "low", "close")})
        for name, table in bars.items()
    }
    levels = orders.assign(price=orders["price"] * factor, limit_price=orders["limit_price"] * factor)
    scaled = run(dearer, levels, account.model_copy(update={"capital": account.capital * factor}), funding)
    atol = rtol * account.capital * factor
    np.testing.assert_allclose(scaled.equity["equity"], plain.equity["equity"] * factor, rtol=rtol, atol=atol)
    np.testing.assert_allclose(scaled.fills["units"], plain.fills["units"], rtol=max(rtol, 0), atol=rtol)


@few
@seeds
def test_an_asset_that_is_not_traded_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    bars = {"A": random_bars(rng, whole=True), "B": random_bars(rng, whole=True)}
    account = random_account(rng, market="spot", borrow_rate=0.1)
    orders = random_orders(rng, {"A": bars["A"]})
    alone, beside = run({"A": bars["A"]}, orders, account), run(bars, orders, account)
    same(alone.equity, beside.equity.drop(columns="units_B"))
    same(alone.fills, beside.fills)


# A game of chance stays one: on a walk without drift, bought and left within a bar, no rule earns anything

LEVEL, STEPS, GAMES = 1_000_000, 1_600, 8_000  # a bar moves by 40 ticks or so


@pytest.fixture(scope="module")
def chance() -> pd.DataFrame:
    """A bar of a fair coin from the same price on each second place, a bar that stays where it ended on the others."""
    rng = np.random.default_rng(20)
    way = np.cumsum(2 * rng.integers(0, 2, (GAMES, STEPS), dtype=np.int8).astype(np.int16) - 1, axis=1, dtype=np.int16)
    high, low, close = (
        one.astype(float) for one in (way.max(axis=1).clip(0), way.min(axis=1).clip(None, 0), way[:, -1])
    )
    rows = np.empty((2 * GAMES + 1, 4))
    rows[0] = LEVEL
    rows[1::2] = LEVEL + np.column_stack([np.zeros(GAMES), high, low, close])
    rows[2::2] = LEVEL + np.repeat(close[:, None], 4, axis=1)
    return market(*rows)


def share(ticks: int) -> float:
    """That many ticks as a share of the price, a hundredth less, so that a level is reached when its tick is."""
    return (ticks - 0.01) / LEVEL


def beside(kind: str, size: float = 1.0, **extra) -> dict:
    return order(0, kind, size, replaces=False, **extra)


def leaving(kind: str, level: float) -> dict:
    return beside(kind, unit="close", price=LEVEL + level)


RULES = {
    "hold": [beside("market")],
    "short": [beside("market", -1)],
    "stop": [beside("market", stop_loss=share(20))],
    "profit": [beside("market", take_profit=share(20))],
    "limit out": [beside("market"), leaving("limit", 20)],
    "stop and profit": [beside("market", stop_loss=share(20), take_profit=share(30))],
    "short with stop and profit": [beside("market", -1, stop_loss=share(20), take_profit=share(30))],
    "close trailing stop": [beside("market", trailing_stop=share(10))],
    "nearer trailing stop": [beside("market", trailing_stop=share(15))],
    "trailing stop": [beside("market", trailing_stop=share(25))],
    "far trailing stop": [beside("market", trailing_stop=share(40))],
    "trailing stop of a short": [beside("market", -1, trailing_stop=share(25))],
    "limit": [beside("limit", price=LEVEL - 20)],
    "limit with a stop": [beside("limit", price=LEVEL - 20, stop_loss=share(20))],
    "limit with a profit": [beside("limit", price=LEVEL - 20, take_profit=share(20))],
    "limit with a trailing stop": [beside("limit", price=LEVEL - 20, trailing_stop=share(20))],
    "limit below a stop": [beside("limit", price=LEVEL - 30), leaving("stop", -10)],
    "limit below a limit": [beside("limit", price=LEVEL - 20), leaving("limit", 20)],
    "limits on both sides": [beside("limit", price=LEVEL - 20), beside("limit", -1, price=LEVEL + 20)],
    "breakout": [beside("stop", price=LEVEL + 20)],
    "breakout with a stop": [beside("stop", price=LEVEL + 20, stop_loss=share(20))],
    "breakout with a trailing stop": [beside("stop", price=LEVEL + 20, trailing_stop=share(20))],
    "breakouts on both sides": [beside("stop", price=LEVEL + 20), beside("stop", -1, price=LEVEL - 20)],
    "stop-limit above": [beside("stop_limit", price=LEVEL + 20, limit_price=LEVEL + 30)],
    "stop-limit below its trigger": [beside("stop_limit", price=LEVEL + 20, limit_price=LEVEL + 10)],
    "stop-limit far below its trigger": [beside("stop_limit", price=LEVEL + 20, limit_price=LEVEL - 10)],
    "more below, stop above it": [
        beside("market"),
        beside("limit", price=LEVEL - 30),
        leaving("stop", -10),
    ],
    "more below, profit above it": [
        beside("market"),
        beside("limit", price=LEVEL - 20),
        beside("limit", -2, price=LEVEL + 20),
    ],
    "turned by a stop": [beside("market"), beside("stop", -2, price=LEVEL - 20)],
    "turned by a limit": [beside("market"), beside("limit", -2, price=LEVEL + 20)],
}


def games(rule: list[dict]) -> pd.DataFrame:
    """The rule's orders before each bar of chance, and the way out at its end, whatever is left."""
    out = order(1, unit="close")
    blocks = [pd.DataFrame([one]).loc[lambda t: t.index.repeat(GAMES)] for one in (*rule, out)]
    table = pd.concat([block.assign(bar=block["bar"] + 2 * np.arange(GAMES)) for block in blocks], ignore_index=True)
    return table.sort_values("bar", kind="stable", ignore_index=True)


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_earns_on_a_game_of_chance(chance, rule):
    table = games(RULES[rule])
    table.insert(0, "ts", opens(table.pop("bar") + 1))
    if "replaces" in table:
        table["replaces"] = [one is not False for one in table["replaces"]]
    account = AccountSettings(**FREE, market="perpetual", leverage=10.0, capital=1e8)
    equity = simulate({"A": chance}, table, account, timeframe="1h").equity["equity"].to_numpy()
    won = np.diff(equity[::2])
    error = won.std() / np.sqrt(GAMES)
    assert won.mean() <= 3 * error, f"a game earns {won.mean():.2f} ticks, give or take {error:.2f}"


def test_wrong_tables_are_refused():
    with pytest.raises(KallosError):
        play(market((100, 101, 99, 100), (100, 101, 99, 100)), order(0, "iceberg"))
    with pytest.raises(KallosError):
        play(market((100, 101, 99, 100), (100, 101, 99, 100)), order(0, asset="Z"))
    with pytest.raises(KallosError):
        play(market((100, 101, 99, 100), (100, 101, 99, 100)), order(0, size=np.nan))
