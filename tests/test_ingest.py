"""Files of bars as vendors write them, synthetic and real, and what becomes of them."""

import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather, parquet

from kallos.core.columns import BAR_COLUMNS, PRICE_COLUMNS
from kallos.core.errors import DataError
from kallos.data import files
from kallos.data.assets import list_assets
from kallos.data.bars import gap_map, resample_bars, segment_ids
from kallos.data.features import compute_features, registered
from kallos.data.files import find_files, read_bars_file, read_raw, stream_raw, symbols_of
from kallos.data.ingest import ingest_files
from kallos.data.merging import WriteReport
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, read_features, write_bars, write_features
from kallos.data.tables import connect

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
    with pytest.raises(DataError, match=r"lacks the columns ts, open.*--map ts=NAME"):
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
    """Faults of a whole table: the table and what the error must say."""
    kline = as_kline(bars)
    return {
        "no volume": (kline.drop(columns="volume"), "lacks the columns volume; got .*'open_time'"),
        "two closes": (
            kline.assign(close_price=kline["close"]),
            r"several columns that mean close; got .*--map close=close",
        ),
        "nothing": (kline[:0], "holds no bars"),
        "spreadsheet": (
            kline.assign(open_time="00:00.0"),
            "no reading of this file is right.* none of its 24 .*'00:00.0'",
        ),
        "day count": (
            kline.assign(open_time=45658 + kline.index / 24),
            "no reading of this file is right.*got '45658.0'",
        ),
        "day first": (kline.assign(open_time="31/12/2024 03:00"), "no reading of this file is right"),
        "decimal comma": (kline.assign(low="93000,5"), "'low' holds no number in any of its 24 rows, .*'93000,5'"),
    }


@pytest.mark.parametrize("fault", spoiled(sample_bars(timeframe="1h", start="2025-01-01", end="2025-01-01")))
def test_faults_of_a_table(tmp_path, bars, fault):
    table, said = spoiled(bars[:24])[fault]
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(DataError, match=f"bad.csv.*{said}"):
        read_bars_file(tmp_path / "bad.csv", timeframe="1h")


def test_faults_of_rows_are_left_to_the_repair(tmp_path, bars):
    for table in (as_kline(bars)[::-1], as_kline(bars).iloc[[0, 1, 1, *range(2, len(bars))]]):
        assert_same(read_bars_file(write(table, tmp_path / "bars.csv"), timeframe="1h"), bars)
    with pytest.raises(DataError, match=r"bars.csv.*1d"):
        read_bars_file(tmp_path / "bars.csv", timeframe="1d")
    with pytest.raises(DataError, match="unknown timeframe; got '1 hour'"):
        read_bars_file(tmp_path / "bars.csv", timeframe="1 hour")


HEADER, ROW = b"ts,open,high,low,close,volume\n", b"1735689600,1,1,1,1,1\n"


def zipped(*, flag: int = 0, size: int | None = None) -> bytes:
    """A ZIP of one CSV, made to say that it is encrypted or of another size."""
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bars.csv", HEADER + ROW * 999)
        file.seek(0)
        content = bytearray(file.read())
    central = content.index(b"PK\1\2")
    content[6] |= flag
    content[central + 8] |= flag
    if size is not None:
        content[central + 24 : central + 28] = size.to_bytes(4, "little")
    return bytes(content)


# By name alone: their content, which holds the time, would name the tests differently in each process.
NO_BARS = {
    "empty.csv": b"",
    "blank.csv": b"\n\n\n",
    "page.csv": b"<!DOCTYPE html>\n<html><body>404, sorry</body></html>",
    "binary.csv": bytes(range(256)) * 99,
    "zeros.csv": b"\0" * 999,
    "one_line.csv": HEADER + b"1" * 9_999_999,
    "short_row.csv": HEADER + ROW * 9 + ROW[:14],
    "text.csv.gz": HEADER,
    "empty.csv.gz": b"",
    "cut.csv.gz": gzip.compress(HEADER + ROW * 9999)[:-40],
    "bomb.csv.gz": gzip.compress(HEADER + ROW * 1_100_000),
    "empty.parquet": b"",
    "text.parquet": HEADER,
    "empty.feather": b"",
    "text.feather": b"ARROW1" + HEADER,
    "empty.json": b"",
    "cut.json.gz": gzip.compress(b"[[1735689600000,1,1,1,1,1],[173"),
    "empty.zip": b"",
    "text.zip": HEADER,
    "cut.zip": zipped()[:-99],
    "secret.zip": zipped(flag=1),
    "bomb.zip": zipped(size=2**31),
    "longer.zip": zipped(size=99),
    "bars.xlsx": b"PK",
    "missing.csv": None,
    "missing.zip": None,
    "missing.feather": None,
}


