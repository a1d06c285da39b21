"""The backtest against cases worked out by hand: every kind of order, every cost, every way to lose the account."""

import pandas as pd
import pytest

from kallos.core.errors import KallosError
from tests.hand_market import FLAT, START, market, order, play, rates, seen

PERP = {"market": "perpetual", "leverage": 5.0}
QUIET = (100, 101, 99, 100)


def last(result, name="equity"):
    return result.equity[name].iloc[-1]


def status(result):
    return result.orders["status"].tolist()


# One order: (its kind and levels, units), the bars after the one it was decided in, and the fills expected

SINGLE = {
    "market buy": (order(0), [(102, 104, 101, 103)], [(1, 1, 102, "taker")]),
    "market sell": (order(0, size=-1), [(102, 104, 101, 103)], [(1, -1, 102, "taker")]),
    # a limit that arrives and can be filled at the open gets the open
    "limit buy, marketable": (order(0, "limit", price=105), [(102, 104, 101, 103)], [(1, 1, 102, "taker")]),
    "limit sell, marketable": (order(0, "limit", -1, price=99), [(102, 104, 101, 103)], [(1, -1, 102, "taker")]),
    "limit buy inside the bar": (order(0, "limit", price=95), [(100, 101, 94, 96)], [(1, 1, 95, "maker")]),
    "limit sell inside the bar": (order(0, "limit", -1, price=105), [(100, 106, 99, 101)], [(1, -1, 105, "maker")]),
    # touched is not traded through: the queue in front of it may have taken all that was sold there
    "limit buy, touched": (order(0, "limit", price=95), [(100, 101, 95, 96)], []),
    "limit sell, touched": (order(0, "limit", -1, price=105), [(100, 105, 99, 101)], []),
    # it was working already when the price jumped over it: its own price, not the better open
    "limit buy, gapped over": (order(0, "limit", price=95), [QUIET, (90, 92, 89, 91)], [(2, 1, 95, "maker")]),
    "limit sell, gapped over": (
        order(0, "limit", -1, price=105),
        [QUIET, (110, 111, 108, 109)],
        [(2, -1, 105, "maker")],
    ),
    "stop buy": (order(0, "stop", price=105), [(100, 106, 99, 103)], [(1, 1, 105, "taker")]),
    "stop sell": (order(0, "stop", -1, price=95), [(100, 101, 94, 97)], [(1, -1, 95, "taker")]),
    "stop buy, touched": (order(0, "stop", price=105), [(100, 105, 99, 103)], [(1, 1, 105, "taker")]),
    "stop sell, touched": (order(0, "stop", -1, price=95), [(100, 101, 95, 97)], [(1, -1, 95, "taker")]),
    "stop buy, not reached": (order(0, "stop", price=105), [(100, 104.9, 99, 103)], []),
    "gap over a stop buy": (order(0, "stop", price=105), [QUIET, (108, 109, 107, 108)], [(2, 1, 108, "taker")]),
    "gap over a stop sell": (order(0, "stop", -1, price=95), [QUIET, (92, 93, 91, 92)], [(2, -1, 92, "taker")]),
    "gap over a stop that arrives": (order(0, "stop", price=105), [(108, 109, 107, 108)], [(1, 1, 108, "taker")]),
    # open 108 is past the trigger 105 and past the limit 106: it waits at 106, and that is traded through in bar 2
    "stop-limit buy, gapped past its limit": (
        order(0, "stop_limit", price=105, limit_price=106),
        [(108, 109, 107, 108), (107, 108, 105, 105.5)],
        [(2, 1, 106, "maker")],
    ),
    "stop-limit sell, gapped past its limit": (
        order(0, "stop_limit", -1, price=95, limit_price=94),
        [(92, 93, 91, 92), (93, 95, 92, 95)],
        [(2, -1, 94, "maker")],
    ),
    "stop-limit, limit without the trigger": (
        order(0, "stop_limit", price=105, limit_price=106),
        [(100, 104, 90, 100)],
        [],
    ),
    "stop-limit, its limit only touched afterwards": (
        order(0, "stop_limit", price=105, limit_price=106),
        [(108, 109, 107, 108), (107, 108, 106, 107)],
        [],
    ),
}


@pytest.mark.parametrize("case", SINGLE)
def test_single_order(case):
    one, later, fills = SINGLE[case]
    result = play(market(FLAT, *later), one, **PERP)
    assert seen(result, "liquidity") == fills
    assert status(result) == (["filled"] if fills else ["waiting"])
    assert result.orders["filled_units"].tolist() == [fills[0][1] if fills else 0]


@pytest.mark.parametrize(("side", "later"), [(1, (100, 107, 99, 103)), (-1, (100, 101, 93, 97))])
def test_stop_limit_that_is_triggered_inside_the_bar(side, later):
    trigger, limit = 100 + side * 5, 100 + side * 6
    result = play(market(FLAT, later), order(0, "stop_limit", side, price=trigger, limit_price=limit), **PERP)
    assert len(result.fills) == 1
    price = result.fills["price"].item()
    assert min(trigger, limit) <= price <= max(trigger, limit)


def test_stop_limit_with_a_limit_better_than_its_trigger_waits_for_the_next_bar():
    # nobody knows whether the low of 99 came before or after the trigger at 105
    bars = market(FLAT, (100, 106, 99, 105), (104, 105, 102, 103))
    assert [row[0] for row in seen(play(bars, order(0, "stop_limit", price=105, limit_price=103), **PERP))] == [2]


# Leaving a position: long (or short) one unit from the open of bar 1 at 100, an order to leave it, what it brings

