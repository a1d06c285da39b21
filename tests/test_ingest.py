"""Files of bars as vendors write them, synthetic and real, and what becomes of them."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.errors import DataError
from kallos.core.schemas import BAR_COLUMNS, PRICE_COLUMNS
from kallos.data.bars import gap_map, segment_ids
from kallos.data.features import compute_features, registered
from kallos.data.files import find_files, read_bars_file, read_raw, stream_raw, symbols_of
from kallos.data.sample import sample_bars
from kallos.data.store import WriteReport, connect, read_bars, read_features, write_bars, write_features

KLINE = ["open_time", *BAR_COLUMNS[:5], "close_time", *BAR_COLUMNS[5:], "ignore"]
VENDORS = {
    "documentation": [
        *("Open time", "Open", "High", "Low", "Close", "Volume", "Close time", "Quote asset volume"),
        *("Number of trades", "Taker buy base asset volume", "Taker buy quote asset volume", "Ignore"),
    ],
    "client": [
        *("timestamp", "open", "high", "low", "close", "volume", "close_time", "quote_av"),
        *("trades", "tb_base_av", "tb_quote_av", "ignore"),
    ],
    "bulk": [
        *("open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume"),
        *("count", "taker_buy_volume", "taker_buy_quote_volume", "ignore"),
    ],
}
STAMPS = {
    "s": lambda ts: ts.astype("int64") // 10**6,
    "ms": lambda ts: ts.astype("int64") // 10**3,
    "us": lambda ts: ts.astype("int64"),
    "ns": lambda ts: ts.astype("int64") * 10**3,
    "float ms": lambda ts: (ts.astype("int64") // 10**3).astype(float),
    "ISO": lambda ts: ts.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "kline": lambda ts: ts.dt.strftime("%Y-%m-%d %H:%M:%S.%f UTC"),
    "naive": lambda ts: ts.dt.tz_localize(None),
    "aware": lambda ts: ts,
}


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return sample_bars(timeframe="1h", start="2024-12-30", end="2025-01-02")


def as_kline(bars: pd.DataFrame, stamp: str = "ms") -> pd.DataFrame:
    """The bars as Binance's twelve columns."""
    close_time = bars["ts"].astype("int64") // 10**3 + 3_599_999
    table = bars.assign(open_time=STAMPS[stamp](bars["ts"]), close_time=close_time, ignore=0)
    return table[KLINE]


def assert_same(read: pd.DataFrame, bars: pd.DataFrame) -> None:
    """That the file's bars are these to the bit; bars of an exchange are not filled."""
    wanted = bars if "is_filled" in bars else bars.assign(is_filled=False)
    pd.testing.assert_frame_equal(read, wanted, check_exact=True)


def write(table: pd.DataFrame, path: Path) -> Path:
    """The table in the format that the path's name says."""
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".feather":
        table.to_feather(path)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{path.stem}.csv", table.to_csv(index=False))
    else:
        table.to_csv(path, index=False)
    return path


# Every way of writing the same bars


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet", ".feather", ".zip"])
@pytest.mark.parametrize("stamp", STAMPS)
def test_every_stamp_in_every_format(tmp_path, bars, stamp, ending):
    path = write(as_kline(bars, stamp), tmp_path / f"bars{ending}")
    assert_same(read_bars_file(path, timeframe="1h"), bars)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("change", [str, str.upper, lambda name: name.replace(" ", "_"), lambda name: f' "{name}"'])
def test_every_vendor_s_names(tmp_path, bars, vendor, change):
    header = ",".join(map(change, VENDORS[vendor]))
    (tmp_path / "bars.csv").write_text(f"{header}\n" + as_kline(bars).to_csv(index=False, header=False))
    assert_same(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), bars)


@pytest.mark.parametrize("columns", [6, 11, 12])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_no_header(tmp_path, bars, columns, line_end, mark):
    text = as_kline(bars).iloc[:, :columns].to_csv(index=False, header=False, lineterminator=line_end)
    (tmp_path / "bars.csv").write_bytes(mark + text.encode())
    assert_same(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), bars if columns > 6 else bars.iloc[:, :6])
    assert read_raw(tmp_path / "bars.csv")[1][0].kind.endswith("without header")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators(tmp_path, bars, separator):
    as_kline(bars).to_csv(tmp_path / "bars.csv", index=False, sep=separator)
    assert_same(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), bars)