@pytest.mark.parametrize("name", NO_BARS)
def test_what_is_no_file_of_bars(tmp_path, name):
    content = NO_BARS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_raw(tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=name), stream_raw([tmp_path / name], timeframe="1h"):
        pytest.fail("the stream was opened")


def test_archives_without_bars(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
        archive.writestr("__MACOSX/._bars.csv", b"\0")
    with pytest.raises(DataError, match=r"other.zip holds no .csv or .json file"):
        read_raw(tmp_path / "other.zip")


# Folders and patterns


def test_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["b.csv", "a.CSV.GZ", "c.parquet", "sub/d.feather", "sub/deep/e.zip", "f.json"]
    for name in [*names, "README.md", "d.csv.part", ".hidden/g.csv", ".h.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.csv").mkdir()
    found = ["a.CSV.GZ", "b.csv", "c.parquet", "f.json", "sub/d.feather", "sub/deep/e.zip"]
    assert [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])] == found
    assert [str(path) for path in find_files(["sub", "*.csv", "b.csv", "**/*.zip"])] == [*found[-2:], "b.csv"]
    for nothing in ("*.feather", "folder.csv"):
        with pytest.raises(DataError, match=rf"no files of bars; got '{re.escape(nothing)}'"):
            find_files([nothing])


# Streams


def streamed(paths: list[Path], **settings) -> list[pd.DataFrame]:
    with stream_raw(paths, timeframe="1h", **settings) as stream:
        chunks = [*stream]
        assert sum(map(len, chunks)) == stream.rows
    return chunks


def assert_in_time(chunks: list[pd.DataFrame]) -> None:
    for early, late in pairwise(chunks):
        assert early["ts"].max() < late["ts"].min()
    for chunk in chunks:
        for _, rows in chunk.groupby("source", observed=True):
            assert rows["row"].is_monotonic_increasing


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), chunk_rows=st.sampled_from([1, 7, 50, 400, 10_000]), files=st.integers(1, 3))
def test_chunks_hold_every_row_in_order_of_time(tmp_path_factory, seed, chunk_rows, files):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("files")
    made = sample_bars(timeframe="1h", start="2025-01-01", end="2025-01-20")
    rows = made.iloc[rng.permutation(np.repeat(np.arange(len(made)), rng.integers(1, 3, len(made))))]
    whole = []
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = as_kline(rows.iloc[part], rng.choice(["ms", "us", "ISO"]))
        table = table if number else table.drop(columns=BAR_COLUMNS[-2:])
        whole.append(read_raw(write(table, folder / f"{number}{rng.choice(['.csv', '.feather', '.zip'])}"))[0])
    chunks = streamed([folder], chunk_rows=chunk_rows)
    assert_in_time(chunks)
    assert max(map(len, chunks)) <= 2 * chunk_rows or len(chunks) == 1
    keys = ["ts", "source", "row"]
    wanted, read = (
        pd.concat(frames).astype({"source": str}).sort_values(keys, ignore_index=True) for frames in (whole, chunks)
    )
    pd.testing.assert_frame_equal(read[wanted.columns], wanted, check_exact=True)


def test_rows_without_a_time_come_with_the_first_chunks(tmp_path, bars):
    table = as_kline(bars, "ISO").astype({"open_time": object})
    table.loc[table.index % 8 == 3, "open_time"] = "soon"
    chunks = streamed([write(table, tmp_path / "bars.csv")], chunk_rows=20)
    assert_in_time(chunks)
    assert chunks[0]["ts"].isna().sum() == 12 and sum(chunk["ts"].isna().sum() for chunk in chunks) == 12


def test_a_stream_of_another_timeframe_is_cut_as_small(tmp_path):
    made = sample_bars(timeframe="1m", start="2025-01-01", end="2025-01-03")
    write(as_kline(made), tmp_path / "bars.csv")
    with stream_raw([tmp_path / "bars.csv"], timeframe="1w", chunk_rows=500) as stream:
        chunks = [*stream]
    assert_in_time(chunks)
    assert len(chunks) > 4 and max(map(len, chunks)) <= 1000


def test_rows_of_one_moment_are_no_bars(tmp_path, bars):
    write(as_kline(bars).assign(open_time=1735689600), tmp_path / "bars.csv")
    with pytest.raises(DataError, match=r"96 rows have one and the same time; got '2025-01-01 00:00:00\+00:00'"):
        streamed([tmp_path / "bars.csv"], chunk_rows=40)