LEAVE = {
    "close at the market": (1, order(1, unit="close"), [(103, 104, 102, 103)], (2, -1, 103)),
    "close a short": (-1, order(1, unit="close"), [(103, 104, 102, 103)], (2, 1, 103)),
    "close by a stop": (1, order(1, "stop", unit="close", price=95), [(100, 101, 94, 99)], (2, -1, 95)),
    "close a short by a stop": (-1, order(1, "stop", unit="close", price=105), [(100, 106, 99, 99)], (2, 1, 105)),
    "gap over the stop": (1, order(1, "stop", unit="close", price=95), [(90, 91, 89, 90)], (2, -1, 90)),
    "profit, touched": (1, order(1, "take_profit", unit="close", price=105), [(100, 105, 99, 104)], (2, -1, 105)),
    "profit of a short": (-1, order(1, "take_profit", unit="close", price=95), [(100, 101, 95, 96)], (2, 1, 95)),
    "profit gapped over": (
        1,
        order(1, "take_profit", unit="close", price=105),
        [QUIET, (110, 111, 109, 110)],
        (3, -1, 105),
    ),
    "profit of a short gapped over": (
        -1,
        order(1, "take_profit", unit="close", price=95),
        [QUIET, (90, 91, 89, 90)],
        (3, 1, 95),
    ),
    "limit, only touched": (1, order(1, "limit", unit="close", price=105), [(100, 105, 99, 104)], None),
    "limit, traded through": (1, order(1, "limit", unit="close", price=105), [(100, 106, 99, 104)], (2, -1, 105)),
    "wanted position": (1, order(1, unit="position", size=0.25), [(103, 104, 102, 103)], (2, -0.75, 103)),
    "wanted share": (1, order(1, unit="fraction", size=0.0), [(103, 104, 102, 103)], (2, -1, 103)),
}


@pytest.mark.parametrize("case", LEAVE)
def test_leaving(case):
    side, leave, later, out = LEAVE[case]
    result = play(market(FLAT, QUIET, *later), order(0, size=side), leave, **PERP)
    assert seen(result) == [(1, side, 100), *([out] if out else [])]
    if out and out[1] == -side:
        trade = result.trades.iloc[0]
        assert trade["net_pnl"] == pytest.approx(side * (out[2] - 100))
        assert (trade["side"], trade["entry_price"], trade["exit_price"]) == (
            "long" if side > 0 else "short",
            100,
            out[2],
        )
        assert trade["return"] == pytest.approx(side * (out[2] - 100) / 100)
        assert not trade["is_open"]


def test_a_close_order_never_opens_a_position():
    result = play(market(FLAT, QUIET, QUIET), order(0, unit="close", size=-5.0), order(1, unit="close"), **PERP)
    assert result.fills.empty
    assert result.trades.empty


# Brackets

BRACKETS = {  # the market buy of bar 1 is filled at 100: stop at 95, profit at 110
    "stop in the bar of the entry": ([(100, 102, 94, 101)], (1, -1, 95, "stop")),
    "profit in the bar of the entry": ([(100, 111, 99, 101)], (1, -1, 110, "take_profit")),
    "both levels in the bar of the entry": ([(100, 111, 94, 101)], (1, -1, 95, "stop")),
    "both levels in a later bar": ([QUIET, (100, 111, 94, 109)], (2, -1, 95, "stop")),
    "gap over the stop": ([QUIET, (90, 111, 89, 90)], (2, -1, 90, "stop")),
    "gap over the profit, stop touched as well": ([QUIET, (112, 113, 94, 100)], (2, -1, 110, "take_profit")),
}


@pytest.mark.parametrize("case", BRACKETS)
def test_brackets_of_a_long(case):
    later, out = BRACKETS[case]
    result = play(market(FLAT, *later), order(0, stop_loss=0.05, take_profit=0.1))
    assert seen(result, "reason") == [(1, 1, 100, "market"), out]


@pytest.mark.parametrize(
    ("later", "out"),
    [
        ((100, 106, 99, 101), (1, 1, 105, "stop")),
        ((100, 101, 89, 95), (1, 1, 90, "take_profit")),
        ((100, 106, 89, 95), (1, 1, 105, "stop")),
    ],
)
def test_brackets_of_a_short(later, out):
    result = play(market(FLAT, later), order(0, size=-1, stop_loss=0.05, take_profit=0.1), **PERP)
    assert seen(result, "reason") == [(1, -1, 100, "market"), out]


def test_brackets_are_shares_of_the_price_that_was_paid():
    # a buy at 100 pays 1 % of half spread: 101; the stop is 10 % below at 90.9, and the seller gets 1 % less: 89.991
    result = play(market(FLAT, (100, 101, 90, 95)), order(0, stop_loss=0.1), half_spread=0.01)
    assert seen(result) == [(1, 1, 101), (1, -1, 89.991)]


def test_a_filled_bracket_takes_the_other_one_along():
    bars = market(FLAT, (100, 101, 94, 96), (96, 115, 90, 100))
    result = play(bars, order(0, stop_loss=0.05, take_profit=0.1), **PERP)
    assert seen(result) == [(1, 1, 100), (1, -1, 95)]
    assert last(result, "units_A") == 0


def test_entry_inside_the_bar_can_be_stopped_in_it():
    # limit 95, its stop 5 % below at 90.25
    result = play(market(FLAT, (100, 120, 90, 110)), order(0, "limit", price=95, stop_loss=0.05, take_profit=0.05))
    assert seen(result, "reason") == [(1, 1, 95, "limit"), (1, -1, 90.25, "stop")]


