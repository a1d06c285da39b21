"""The store on SQLite and on a real PostgreSQL whose time zone is not UTC."""

import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa

from kallos.core.errors import ConfigError, DataError
from kallos.data import bulk, merging, tables
from kallos.data.assets import list_assets
from kallos.data.database import to_url
from kallos.data.ledger import CHANGE_COLUMNS, QUARANTINE_COLUMNS, Repaired
from kallos.data.merging import WriteReport
from kallos.data.records import read_funding, read_quarantine, read_repairs, write_funding
from kallos.data.repair import repair_bars
from kallos.data.sample import sample_bars
from kallos.data.store import (
    bar_batch,
    bar_changes,
    read_bars,
    read_features,
    stale_from,
    stored_features,
    write_bars,
    write_features,
)
from kallos.data.tables import connect

BTC = {"asset_id": "BTC", "timeframe": "4h"}


@pytest.fixture
def engine(db_url: str) -> sa.Engine:
    return connect(db_url)


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return sample_bars(timeframe="4h", start="2024-01-01", end="2024-03-31")


def features_of(bars: pd.DataFrame, **columns) -> pd.DataFrame:
    return bars.assign(ts=bars["ts"] + pd.Timedelta("4h"), **columns)


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True), check_exact=True)


# Values


def test_bars_come_back_bit_for_bit(engine, bars):
    odd = bars.assign(
        volume=np.resize([0.0, 5e-324, 1e300, 0.1 + 0.2, 1 / 3], len(bars)),
        number_of_trades=np.where(bars.index % 3 == 0, np.nan, bars["number_of_trades"]),
        is_filled=bars.index % 5 == 0,
    )
    write_bars(engine, odd, **BTC)
    same(read_bars(engine, **BTC), odd)


def test_features_come_back_bit_for_bit(engine, bars):
    rng = np.random.default_rng(0)
    signed = rng.normal(size=len(bars)) * 10.0 ** rng.integers(-30, 30, len(bars))
    features = features_of(bars, log_return_1=signed, rsi=np.where(bars.index < 9, np.nan, signed))
    write_bars(engine, bars, **BTC)
    assert write_features(engine, features, **BTC) == len(bars)
    same(read_features(engine, **BTC), features)


def test_columns_that_a_file_lacks_are_not_there(engine, bars):
    six = bars.iloc[:, :6]
    write_bars(engine, six, **BTC)
    same(read_bars(engine, **BTC), six)


def test_ranges_are_of_what_was_known(engine, bars):
    write_bars(engine, bars, **BTC)
    write_features(engine, features_of(bars), **BTC)
    known = read_bars(engine, **BTC, end="2024-02-01")
    assert known["ts"].iloc[-1] == pd.Timestamp("2024-01-31 20:00", tz="UTC")
    assert read_bars(engine, **BTC, start="2024-03-01")["ts"].iloc[0] == pd.Timestamp("2024-03-01", tz="UTC")
    assert read_features(engine, **BTC, end="2024-02-01")["ts"].iloc[-1] == pd.Timestamp("2024-02-01", tz="UTC")
    assert len(read_features(engine, **BTC, end="2024-02-01T03:59")) == len(known)


# Writing


def test_writing_twice_changes_nothing(engine, bars):
    assert write_bars(engine, bars[:400], **BTC) == WriteReport(inserted=400)
    assert write_bars(engine, bars, **BTC) == WriteReport(inserted=len(bars) - 400, unchanged=400)
    assert write_bars(engine, bars, **BTC) == WriteReport(unchanged=len(bars))
    same(read_bars(engine, **BTC), bars)


def test_corrected_bars_are_updated(engine, bars, monkeypatch):
    monkeypatch.setattr(bulk, "_CHUNK", 50)
    monkeypatch.setattr(merging, "_CHUNK", 70)
    write_bars(engine, bars, **BTC)
    mended = bars.assign(volume=bars["volume"].where(bars.index % 100 != 7, 1.0))
    assert write_bars(engine, mended, **BTC) == WriteReport(updated=6, unchanged=len(bars) - 6)
    same(read_bars(engine, **BTC), mended)