def test_the_stream_leaves_nothing_behind(tmp_path, bars, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    write(as_kline(bars), tmp_path / "bars.csv")
    with stream_raw([tmp_path / "bars.csv"], timeframe="1h", chunk_rows=10) as stream:
        next(iter(stream))
        assert [*(tmp_path / "temp").rglob("*")]
    assert not [*(tmp_path / "temp").iterdir()]
    with pytest.raises(KeyboardInterrupt), stream_raw([tmp_path / "bars.csv"], timeframe="1h", chunk_rows=10):
        raise KeyboardInterrupt
    write(as_kline(bars).astype({"open_time": str}).assign(open_time="00:00.0"), tmp_path / "excel.csv")
    with pytest.raises(DataError, match="no reading of this file"):
        streamed([tmp_path / "bars.csv", tmp_path / "excel.csv"], chunk_rows=10)
    assert not [*(tmp_path / "temp").iterdir()]
    streamed([tmp_path / "bars.csv"])  # small: the disk is not touched
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert len(streamed([tmp_path / "bars.csv"])) == 1


def test_progress_counts_the_bytes_of_the_files(tmp_path, bars):
    paths = [
        write(as_kline(bars), tmp_path / name) for name in ("a.csv", "b.csv.gz", "c.zip", "d.parquet", "e.feather")
    ]
    told = []
    with stream_raw(paths, timeframe="1h", progress=lambda done, total: told.append((done, total))):
        size = sum(path.stat().st_size for path in paths)
        assert {total for _, total in told} == {size}
        done = [done for done, _ in told]
        assert done == sorted(done) and 0.9 * size < done[-1] <= size


def test_files_of_one_name_are_told_apart(tmp_path, bars):
    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
        write(as_kline(bars), tmp_path / year / "BTCUSDT.csv")
    (chunk,) = streamed([tmp_path])
    assert chunk["source"].cat.categories.tolist() == [
        str(tmp_path / year / "BTCUSDT.csv") for year in ("2023", "2024")
    ]


def shuffled_csv(path: Path, rows: int) -> Path:
    """A CSV of that many minutes, no two of them in order."""
    rng = np.random.default_rng(0)
    close = 30_000 * np.exp(np.cumsum(rng.normal(0, 1e-4, rows)))
    order = rng.permutation(rows)
    columns = {
        "unix": 1262304000000 + 60_000 * np.arange(rows),
        "open": close.round(2),
        "high": (close * 1.001).round(2),
    }
    columns |= {"low": (close * 0.999).round(2), "close": close.round(2), "volume": rng.gamma(2, 5, rows).round(6)}
    csv.write_csv(pa.table({name: values[order] for name, values in columns.items()}), path)
    return path


def peak_of(path: Path) -> int:
    """The most bytes that Arrow holds while the file goes through in small chunks."""
    pool = pa.default_memory_pool()
    begin, held = pool.bytes_allocated(), []
    told = {"chunk_rows": 5_000, "progress": lambda *_: held.append(pool.bytes_allocated())}
    with stream_raw([path], timeframe="1m", **told) as stream:
        for chunk in stream:
            held.append(pool.bytes_allocated())
            assert len(chunk) <= 10_000
    return max(held) - begin


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for rows in (200_000, 800_000):
        table = csv.read_csv(shuffled_csv(tmp_path / "bars.csv", rows))
        feather.write_feather(table, tmp_path / "bars.feather", chunksize=20_000)
        peaks.append(peak_of(tmp_path / "bars.feather"))
    assert peaks[1] < 1.2 * peaks[0] < table.nbytes / 3, peaks


MEASURE = r"""
import re, sys
from pathlib import Path
from kallos.data.files import stream_raw
from kallos.data.repair import Repair
bars = rows = 0
with stream_raw([sys.argv[1]], timeframe="1m") as stream:
    repair = Repair(timeframe="1m", what="bars.csv")
    for chunk in stream:
        rows += len(chunk)
        bars += len(repair.add(chunk, last=rows == stream.rows).bars)
# getrusage would count the memory of the process that started this one
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
print(rows, bars, int(peak) // 1024)
"""


@pytest.mark.soak
def test_ten_million_rows_in_any_order_stay_below_one_gibibyte(tmp_path):
    path = shuffled_csv(tmp_path / "bars.csv", 10_000_000)
    child = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    rows, bars, peak = map(int, child.stdout.split())
    assert rows == bars == 10_000_000 and peak < 1024, child.stdout


# Silent wrong data


@pytest.mark.parametrize("longer", ["4h", "1d"])
def test_a_folder_of_two_timeframes_is_refused(tmp_path, bars, longer):
    """The longer bar opens where its first hour does and reaches further: it looks like that hour, grown."""
    write(bars, tmp_path / "a.csv")
    write(
        resample_bars(sample_bars(timeframe="1h", start="2024-12-30", end="2025-01-09"), timeframe="1h", to=longer),
        tmp_path / "b.csv",
    )
    engine = connect(f"sqlite:///{tmp_path / 'kallos.db'}")
    with pytest.raises(DataError, match=r"b.csv: most bars are .* apart, not 1h"):
        ingest_files(engine, [tmp_path], asset_id="BTC", timeframe="1h")
    (tmp_path / "b.csv").rename(tmp_path / f"BTCUSDT-{longer}-2025-01-02.csv")
    with pytest.raises(DataError, match=f"by its name, BTCUSDT-{longer}-2025-01-02.csv holds bars of {longer}"):
        ingest_files(engine, [tmp_path], asset_id="BTC", timeframe="1h")
    assert list_assets(engine).empty


@pytest.mark.parametrize("blank", [" ", "x"])
def test_a_blank_or_a_broken_cell_does_not_cost_the_others_their_last_bit(tmp_path, bars, blank):
    lines = bars.iloc[:, :6].to_csv(index=False).splitlines()
    if blank == "x":
        lines.insert(30, "x,x,x,x,x,x")
    text = "\n".join(lines).replace(",", ", ") if blank == " " else "\n".join(lines)
    (tmp_path / "a.csv").write_text(text)
    assert_same(read_bars_file(tmp_path / "a.csv", timeframe="1h"), bars.iloc[:, :6])


def test_decimals_of_parquet_are_read_to_the_bit(tmp_path, bars):
    exact = {name: [Decimal(repr(value)) for value in bars[name]] for name in BAR_COLUMNS[:5]}
    columns = {name: pa.array(values, pa.decimal128(38, 18)) for name, values in exact.items()}
    rounded = pd.DataFrame({name: [float(value) for value in column.to_pylist()] for name, column in columns.items()})
    parquet.write_table(pa.table({"date": pa.array(bars["ts"]), **columns}), tmp_path / "a.parquet")
    read = read_bars_file(tmp_path / "a.parquet", timeframe="1h")
    pd.testing.assert_frame_equal(read[BAR_COLUMNS[:5]], rounded, check_exact=True)


@pytest.mark.parametrize("name", ["volume_24h", "volume_sma", "volume_ma20", "Volume ETH", "Volume USDT"])
def test_what_is_no_volume_in_the_base_asset_is_not_taken_for_it(tmp_path, bars, name):
    write(bars.iloc[:, :6].rename(columns={"volume": name}), tmp_path / "BTCUSDT.csv")
    with pytest.raises(DataError, match="--map volume="):
        read_bars_file(tmp_path / "BTCUSDT.csv", timeframe="1h")


def test_a_quote_volume_by_the_name_of_volume_is_refused(tmp_path, bars):
    huobi = bars.iloc[:, :7].rename(columns={"volume": "amount", "quote_asset_volume": "vol"})
    path = write(huobi, tmp_path / "a.csv")
    with pytest.raises(DataError, match="--map volume=amount"):
        read_bars_file(path, timeframe="1h")
    read = read_bars_file(path, timeframe="1h", mapping={"volume": "amount", "quote_asset_volume": "vol"})
    assert_same(read, bars.iloc[:, :7])


def test_a_seventh_column_that_is_no_count_is_the_quote_volume(tmp_path, bars):
    columns = ["open_time", *BAR_COLUMNS[:6]]
    as_kline(bars)[columns].to_csv(tmp_path / "bybit.csv", index=False, header=False)
    assert_same(read_bars_file(tmp_path / "bybit.csv", timeframe="1h"), bars.iloc[:, :7])


@pytest.mark.parametrize("order", [[0, 3, 1, 2], [2, 1, 0, 3]])  # of KuCoin and Bitfinex, and of Coinbase
def test_columns_in_another_order_are_refused(tmp_path, bars, order):
    columns = ["open_time", *(BAR_COLUMNS[place] for place in order), "volume"]
    as_kline(bars)[columns].to_csv(tmp_path / "a.csv", index=False, header=False)
    with pytest.raises(DataError, match="rows are faulty, most by the rule high_low"):
        read_bars_file(tmp_path / "a.csv", timeframe="1h")


@pytest.mark.parametrize("name", ["b.zip", "b.csv.gz", "b.parquet", "b.xlsx"])
def test_an_archive_with_tables_that_are_not_read_is_refused(tmp_path, bars, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", bars.to_csv(index=False))
        archive.writestr(name, b"more bars")
    with pytest.raises(DataError, match=f"a table that is not read from within an archive; got '{name}'"):
        read_raw(tmp_path / "a.zip")


def test_rows_without_a_symbol_are_not_left_out_in_silence(tmp_path, bars):
    table = bars.iloc[:, :6].assign(symbol=["BTCUSDT"] * 40 + [None] * (len(bars) - 40))
    write(table, tmp_path / "a.csv")
    engine = connect(f"sqlite:///{tmp_path / 'kallos.db'}")
    with pytest.raises(DataError, match="56 rows name no symbol"):
        ingest_files(engine, [tmp_path], timeframe="1h", allow_batch_symbols=True)
    assert list_assets(engine).empty


def test_a_full_temporary_folder_and_a_broken_pattern_are_told_in_one_line(tmp_path, bars, monkeypatch):
    with pytest.raises(DataError, match="cannot look for files"):
        find_files([tmp_path / "**x"])
    monkeypatch.setattr(files, "_deal", Mock(side_effect=OSError(28, "No space left on device")))
    with (
        pytest.raises(DataError, match="the temporary folder cannot be used"),
        stream_raw([write(bars, tmp_path / "a.csv")], timeframe="1h", chunk_rows=10),
    ):
        pass


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
    "BTCUSDT_spot_1h.csv.gz": (28630, None, "2017-08-17 04:00", "2020-11-28 08:00"),
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


RAW = {
    "bars/BTCUSDT_spot_1h.csv.gz": (28673, "BTCUSDT", "Binance klines, CSV with header", "ISO 8601"),
    "bars/BTCUSDT_perp_15m.parquet": (75840, "BTCUSDT:USDT", "plain Parquet", "times of the file's own type"),
    "messy/cdd_BTCUSDT_1h.csv.gz": (
        *(36062, "BTCUSDT", "CryptoDataDownload CSV"),
        "unix: milliseconds and seconds since 1970, mixed; date: ISO 8601 and a clock of twelve hours, mixed",
    ),
    "messy/coinbase_BTCUSD_1h.csv.gz": (20111, "BTCUSD", "CryptoDataDownload CSV", "a clock of twelve hours"),
    "messy/partials_BTCUSDT_1h.csv.gz": (28909, "BTCUSDT", "Binance klines, CSV with header", "ISO 8601"),
    "messy/tiny_SHIBUSDT_3m.csv.gz": (1000, "SHIBUSDT", "plain CSV", "ISO 8601"),
}


@pytest.mark.parametrize("name", RAW)
def test_real_files_are_recognised(real_data, name):
    raw, (seen,) = read_raw(real_data / name)
    assert (len(raw), symbols_of(raw), seen.kind, seen.stamps) == (RAW[name][0], {RAW[name][1]}, *RAW[name][2:])
    assert raw["ts"].notna().all()
    if "quote_asset_volume" in raw:
        traded = raw[raw["volume"] > 0]
        price = traded["quote_asset_volume"] / traded["volume"]
        assert price.between(0.98 * traded["low"], 1.02 * traded["high"]).mean() > 0.99


def test_real_times_that_disagree_are_both_kept(real_data):
    raw, _ = read_raw(real_data / "messy" / "cdd_BTCUSDT_1h.csv.gz")
    apart = raw["ts"] - raw["ts_other"]
    assert apart.value_counts().to_dict() == {pd.Timedelta(0): 36062 - 91, pd.Timedelta("4h"): 91}
    assert raw["ts"].duplicated().sum() == 2649 and raw["number_of_trades"].isna().sum() == 28584


def test_a_real_spreadsheet_is_refused_at_once(real_data):
    said = r"excel_BTCUSDT_4h.csv.gz: no reading of this file is right, none of its 17744 stamps.*got '00:00.0'"
    with pytest.raises(DataError, match=said), stream_raw([real_data / "messy"], timeframe="1h"):
        pytest.fail("the stream was opened")


def test_real_prices_come_through_to_the_bit(real_data):
    path = real_data / "messy" / "tiny_SHIBUSDT_3m.csv.gz"
    written = [line.split(",") for line in gzip.decompress(path.read_bytes()).decode().split()[1:]]
    wanted = np.array([[float(cell) for cell in line[-5:]] for line in (row for row in written if len(row) > 1)])
    assert (read_bars_file(path, timeframe="3m")[BAR_COLUMNS[:5]].to_numpy() == wanted).all()


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