def test_kraken_has_seven_columns_and_no_header(tmp_path, bars):
    table = as_kline(bars, "s")[["open_time", *BAR_COLUMNS[:5], "number_of_trades"]]
    table.to_csv(tmp_path / "XBTUSD_60.csv", index=False, header=False)
    assert_same(read_bars_file(tmp_path / "XBTUSD_60.csv", timeframe="1h"), bars[["ts", *table.columns[1:]]])


def test_the_time_in_a_parquet_index(tmp_path, bars):
    bars.set_index("ts").to_parquet(tmp_path / "bars.parquet")
    bars.set_index("ts").rename_axis(None).to_parquet(tmp_path / "nameless.parquet")
    for name in ("bars", "nameless"):
        assert_same(read_bars_file(tmp_path / f"{name}.parquet", timeframe="1h"), bars)


def test_bars_that_kallos_wrote_keep_their_fillers(tmp_path, bars):
    flat = bars.index % 7 == 0
    filled = bars.assign(is_filled=flat)
    filled.loc[flat, BAR_COLUMNS[4:]] = 0.0
    for name in ("open", "high", "low"):
        filled.loc[flat, name] = filled.loc[flat, "close"]
    for ending in (".csv", ".parquet", ".feather"):
        assert_same(read_bars_file(write(filled, tmp_path / f"bars{ending}"), timeframe="1h"), filled)


@settings(max_examples=25, deadline=None)
@given(price=st.floats(1e-12, 1e12), volume=st.floats(0, 1e15))
def test_every_decimal_is_read_exactly(tmp_path_factory, price, volume):
    path = tmp_path_factory.mktemp("exact") / "bars.csv"
    rows = [f"{1735689600 + 3600 * hour},{price!r},{price!r},{price!r},{price!r},{volume!r}" for hour in range(2)]
    path.write_text("\n".join(rows))
    read, _ = read_raw(path)
    assert (read[PRICE_COLUMNS] == price).all(axis=None) and (read["volume"] == volume).all()


# freqtrade


def as_freqtrade(bars: pd.DataFrame) -> list[list[float]]:
    return as_kline(bars).iloc[:, :6].to_numpy(float).tolist()


def test_freqtrade_s_feather(tmp_path, bars):
    table = bars.iloc[:, :6].rename(columns={"ts": "date"})
    table.assign(date=table["date"].astype("datetime64[ms, UTC]")).to_feather(
        tmp_path / "BTC_USDT-1h.feather", compression="lz4", compression_level=9
    )
    assert_same(read_bars_file(tmp_path / "BTC_USDT-1h.feather", timeframe="1h"), bars.iloc[:, :6])
    raw, (seen,) = read_raw(tmp_path / "BTC_USDT-1h.feather")
    assert (seen.kind, symbols_of(raw)) == ("freqtrade Feather", {"BTCUSDT"})


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".zip"])
@pytest.mark.parametrize("spaced", [{"separators": (",", ":")}, {}, {"indent": 1}], ids=["tight", "loose", "indented"])
def test_freqtrade_s_json(tmp_path, bars, ending, spaced):
    text, path = json.dumps(as_freqtrade(bars), **spaced), tmp_path / f"BTC_USDT-1h{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("BTC_USDT-1h.json", text)
    else:
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert_same(read_bars_file(path, timeframe="1h"), bars.iloc[:, :6])
    assert read_raw(path)[1][0].kind == "freqtrade JSON"


def test_binance_s_own_json(tmp_path, bars):
    rows = [
        [row[0], *map(str, row[1:6]), row[6], *map(str, row[7:])] for row in as_kline(bars).to_numpy(object).tolist()
    ]
    (tmp_path / "bars.json").write_text(json.dumps(rows))
    assert_same(read_bars_file(tmp_path / "bars.json", timeframe="1h"), bars)


@pytest.mark.parametrize(
    ("text", "said"),
    {
        '{"open": [1]}': "no list of rows",
        '[{"open": 1}]': "no list of rows",
        "[1, 2]": "no list of rows",
        "[[1735689600000, 1, 1, 1, 1, 1], [173": "ends in the middle",
        "": "no list of rows",
    }.items(),
)
def test_json_that_is_no_list_of_rows(tmp_path, text, said):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=f"{said}.*bad.json"):
        read_raw(tmp_path / "bad.json")


