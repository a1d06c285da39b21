"""Faults planted into a known market, and real files: each reaches the outcome of its rule, and can be read back."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.columns import BAR_COLUMNS, PRICE_COLUMNS
from kallos.core.errors import DataError
from kallos.core.schemas import BARS, check_table
from kallos.data.bars import check_bars, resample_bars
from kallos.data.files import read_raw
from kallos.data.findings import RepairReport
from kallos.data.ledger import Repaired, read_back
from kallos.data.repair import Repair, repair_bars
from kallos.data.rules import RULES
from kallos.data.sample import sample_bars

BARS_OF_MARKET, APART = 360, 15
HOUR = pd.Timedelta("1h")


@pytest.fixture(scope="module")
def market() -> pd.DataFrame:
    return make_market()


def make_market() -> pd.DataFrame:
    bars = sample_bars(timeframe="1h", start="2024-01-01", end="2024-01-16").head(BARS_OF_MARKET)
    return bars.assign(ts_other=bars["ts"], row=np.arange(1, len(bars) + 1), source="planted.csv")


def repaired(raw: pd.DataFrame, **options) -> tuple[Repaired, RepairReport]:
    return repair_bars(raw, timeframe="1h", what="planted.csv", **options)


def in_chunks(raw: pd.DataFrame, cuts: list[pd.Timestamp], **options) -> tuple[Repaired, RepairReport]:
    """The same rows in chunks that end before these times; rows without a time come first."""
    repair = Repair(timeframe="1h", what="planted.csv", **options)
    ends = pd.DatetimeIndex(sorted(cuts), tz="UTC").as_unit("us")
    number = ends.searchsorted(pd.DatetimeIndex(raw["ts"].fillna(pd.Timestamp(0, tz="UTC"))), side="right")
    parts = [repair.add(raw[number == n], last=n == len(cuts)) for n in range(len(cuts) + 1)]
    tables = [[getattr(part, name) for part in parts] for name in ("bars", "quarantine", "changes")]
    return Repaired(*(pd.concat(table, ignore_index=True) for table in tables)), repair.report


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values([name for name in ("ts", "row", "rule", "column") if name in table], ignore_index=True)


def assert_same(one: tuple[Repaired, RepairReport], other: tuple[Repaired, RepairReport]) -> None:
    pd.testing.assert_frame_equal(one[0].bars, other[0].bars, check_exact=True)
    pd.testing.assert_frame_equal(in_order(one[0].quarantine), in_order(other[0].quarantine), check_exact=True)
    pd.testing.assert_frame_equal(in_order(one[0].changes), in_order(other[0].changes), check_exact=True)
    assert one[1].to_dict() == other[1].to_dict()


def assert_readable(raw: pd.DataFrame, result: Repaired) -> None:
    """Every bar of the repair, read back, is a row of the file to the digit."""
    columns = ["ts", *(name for name in BAR_COLUMNS if name in raw)]
    original = read_back(result.bars, result.changes)
    found = original[columns].merge(raw[columns].drop_duplicates(), on=columns)
    assert len(found) == len(original)


# One fault


def cells(**values: float) -> Callable:
    """A fault that writes into cells of one row; a number stands for itself, a function takes the row."""

    def plant(raw: pd.DataFrame, at: int) -> pd.DataFrame:
        raw = raw.copy()
        row = raw.loc[at]
        for name, value in values.items():
            raw.loc[at, name] = value(row) if callable(value) else value
        return raw

    return plant


def inserted(before: bool = False, **values: Callable) -> Callable:
    """A fault that adds a row of the same time, with other values."""

    def plant(raw: pd.DataFrame, at: int) -> pd.DataFrame:
        twin = cells(**values)(raw, at).loc[[at]]
        ends = at if before else at + 1
        return pd.concat([raw[:ends], twin, raw[ends:]], ignore_index=True)

    return plant


def hang(raw: pd.DataFrame, at: int) -> pd.DataFrame:
    raw = raw.copy()
    raw.loc[at + 1 : at + 6, BAR_COLUMNS] = raw.loc[[at] * 6, BAR_COLUMNS].to_numpy()
    return raw


def echo(raw: pd.DataFrame, at: int) -> pd.DataFrame:
    raw = raw.copy()
    raw.loc[at + 5 : at + 9, BAR_COLUMNS] = raw.loc[at : at + 4, BAR_COLUMNS].to_numpy()
    return raw


def of(name: str, factor: float) -> Callable:
    return lambda row: row[name] * factor


NOBODY = dict.fromkeys(BAR_COLUMNS[4:], 0.0)
HALF = {name: of("open", 1) for name in PRICE_COLUMNS} | {name: of(name, 0.4) for name in NOBODY}
OTHER = {name: of(name, 1.01) for name in PRICE_COLUMNS}
NARROW = {"open": of("close", 0.9999), "low": of("close", 0.9999), "high": of("close", 1 - 1e-8)}
FLAT = {name: of("close", 1) for name in PRICE_COLUMNS} | NOBODY
LATER = {name: lambda row: row["ts"] + HOUR / 7 for name in ("ts", "ts_other")}
FAULTS = {  # the rule: how it is broken, how often it then counts, rows in quarantine, values changed
    "unreadable_time": (cells(ts=pd.NaT), 1, 1, 0),
    "times_disagree": (cells(ts_other=lambda row: row["ts"] - 4 * HOUR), 1, 1, 0),
    "off_grid": (cells(**LATER), 1, 1, 0),
    "duplicate": (inserted(), 1, 0, 0),
    "partial_version": (inserted(before=True, **HALF), 1, 1, 0),
    "conflicting_duplicate": (inserted(**OTHER), 2, 2, 0),
    "not_finite": (cells(close=np.nan), 1, 1, 0),
    "non_positive_price": (cells(low=0.0), 1, 1, 0),
    "negative_volume": (cells(number_of_trades=-3.0), 1, 1, 0),
    "high_low": (cells(high=of("low", 0.999)), 1, 1, 0),
    "taker_above_volume": (cells(taker_buy_base_asset_volume=of("volume", 1.5)), 1, 1, 0),
    "spike": (cells(high=of("high", 4.0)), 1, 1, 0),
    "frozen": (hang, 6, 6, 0),
    "echo": (echo, 1, 0, 0),
    "high_low_rounding": (cells(**NARROW), 1, 0, 1),
    "infinite_amount": (cells(number_of_trades=np.inf), 1, 0, 1),
    "flat_filler": (cells(**FLAT), 1, 0, 1),
    "vwap_outside": (cells(quote_asset_volume=of("quote_asset_volume", 1.5)), 1, 0, 0),
    "missing_values": (cells(taker_buy_quote_asset_volume=np.nan), 1, 0, 0),
    "gap": (lambda raw, at: raw.drop(index=at).reset_index(drop=True), 1, 0, 0),
}
FOLLOWS = {"gap", "vwap_outside", "missing_values"}  # what a fault and its repair may bring with them
NOT_PLANTED = {"wrong_timeframe", "newest_first", "unordered", "filled", "splice", "partial_last_bar", "thin_last_bar"}


def numbered(raw: pd.DataFrame) -> pd.DataFrame:
    return raw.assign(row=np.arange(1, len(raw) + 1))


def test_every_rule_is_tried() -> None:
    assert FAULTS.keys() | NOT_PLANTED == RULES.keys()


def test_a_clean_market_is_untouched(market: pd.DataFrame) -> None:
    result, report = repaired(market)
    pd.testing.assert_frame_equal(result.bars.drop(columns="is_filled"), market[["ts", *BAR_COLUMNS]])
    assert not report.counts and result.quarantine.empty and result.changes.empty and not result.bars["is_filled"].any()


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_reaches_its_outcome(rule: str, market: pd.DataFrame) -> None:
    plant, count, kept_out, changed = FAULTS[rule]
    raw = numbered(plant(market, 100))
    result, report = repaired(raw)
    assert report.counts.pop(rule) == count
    assert report.counts.keys() <= FOLLOWS
    assert [*result.quarantine["rule"]] == [rule] * kept_out and [*result.changes["rule"]] == [rule] * changed
    assert_readable(raw, result)
    check_bars(result.bars, timeframe="1h", what="the repair")


# Many faults


@st.composite
def damaged(draw: st.DrawFn) -> tuple[pd.DataFrame, dict[str, int]]:
    """A market with faults far enough apart to be seen one by one, and how often each rule must fire."""
    places = draw(st.lists(st.sampled_from(range(APART, BARS_OF_MARKET - APART, APART)), unique=True, max_size=12))
    raw, counts = make_market(), {}
    for place in sorted(places, reverse=True):  # rows that are added later stand before those that were added
        rule = draw(st.sampled_from([*FAULTS]))
        plant, count, *_ = FAULTS[rule]
        raw, counts[rule] = plant(raw, place), counts.get(rule, 0) + count
    return raw, counts


WRITTEN = st.sampled_from(["oldest first", "newest first", "shuffled"])
CUTS = st.lists(st.integers(1, BARS_OF_MARKET - 1), unique=True, max_size=5)


def as_written(raw: pd.DataFrame, way: str) -> pd.DataFrame:
    """The rows in another order, without taking apart rows of one time."""
    if way == "newest first":
        raw = raw[::-1]
    if way == "shuffled":
        groups = [group for _, group in raw.groupby("ts", sort=False, dropna=False)]
        order = np.random.default_rng(len(raw)).permutation(len(groups))
        raw = pd.concat([groups[n] for n in order])
    return numbered(raw.reset_index(drop=True))


@settings(max_examples=30, deadline=None)
@given(damaged(), WRITTEN, CUTS, st.booleans(), st.booleans())
def test_planted_faults(faults: tuple, way: str, cuts: list[int], fill: bool, drop: bool) -> None:
    planted, counts = faults
    raw = as_written(planted, way)
    whole = repaired(raw, fill_gaps=fill, drop_last=drop)
    result, report = whole
    for rule in FAULTS.keys() - FOLLOWS:
        assert report.counts.get(rule, 0) == counts.get(rule, 0), rule
    assert ("newest_first" in report.counts) == (way == "newest first")
    assert ("unordered" in report.counts) == (way == "shuffled")
    assert report.counts.get("partial_last_bar", 0) == drop
    assert (report.counts.get("filled", 0) == report.gaps["missing"].sum()) or not fill
    assert_readable(raw, result)
    check_bars(result.bars, timeframe="1h", what="the repair")
    assert_same(whole, in_chunks(raw, [make_market()["ts"][cut] for cut in cuts], fill_gaps=fill, drop_last=drop))


# Rubbish

NUMBERS = st.sampled_from([1.0, 1.0000005, 2.0, 5.0, 1e-5, 1e12, 0.0, -1.0, np.nan, np.inf, -np.inf])
TIMES = st.sampled_from([*pd.date_range("2024-01-01", periods=8, freq="1h", tz="UTC"), pd.NaT])
ROWS = st.lists(st.tuples(TIMES, *[NUMBERS] * 6), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(ROWS, CUTS, st.booleans())
def test_any_rows_become_bars_or_are_accounted_for(rows: list, cuts: list[int], fill: bool) -> None:
    names = ["ts", *PRICE_COLUMNS, "volume", "quote_asset_volume"]
    raw = numbered(pd.DataFrame(rows, columns=names).assign(source="rubbish.csv"))
    raw["ts"] = pd.to_datetime(raw["ts"], utc=True).dt.as_unit("us")
    try:
        result, report = repaired(raw, fill_gaps=fill)
    except DataError:
        return
    check_table(result.bars, BARS, what="the repair")
    copies = report.counts.get("duplicate", 0) - (result.quarantine["rule"] == "duplicate").sum()
    assert len(raw) == len(result.quarantine) + copies + len(result.bars) - report.counts.get("filled", 0)
    assert_readable(raw, result)
    assert RepairReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_dict() == report.to_dict()
    hours = pd.date_range("2024-01-01", periods=9, freq="1h", tz="UTC")
    assert_same((result, report), in_chunks(raw, sorted({hours[cut % 9] for cut in cuts}), fill_gaps=fill))


# The whole series


def test_two_venues_in_one_series() -> None:
    bars = sample_bars(timeframe="1h", start="2024-01-01", end="2024-06-30")
    volumes = bars[BAR_COLUMNS[4:]] * np.where(np.arange(len(bars)) < 2000, 1, 20)[:, None]
    _, report = repaired(bars.assign(**volumes))
    assert report.counts == {"splice": 1}
    found = pd.Timestamp(report.examples["splice"][0]["ts"])
    assert abs(found - bars["ts"][2000]) <= 50 * HOUR


@pytest.mark.parametrize("claimed", ["15m", "4h", "1d"])
def test_a_wrong_timeframe_is_refused(claimed: str, market: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="most bars are 1h apart, not " + claimed):
        repair_bars(market, timeframe=claimed, what="planted.csv")


def test_a_file_without_times_is_refused(market: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="the time of 360 of 360 rows cannot be read, so no reading of this file"):
        repaired(market.assign(ts=pd.Series(pd.NaT, market.index, market["ts"].dtype)))
    with pytest.raises(DataError, match="all 360 rows have one time, so no reading of this file is right"):
        repaired(market.assign(ts=market["ts"][0], ts_other=market["ts"][0]))


def test_a_wrong_column_is_refused(market: pd.DataFrame) -> None:
    swapped = market.rename(columns={"volume": "quote_asset_volume", "quote_asset_volume": "volume"})
    with pytest.raises(DataError, match=r"volume.*--map volume="):
        repaired(swapped.drop(columns=BAR_COLUMNS[7:]))
    with pytest.raises(DataError, match=r"two columns of times disagree in 360 of 360 rows.*--map ts="):
        repaired(market.assign(ts_other=market["ts"] + HOUR))


def test_bars_that_are_not_closed(market: pd.DataFrame) -> None:
    now = market["ts"].iloc[-3] + HOUR
    result, report = repaired(market, now=now)
    assert result.bars["ts"].iloc[-1] == now - HOUR and report.counts == {"partial_last_bar": 2}
    assert result.quarantine["row"].tolist() == [359, 360]
    assert_same((result, report), in_chunks(market, [market["ts"].iloc[-2]], now=now))
    thin = cells(**{name: of(name, 0.01) for name in BAR_COLUMNS[4:]})(market, len(market) - 1)
    assert repaired(thin)[1].counts == {"thin_last_bar": 1}


def test_chunks_come_in_order(market: pd.DataFrame) -> None:
    repair = Repair(timeframe="1h", what="planted.csv")
    repair.add(market[:50], last=False)
    with pytest.raises(DataError, match="a chunk begins before the one before it ended"):
        repair.add(market[49:])


@pytest.mark.parametrize("cut", [96, 97, 98, 101, 103])
def test_what_was_said_of_a_waiting_bar_waits_with_it(market: pd.DataFrame, cut: int) -> None:
    """A chunk's entries take the place of those on its bars: one that came a chunk earlier would be lost."""
    young = market[97:98].assign(volume=1.0, quote_asset_volume=1.0)
    young = young.assign(number_of_trades=1.0, taker_buy_base_asset_volume=0.5, taker_buy_quote_asset_volume=0.5)
    repair = Repair(timeframe="1h", what="planted.csv")
    ordered = pd.concat([market, young]).sort_values("ts", kind="stable")
    early = ordered["ts"] < market["ts"][cut]
    parts = [repair.add(ordered[early], last=False), repair.add(ordered[~early])]
    home = [part for part in parts if part.bars["ts"].isin(young["ts"]).any()]
    assert len(home) == 1 and home[0].quarantine["rule"].tolist() == ["partial_version"]
    assert sum(len(part.quarantine) for part in parts) == 1