def test_entry_inside_the_bar_cannot_take_its_profit_in_it():
    # 120 may have come before the entry at 95; the profit at 99.75 is taken in the next bar, gapped over: at its level
    bars = market(FLAT, (100, 120, 94, 99), (101, 102, 100, 101))
    result = play(bars, order(0, "limit", price=95, stop_loss=0.05, take_profit=0.05))
    assert seen(result) == [(1, 1, 95), (2, -1, 99.75)]


def test_stop_entry_inside_the_bar_and_its_stop():
    # entry at 105, stop 2 % below at 102.9; the low of 99 may be older than the entry: the worse is assumed
    result = play(market(FLAT, (100, 106, 99, 104)), order(0, "stop", price=105, stop_loss=0.02))
    assert seen(result) == [(1, 1, 105), (1, -1, 102.9)]


# Nothing bought inside a bar may be sold in it at a gain: the way of the price inside the bar is not known


def test_a_stop_above_an_entry_inside_the_bar_brings_no_gain():
    # the price fell from 100 through 98 to 94: a buyer at 95 cannot have sold at 98 on the way down
    rows = [order(0, "limit", price=95), order(0, "stop", unit="close", price=98, replaces=False)]
    result = play(market(FLAT, (100, 101, 94, 95)), *rows)
    assert last(result, "cash") <= 10_000
    assert last(result) <= 10_000


def test_a_trailing_stop_above_an_entry_inside_the_bar_brings_no_gain():
    # best 110, trailing stop at 104.5; the second unit is bought at 100 in the bar that sells: 104.5 is past by then
    bars = market(FLAT, (100, 104, 99.5, 104), (105, 110, 104.6, 110), (108, 109, 99, 100))
    result = play(bars, order(0, trailing_stop=0.05), order(2, "limit", price=100, replaces=False))
    assert len(result.fills) >= 2
    assert last(result) <= 10_000 + 4.5 + 1e-9


def test_buy_and_sell_limits_around_the_price_are_not_both_filled_in_one_bar():
    rows = [order(0, "limit", price=95), order(0, "limit", -1, price=105, replaces=False)]
    result = play(market(FLAT, (100, 106, 94, 100)), *rows, **PERP)
    assert len(result.fills) == 1


def test_a_limit_does_not_sell_at_a_gain_what_was_bought_inside_the_bar():
    bars = market(FLAT, QUIET, (100, 106, 94, 100))
    rows = [order(1, "limit", price=95), order(1, "limit", -2, price=105, replaces=False)]
    result = play(bars, order(0), *rows)
    assert last(result) <= 10_000 + 5 + 5  # a unit of bar 1 sold at 105, the other one bought at 95 and worth 100


# Trailing stops


def test_trailing_stop_of_a_long():
    bars = market(
        FLAT,
        (100, 105, 95, 104),  # 90 is not touched; 105 raises it to 94.5, which is not touched
        (104, 110, 100, 109),  # 94.5 not; 110 raises it to 99, not
        (109, 120, 107, 110),  # 99 not; 120 raises it to 108, and 107 is below it
    )
    assert seen(play(bars, order(0, trailing_stop=0.1)), "reason")[1:] == [(3, -1, 108, "trailing_stop")]


def test_trailing_stop_of_a_short():
    bars = market(
        FLAT,
        (100, 105, 95, 96),  # 110 not; 95 lowers it to 104.5, and 105 is above it
    )
    assert seen(play(bars, order(0, size=-1, trailing_stop=0.1), **PERP))[1:] == [(1, 1, 104.5)]


def test_trailing_stop_tries_the_level_of_the_bars_before_first():
    # best 110: 99 is touched by the low of 98, whatever the high of 130 would have made of it
    bars = market(FLAT, (100, 110, 100, 109), (109, 130, 98, 120))
    assert seen(play(bars, order(0, trailing_stop=0.1)))[1:] == [(2, -1, 99)]


def test_gap_over_a_trailing_stop():
    bars = market(FLAT, (100, 110, 100, 109), (95, 96, 94, 95))
    assert seen(play(bars, order(0, trailing_stop=0.1)))[1:] == [(2, -1, 95)]


def test_trailing_stop_as_an_order_of_its_own():
    rows = [order(0), order(0, "trailing_stop", unit="close", trail=0.1, replaces=False)]
    bars = market(FLAT, (100, 110, 100, 109), (109, 109, 98, 100))
    assert seen(play(bars, *rows), "reason")[1:] == [(2, -1, 99, "trailing_stop")]


def test_an_entry_inside_the_bar_is_not_trailed_by_its_high():
    # entry at 95, stop at 85.5; 110 would make it 99
    result = play(market(FLAT, (100, 110, 94, 96)), order(0, "limit", price=95, trailing_stop=0.1))
    assert seen(result) == [(1, 1, 95)]


# The account: what it holds, what it can pay, what it owes


