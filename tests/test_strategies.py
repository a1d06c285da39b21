"""What must hold of every strategy: on any forecasts, against slow loops, cut off anywhere, and refused where wrong."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.errors import DataError
from kallos.evaluation.signals import check_tradable, cross_rank_signal, past_rank, probability_signal, return_signal
from kallos.evaluation.sizing import kelly, past_deviation
from kallos.evaluation.strategies import StrategySettings, check_orders, hold, make_orders, orders_of

HOUR = pd.Timedelta("1h")
START = pd.Timestamp("2024-01-01", tz="UTC")


def table(made, y_pred=0.01, **columns) -> pd.DataFrame:
    """Forecasts made at whole hours."""
    ts = pd.DatetimeIndex(START + np.asarray(made) * HOUR)
    keys = {"asset_id": "BTC", "timeframe": "1h", "model": "gru", "fold": 0, "horizon": 3, "target": "return"}
    rows = pd.DataFrame({"ts": ts, "target_ts": ts + 3 * HOUR} | keys)
    return rows.assign(close_at_ts=100.0, y_true=0.0, y_pred=y_pred, y_naive=0.0).assign(**columns)


def bars(closed, close=100.0) -> pd.DataFrame:
    """Bars that close at whole hours."""
    rows = pd.DataFrame({"ts": pd.DatetimeIndex(START + (np.asarray(closed) - 1) * HOUR), "close": close})
    return rows.assign(open=rows["close"], high=rows["close"], low=rows["close"], volume=1.0)


@st.composite
def histories(draw) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Forecasts of one to three assets, with holes, in any order, and bars that have holes of their own."""
    forecasts, closes = [], {}
    for asset in draw(st.sampled_from([["BTC"], ["BTC", "ETH"], ["ADA", "BTC", "ETH"]])):
        known = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=50)))
        made = sorted(draw(st.sets(st.sampled_from(known), min_size=1)))
        values = draw(
            st.lists(st.sampled_from([-0.03, -0.01, 0.0, 0.01, 0.03]), min_size=len(made), max_size=len(made))
        )
        forecasts.append(table(made, values, asset_id=asset))
        closes[asset] = bars(known)
    order = draw(st.randoms(use_true_random=False))
    rows = pd.concat(forecasts, ignore_index=True)
    return rows.loc[order.sample([*rows.index], len(rows))], closes


choices = st.builds(
    StrategySettings,
    signal=st.sampled_from(["return", "rank"]),
    entry=st.sampled_from([0.0, 0.005, 0.02]),
    hysteresis=st.sampled_from([0.0, 0.01, 0.5]),
    rank_history=st.just(3),
    holding=st.integers(1, 6),
    side=st.sampled_from(["both", "long", "short"]),
) | st.builds(StrategySettings, leave=st.just("horizon"), stop_at=st.just(0.1))