def test_a_file_that_is_mostly_faulty_is_refused(market: pd.DataFrame) -> None:
    many, few = market.copy(), market.copy()
    many.loc[:200, "close"], few.loc[:150, "close"] = -1.0, -1.0
    with pytest.raises(DataError, match="201 of 360 rows are faulty, most by the rule non_positive_price"):
        repaired(many)
    assert repaired(few)[1].counts["non_positive_price"] == 151


def test_a_gap_of_years_is_not_filled(market: pd.DataFrame) -> None:
    late = market.tail(1).assign(ts=market["ts"].iloc[-1] + 200_000 * HOUR)
    raw = numbered(pd.concat([market, late.assign(ts_other=late["ts"])], ignore_index=True))
    assert repaired(raw)[1].gaps["missing"].tolist() == [199_999]
    with pytest.raises(DataError, match=r"a gap of 199,999 bars .* is too long to be filled"):
        repaired(raw, fill_gaps=True)


# Real files


def of_real_file(folder: Path, name: str) -> tuple[pd.DataFrame, Repaired, RepairReport]:
    path = next(folder.glob(f"*/{name}.*"))
    raw, _ = read_raw(path)
    return raw, *repair_bars(raw, timeframe=name.rsplit("_", 1)[-1], what=path.name)


CLEAN = {
    "BTCUSDT_spot_1d": {},
    "BTCUSDT_spot_4h": {"gap": 8},
    "BTCUSDT_spot_1h": {"off_grid": 43, "gap": 18, "flat_filler": 1, "thin_last_bar": 1},
    "BTCUSDT_perp_15m": {"flat_filler": 4},
    "ETHUSDT_spot_1d": {},
    "ETHUSDT_spot_4h": {"gap": 8, "flat_filler": 1, "thin_last_bar": 1},
    "tiny_SHIBUSDT_3m": {},
}