def test_books_of_a_round_trip():
    # buy 2 at 100 * 1.001 = 100.1: 200.2, fee 0.4004; sell 2 at 110 * 0.999 = 109.89: 219.78, fee 0.43956
    bars = market(FLAT, (100, 106, 99, 105), (110, 112, 109, 111))
    result = play(bars, order(0, size=2), order(1, unit="close"), capital=1000, taker_fee=0.002, half_spread=0.001)
    cash = [1000, 1000 - 200.2 - 0.4004, 1000 - 200.2 - 0.4004 + 219.78 - 0.43956]
    assert result.equity["cash"].tolist() == pytest.approx(cash)
    assert result.equity["equity"].tolist() == pytest.approx([1000, cash[1] + 210, cash[2]])
    assert result.equity["position_value"].tolist() == pytest.approx([0, 210, 0])
    assert result.equity["gross_exposure"].tolist() == pytest.approx([0, 210 / (cash[1] + 210), 0])
    assert result.equity["fees"].tolist() == pytest.approx([0, 0.4004, 0.43956])
    assert result.equity["spread"].tolist() == pytest.approx([0, 0.2, 0.22])
    assert result.equity["slippage"].tolist() == [0, 0, 0]
    assert result.equity["units_A"].tolist() == [0, 2, 0]
    assert result.equity["ts"].tolist() == [START + pd.Timedelta(hours=hours) for hours in (1, 2, 3)]
    fill = result.fills.iloc[0]
    assert fill["ts"] == fill["decided_ts"] == START + pd.Timedelta("1h")
    assert fill[["base_price", "price", "notional", "fee", "spread", "slippage"]].tolist() == pytest.approx(
        [100, 100.1, 200.2, 0.4004, 0.2, 0]
    )
    trade = result.trades.iloc[0]
    assert trade["net_pnl"] == pytest.approx(cash[2] - 1000)
    assert trade["fees"] == pytest.approx(0.4004 + 0.43956)
    assert trade["return"] == pytest.approx((cash[2] - 1000) / 200.2)
    assert (trade["entry_ts"], trade["exit_ts"]) == (START + pd.Timedelta("1h"), START + pd.Timedelta("2h"))


def test_maker_and_taker_fees():
    # bought by a limit at 95 for 1 per mille, sold at the market at 100 for 3 per mille and half a spread of 1 %
    rows = [order(0, "limit", price=95), order(1, unit="close")]
    costs = {"maker_fee": 0.001, "taker_fee": 0.003, "half_spread": 0.01}
    result = play(market(FLAT, (100, 101, 94, 96), QUIET), *rows, **costs)
    assert result.fills["fee"].tolist() == pytest.approx([0.095, 0.297])
    assert result.fills["spread"].tolist() == pytest.approx([0, 1])
    assert seen(result) == [(1, 1, 95), (2, -1, 99)]


def test_scaling_in_and_out_averages_the_prices():
    bars = market(FLAT, (100, 101, 99, 100), (110, 111, 109, 110), (120, 121, 119, 120), (105, 106, 104, 105))
    rows = [order(0), order(1, size=3, replaces=False), order(2, size=-2), order(3, unit="close")]
    trade = play(bars, *rows).trades
    assert len(trade) == 1
    assert trade["entry_price"].item() == pytest.approx((100 + 3 * 110) / 4)
    assert trade["exit_price"].item() == pytest.approx((2 * 120 + 2 * 105) / 4)
    assert trade["units"].item() == 4
    assert trade["net_pnl"].item() == pytest.approx(2 * 120 + 2 * 105 - 100 - 330)


def test_flip_from_long_to_short_makes_two_trades():
    # long 1 from 100, at 110 short 1, closed at 104: 10 and 6 earned
    bars = market(FLAT, QUIET, (110, 111, 109, 110), (104, 105, 103, 104))
    rows = [order(0), order(1, size=-1, unit="position"), order(2, unit="close")]
    result = play(bars, *rows, taker_fee=0.001, **PERP)
    assert result.equity["units_A"].tolist() == [0, 1, -1, 0]
    assert result.trades["side"].tolist() == ["long", "short"]
    assert result.trades["net_pnl"].tolist() == pytest.approx([10 - 0.1 - 0.11, 6 - 0.11 - 0.104])


def test_a_position_open_at_the_end_is_a_trade():
    result = play(market(FLAT, QUIET, (100, 108, 99, 107)), order(0))
    trade = result.trades.iloc[0]
    assert (trade["exit_reason"], trade["is_open"], trade["net_pnl"]) == ("open", True, 7)


@pytest.mark.parametrize(("size", "unit"), [(1.0, "fraction"), (500.0, "units"), (500.0, "position")])
def test_bought_is_what_can_be_paid(size, unit):
    # 100 * 1.01 = 101 a unit, and 1 % fee on that: 102.01 a unit
    result = play(market(FLAT, FLAT), order(0, size=size, unit=unit), capital=10_201, taker_fee=0.01, half_spread=0.01)
    assert result.fills["units"].item() == pytest.approx(100)
    assert last(result, "cash") == pytest.approx(0, abs=1e-8)


def test_leverage_bounds_the_position_after_its_costs():
    # 100 u = 5 * (1000 - 0.1 u): u = 5000 / 100.5
    result = play(market(FLAT, FLAT), order(0, size=1000), capital=1000, taker_fee=0.001, **PERP)
    assert result.fills["units"].item() == pytest.approx(5000 / 100.5)


def test_share_is_sized_at_the_close_of_its_decision():
    # half of 1000 at a close of 100: 5 units, whatever the next open is
    result = play(market(FLAT, (110, 111, 109, 110)), order(0, size=0.5, unit="fraction"), capital=1000)
    assert seen(result) == [(1, 5, 110)]


def test_share_of_what_the_account_has_become():
    # 5 units from 100 rise to 120: equity 1100; half of it at 120 is 4.58333 units
    bars = market(FLAT, (100, 120, 100, 120), (120, 121, 119, 120))
    result = play(bars, order(0, size=0.5, unit="fraction"), order(1, size=0.5, unit="fraction"), capital=1000)
    assert seen(result)[1] == (2, round(550 / 120 - 5, 8), 120)


def test_share_of_a_price_that_jumped_is_cut():
    result = play(market(FLAT, (125, 126, 124, 125)), order(0, size=1.0, unit="fraction"), capital=1000)
    assert seen(result) == [(1, 8, 125)]


def test_spot_is_not_short_unless_units_can_be_borrowed():
    try:
        result = play(market(FLAT, QUIET, QUIET), order(0), order(1, size=-3))
    except KallosError:
        return
    assert last(result, "units_A") >= 0