def test_fewer_columns_keep_the_others_of_the_same_bar(engine, bars):
    write_bars(engine, bars, **BTC)
    assert write_bars(engine, bars.iloc[:, :6], **BTC) == WriteReport(unchanged=len(bars))
    assert write_bars(engine, bars.assign(number_of_trades=np.nan), **BTC) == WriteReport(unchanged=len(bars))
    rounded = bars.iloc[:, :6].assign(volume=bars["volume"].round(2))
    assert write_bars(engine, rounded, **BTC) == WriteReport(kept=len(bars))
    same(read_bars(engine, **BTC), bars)


def test_another_bar_does_not_keep_the_amounts_of_the_one_before(engine, bars):
    write_bars(engine, bars, **BTC)
    other = bars.iloc[:, :6].assign(volume=2 * bars["volume"])
    assert write_bars(engine, other[5:9], **BTC) == WriteReport(updated=4)
    stored = read_bars(engine, **BTC)
    assert stored["quote_asset_volume"].isna().tolist() == [5 <= index < 9 for index in range(len(bars))]
    same(stored.loc[5:8, other.columns], other[5:9])


@pytest.mark.parametrize("cut", [1, 7, 200])
def test_an_old_download_does_not_undo_a_newer_one(engine, bars, cut):
    half = bars[:cut].copy()
    half.loc[cut - 1, ["high", "low", "close"]] = half.loc[cut - 1, "open"]
    half.loc[cut - 1, "volume"] *= 0.1
    half.loc[cut - 1, list(bars)[6:]] *= 0.1
    write_bars(engine, bars, **BTC)
    features_before = bar_changes(engine, **BTC)
    assert write_bars(engine, half, **BTC) == WriteReport(unchanged=cut - 1, kept=1)
    same(read_bars(engine, **BTC), bars)
    assert bar_changes(engine, **BTC) == features_before
    assert write_bars(engine, half, **BTC, replace=True) == WriteReport(inserted=cut)
    assert write_bars(engine, bars, **BTC) == WriteReport(len(bars) - cut, 1, cut - 1)
    same(read_bars(engine, **BTC), bars)


def test_filled_bars_never_replace_printed_ones(engine, bars):
    holes = repair_bars(bars.drop(index=range(20, 30)), timeframe="4h", what="a.csv", fill_gaps=True)[0]
    with bar_batch(engine, **BTC) as batch:
        batch.add(holes)
    assert batch.report == WriteReport(inserted=len(bars)) and len(read_repairs(engine, **BTC)) == 10
    with bar_batch(engine, **BTC) as batch:
        batch.add(repair_bars(bars, timeframe="4h", what="b.csv")[0])
    assert batch.report == WriteReport(updated=10, unchanged=len(bars) - 10) and read_repairs(engine, **BTC).empty
    with bar_batch(engine, **BTC) as batch:
        batch.add(holes)
    assert batch.report == WriteReport(unchanged=len(bars) - 10, kept=10) and read_repairs(engine, **BTC).empty
    same(read_bars(engine, **BTC).drop(columns="is_filled"), bars)


@pytest.mark.parametrize(
    "name", ["", "../../evil", "a/b", "a b", "BTC,ETH", "-x", "x" * 65, "NUL\0", "\udcff", "'; --"]
)
def test_an_asset_has_a_plain_name(engine, bars, name):
    with pytest.raises(ConfigError, match="this cannot be the name of an asset"):
        write_bars(engine, bars, asset_id=name, timeframe="4h")


def test_features_are_replaced_as_a_whole(engine, bars):
    write_bars(engine, bars, **BTC)
    write_features(engine, features_of(bars, rsi=1.0), **BTC)
    write_features(engine, features_of(bars[50:], mfi=2.0), **BTC)
    same(read_features(engine, **BTC), features_of(bars[50:], mfi=2.0))


