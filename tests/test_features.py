"""What must hold of features on any market: with gaps, filled bars, holes in a column, and longer bars."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.errors import ConfigError, DataError
from kallos.data.bars import resample_bars
from kallos.data.features import Feature, bounds_of, compute_features, feature, register, registered, unregister
from kallos.data.files import read_bars_file
from kallos.data.sample import sample_bars

TAKER = "taker_buy_base_asset_volume"
NAMES = ["log_return_3", "williams_r", "taker_buy_ratio", "hour_sine", "log_return_1_4h", "mfi_2h", "trade_ratio_test"]
WHOLE = sample_bars(timeframe="1h", start="2024-01-01", end="2024-01-12")


@pytest.fixture(scope="module", autouse=True)
def own_feature() -> Iterator[None]:
    @feature("unbounded_features", inputs=("number_of_trades",), warmup=2, gap_safe=True)
    def trade_ratio_test(bars):
        trades = bars["number_of_trades"]
        return np.concatenate([[np.nan] * 2, trades[2:] / trades[:-2]])[: len(trades)]

    yield
    unregister("trade_ratio_test")


@st.composite
def markets(draw) -> pd.DataFrame:
    """Eleven days of hourly bars with some dropped, some filled, and holes in two columns."""
    places = st.integers(1, len(WHOLE) - 1)
    filled, taker, trades = (draw(st.sets(places, max_size=8)) for _ in range(3))
    bars = WHOLE.assign(is_filled=WHOLE.index.isin(filled))
    bars[TAKER] = bars[TAKER].where(~WHOLE.index.isin(taker))
    bars["number_of_trades"] = bars["number_of_trades"].where(~WHOLE.index.isin(trades))
    return bars.drop(index=draw(st.sets(places, max_size=6))).reset_index(drop=True)


def computed(bars: pd.DataFrame, **how) -> pd.DataFrame:
    try:
        return compute_features(bars, timeframe="1h", names=NAMES, **how)
    except DataError:
        return pd.DataFrame({"ts": bars["ts"][:0], **{name: [] for name in NAMES}})


@settings(deadline=None, max_examples=25)
@given(markets(), st.data())
def test_the_future_changes_nothing_and_since_gives_the_same(bars, data):
    whole = computed(bars)
    cut = data.draw(st.integers(5, len(bars) - 1))
    known = whole["ts"] <= bars["ts"].iloc[cut - 1] + pd.Timedelta("1h")
    early = computed(bars[:cut])
    assert early["ts"].tolist() == whole["ts"][known].tolist()
    wild = bars.copy()
    wild.loc[cut:, ["open", "high", "low", "close", "volume", TAKER, "number_of_trades"]] *= 3
    changed = computed(wild)
    late = computed(bars, since=bars["ts"].iloc[cut])
    after = whole["ts"] > bars["ts"].iloc[cut]
    for name in NAMES:
        np.testing.assert_array_equal(early[name], whole[name][known])
        np.testing.assert_array_equal(changed[name][changed["ts"].isin(whole["ts"][known])], whole[name][known])
        np.testing.assert_array_equal(late[name], whole[name][after])


@settings(deadline=None, max_examples=25)
@given(markets())
def test_rows_are_where_every_feature_is_known(bars):
    whole = computed(bars)
    assert np.isfinite(whole[NAMES].to_numpy(float)).all()
    by_open = bars.set_index("ts")
    longer = resample_bars(bars, timeframe="1h", to="4h").set_index("ts")
    hour = pd.Timedelta("1h")
    for _, row in whole.sample(min(len(whole), 12), random_state=0).iterrows():
        opened = row["ts"] - hour
        assert not by_open.loc[opened, "is_filled"]
        past = [by_open.loc[opened - n * hour, "close"] for n in (0, 3)]  # KeyError if a bar is missing
        assert row["log_return_3"] == pytest.approx(np.log(past[0] / past[1]))
        closed = row["ts"].floor("4h") - pd.Timedelta("4h")
        steps = [longer.loc[closed - n * pd.Timedelta("4h"), "close"] for n in (0, 1)]
        assert row["log_return_1_4h"] == pytest.approx(np.log(steps[0] / steps[1]))
        assert row["taker_buy_ratio"] == by_open.loc[opened, TAKER] / by_open.loc[opened, "volume"]
        usable = by_open["number_of_trades"][:opened].dropna()
        assert row["trade_ratio_test"] == usable.iloc[-1] / usable.iloc[-3]


# What a user may have written


def writes_prices(columns):
    columns["close"][:] = 1.0
    return columns["close"]


def writes_times(columns):
    columns["ts"][:] = columns["ts"][0]
    return np.zeros(len(columns["ts"]))


def divides_by_the_hundredth(columns):
    return columns["close"] / columns["close"][10_000]


WRONG = {
    "read-only": (writes_prices, writes_times),
    "IndexError": (divides_by_the_hundredth,),
    "one value a bar": (lambda c: c["close"][1:], lambda c: c["close"][:, None], lambda c: None, lambda c: 1.0),
    "could not convert": (lambda c: ["up"] * len(c["close"]),),
}


@pytest.mark.parametrize(("said", "compute"), [(said, wrong) for said in WRONG for wrong in WRONG[said]])
@pytest.mark.parametrize("gap_safe", [False, True])
def test_a_wrong_feature_is_named_and_changes_nothing(said, compute, gap_safe):
    bars = WHOLE.drop(index=100).reset_index(drop=True)
    before = bars.copy(deep=True)
    honest = computed(bars)
    inputs = ("ts", "close")
    register(Feature("wrong", "unbounded_features", compute, inputs, 0, "a mistake", gap_safe=gap_safe))
    try:
        with pytest.raises(ConfigError, match="feature 'wrong'") as caught:
            compute_features(bars, timeframe="1h", names=["wrong", *NAMES])
    finally:
        unregister("wrong")
    assert said in str(caught.value)
    pd.testing.assert_frame_equal(bars, before)
    pd.testing.assert_frame_equal(computed(bars), honest)


def test_numbers_of_any_kind_are_taken():
    close = compute_features(WHOLE, timeframe="1h", names=[])["close"].round()
    for give in (
        lambda c: [int(x) for x in c["close"].round()],
        lambda c: pd.Series(c["close"].round(), index=c["ts"]),
    ):
        register(Feature("own", "unbounded_features", give, ("ts", "close"), 0, "a rounded close"))
        try:
            values = compute_features(WHOLE, timeframe="1h", names=["own"])["own"]
        finally:
            unregister("own")
        assert values.dtype == "float64" and values.tolist() == close.tolist()


def test_an_hourly_row_sees_a_longer_bar_from_its_close_on():
    bars = WHOLE.drop(index=50).reset_index(drop=True)
    table = compute_features(bars, timeframe="1h", names=["log_return_1_4h"]).set_index("ts")["log_return_1_4h"]
    close = resample_bars(bars, timeframe="1h", to="4h").set_index("ts")["close"]
    known = np.log(close / close.shift(freq="4h")).dropna().rename_axis("ts")
    known.index += pd.Timedelta("4h")  # when each longer bar closes
    for ts, value in table.items():
        assert value == pytest.approx(known[ts.floor("4h")], rel=1e-12), ts
    missing = pd.Timestamp("2024-01-03T02:00", tz="UTC").floor("4h")  # the bar of hour 50 never closes
    assert not table.index.isin(pd.date_range(missing + pd.Timedelta("4h"), periods=8, freq="1h")).any()


REAL = {"BTCUSDT_spot_1d.csv.gz": "1d", "BTCUSDT_spot_4h.csv.gz": "4h", "BTCUSDT_perp_15m.parquet": "15m"}


@pytest.mark.skipif("KALLOS_REAL_DATA" not in os.environ, reason="KALLOS_REAL_DATA names no folder of market data")
@pytest.mark.parametrize("name", REAL)
def test_warmups_are_long_enough_on_real_markets(name):
    timeframe = REAL[name]
    bars = read_bars_file(Path(os.environ["KALLOS_REAL_DATA"]) / "bars" / name, timeframe=timeframe)
    names = [name for name in registered() if name != "trade_ratio_test"]
    whole = compute_features(bars, timeframe=timeframe, names=names).set_index("ts").dropna(axis="columns")
    names = [name for name in names if name in whole]
    scale = pd.Series({n: np.ptp(bounds_of(n)) if bounds_of(n) else whole[n].std() for n in names})
    begins = np.random.default_rng(0).integers(1, len(bars) - 700, size=20)
    for begin in begins:
        late = compute_features(
            bars[begin : begin + 700].reset_index(drop=True), timeframe=timeframe, names=names, since=whole.index[0]
        )
        moved = (late.set_index("ts")[names] - whole[names]).dropna().abs().max() / scale
        assert moved.max() < 1e-6, moved.nlargest(3)