def test_several_assets_share_the_account():
    # A: 4 from 100 to 110; B: -2 from 200 to 210: 1000 + 40 - 20
    bars = {
        "A": market(FLAT, (100, 111, 99, 110)),
        "B": market((200, 200, 200, 200), (200, 211, 199, 210)),
    }
    result = play(bars, order(0, size=4), order(0, size=-2, asset="B"), capital=1000, **PERP)
    assert last(result) == pytest.approx(1020)
    assert result.equity[["units_A", "units_B"]].iloc[-1].tolist() == [4, -2]
    assert last(result, "position_value") == pytest.approx(440 - 420)
    assert last(result, "gross_exposure") == pytest.approx(860 / 1020)
    assert last(result, "net_exposure") == pytest.approx(20 / 1020)


def test_several_assets_share_what_can_be_paid():
    bars = {"A": market(FLAT, FLAT), "B": market(FLAT, FLAT)}
    rows = [order(0, size=0.75, unit="fraction"), order(0, size=0.75, unit="fraction", asset="B")]
    result = play(bars, *rows, capital=1000)
    assert result.equity[["units_A", "units_B"]].iloc[-1].tolist() == pytest.approx([7.5, 2.5])


def test_a_sale_pays_for_a_purchase_in_the_same_bar():
    bars = {"A": market(FLAT, FLAT, FLAT), "B": market(FLAT, FLAT, FLAT)}
    rows = [order(0, size=10), order(1, unit="close"), order(1, size=10, asset="B")]
    result = play(bars, *rows, capital=1000)
    assert result.equity[["units_A", "units_B"]].iloc[-1].tolist() == pytest.approx([0, 10])


def test_an_asset_whose_bar_is_missing_is_worth_its_last_close():
    bars = {
        "A": market(FLAT, (100, 106, 99, 105), (110, 111, 109, 110), missing=(2,)),
        "B": market(FLAT, FLAT, FLAT, FLAT),
    }
    result = play(bars, order(0))
    assert result.equity["equity"].tolist() == [10_000, 10_005, 10_005, 10_010]


# Liquidation: 100 units from 100 with 1000 of equity; what must be left is 0.5 % of what the position is worth

TENFOLD = {"market": "perpetual", "leverage": 10.0, "capital": 1000.0, "liquidation_fee": 0.0}


@pytest.mark.parametrize(
    ("side", "bar", "price"),
    [(1, (100, 101, 85, 90), 9000 / 99.5), (-1, (100, 115, 99, 110), 11_000 / 100.5)],
)
def test_liquidation_at_the_exact_price(side, bar, price):
    # 1000 + 100 (p - 100) = 0.5 p; for the short 1000 - 100 (p - 100) = 0.5 p
    result = play(market(FLAT, QUIET, bar), order(0, size=100 * side), **TENFOLD)
    assert result.fills["reason"].tolist() == ["market", "liquidation"]
    assert result.fills["base_price"].iloc[1] == pytest.approx(price)
    assert result.fills["order"].iloc[1] == -1
    assert last(result, "units_A") == 0
    assert last(result) == pytest.approx(0.5 * price)
    assert result.trades["exit_reason"].tolist() == ["liquidation"]


def test_one_cent_before_the_liquidation_nothing_happens():
    result = play(market(FLAT, QUIET, (100, 101, 9000 / 99.5 + 0.01, 95)), order(0, size=100), **TENFOLD)
    assert last(result, "units_A") == 100


def test_liquidation_fee_takes_the_rest():
    account = TENFOLD | {"liquidation_fee": 0.005}
    result = play(market(FLAT, QUIET, (100, 101, 85, 90)), order(0, size=100), **account)
    assert last(result, "liquidation") == pytest.approx(0.5 * 9000 / 99.5)
    assert last(result) == pytest.approx(0, abs=1e-8)


def test_gap_through_the_liquidation():
    # at 80 the account owes 1000
    result = play(market(FLAT, QUIET, (80, 120, 80, 120)), order(0, size=100), **TENFOLD)
    assert seen(result, "reason")[1:] == [(2, -100, 80, "liquidation")]
    assert last(result) == pytest.approx(-1000)


def test_nothing_is_bought_with_an_account_that_owes():
    bars = market(FLAT, QUIET, (80, 81, 80, 80), (80, 120, 80, 120))
    result = play(bars, order(0, size=100), order(2, size=10), **TENFOLD)
    assert len(result.fills) == 2
    assert status(result)[1] in ("rejected", "cancelled")


def test_liquidation_of_several_assets_at_once():
    # equity 1000 - 1000 w on the way w from the open to the lows, margin 0.005 * (10000 - 1000 w): w = 950 / 995
    bars = {
        "A": market(FLAT, QUIET, (100, 101, 90, 95)),
        "B": market((200,) * 4, (200,) * 4, (200, 201, 180, 190)),
    }
    way = 950 / 995
    result = play(bars, order(0, size=50), order(0, size=25, asset="B"), **TENFOLD)
    out = result.fills[result.fills["reason"] == "liquidation"].set_index("asset_id")["base_price"]
    assert out.to_dict() == pytest.approx({"A": 100 - 10 * way, "B": 200 - 20 * way})


def test_liquidation_of_a_long_and_a_short():
    # the worst prices of both: 1000 - 50 * 10 w - 50 * 10 w, margin 0.005 * (5000 - 500 w + 5000 + 500 w) = 50
    bars = {"A": market(FLAT, QUIET, (100, 101, 90, 95)), "B": market(FLAT, QUIET, (100, 110, 99, 105))}
    result = play(bars, order(0, size=50), order(0, size=-50, asset="B"), **TENFOLD)
    out = result.fills[result.fills["reason"] == "liquidation"].set_index("asset_id")["base_price"]
    assert out.to_dict() == pytest.approx({"A": 100 - 9.5, "B": 100 + 9.5})