@given(histories(), choices, st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_orders_are_those_of_the_past_at_closes_and_only_changes(history, how, cut):
    forecasts, closes = history
    orders = check_orders(make_orders(forecasts, how, cost=0.001, bars=closes))
    assert orders["ts"].le(forecasts["ts"].max()).all()
    for asset, mine in orders.groupby("asset_id"):
        assert mine["ts"].isin(closes[asset]["ts"] + HOUR).all() and mine["ts"].is_unique
        assert (np.diff(mine["size"], prepend=0) != 0).all()
    moment = START + cut * HOUR
    past = forecasts[forecasts["ts"] <= moment]
    if len(past):
        known = {asset: rows[rows["ts"] + HOUR <= moment] for asset, rows in closes.items()}
        # an order may fall into a time without forecasts: it is sent once the table has come that far
        shorter = make_orders(past, how, cost=0.001, bars=known)
        expected = orders[orders["ts"] <= past["ts"].max()]
        assert [*zip(*map(shorter.get, ("ts", "asset_id", "size")), strict=True)] == [
            *zip(*map(expected.get, ("ts", "asset_id", "size")), strict=True)
        ]


def slow_positions(wanted, made, closes, at_least, exactly, horizon=3):
    """The side after every close, hour by hour, as one would do it by hand."""
    asked, side, entered, rests_on, due, found = dict(zip(made, wanted, strict=True)), 0, None, None, False, {}
    for hour in range(made[0], made[-1] + 1):
        length = horizon if exactly else at_least
        if side:
            until = entered + length if exactly else max(rests_on + horizon, entered + length)
            due = hour > until or (hour == until and hour not in asked)
        if side and due and (hour in closes or hour in asked):
            side = 0
        if hour in asked:
            free = not side or hour >= entered + length
            if free and (exactly or asked[hour] != side):
                side, entered = asked[hour], hour
            rests_on = hour
        if hour in closes:
            found[hour] = side
    return found


@given(histories(), st.integers(1, 6), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_holding_is_what_one_would_do_by_hand(history, at_least, exactly, data):
    forecasts, closes = history
    one = forecasts[forecasts["asset_id"] == "BTC"].sort_values("ts")
    wanted = data.draw(st.lists(st.integers(-1, 1), min_size=len(one), max_size=len(one)))
    hours = [int(made) for made in (one["ts"] - START) / HOUR]
    known = {int(closed) for closed in (closes["BTC"]["ts"] + HOUR - START) / HOUR}
    held = hold(one, wanted, at_least=at_least, exactly=exactly, bars=closes)
    slow = slow_positions(wanted, hours, known, at_least, exactly)
    side = held.set_index(((held["ts"] - START) / HOUR).astype(int))["side"].reindex([*slow]).ffill()
    assert [*side.astype(int)] == [*slow.values()]


@given(st.lists(st.floats(-1, 1) | st.sampled_from([0.0, 0.5]), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_rank_is_among_the_past(values):
    seen = np.array(values)
    slow = [np.mean((seen[:at] < seen[at]) + 0.5 * (seen[:at] == seen[at])) for at in range(1, len(seen))]
    np.testing.assert_allclose(past_rank(seen)[1:], slow)
    assert np.isnan(past_rank(seen)[0])


@given(st.lists(st.floats(-0.05, 0.05), min_size=1, max_size=80), st.floats(0, 0.02), st.floats(0, 0.05))
@settings(max_examples=50, deadline=None)
def test_hysteresis_only_ever_keeps_a_side_longer(values, enter, hysteresis):
    rows = table(range(len(values)), values)
    plain = return_signal(rows, cost=enter)
    sticky = return_signal(rows, cost=enter, hysteresis=hysteresis)
    assert (sticky[plain != 0] == plain[plain != 0]).all()
    assert sticky.diff().ne(0).sum() <= plain.diff().ne(0).sum()


def test_two_sides_that_are_both_probable_change_nothing_while_they_are_equal():
    rows = table(range(4), target="label", p_up=[0.45, 0.5, 0.45, 0.4], p_down=[0.45, 0.4, 0.45, 0.5])
    assert [*probability_signal(rows, entry=0.3)] == [0, 1, 1, -1]


def test_a_rank_among_assets_leaves_out_who_has_no_forecast():
    rows = pd.concat([table([0, 1], [0.1, 0.2]), table([1], [0.3], asset_id="ETH"), table([0], [0.0], asset_id="ADA")])
    assert [*cross_rank_signal(rows, quantile=0.6)] == [1, -1, 1, -1]


def test_the_index_of_the_forecasts_does_not_matter():
    rows = table(range(6), [0.01, -0.01] * 3).set_axis([7] * 6)
    strange, plain = (make_orders(made, StrategySettings(), cost=0) for made in (rows, rows.reset_index(drop=True)))
    pd.testing.assert_frame_equal(strange, plain)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_the_resolution_of_the_times_does_not_matter(unit):
    rows = table([0, 1, 9, 10])
    rows["ts"] = rows["ts"].dt.as_unit(unit)
    orders = make_orders(rows, StrategySettings(), cost=0, bars=bars(range(20)))
    assert [*((orders["ts"] - START) / HOUR)] == [0, 4, 9]


def test_not_a_number_is_found_wherever_it_is():
    rows = table(range(5), [0.1, np.nan, 0.1, np.inf, 0.1])
    with pytest.raises(DataError, match="2 forecasts is no number; got 'BTC at 2024-01-01 01:00 to BTC at"):
        make_orders(rows, StrategySettings(), cost=0)
    with pytest.raises(DataError, match="folds overlap: 5"):
        check_tradable(pd.concat([table(range(5)), table(range(9), fold=1)]))
    check_tradable(pd.concat([table(range(5)), table(range(5, 9), fold=1)]))


def test_a_bar_that_closes_after_the_forecast_is_not_known():
    rng = np.random.default_rng(0)
    close = 100 * np.exp(rng.normal(0, 0.01, 60).cumsum())
    rows = table(range(40, 50), 0.02)
    sized = kelly(rows, bars(range(60), close), largest=100)
    for at in range(10):
        wild = np.where(np.arange(60) > 40 + at, close * 3, close)
        assert kelly(rows.iloc[[at]], bars(range(60), wild), largest=100).item() == sized[at]
        touched = np.where(np.arange(60) == 40 + at, close * 1.01, close)
        assert past_deviation(rows.iloc[[at]], bars(range(60), touched)).item() != sized[at]


def test_a_strategy_that_never_trades_is_a_table():
    orders = make_orders(table(range(5), 0.0), StrategySettings(stop_at=0.1), cost=0)
    assert orders.empty and check_orders(orders).columns.tolist() == [
        "ts",
        "asset_id",
        "kind",
        "unit",
        "size",
        "stop_loss",
    ]


def test_a_turn_into_a_size_of_nothing_closes_what_there_was():
    positions = hold(table(range(4)), [1, -1, -1, 1])
    assert orders_of(positions, [0.5, 0.0, 0.3, 0.5])["size"].tolist() == [0.5, 0.0, 0.5]


def test_orders_in_numbers_and_objects_are_read_as_what_they_mean():
    orders = pd.DataFrame(
        {"ts": [START, START + HOUR], "asset_id": "BTC", "kind": ["limit", "market"], "unit": "units"}
    )
    read = check_orders(orders.assign(size=[1, -1], price=[100, None], replaces=[True, False]))
    assert read["price"].dtype == read["size"].dtype == "float64"
    assert check_orders(orders.assign(size=1.0, price=pd.Series([100.0, None], dtype=object)))["price"].iloc[0] == 100
    with pytest.raises(DataError, match="size"):
        check_orders(orders.assign(size="much", price=[100, None]))
    with pytest.raises(DataError, match="price: above 0 and finite in 1 rows, first at row 0"):
        check_orders(orders.assign(size=1, price=[-100, None]))
    with pytest.raises(DataError, match="replaces"):
        check_orders(orders.assign(size=1, price=[100, None], replaces=[True, None]))