# CryptoDataDownload


def as_cdd(bars: pd.DataFrame, *, unix: bool = True, quote: str = "Volume USDT", base: str = "Volume BTC") -> str:
    """The bars as CryptoDataDownload writes them: newest first, a line about itself above the header."""
    table = bars[::-1].assign(
        unix=STAMPS["ms"](bars["ts"]),
        date=bars["ts"].dt.strftime("%Y-%m-%d %I-%p"),
        symbol="BTC/USDT",
        tradecount=bars["number_of_trades"].astype(int),
    )
    table = table.rename(columns={"volume": base, "quote_asset_volume": quote})
    names = ["date", "symbol", *PRICE_COLUMNS, base, quote, "tradecount"]
    text = table[["unix", *names] if unix else names].to_csv(index=False, na_rep="NULL")
    return "https://www.CryptoDataDownload.com\n" + text


@pytest.mark.parametrize("unix", [True, False])
@pytest.mark.parametrize(
    ("base", "quote"),
    [("Volume BTC", "Volume USDT"), ("volume_btc", "volume"), ("volume", "volume_usd"), ("Volume", "q")],
)
def test_two_volumes(tmp_path, bars, unix, base, quote):
    (tmp_path / "bars.csv").write_text(as_cdd(bars, unix=unix, base=base, quote=quote))
    wanted = bars.drop(columns=BAR_COLUMNS[-2:])
    wanted = wanted if quote != "q" else wanted.drop(columns="quote_asset_volume")
    assert_same(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), wanted)
    raw, (seen,) = read_raw(tmp_path / "bars.csv")
    assert seen.kind == "CryptoDataDownload CSV" and symbols_of(raw) == {"BTCUSDT"}
    assert raw["row"].tolist() == [*range(1, len(bars) + 1)] and raw["ts"].is_monotonic_decreasing
    assert not unix or (raw["ts"] == raw["ts_other"]).all()


def test_volumes_that_only_the_numbers_tell(tmp_path, bars):
    table = as_kline(bars)[["open_time", *BAR_COLUMNS[:6]]].rename(columns={"quote_asset_volume": "volume_two"})
    table.rename(columns={"volume": "volume_one"}).to_csv(tmp_path / "bars.csv", index=False)
    read = read_bars_file(tmp_path / "bars.csv", timeframe="1h")
    assert_same(read, bars.iloc[:, :7])
    unclear = table.rename(columns={"volume": "volume_one"}).assign(volume_two=table["volume"])
    unclear.to_csv(tmp_path / "unclear.csv", index=False)
    with pytest.raises(DataError, match=r"volume in the base asset; got \['volume_one', 'volume_two'\].*--map volume="):
        read_raw(tmp_path / "unclear.csv")
    wanted = bars.iloc[:, :6]
    assert_same(read_bars_file(tmp_path / "unclear.csv", timeframe="1h", mapping={"volume": "volume_one"}), wanted)


def test_the_user_s_own_choice(tmp_path, bars):
    table = as_kline(bars)[["open_time", *BAR_COLUMNS[:5]]]
    table.columns = ["Zeit", "Erster", "Hoch", "Tief", "Letzter", "Menge"]
    table.to_csv(tmp_path / "bars.csv", index=False)
    mapping = dict(zip(["ts", *BAR_COLUMNS[:5]], table.columns, strict=True))
    assert_same(read_bars_file(tmp_path / "bars.csv", timeframe="1h", mapping=mapping), bars.iloc[:, :6])
    with pytest.raises(DataError, match=r"has no column for --map volume=Volumen; got \['Zeit', 'Erster'"):
        read_raw(tmp_path / "bars.csv", mapping={**mapping, "volume": "Volumen"})
    with pytest.raises(DataError, match="lacks the columns ts, open.*--map ts=NAME"):
        read_raw(tmp_path / "bars.csv")
    with pytest.raises(DataError, match="--map knows no such column; got 'price'"):
        read_raw(tmp_path / "bars.csv", mapping={"price": "Letzter"})


# Times, row by row