def test_an_asset_that_is_not_traded_does_not_save_the_others():
    bars = {"A": market(FLAT, QUIET, (100, 101, 50, 55)), "B": market(FLAT, QUIET)}
    result = play(bars, order(0, size=98), order(0, asset="B"), **TENFOLD)
    assert "A" in result.fills.loc[result.fills["reason"] == "liquidation", "asset_id"].tolist()


def test_a_stop_before_the_liquidation_saves_the_account():
    bars = market(FLAT, QUIET, (100, 101, 85, 90))
    result = play(bars, order(0, size=100, stop_loss=0.05), **TENFOLD)
    assert seen(result, "reason")[1:] == [(2, -100, 95, "stop")]
    assert last(result) == pytest.approx(500)


def test_a_stop_behind_the_liquidation_comes_too_late():
    bars = market(FLAT, QUIET, (100, 101, 85, 90))
    result = play(bars, order(0, size=100, stop_loss=0.12), **TENFOLD)
    assert result.fills["reason"].tolist() == ["market", "liquidation"]


def test_a_profit_in_the_bar_of_the_liquidation_is_not_taken():
    bars = market(FLAT, QUIET, (100, 120, 85, 110))
    result = play(bars, order(0, size=100, take_profit=0.05), **TENFOLD)
    assert result.fills["reason"].tolist() == ["market", "liquidation"]


# Funding and borrowing


def test_funding_at_the_open_is_of_the_position_held_before():
    # bought at the open of bar 1, at which the first rate falls due: not held yet; in bar 2 one pays 2 * 104 * 0.01
    due = rates(("2024-01-01 01:00", 0.05), ("2024-01-01 02:00", 0.01), ("2024-01-01 03:00", -0.01))
    bars = market(FLAT, (100, 105, 99, 104), (104, 111, 103, 110), (110, 111, 109, 110))
    result = play(bars, order(0, size=2), funding={"A": due}, **PERP)
    assert result.equity["funding"].tolist() == pytest.approx([0, 0, 2.08, -2.2])
    assert last(result) == pytest.approx(10_000 + 20 - 2.08 + 2.2)
    assert result.trades["funding"].item() == pytest.approx(2.08 - 2.2)


def test_a_short_receives_what_a_long_pays():
    result = play(market(FLAT, FLAT, FLAT), order(0, size=-2), funding={"A": rates(("2024-01-01 02:00", 0.01))}, **PERP)
    assert last(result, "funding") == pytest.approx(-2)


def test_three_settlements_in_a_day():
    # bought at the open of day 2: the rate of 00:00 is not its own, those of 08:00 and 16:00 are; on day 3 all three
    due = rates(*((f"2024-01-0{day} {hour}:00", 0.001) for day in (2, 3) for hour in ("00", "08", "16")))
    result = play(market(FLAT, FLAT, FLAT, timeframe="1d"), order(0), timeframe="1d", funding={"A": due}, **PERP)
    assert result.equity["funding"].tolist() == pytest.approx([0, 0.2, 0.3])


def test_funding_inside_a_bar_is_received_on_what_is_held_at_its_close():
    # short 2 of which the stop closes all inside the bar: nothing received; a long in its place pays
    due = {"A": rates(("2024-01-02 08:00", 0.01))}
    bars = market(FLAT, (100, 106, 94, 100), timeframe="1d")
    short = play(bars, order(0, size=-2, stop_loss=0.05), timeframe="1d", funding=due, **PERP)
    long = play(bars, order(0, size=2, stop_loss=0.05), timeframe="1d", funding=due, **PERP)
    assert last(short, "funding") == 0
    assert last(long, "funding") == pytest.approx(2)
    assert last(play(bars, order(0, size=-2), timeframe="1d", funding=due, **PERP), "funding") == pytest.approx(-2)


def test_funding_that_falls_due_in_a_gap_is_charged_after_it():
    due = {"A": rates(("2024-01-01 03:00", 0.01))}
    bars = market(FLAT, FLAT, FLAT, missing=(2, 3))
    assert play(bars, order(0), funding=due, **PERP).equity["funding"].sum() == pytest.approx(1)


def test_a_perpetual_without_rates_is_said():
    result = play(market(FLAT, FLAT), order(0), **PERP)
    assert any("A" in note and "funding" in note for note in result.notes)


def test_borrowed_units_cost_by_the_hour():
    # 0.876 a year is 0.0001 an hour: 0.01 for a unit of 100; the gap of two bars is paid too
    result = play(market(FLAT, FLAT, FLAT, missing=(2, 3)), order(0, size=-1), borrow_rate=0.876)
    assert result.equity["borrow"].sum() == pytest.approx(0.04)
    assert last(result) == pytest.approx(10_000 - 0.04)
    assert result.trades["borrow"].item() == pytest.approx(0.04)


def test_borrowed_cash_costs_by_the_hour():
    # 20 units for 2000 with 1000: 1000 borrowed, 0.1 an hour, and then 0.1 more is borrowed
    result = play(market(FLAT, FLAT, FLAT), order(0, size=20), capital=1000, leverage=3.0, borrow_rate=0.876)
    assert result.equity["borrow"].tolist() == pytest.approx([0, 0.1, 0.10001])


def test_a_long_that_is_paid_borrows_nothing():
    result = play(market(FLAT, FLAT, FLAT), order(0, size=1.0, unit="fraction"), borrow_rate=0.876)
    assert result.equity["borrow"].sum() == pytest.approx(0, abs=1e-9)


# What the market gives: slippage, tick, lot, volume