def test_a_new_feature_gets_a_column_and_leaves_other_assets_alone(engine, bars):
    for asset, feature in (("BTC", "rsi"), ("ETH", "mfi")):
        write_bars(engine, bars, asset_id=asset, timeframe="4h")
        write_features(engine, features_of(bars, **{feature: 5.0}), asset_id=asset, timeframe="4h")
    same(read_features(engine, **BTC), features_of(bars, rsi=5.0))
    same(read_features(engine, asset_id="ETH", timeframe="4h"), features_of(bars, mfi=5.0))


def test_timeframes_of_one_asset_do_not_mix(engine, bars):
    write_bars(engine, bars, **BTC)
    days = sample_bars(start="2024-01-01", end="2024-03-31")
    write_bars(engine, days, asset_id="BTC", timeframe="1d")
    same(read_bars(engine, **BTC), bars)
    listed = list_assets(engine)
    assert listed[["timeframe", "bars"]].to_numpy().tolist() == [["4h", len(bars)], ["1d", len(days)]]
    assert listed["last"].tolist() == [bars["ts"].iloc[-1], days["ts"].iloc[-1]]


# Another instrument


@pytest.mark.parametrize("other", [{"venue": "kraken"}, {"market": "perpetual"}, {"quote": "EUR"}])
def test_another_instrument_is_refused(engine, bars, other):
    mine = {"venue": "binance", "market": "spot", "quote": "USDT"}
    write_bars(engine, bars[:9], **BTC, **mine)
    with pytest.raises(DataError, match=r"'BTC' is another instrument in the database.*--asset-id, or --replace"):
        write_bars(engine, bars, **BTC, **mine | other)
    assert len(read_bars(engine, **BTC)) == 9


def test_what_nobody_told_is_in_no_conflict_and_is_filled_in(engine, bars):
    write_bars(engine, bars[:9], **BTC)
    assert list_assets(engine)[["venue", "market", "quote"]].to_numpy().tolist() == [["unknown", "spot", None]]
    for told in ({"venue": "unknown"}, {"market": "spot"}, {"venue": "binance", "quote": "USDT"}, {}):
        write_bars(engine, bars[:9], **BTC, **told)
    assert list_assets(engine)[["venue", "market", "quote"]].to_numpy().tolist() == [["binance", "spot", "USDT"]]
    with pytest.raises(DataError, match="another instrument"):
        write_bars(engine, bars, **BTC, market="perpetual")


def test_bars_of_another_market_under_a_known_name_are_refused_by_their_prices(engine, bars):
    write_bars(engine, bars, **BTC)
    prices = ["open", "high", "low", "close"]
    far, near = (bars[100:].assign(**{name: bars[name] * times for name in prices}) for times in (0.05, 1.05))
    with pytest.raises(
        DataError, match=r"446 of 446 bars that are stored already have another close, by more than 10 %"
    ):
        write_bars(engine, far, **BTC)
    same(read_bars(engine, **BTC), bars)
    assert write_bars(engine, near, **BTC).updated == len(near)
    some = bars.assign(close=bars["close"].where(bars.index % 50 != 0, bars["low"] * 0.7))
    assert write_bars(engine, some.assign(low=some[["low", "close"]].min(axis=1)), **BTC).updated
    write_bars(engine, far, **BTC, replace=True)
    same(read_bars(engine, **BTC), far.reset_index(drop=True))


