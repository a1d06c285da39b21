"""Runs under other settings against runs of their own, break-even costs against arithmetic, and heat maps."""

import math
import threading
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from kallos.core.errors import ConfigError, DataError
from kallos.evaluation import sensitivity as room
from kallos.evaluation.heat_maps import default_grid, sensitivity_figures
from kallos.evaluation.performance import figures_of_merit
from kallos.evaluation.sensitivity import break_even_cost, round_trip_cost, sensitivity_table
from kallos.evaluation.simulation import AccountSettings, simulate
from kallos.evaluation.strategies import StrategySettings, make_orders

HOUR = pd.Timedelta("1h")
PERPETUAL = AccountSettings(market="perpetual")
RESULTS = ["final_equity", "total_return", "sharpe", "max_drawdown", "trades", "costs", "turnover"]


def market(asset: str, n: int, seed: int, *, skill: float = 0.05, start: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bars of a random walk, and forecasts that know a part of its next step."""
    rng = np.random.default_rng(seed)
    moves = rng.normal(0, 0.006, n)
    close = 100 * np.exp(moves.cumsum())
    opened = np.r_[100, close[:-1]]
    high, low = np.maximum(opened, close) * 1.002, np.minimum(opened, close) / 1.002
    ts = pd.date_range("2024-01-01", periods=n, freq="1h", tz="UTC") + start * HOUR
    bars = pd.DataFrame({"ts": ts, "open": opened, "high": high, "low": low, "close": close})
    names = {"asset_id": asset, "timeframe": "1h", "model": "gru", "fold": 0, "horizon": 1, "target": "return"}
    known = skill * np.r_[moves[1:], 0] + rng.normal(0, 0.0015, n)
    values = {"close_at_ts": close, "y_true": 0.0, "y_naive": 0.0, "y_pred": known}
    made = pd.DataFrame({"ts": ts + HOUR, "target_ts": ts + 2 * HOUR} | names | values)
    return bars.assign(volume=rng.uniform(500, 5000, n)), made[40:].reset_index(drop=True)


@pytest.fixture(scope="module")
def btc() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Bars and forecasts of one asset."""
    return market("BTC", 1_500, 1)


@pytest.fixture(scope="module")
def two() -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Two assets that begin at other times, one with holes in its bars and in its forecasts."""
    (one, of_one), (other, of_other) = market("BTC", 700, 2), market("ETH", 600, 3, start=55)
    hole = range(200, 230)
    of_other = of_other[~of_other["ts"].isin(other["ts"][hole] + HOUR)]
    both = pd.concat([of_one, of_other]).sort_values("ts", kind="stable", ignore_index=True)
    return {"BTC": one, "ETH": other.drop(index=hole).reset_index(drop=True)}, both


def alone(forecasts, bars, strategy, account, funding=None) -> list[float]:
    """What a run of its own says, by way of the tables."""
    orders = make_orders(forecasts, strategy, cost=round_trip_cost(account), bars=bars)
    run = simulate(bars, orders, account, timeframe="1h", funding=funding)
    tables = {"timeframe": "1h", "capital": account.capital, "fills": run.fills}
    found = figures_of_merit(run.equity, run.trades, **tables)
    return [found["end_equity"], *(found[name] for name in RESULTS[1:])]


def test_points_drawn_at_random_are_runs_of_their_own(two):
    bars, forecasts = two
    rng = np.random.default_rng(4)
    rates = {"ETH": pd.DataFrame({"ts": bars["ETH"]["ts"][::8], "rate": rng.normal(0, 0.001, len(bars["ETH"][::8]))})}
    choices = {
        "fee": [0.0, 0.0005], "half_spread": [0.0, 0.0002], "slippage": [0.0, 0.0004], "delay": [0, 1, 5],
        "slippage_volatility": [0.0, 0.05], "slippage_volume": [0.0, 10.0], "volume_limit": [None, 0.001],
        "leverage": [1, 2, 20], "lot": [0.0, 0.5], "min_notional": [0.0, 400.0], "tick": [0.0, 0.05],
        "fraction": [0.3, 1.0, 8.0], "signal": ["return", "rank", "cross_rank"], "entry": [0.0, 0.001],
        "side": ["both", "short"], "holding": [1, 4], "stop_at": [None, 0.004], "take_profit_at": [None, 0.006],
        "trail_by": [None, 0.005], "sizing": ["fixed", "volatility", "kelly"], "capital": [2_000.0, 10_000.0],
    }  # fmt: skip
    grid = [{name: [values[rng.integers(len(values))]] for name, values in choices.items()} for _ in range(40)]
    own = {"strategy": StrategySettings(), "account": PERPETUAL}
    table = sensitivity_table(forecasts, bars, grid=grid, funding=rates, n_jobs=3, **own)
    assert len(table) == 40 and table["trades"].gt(0).sum() > 20
    for row, changes in zip(table.itertuples(), grid, strict=True):
        given = {name: values[0] for name, values in changes.items()}
        given |= dict.fromkeys(["maker_fee", "taker_fee"], given["fee"])
        account = PERPETUAL.model_copy(update={n: given[n] for n in AccountSettings.model_fields if n in given})
        strategy = StrategySettings(**{n: given[n] for n in StrategySettings.model_fields if n in given})
        expected = alone(forecasts, bars, strategy, account, rates)
        np.testing.assert_allclose([getattr(row, name) for name in RESULTS], expected, rtol=1e-9, atol=1e-9)


def test_the_rows_do_not_depend_on_the_threads(btc):
    bars, forecasts = btc
    grid = {"delay": [3, 0], "fee": [0.001, 0.0, 0.0003], "entry": [0.001, 0.0], "stop_at": [0.01, None]}
    before = forecasts.copy(), bars.copy()
    tables = [
        sensitivity_table(forecasts, bars, strategy=StrategySettings(), account=PERPETUAL, grid=grid, n_jobs=n)
        for n in (1, 2, 8, -1)
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
    assert tables[0]["delay"].tolist() == [3] * 12 + [0] * 12
    assert tables[0]["fee"].tolist() == [0.001] * 4 + [0.0] * 4 + [0.0003] * 4 + [0.001] * 4 + [0.0] * 4 + [0.0003] * 4
    for then, now in zip(before, (forecasts, bars), strict=True):
        pd.testing.assert_frame_equal(then, now)


@pytest.mark.parametrize(("signal", "costs"), [("rank", {0.0}), ("return", {0.0, 0.002, 0.0006, 0.0026})])
def test_orders_are_made_once_for_points_that_share_them_and_know_their_cost(btc, signal, costs):
    bars, forecasts = btc
    asked, lock = [], threading.Lock()

    def counted(*args, cost: float, **how):
        with lock:
            asked.append(cost)
        return make_orders(*args, cost=cost, **how)

    grid = {"delay": [0, 1, 2], "taker_fee": [0.0, 0.001], "slippage": [0.0, 0.0003]}
    free = PERPETUAL.model_copy(update={"half_spread": 0.0})
    own = {"strategy": StrategySettings(signal=signal), "account": free}
    assert len(sensitivity_table(forecasts, bars, grid=grid, n_jobs=4, make=counted, **own)) == 12
    assert sorted(round(cost, 12) for cost in asked) == sorted(costs)


def test_memory_does_not_grow_with_the_number_of_points(btc):
    bars, forecasts = btc
    peaks = []
    for count in (3, 3, 30):
        grid = {"entry": [*np.linspace(0, 0.0005, count)]}
        tracemalloc.start()
        sensitivity_table(forecasts, bars, strategy=StrategySettings(), account=PERPETUAL, grid=grid, n_jobs=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 27 * 16_000  # settings and results; the orders of a point are a hundred kilobytes


def test_what_cannot_be_is_refused_with_its_cure(btc):
    bars, forecasts = btc

    def refused(grid, account=PERPETUAL, strategy=StrategySettings(), given=forecasts) -> str:
        with pytest.raises((ConfigError, DataError)) as error:
            sensitivity_table(given, bars, strategy=strategy, account=account, grid=grid, n_jobs=2)
        return str(error.value)

    assert "unknown settings in the grid" in refused({"spread": [0.1]}) and "half_spread" in refused({"spread": [0.1]})
    assert "10,201 points" in refused({"fee": [0.0] * 101, "slippage": [0.0] * 101})
    assert "not crossed" in refused({"fee": [0.0] * 101, "slippage": [0.0] * 101})
    assert "no values of delay" in refused({"delay": 3})
    assert "no values of signal" in refused({"signal": "rank"})
    assert "a grid names settings" in refused([{}, {"delay": [1]}])
    assert "from 1 to 10,000 points" in refused([])
    assert "fee sets maker_fee and taker_fee" in refused({"maker_fee": [0.0], "fee": [0.0]})
    assert "taker_fee: Input should be less than 1, got 1.5" in refused({"taker_fee": [0.0, 1.5]})
    assert "holding is for positions" in refused({"leave": ["horizon"], "holding": [1, 2]})
    assert "need a lender" in refused({"market": ["perpetual", "spot"]})
    assert "leverage on spot" in refused({"leverage": [1, 2]}, AccountSettings(), StrategySettings(side="long"))
    assert "folds overlap" in refused({"delay": [0]}, given=pd.concat([forecasts, forecasts]))
    between = forecasts.assign(ts=forecasts["ts"] + HOUR / 2)
    assert "are not decided at the close" in refused({"delay": [0]}, given=between)


def test_a_total_loss_and_a_run_without_trades_have_their_numbers(btc):
    bars, forecasts = btc
    grid = {"leverage": [125], "fraction": [100.0], "entry": [0.0, 0.9]}
    table = sensitivity_table(forecasts, bars, strategy=StrategySettings(), account=PERPETUAL, grid=grid)
    ruined, idle = table.to_dict("records")
    assert ruined["total_return"] < -0.9 and (ruined["total_return"] > -1 or math.isnan(ruined["sharpe"]))
    assert (idle["total_return"], idle["max_drawdown"], idle["trades"], idle["turnover"]) == (0, 0, 0, 0)
    assert math.isnan(idle["sharpe"])


def once(first: float, second: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A coin that is bought at one price and sold at the other."""
    bars, forecasts = market("BTC", 60, 5)
    price = np.where(np.arange(60) < 50, first, second)
    bars = bars.assign(**dict.fromkeys(["open", "high", "low", "close"], price))
    wanted = np.where((forecasts["ts"] >= bars["ts"][45]) & (forecasts["ts"] < bars["ts"][55]), 0.5, 0.0)
    return bars, forecasts.assign(y_pred=wanted, close_at_ts=100.0)


@pytest.mark.parametrize("fraction", [0.2, 1.0])
@pytest.mark.parametrize("fee", [0.0, 0.001, 0.0476, 0.1])
def test_the_break_even_cost_of_one_trade_is_arithmetic(fee: float, fraction: float):
    bars, forecasts = once(100.0, 110.0)
    account = AccountSettings(maker_fee=fee, taker_fee=fee, half_spread=0.0)
    found = break_even_cost(forecasts, bars, strategy=StrategySettings(fraction=fraction), account=account)
    assert found.own == pytest.approx(fee)
    assert found.cost == pytest.approx(10 / 210, abs=1e-7)  # 100 (1 + c) = 110 (1 - c)
    assert (found.extra > 0) == (found.total_return > 0)
    assert found.extra == pytest.approx(10 / 210 - fee, abs=1e-7)


def test_a_run_that_loses_is_asked_what_it_could_have_paid():
    bars, forecasts = once(100.0, 101.0)
    account = AccountSettings(maker_fee=0.0, taker_fee=0.004, half_spread=0.002, slippage=0.002)
    found = break_even_cost(forecasts, bars, strategy=StrategySettings(fraction=0.5), account=account)
    share = 1 + found.extra / found.own
    fee, gap = 0.004 * share, 0.004 * share
    assert -found.own < found.extra < 0 and "only below" in found.sentence
    assert 100 * (1 + gap) * (1 + fee) == pytest.approx(101 * (1 - gap) * (1 - fee), rel=1e-7)


@pytest.mark.parametrize("fee", [0.0, 0.001])
def test_no_cost_is_low_enough_for_what_loses_without_any(fee: float):
    bars, forecasts = once(100.0, 90.0)
    account = AccountSettings(maker_fee=fee, taker_fee=fee, half_spread=0.0)
    found = break_even_cost(forecasts, bars, strategy=StrategySettings(), account=account)
    assert math.isnan(found.extra) and math.isnan(found.cost) and "no cost is low enough" in found.sentence
    flat = break_even_cost(*reversed(once(100.0, 100.0)), strategy=StrategySettings(), account=account)
    assert flat.cost == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("steps", [{"lot": 3.0}, {"min_notional": 3_000.0}, {"volume_limit": 0.02}, {"leverage": 3}])
def test_steps_do_not_keep_the_search_from_a_cost_where_profit_ends(steps: dict):
    bars, forecasts = market("BTC", 1_500, 1, skill=0.2)
    account, strategy = PERPETUAL.model_copy(update=steps), StrategySettings(fraction=0.9)
    found = break_even_cost(forecasts, bars, strategy=strategy, account=account)
    orders = make_orders(forecasts, strategy, cost=round_trip_cost(account), bars=bars)

    def earned(extra: float) -> float:
        fees = {"maker_fee": account.maker_fee + extra, "taker_fee": account.taker_fee + extra}
        return simulate(bars, orders, account.model_copy(update=fees), timeframe="1h").values[-1] - account.capital

    assert found.extra > 0
    assert earned(found.extra - 2e-8) >= -0.1 and earned(found.extra + 2e-8) <= 0.1


def extremes() -> Iterator[tuple[AccountSettings, StrategySettings]]:
    """Accounts and strategies at the ends of what settings allow."""
    for fee, slippage, delay in ((0.0, 0.0, 0), (0.99, 0.49, 10_000), (1e-9, 1e-9, 9_997)):
        for signal in ("return", "probability", "rank", "cross_rank"):
            for entry in (0.0, 0.999):
                levels = {"entry": entry, "entry_probability": entry, "entry_rank": max(entry, 0.5)}
                costs = {"maker_fee": fee, "taker_fee": fee, "slippage": slippage, "delay": delay}
                yield AccountSettings(**costs), StrategySettings(signal=signal, **levels)
    yield AccountSettings(maker_fee=0.0, taker_fee=0.001), StrategySettings()


def test_the_default_grid_holds_the_run_itself_and_only_what_can_be():
    for account, strategy in extremes():
        own = room._Point(strategy, account)
        names, points = room._points(default_grid(account, strategy), own)
        assert len(names) == 4 and own in points and 9 <= len(points) <= 49
    assert names[0] == "taker_fee"


def test_heat_maps_hold_the_other_settings_at_the_runs_own(btc):
    bars, forecasts = btc
    own = {"strategy": StrategySettings(stop_at=0.02), "account": PERPETUAL}
    grid = {"stop_at": [None, 0.01, 0.02], "delay": [0, 1], "entry": [0.0, 0.001]}
    table = sensitivity_table(forecasts, bars, grid=grid, **own)
    figures = sensitivity_figures(table, pairs=[("stop_at", "delay"), ("delay", "entry")], value="trades")
    across, upwards = (figure.data[0] for figure in figures.values())
    assert {*across.x} == {"none", "0.01", "0.02"} and np.isfinite(across.z).all()
    held = table[(table["stop_at"] == 0.02)].pivot(index="entry", columns="delay", values="trades")
    np.testing.assert_array_equal(upwards.z, held.to_numpy(float))
    with pytest.raises(ConfigError, match="two settings of the table"):
        sensitivity_figures(table[["delay", "is_own", *RESULTS]])
    with pytest.raises(ConfigError, match="the run's own values"):
        sensitivity_figures(table[~table["is_own"]], pairs=[("delay", "entry")])
    unowned = table[table["stop_at"].isna()].drop(columns="stop_at")
    assert [*sensitivity_figures(unowned, marked="in-sample")] == ["sensitivity_delay_entry"]