@pytest.mark.parametrize(
    ("side", "costs", "price"),
    [
        (1, {"slippage": 0.002}, 100.2),
        (-1, {"slippage": 0.002}, 99.8),
        (1, {"half_spread": 0.001, "slippage": 0.002}, 100.3),
        (1, {"slippage_volume": 0.1}, 100.1),  # 100 of 1000: 0.1 * 0.1 ** 2
        (-1, {"slippage_volume": 0.1}, 99.9),
        (1, {"half_spread": 0.001, "slippage": 0.002, "slippage_volume": 0.1}, 100.4),
        (1, {"half_spread": 0.001, "tick": 0.5}, 100.5),  # 100.1 rounded up
        (-1, {"half_spread": 0.001, "tick": 0.5}, 99.5),
        (1, {"tick": 0.5}, 100),
        (-1, {"tick": 0.5}, 100),
    ],
)
def test_price_paid(side, costs, price):
    result = play(market(FLAT, FLAT), order(0, size=100 * side), capital=100_000, **(PERP | costs))
    assert seen(result) == [(1, 100 * side, price)]
    fill = result.fills.iloc[0]
    assert fill["base_price"] == 100
    assert fill["spread"] == pytest.approx(100 * 100 * costs.get("half_spread", 0))
    assert fill["spread"] + fill["slippage"] == pytest.approx(100 * abs(price - 100), abs=1e-8)


def test_slippage_by_volatility_grows_in_proportion():
    bars = market(*((100, 102, 98, 100 + place % 2) for place in range(60)))
    bars.loc[1:, "open"] = bars["close"].shift()[1:]
    fills = [play(bars, order(50), slippage_volatility=times).fills.iloc[0] for times in (0.0, 0.1, 0.2)]
    above = [fill["price"] - fill["base_price"] for fill in fills]
    assert above[0] == 0 < above[1]
    assert above[2] == pytest.approx(2 * above[1])
    assert play(market(*[FLAT] * 60), order(50), slippage_volatility=1.0).fills["price"].item() == 100


def test_slippage_by_volatility_is_known_at_the_close_before():
    calm = [(100, 102, 98, 100 + place % 2) for place in range(51)]
    wild = [(101, 300, 20, 200), (200, 400, 10, 50)]
    tame = [(101, 102, 98, 100), (100, 101, 99, 100)]
    prices = [play(market(*calm, *end), order(50), slippage_volatility=0.1).fills["price"][0] for end in (wild, tame)]
    assert prices[0] == prices[1]


def test_orders_cut_in_pieces_do_not_slip_less():
    # 100 of 1000 in one order, or in four of 25
    rows = [order(0, size=25, replaces=False) for _ in range(4)]
    whole = play(market(FLAT, FLAT), order(0, size=100), capital=100_000, slippage_volume=0.1)
    pieces = play(market(FLAT, FLAT), *rows, capital=100_000, slippage_volume=0.1)
    assert pieces.fills["slippage"].sum() >= whole.fills["slippage"].sum() * 0.5


def test_makers_pay_no_spread_and_no_slippage():
    costs = {"half_spread": 0.01, "slippage": 0.01, "slippage_volume": 0.1, "tick": 0.5}
    assert seen(play(market(FLAT, (100, 101, 94, 96)), order(0, "limit", price=95), **costs)) == [(1, 1, 95)]


def test_a_marketable_limit_never_pays_more_than_its_limit():
    result = play(market(FLAT, (100, 101, 99.9, 100)), order(0, "limit", price=100.05), half_spread=0.001)
    assert (result.fills["price"] <= 100.05).all()


def test_units_are_rounded_down_to_lots():
    assert seen(play(market(FLAT, FLAT), order(0, size=1.99), lot=0.5)) == [(1, 1.5, 100)]
    assert seen(play(market(FLAT, FLAT), order(0, size=-1.99), lot=0.5, **PERP)) == [(1, -1.5, 100)]
    assert play(market(FLAT, FLAT), order(0, size=0.49), lot=0.5).fills.empty


def test_a_lot_is_not_lost_to_rounding():
    assert seen(play(market(FLAT, FLAT), order(0, size=0.3), lot=0.1)) == [(1, 0.3, 100)]  # 0.3 / 0.1 is 2.99...


def test_small_orders_are_rejected_unless_they_close():
    bars = market(FLAT, QUIET, (10, 10, 10, 10), (10, 10, 10, 10))
    rows = [order(0), order(1, size=2), order(2, unit="close")]
    result = play(bars, *rows, min_notional=50)
    assert status(result) == ["filled", "rejected", "filled"]
    assert seen(result) == [(1, 1, 100), (3, -1, 10)]


def test_volume_limit_spreads_an_order_over_bars():
    bars = market(FLAT, QUIET, (101, 102, 100, 101), (102, 103, 101, 102), FLAT)
    result = play(bars, order(0, size=250), capital=100_000, volume_limit=0.1)
    assert seen(result) == [(1, 100, 100), (2, 100, 101), (3, 50, 102)]
    assert status(result) == ["filled"]
    assert result.orders["filled_units"].tolist() == [250]


def test_an_order_that_the_volume_does_not_fill():
    result = play(market(FLAT, FLAT, FLAT), order(0, size=250), capital=100_000, volume_limit=0.1)
    assert last(result, "units_A") == 200
    assert status(result) == ["partly filled"]


def test_the_rest_of_a_stop_goes_on_as_market():
    # long 150 since bars 1 and 2; the stop at 95 gets 100 in bar 3, the rest at the open of bar 4, above the trigger
    bars = market(FLAT, QUIET, QUIET, (100, 101, 94, 99), (99, 100, 98, 99))
    rows = [order(0, size=150), order(2, "stop", unit="close", price=95)]
    result = play(bars, *rows, capital=100_000, volume_limit=0.1)
    assert seen(result)[2:] == [(3, -100, 95), (4, -50, 99)]