NOTATIONS = {
    "s": lambda ts: str(ts.value // 10**9),
    "float s": lambda ts: f"{ts.value // 10**9}.0",
    "ms": lambda ts: str(ts.value // 10**6),
    "us": lambda ts: str(ts.value // 10**3),
    "ns": lambda ts: str(ts.value),
    "ISO": lambda ts: ts.strftime("%Y-%m-%d %H:%M:%S"),
    "ISO ms": lambda ts: ts.strftime("%Y-%m-%d %H:%M:%S.000"),
    "zone": lambda ts: ts.tz_convert("Asia/Kolkata").isoformat(),
    "UTC": lambda ts: ts.strftime("%Y-%m-%d %H:%M:%S.%f UTC"),
    "AM/PM": lambda ts: ts.strftime("%Y-%m-%d %I-%p"),
    "slashes": lambda ts: ts.strftime("%Y/%m/%d %H:%M"),
}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.datetimes(pd.Timestamp("2010-01-01"), pd.Timestamp("2060-01-01")), st.sampled_from([*NOTATIONS])),
        min_size=1,
        max_size=30,
    )
)
def test_every_row_may_have_a_notation_of_its_own(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("times") / "bars.csv"
    times = [pd.Timestamp(when, tz="UTC").floor("h") for when, _ in rows]
    written = [NOTATIONS[notation](ts.as_unit("ns")) for ts, (_, notation) in zip(times, rows, strict=True)]
    path.write_text("date,open,high,low,close,volume\n" + "".join(f"{stamp},1,1,1,1,1\n" for stamp in written))
    assert read_raw(path)[0]["ts"].tolist() == times


def test_two_times_are_both_kept_unless_the_second_is_none(tmp_path, bars):
    table = as_kline(bars, "ms").rename(columns={"open_time": "unix"}).drop(columns="close_time")
    hours = bars["ts"].dt.strftime("%Y-%m-%d %H:%M")
    for date, kept in ((hours, True), (bars["ts"].dt.strftime("%Y-%m-%d"), False), ("00:00.0", False), (np.nan, False)):
        table.assign(date=date).to_csv(tmp_path / "bars.csv", index=False)
        raw, (seen,) = read_raw(tmp_path / "bars.csv")
        assert ("ts_other" in raw, bool(seen.notes)) == (kept, not kept)
        assert (raw["ts"] == bars["ts"]).all()
    table.assign(unix="00:00.0", date=hours).to_csv(tmp_path / "bars.csv", index=False)
    assert (read_raw(tmp_path / "bars.csv")[0]["ts"] == bars["ts"]).all()


def test_what_cannot_be_read_is_nat_or_nan_and_said(tmp_path, bars):
    table = as_kline(bars).astype(object)
    table.loc[3, "close"], table.loc[5, "close"], table.loc[4, "open_time"] = "n.a.", "", "soon"
    table.loc[6, "volume"], table.loc[7, "number_of_trades"] = "inf", "NULL"
    raw, (seen,) = read_raw(write(table, tmp_path / "bars.csv"))
    assert raw.index[raw["close"].isna()].tolist() == [3, 5] and raw.index[raw["ts"].isna()].tolist() == [4]
    assert raw.loc[6, "volume"] == np.inf and np.isnan(raw.loc[7, "number_of_trades"])
    assert seen.notes == ["close: 1 cells are no numbers, first in row 4"]


def test_a_cell_that_is_none_far_down_in_a_large_file(tmp_path):
    rows = [f"{1262304000 + 60 * n},{n + 0.5},1e9,{n},{n + 1},7" for n in range(250_000)]
    rows[200_000] = rows[200_000].replace(",7", ",seven")
    (tmp_path / "bars.csv").write_text("unix,open,high,low,close,volume\n" + "\n".join(rows))
    raw, (seen,) = read_raw(tmp_path / "bars.csv")
    assert raw["row"].tolist() == [*range(1, 250_001)] and (raw["open"] == raw["row"] - 0.5).all()
    assert raw.index[raw["volume"].isna()].tolist() == [200_000]
    assert seen.notes == ["volume: 1 cells are no numbers, first in row 200001"]


# Symbols


def test_symbols_of_columns_and_names(tmp_path, bars):
    table = as_kline(bars).iloc[:, :6]
    mixed = table.assign(symbol=np.where(table.index < 5, "BTC/USDT", "ETH/USDT"))
    assert symbols_of(read_raw(write(mixed, tmp_path / "a.csv"))[0]) == {"BTCUSDT", "ETHUSDT"}
    assert symbols_of(read_raw(write(table, tmp_path / "bars.csv"))[0]) == set()
    with stream_raw([write(table, tmp_path / "SOLUSDT-1h.zip"), tmp_path / "a.csv"], timeframe="1h") as stream:
        assert stream.symbols == {"BTCUSDT", "ETHUSDT", "SOLUSDT"}
        assert symbols_of(pd.concat([*stream])) == stream.symbols


# What is refused


def spoiled(bars: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, str]]:
    """Faults of a table: the table and what the error must say."""
    kline = as_kline(bars)
    text = kline.astype({"close": object})
    text.loc[3, "close"] = "n.a."
    return {
        "text": (text, "column 'close': Row #5: .*'n.a.'"),
        "hole": (kline.assign(low=kline["low"].where(kline.index != 3)), "low: empty"),
        "order": (kline[::-1], "do not come after the one before them, first at row 1"),
        "twice": (kline.iloc[[0, 1, 1, 2, 3]], "1 bars do not come after the one before them, first at row 2"),
        "grid": (kline.assign(open_time=kline["open_time"] + 60_000), "do not open on the UTC grid of 1h"),
        "high": (kline.assign(high=kline["low"]), "high is the highest price"),
        "volume": (kline.assign(volume=-1.0), "volume"),
        "no volume": (kline.drop(columns="volume"), "lacks the columns volume; got .*'open_time'"),
        "two times": (kline.assign(date=kline["open_time"]), "several columns that mean ts"),
        "nothing": (kline[:0], "holds no bars"),
        "spreadsheet": (kline.assign(open_time="00:00.0"), "times cannot be read, first at row 0; got '00:00.0'"),
    }