def test_replace_deletes_every_timeframe_and_its_features(engine, bars):
    write_bars(engine, bars, **BTC, venue="sample")
    write_features(engine, features_of(bars), **BTC)
    write_funding(engine, bars[["ts"]].assign(rate=0.1), asset_id="BTC")
    with bar_batch(engine, **BTC) as batch:
        batch.add(repaired(bars))
    write_bars(engine, bars[:5], asset_id="BTC", timeframe="1h", venue="binance", replace=True)
    listed = list_assets(engine)[["venue", "timeframe", "bars", "features"]]
    assert listed.to_numpy().tolist() == [["binance", "1h", 5, 0]]
    assert len(read_quarantine(engine, **BTC)) + len(read_repairs(engine, **BTC)) == 0
    assert len(read_funding(engine, asset_id="BTC")) == 0


def test_bars_may_have_holes_where_others_are_stored(engine, bars):
    write_bars(engine, bars[bars.index % 2 == 0], **BTC)
    odd = bars[(bars.index % 3 == 0) | (bars.index == 545)]
    write_bars(engine, odd, **BTC)
    same(read_bars(engine, **BTC), bars[(bars.index % 2 == 0) | bars.index.isin(odd.index)])


def test_no_word_about_filling_means_not_filled(engine, bars):
    write_bars(engine, bars, **BTC)
    assert write_bars(engine, bars.assign(is_filled=False), **BTC) == WriteReport(unchanged=len(bars))
    assert write_bars(engine, bars.assign(is_filled=bars.index == 3), **BTC) == WriteReport(0, 1, len(bars) - 1)
    assert read_bars(engine, **BTC)["is_filled"].tolist() == [index == 3 for index in range(len(bars))]


def test_later_bars_are_written_without_reading_what_is_stored(engine, bars, monkeypatch):
    write_bars(engine, bars[:300], **BTC)
    monkeypatch.setattr(merging, "fetch_rows", None)
    assert write_bars(engine, bars[300:], **BTC) == WriteReport(inserted=len(bars) - 300)
    same(read_bars(engine, **BTC), bars)


# What the repair leaves behind


def repaired(bars: pd.DataFrame, *, source: str = "4h.csv") -> Repaired:
    """The first row without a readable time, the second kept out, the third with another volume."""
    rows = bars.assign(source=source, row=np.arange(1, len(bars) + 1))
    out = rows[:2].assign(
        ts=rows["ts"].iloc[:2].mask([True, False]), rule=["unreadable_time", "not_finite"], high=np.inf
    )
    change = rows.loc[rows.index[2:3], ["source", "row", "ts"]]
    change = change.assign(column="volume", old=-1e-300, new=rows["volume"].iloc[2], rule="Bär 'ß'")
    return Repaired(bars[2:], out[QUARANTINE_COLUMNS], change[CHANGE_COLUMNS])


def test_records_come_back_as_they_were(engine, bars):
    came = repaired(bars)
    for _ in range(2):
        with bar_batch(engine, **BTC) as batch:
            batch.add(came)
    assert batch.report == WriteReport(unchanged=len(bars) - 2)
    out, changes = read_quarantine(engine, **BTC), read_repairs(engine, **BTC)
    same(out, came.quarantine[out.columns].sort_values("ts"))
    same(changes, came.changes)


def test_chunks_keep_each_other_s_records(engine, bars):
    with bar_batch(engine, **BTC) as batch:
        for start in range(0, 500, 100):
            batch.add(repaired(bars[start : start + 100], source=f"{start}.csv"))
    assert batch.report == WriteReport(inserted=490)
    out = read_quarantine(engine, **BTC)
    assert (len(out), out["ts"].isna().sum(), len(read_repairs(engine, **BTC))) == (10, 5, 5)
    with bar_batch(engine, **BTC) as batch:
        batch.add(repaired(bars[100:200], source="other.csv"))
    assert sorted(read_repairs(engine, **BTC)["source"]) == ["0.csv", "200.csv", "300.csv", "400.csv", "other.csv"]
    assert len(read_quarantine(engine, **BTC)) == 11