def test_two_orders_share_the_volume_of_a_bar():
    rows = [order(0, size=80), order(0, size=80, replaces=False)]
    result = play(market(FLAT, FLAT), *rows, capital=100_000, volume_limit=0.1)
    assert result.fills["units"].tolist() == pytest.approx([80, 20])


# Time: waiting, delay, expiry, replacement


@pytest.mark.parametrize("how", [{"filled": (1,)}, {"volume": [1000, 0, 1000]}])
def test_bars_that_nobody_traded_fill_nothing(how):
    bars = market(FLAT, (101, 101, 101, 101), (103, 104, 102, 103), **how)
    assert seen(play(bars, order(0))) == [(2, 1, 103)]


def test_a_stop_is_not_filled_in_a_bar_that_nobody_traded():
    bars = market(FLAT, QUIET, (90, 91, 89, 90), (92, 93, 91, 92), volume=[1000, 1000, 0, 1000])
    assert seen(play(bars, order(0, stop_loss=0.05)))[1:] == [(3, -1, 92)]


def test_an_order_waits_for_the_end_of_a_gap():
    bars = market(FLAT, (103, 104, 102, 103), FLAT, FLAT, missing=(1, 2))
    assert seen(play(bars, order(0))) == [(3, 1, 103)]


def test_an_asset_without_a_bar_waits_while_the_other_is_traded():
    bars = {"A": market(FLAT, (103, 104, 102, 103), FLAT, missing=(1,)), "B": market(FLAT, FLAT, FLAT, FLAT)}
    result = play(bars, order(0), order(0, asset="B"))
    assert sorted(seen(result, "asset_id")) == [(1, 1, 100, "B"), (2, 1, 103, "A")]


def test_an_order_of_the_last_close_waits():
    result = play(market(FLAT, FLAT), order(1))
    assert result.fills.empty
    assert status(result) == ["waiting"]


def test_an_order_that_is_no_bars_close_is_refused():
    rows = order(0)
    bars = market(FLAT, FLAT)
    with pytest.raises(KallosError):
        play(bars.assign(ts=bars["ts"] + pd.Timedelta("1D")), rows)


@pytest.mark.parametrize(("delay", "place", "price"), [(0, 1, 101), (1, 2, 102), (2, 3, 103)])
def test_delay(delay, place, price):
    bars = market(FLAT, *((100 + place, 100 + place, 100 + place, 100 + place) for place in (1, 2, 3)))
    assert seen(play(bars, order(0), delay=delay)) == [(place, 1, price)]


@pytest.mark.parametrize(("expires", "fills", "fate"), [(2, [], "expired"), (3, [(3, 1, 95)], "filled")])
def test_expiry(expires, fills, fate):
    bars = market(FLAT, QUIET, QUIET, (100, 101, 94, 96))
    result = play(bars, order(0, "limit", price=95, expires=expires))
    assert (seen(result), status(result)) == (fills, [fate])


def test_an_order_without_expiry_stays_beside_one_that_has_it():
    rows = [order(0, "limit", price=95), order(0, "limit", price=90, expires=1, replaces=False)]
    result = play(market(FLAT, QUIET, QUIET, (100, 101, 94, 96)), *rows)
    assert (seen(result), status(result)) == ([(3, 1, 95)], ["filled", "expired"])


def test_a_target_that_is_reached_is_not_traded_again():
    # 0.1 + 0.2 is not 0.3 to the last digit; what is left is no order, no fill and no trade
    rows = [order(0, size=0.1), order(1, size=0.2), order(2, size=0.3, unit="position"), order(3, size=-0.3)]
    result = play(market(FLAT, *[QUIET] * 5), *rows, order(4, unit="close"), **PERP)
    assert [units for _, units, _ in seen(result)] == [0.1, 0.2, -0.3]
    assert len(result.trades) == 1


def test_a_later_order_replaces_an_earlier_one():
    bars = market(FLAT, QUIET, (100, 101, 94, 96))
    rows = [order(0, "limit", price=95), order(1, "limit", price=90)]
    assert status(play(bars, *rows)) == ["cancelled", "waiting"]
    beside = play(bars, rows[0], rows[1] | {"replaces": False})
    assert (seen(beside), status(beside)) == ([(2, 1, 95)], ["filled", "waiting"])


def test_a_replacing_order_leaves_other_assets_alone():
    bars = {"A": market(FLAT, QUIET, (100, 101, 94, 96)), "B": market(FLAT, QUIET, QUIET)}
    result = play(bars, order(0, "limit", price=95), order(1, asset="B"))
    assert status(result) == ["filled", "filled"]


def test_a_replacing_order_takes_the_brackets_along():
    bars = market(FLAT, QUIET, (100, 101, 99, 100), (100, 101, 90, 91))
    result = play(bars, order(0, stop_loss=0.05), order(1))
    assert last(result, "units_A") == 2


def test_a_replacing_order_ends_what_is_half_filled():
    rows = [order(0, size=150), order(1, unit="close")]
    result = play(market(FLAT, FLAT, FLAT, FLAT), *rows, capital=100_000, volume_limit=0.1)
    assert seen(result) == [(1, 100, 100), (2, -100, 100)]
    assert status(result)[1] == "filled"


def test_without_orders_nothing_happens():
    result = play(market(FLAT, QUIET, QUIET))
    assert result.equity["equity"].tolist() == [10_000] * 3
    assert result.fills.empty
    assert result.trades.empty