@pytest.mark.parametrize("fault", spoiled(sample_bars(timeframe="1h", start="2025-01-01", end="2025-01-01")))
def test_faults_of_a_table(tmp_path, bars, fault):
    table, said = spoiled(bars)[fault]
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match=f"bad.csv.*{said}"):
        read_bars_file(tmp_path / "bad.csv", timeframe="1h")


@pytest.mark.parametrize("timeframe", ["30m", "4h", "1d", "1w"])
def test_another_timeframe_is_refused(tmp_path, bars, timeframe):
    as_kline(bars).to_csv(tmp_path / "bars.csv", index=False)
    with pytest.raises(DataError, match=f"most bars are 0 days 01:00:00 apart, not {timeframe}"):
        read_bars_file(tmp_path / "bars.csv", timeframe=timeframe)
    with pytest.raises(DataError, match="unknown timeframe; got '1 hour'"):
        read_bars_file(tmp_path / "bars.csv", timeframe="1 hour")


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "empty.csv": b"",
        "blank.csv": b"\n\n\n",
        "page.csv": b"<!DOCTYPE html>\n<html><body>404, sorry</body></html>",
        "binary.csv": bytes(range(256)) * 99,
        "zeros.csv": b"\0" * 999,
        "text.csv.gz": b"ts,open,high,low,close,volume\n",
        "cut.csv.gz": gzip.compress(b"ts,open,high,low,close,volume\n" + b"1735689600,1,1,1,1,1\n" * 9999)[:-40],
        "empty.parquet": b"",
        "text.parquet": b"ts,open,high,low,close,volume\n",
        "bars.xlsx": b"PK",
        "missing.csv": None,
    }.items(),
)
def test_what_is_no_file_of_bars(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_bars_file(tmp_path / name, timeframe="1h")
    assert name in str(caught.value) and len(str(caught.value)) < 500


def test_raw_files_are_found_by_name(tmp_path):
    for name in ("b.csv", "a.CSV.GZ", "c.parquet", "README.md", "d.csv.part"):
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()
    assert [path.name for path in find_raw_files(tmp_path)] == ["a.CSV.GZ", "b.csv", "c.parquet"]


# From file to features


def test_a_file_becomes_features_in_the_database(tmp_path, db_url):
    made = sample_bars(start="2023-01-01", end="2024-12-31").drop(index=range(330, 333)).reset_index(drop=True)
    made.to_csv(tmp_path / "bars.csv.gz", index=False)
    engine, key = connect(db_url), {"asset_id": "BTC", "timeframe": "1d"}
    names = ["rsi", "mfi", "volume_ratio", "log_return_1"]
    for wanted in (WriteReport(inserted=len(made)), WriteReport(unchanged=len(made))):
        assert write_bars(engine, read_bars_file(tmp_path / "bars.csv.gz", timeframe="1d"), **key) == wanted
        table = compute_features(read_bars(engine, **key), timeframe="1d", names=names)
        assert write_features(engine, table, **key) == len(made) - 2 * 250  # the RSI's warm-up, in both runs
    stored = read_features(engine, **key)
    pd.testing.assert_frame_equal(stored, table, check_exact=True)
    gap = gap_map(read_bars(engine, **key)["ts"], timeframe="1d")
    assert gap["missing"].tolist() == [3]


# Real data


REAL = {
    "BTCUSDT_spot_1d.csv.gz": (2742, 0, "2018-01-01", "2025-07-04"),
    "BTCUSDT_spot_4h.csv.gz": (15440, 16, "2018-01-01", "2025-01-19 20:00"),
    "BTCUSDT_perp_15m.parquet": (75840, 0, "2024-01-01", "2026-02-28 23:45"),
    "ETHUSDT_spot_1d.csv.gz": (1309, 0, "2018-01-01", "2021-08-01"),
    "ETHUSDT_spot_4h.csv.gz": (18371, None, "2017-08-17 04:00", "2026-01-06 12:00"),
}


def timeframe_of(name: str) -> str:
    return name.split("_")[-1].partition(".")[0]


def read_real(real_data: Path, name: str) -> pd.DataFrame:
    return read_bars_file(real_data / "bars" / name, timeframe=timeframe_of(name))


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_what_their_readme_says(real_data, name):
    rows, missing, first, last = REAL[name]
    read = read_real(real_data, name)
    assert (len(read), read["ts"].iloc[0], read["ts"].iloc[-1]) == (
        rows,
        pd.Timestamp(first, tz="UTC"),
        pd.Timestamp(last, tz="UTC"),
    )
    gaps = gap_map(read["ts"], timeframe=timeframe_of(name))
    assert missing is None or gaps["missing"].sum() == missing
    assert segment_ids(read["ts"], timeframe=timeframe_of(name)).max() == len(gaps)


def test_real_bars_off_the_grid_are_refused_with_their_place(real_data):
    with pytest.raises(DataError, match=r"43 of 28673 bars do not open on the UTC grid of 1h, first at row 4189"):
        read_real(real_data, "BTCUSDT_spot_1h.csv.gz")


def test_real_four_hours_make_the_real_day(real_data):
    hours, days = (read_real(real_data, f"BTCUSDT_spot_{tf}.csv.gz") for tf in ("4h", "1d"))
    groups = hours.groupby(hours["ts"].dt.floor("1D"))
    made = groups.agg({"open": "first", "high": "max", "low": "min", "close": "last"})[groups.size() == 6]
    assert len(made) > 2500
    pd.testing.assert_frame_equal(made, days.set_index("ts").loc[made.index, PRICE_COLUMNS], check_exact=True)


@pytest.mark.parametrize("name", ["BTCUSDT_spot_1d.csv.gz", "BTCUSDT_perp_15m.parquet"])
def test_real_features_are_causal_and_forget_where_the_history_began(real_data, name):
    timeframe, read = timeframe_of(name), read_real(real_data, name)[:20_000]
    whole = compute_features(read, timeframe=timeframe).set_index("ts").dropna(axis="columns")
    scale = whole.std().where(lambda s: s > 0, 1)
    for cut in np.linspace(400, len(read) - 400, 8).astype(int):
        early = compute_features(read[:cut], timeframe=timeframe).set_index("ts")[whole.columns]
        pd.testing.assert_frame_equal(early, whole.loc[early.index], check_exact=True)
        late = compute_features(read[cut:].reset_index(drop=True), timeframe=timeframe).set_index("ts")[whole.columns]
        assert ((late - whole.loc[late.index]).abs() / scale).max(axis=None) < 1e-6
    assert np.isfinite(whole).all(axis=None)
    assert set(registered()) - set(whole.columns) <= {"taker_buy_ratio"}
