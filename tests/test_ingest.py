"""Files of bars as vendors write them, synthetic and real, and what becomes of them."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kallos.core.errors import DataError
from kallos.core.schemas import BAR_COLUMNS, PRICE_COLUMNS
from kallos.data.bars import gap_map, segment_ids
from kallos.data.features import compute_features, registered
from kallos.data.sample import sample_bars
from kallos.data.sources import find_raw_files, read_bars_file
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


# Every way of writing the same bars


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("stamp", STAMPS)
def test_every_stamp_in_every_format(tmp_path, bars, stamp, ending):
    path = tmp_path / f"bars{ending}"
    table = as_kline(bars, stamp)
    table.to_parquet(path) if ending == ".parquet" else table.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_bars_file(path, timeframe="1h"), bars, check_exact=True)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("change", [str, str.upper, lambda name: name.replace(" ", "_"), lambda name: f' "{name}"'])
def test_every_vendor_s_names(tmp_path, bars, vendor, change):
    header = ",".join(map(change, VENDORS[vendor]))
    (tmp_path / "bars.csv").write_text(f"{header}\n" + as_kline(bars).to_csv(index=False, header=False))
    pd.testing.assert_frame_equal(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), bars, check_exact=True)


@pytest.mark.parametrize("columns", [6, 12])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_no_header(tmp_path, bars, columns, line_end, mark):
    text = as_kline(bars).iloc[:, :columns].to_csv(index=False, header=False, lineterminator=line_end)
    (tmp_path / "bars.csv").write_bytes(mark + text.encode())
    wanted = bars if columns == 12 else bars.iloc[:, :6]
    pd.testing.assert_frame_equal(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), wanted, check_exact=True)


def test_the_time_in_a_parquet_index(tmp_path, bars):
    bars.set_index("ts").to_parquet(tmp_path / "bars.parquet")
    bars.set_index("ts").rename_axis(None).to_parquet(tmp_path / "nameless.parquet")
    for name in ("bars", "nameless"):
        pd.testing.assert_frame_equal(read_bars_file(tmp_path / f"{name}.parquet", timeframe="1h"), bars)


def test_bars_that_kallos_wrote_keep_their_fillers(tmp_path, bars):
    filled = bars.assign(is_filled=bars.index % 7 == 0)
    filled.to_csv(tmp_path / "bars.csv", index=False)
    pd.testing.assert_frame_equal(read_bars_file(tmp_path / "bars.csv", timeframe="1h"), filled, check_exact=True)


@settings(max_examples=25, deadline=None)
@given(price=st.floats(1e-12, 1e12), volume=st.floats(0, 1e15))
def test_every_decimal_is_read_exactly(tmp_path_factory, price, volume):
    path = tmp_path_factory.mktemp("exact") / "bars.csv"
    rows = [f"{1735689600 + 3600 * hour},{price!r},{price!r},{price!r},{price!r},{volume!r}" for hour in range(2)]
    path.write_text("\n".join(rows))
    read = read_bars_file(path, timeframe="1h")
    assert (read[PRICE_COLUMNS] == price).all(axis=None) and (read["volume"] == volume).all()


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