@pytest.mark.parametrize("name", CLEAN)
def test_real_files_without_false_alarm(name: str, real_data: Path) -> None:
    raw, result, report = of_real_file(real_data, name)
    assert report.counts == CLEAN[name]
    assert_readable(raw, result)
    columns = ["ts", *(column for column in BAR_COLUMNS if column in raw)]
    kept = raw.loc[~raw["row"].isin(result.quarantine["row"]), columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.bars[columns], kept, check_exact=True)


def test_real_four_hours_make_days(real_data: Path) -> None:
    days = of_real_file(real_data, "BTCUSDT_spot_1d")[1].bars
    made = resample_bars(of_real_file(real_data, "BTCUSDT_spot_4h")[1].bars, timeframe="4h", to="1d")
    both = made.merge(days, on="ts", suffixes=("", "_of_days"))
    assert len(both) == 2567
    for name in PRICE_COLUMNS:
        assert (both[name] == both[f"{name}_of_days"]).all()


def test_cryptodatadownload(real_data: Path) -> None:
    raw, result, report = of_real_file(real_data, "cdd_BTCUSDT_1h")
    counts = report.counts
    assert counts["times_disagree"] == 91 and counts["newest_first"] == len(raw) == 36062
    assert counts["duplicate"] + counts["partial_version"] == 2649 and counts["partial_version"] == 3
    assert counts["flat_filler"] == result.bars["is_filled"].sum() == 117
    spike = result.quarantine.query("rule == 'spike'")
    assert spike["high"].tolist() == [16199.91]
    assert "conflicting_duplicate" not in counts and "off_grid" not in counts
    grown = result.bars.set_index("ts").loc[pd.Timestamp("2020-11-20 07:00", tz="UTC")]
    assert grown["volume"] == 6097.866380 and grown["number_of_trades"] == 93118
    assert_readable(raw, result)
    assert len(result.bars) == 36062 - 91 - 2649 - 1


def test_coinbase(real_data: Path) -> None:
    raw, result, report = of_real_file(real_data, "coinbase_BTCUSD_1h")
    assert report.counts == {"newest_first": 20111, "unordered": 1, "echo": 1, "flat_filler": 28}
    assert len(result.bars) == len(raw) == 20111
    assert_readable(raw, result)


def test_partial_versions(real_data: Path) -> None:
    raw, result, report = of_real_file(real_data, "partials_BTCUSDT_1h")
    assert report.counts["partial_version"] == 5 and report.counts["off_grid"] == 43
    last = raw.groupby("ts")["volume"].last()
    assert (result.bars.set_index("ts")["volume"] == last.reindex(result.bars["ts"])).all()
    assert len(result.bars) == len(raw) - 48


def test_a_spreadsheet_without_times_is_refused(real_data: Path) -> None:
    with pytest.raises(DataError, match="no reading of this file is right"):
        of_real_file(real_data, "excel_BTCUSDT_4h")