def test_a_row_in_quarantine_leaves_the_repair_of_a_stored_bar(engine, bars):
    came = repaired(bars)
    with bar_batch(engine, **BTC) as batch:
        batch.add(came)
        batch.add(Repaired(bars[:0], came.quarantine.assign(ts=came.changes["ts"].iloc[0]), came.changes[:0]))
    assert len(read_repairs(engine, **BTC)) == 1


def test_funding_is_kept_apart_from_bars(engine, bars):
    rates = pd.DataFrame({"ts": bars["ts"][::2], "rate": np.linspace(-1e-3, 1e-3, len(bars) // 2)})
    write_funding(engine, rates[:100], asset_id="BTC", market="perpetual")
    assert write_funding(engine, rates, asset_id="BTC") == WriteReport(173, 0, 100)
    same(read_funding(engine, asset_id="BTC"), rates)
    assert list_assets(engine)["bars"].tolist() in ([], [0])


# What is out of date


def test_features_are_stale_from_the_first_bar_that_changed(engine, bars):
    write_bars(engine, bars[:500], **BTC)
    assert stale_from(engine, **BTC) == bars["ts"].iloc[0]
    write_features(engine, features_of(bars[:500], rsi=1.0), **BTC)
    assert stale_from(engine, **BTC) is None
    write_bars(engine, bars[:500], **BTC)
    assert stale_from(engine, **BTC) is None
    write_bars(engine, bars, **BTC)
    assert stale_from(engine, **BTC) == bars["ts"].iloc[500]
    write_bars(engine, bars[200:300].assign(volume=1.0), **BTC)
    assert stale_from(engine, **BTC) == bars["ts"].iloc[200]


def test_features_since_a_time_leave_the_earlier_rows(engine, bars):
    write_bars(engine, bars, **BTC)
    write_features(engine, features_of(bars[:500], rsi=1.0), **BTC)
    since = bars["ts"].iloc[400]
    assert write_features(engine, features_of(bars[300:], rsi=2.0), **BTC, since=since) == len(bars) - 400
    same(read_features(engine, **BTC), features_of(bars, rsi=np.where(bars.index < 400, 1.0, 2.0)))
    assert stale_from(engine, **BTC) is None
    assert stored_features(engine, **BTC) == [*list(bars)[1:], "rsi"]
    with pytest.raises(DataError, match=r"others than these; got \['mfi', 'rsi'\]"):
        write_features(engine, features_of(bars, mfi=2.0), **BTC, since=since)


def test_a_database_of_an_earlier_kallos_opens_and_is_stale_as_a_whole(db_url, bars):
    engine = connect(db_url)
    write_bars(engine, bars[:500], **BTC, market="spot")
    tables.METADATA.drop_all(
        engine, tables=[tables.SERIES, tables.FUNDING, tables.QUARANTINE, tables.REPAIRS, tables.RUNS]
    )
    engine = connect(db_url, create=False)
    assert stale_from(engine, **BTC) == bars["ts"].iloc[0]
    write_bars(engine, bars, **BTC)
    assert stale_from(engine, **BTC) == bars["ts"].iloc[0]
    assert (len(read_quarantine(engine, **BTC)), stored_features(engine, **BTC)) == (0, [])


# All or nothing


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupts the writing of rows before the chunk of that number, counted from 1."""
    chunks, seen = bulk._chunks, []

    def interrupted(rows: pd.DataFrame):
        for chunk in chunks(rows):
            seen.append(len(chunk))
            if len(seen) == count:
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(bulk, "_CHUNK", 50)
    monkeypatch.setattr(bulk, "_chunks", interrupted)


def everything_in(engine: sa.Engine) -> dict[str, list]:
    with engine.connect() as connection:
        return {name: connection.execute(sa.select(table)).all() for name, table in tables.METADATA.tables.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("replace", [False, True])
def test_an_interrupted_batch_leaves_no_trace(engine, bars, monkeypatch, count, replace):
    with bar_batch(engine, **BTC, venue="binance") as batch:
        batch.add(repaired(bars[:300]))
    write_features(engine, features_of(bars[:300]), **BTC)
    before = everything_in(engine)
    stop_at(monkeypatch, count)
    with pytest.raises(KeyboardInterrupt), bar_batch(engine, **BTC, replace=replace, quote="USDT") as batch:
        batch.add(repaired(bars.assign(volume=2.0)))
    assert everything_in(engine) == before


def test_an_interrupted_first_write_leaves_no_trace(engine, bars, monkeypatch):
    stop_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        write_bars(engine, bars, **BTC, venue="sample")
    assert not any(everything_in(engine).values())


def test_an_interrupted_write_of_features_leaves_the_old_ones(engine, bars, monkeypatch):
    write_bars(engine, bars, **BTC)
    write_features(engine, features_of(bars, rsi=1.0), **BTC)
    before = everything_in(engine)
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        write_features(engine, features_of(bars, rsi=2.0, mfi=3.0), **BTC)
    assert everything_in(engine) == before
    with engine.connect() as connection:
        assert "mfi" not in [column["name"] for column in sa.inspect(connection).get_columns("features")]


KILLED = """
import os, signal, sys
import pandas as pd
from kallos.data import bulk
from kallos.data.sample import sample_bars
from kallos.data.store import bar_batch
from kallos.data.tables import connect

bars, chunks, seen = sample_bars(timeframe="4h", start="2024-01-01", end="2024-03-31"), bulk._chunks, []

def killed(rows):
    for chunk in chunks(rows):
        seen.append(0)
        if len(seen) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk

bulk._CHUNK, bulk._chunks = 50, killed
with bar_batch(connect(sys.argv[1]), asset_id="BTC", timeframe="4h") as batch:
    for start in range(0, len(bars), 100):
        batch.add_bars(bars[start : start + 100])
"""


@pytest.mark.parametrize("count", [4, 10])
def test_a_killed_process_leaves_nothing_and_the_next_completes_its_work(db_url, bars, count):
    write_bars(connect(db_url), bars[:70], **BTC)
    before = everything_in(connect(db_url))
    done = subprocess.run([sys.executable, "-c", KILLED, db_url, str(count)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert everything_in(connect(db_url)) == before
    assert write_bars(connect(db_url), bars, **BTC) == WriteReport(inserted=len(bars) - 70, unchanged=70)


def test_a_full_disk_is_told_in_one_line(tmp_path, bars):
    engine = connect(f"sqlite:///{tmp_path / 'kallos.db'}")
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 20"))
    with pytest.raises(DataError, match=r"the database cannot be used \(database or disk is full\)"):
        write_bars(engine, bars.assign(is_filled=False), **BTC)


# Several at once


def test_many_may_create_and_write_at_once(db_url, bars):
    def work(number: int) -> None:
        key = {"asset_id": f"A{number}", "timeframe": "4h"}
        engine = connect(db_url)
        write_bars(engine, bars, **key)
        write_features(engine, features_of(bars, rsi=1.0, mfi=2.0), **key)
        assert len(read_features(engine, **key)) == len(bars)
        engine.dispose()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list_assets(connect(db_url))["features"].tolist() == [len(bars)] * 4


# What is missing


def test_errors_list_what_there_is(engine, bars):
    with pytest.raises(DataError, match=r"no bars of 'BTC' in '4h'\. The database has bars of: nothing"):
        read_bars(engine, **BTC)
    write_bars(engine, bars, **BTC)
    with pytest.raises(DataError, match=r"bars of: BTC 4h \(546\)"):
        read_bars(engine, asset_id="DOGE", timeframe="4h")
    with pytest.raises(DataError, match=r"bars of: BTC 4h \(546\)"):
        read_bars(engine, asset_id="BTC", timeframe="1d")
    with pytest.raises(DataError, match=r"in that range.*There are 546, from 2024-01-01 00:00"):
        read_bars(engine, **BTC, end="2020-01-01")
    with pytest.raises(DataError, match="kallos-run features --asset-id BTC --timeframe 4h"):
        read_features(engine, **BTC)
    with pytest.raises(DataError, match="no bars of 'ETH'"):
        write_features(engine, features_of(bars), asset_id="ETH", timeframe="4h")
    write_features(engine, features_of(bars, rsi=1.0, mfi=np.nan), **BTC)
    with pytest.raises(DataError, match=r"no values of mfi, adx for 'BTC' in '4h'\. There are open, .*, rsi"):
        read_features(engine, **BTC, columns=["rsi", "mfi", "adx"])
    with pytest.raises(DataError, match=r"in that range.*There are 546, from 2024-01-01 04:00"):
        read_features(engine, **BTC, end="2020-01-01")
    with pytest.raises(DataError, match="this is no date"):
        read_features(engine, **BTC, end="soon")


def test_reading_makes_no_database(tmp_path):
    with pytest.raises(DataError, match=r"no such database.*kallos-run ingest"):
        connect(f"sqlite:///{tmp_path}/typo/kallos.db", create=False)
    assert not (tmp_path / "typo").exists()


def test_an_empty_server_is_told_so(postgres_url):
    with pytest.raises(DataError, match=r"no tables of kallos.*kallos-run ingest"):
        connect(postgres_url, create=False)


# Which database


def test_the_five_keys_name_a_database(postgres_kwargs, bars):
    engine = connect(postgres_kwargs | {"postgres_port": str(postgres_kwargs["postgres_port"])})
    assert engine.driver == "psycopg"
    write_bars(engine, bars[:5], **BTC)
    url = "postgres://{postgres_user}:x@{postgres_host}:{postgres_port}/{postgres_db}".format(**postgres_kwargs)
    assert len(read_bars(connect({"url": url}), **BTC)) == 5


def test_the_default_is_the_environment_then_the_project(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    for name in ("settings.ini", "config/train.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("KALLOS_DB_URL", "sqlite:///mine.db")
    assert to_url().database == str(tmp_path / "below" / "mine.db")
    for unset in (lambda: monkeypatch.setenv("KALLOS_DB_URL", ""), lambda: monkeypatch.delenv("KALLOS_DB_URL")):
        unset()
        assert to_url().database == str(tmp_path / "data" / "kallos.db")


# Passwords


def everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("change", [{"postgres_port": 1}, {"postgres_db": "nowhere"}, {"postgres_user": "nobody"}])
def test_no_password_in_the_error_of_a_connection(postgres_kwargs, change):
    with pytest.raises(DataError, match="the database cannot be used") as caught:
        connect(postgres_kwargs | change)
    said = everything_said(caught.value)
    assert "secret-of-the-tests" not in said
    assert "Check that the server runs" in said


@pytest.mark.parametrize(
    "db",
    [
        "postgresql://user:hush/hush@host:port/db",
        "postgresql://user:hush@hush@host/db",
        "postgresql://user:hush@host",
        "mysql://user:hush@host/db",
        "user:hush@host/db",
        {"postgres_user": "user", "postgres_password": "hush"},
        {"url": "postgresql://user:hush@host/db", "postgres_password": "hush"},
        {"url": "oracle://user:hush@host/db"},
    ],
)
def test_no_password_in_the_error_of_a_url(db):
    with pytest.raises(ConfigError) as caught:
        to_url(db)
    assert "hush" not in str(caught.value)


def test_missing_rights_are_the_reader_s_to_mend(postgres, postgres_kwargs):
    with psycopg.connect(**postgres, dbname=postgres_kwargs["postgres_db"], autocommit=True) as connection:
        connection.execute("CREATE ROLE guest LOGIN")
        try:
            with pytest.raises(DataError, match="permission denied"):
                connect(postgres_kwargs | {"postgres_user": "guest"})
        finally:
            connection.execute("DROP ROLE guest")
