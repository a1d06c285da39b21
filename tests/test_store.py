"""The store on SQLite and on a real PostgreSQL whose time zone is not UTC."""

import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa

from kallos.core.errors import ConfigError, DataError
from kallos.data import store
from kallos.data.sample import sample_bars
from kallos.data.store import (
    WriteReport,
    connect,
    list_assets,
    read_bars,
    read_features,
    to_url,
    write_bars,
    write_features,
)

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
    monkeypatch.setattr(store, "_CHUNK", 50)
    write_bars(engine, bars, **BTC)
    mended = bars.assign(volume=bars["volume"].where(bars.index % 100 != 7, 1.0))
    assert write_bars(engine, mended, **BTC) == WriteReport(updated=6, unchanged=len(bars) - 6)
    same(read_bars(engine, **BTC), mended)


def test_fewer_columns_keep_the_others(engine, bars):
    write_bars(engine, bars, **BTC)
    assert write_bars(engine, bars.iloc[:, :6].assign(volume=1.0), **BTC) == WriteReport(updated=len(bars))
    same(read_bars(engine, **BTC), bars.assign(volume=1.0))


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


@pytest.mark.parametrize(
    "other", [{"venue": "kraken"}, {"market": "perpetual"}, {"quote": "EUR"}, {"venue": "unknown"}]
)
def test_another_instrument_is_refused(engine, bars, other):
    mine = {"venue": "binance", "market": "spot", "quote": "USDT"}
    write_bars(engine, bars[:9], **BTC, **mine)
    with pytest.raises(DataError, match=r"'BTC' is another instrument in the database.*--asset-id, or --replace"):
        write_bars(engine, bars, **BTC, **mine | other)
    assert len(read_bars(engine, **BTC)) == 9


def test_replace_deletes_every_timeframe_and_its_features(engine, bars):
    write_bars(engine, bars, **BTC, venue="sample")
    write_features(engine, features_of(bars), **BTC)
    write_bars(engine, bars[:5], asset_id="BTC", timeframe="1h", venue="binance", replace=True)
    assert list_assets(engine)[["venue", "timeframe", "bars", "features"]].to_numpy().tolist() == [
        ["binance", "1h", 5, 0]
    ]


# All or nothing


def stop_at(engine: sa.Engine, start_of_statement: str, count: int) -> None:
    """Interrupts the engine in the statement of that beginning that is its `count`th."""
    seen = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def interrupt(connection, cursor, statement, *others):
        seen.extend([statement] if statement.startswith(start_of_statement) else [])
        if len(seen) == count:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stored", [0, 300])
def test_an_interrupted_write_of_bars_leaves_no_trace(db_url, bars, monkeypatch, stored):
    monkeypatch.setattr(store, "_CHUNK", 50)
    if stored:
        write_bars(connect(db_url), bars[:stored], **BTC, venue="binance")
    engine = connect(db_url)
    stop_at(engine, "INSERT INTO bars", 4)
    with pytest.raises(KeyboardInterrupt):
        write_bars(engine, bars.assign(volume=2.0), **BTC, venue="sample", replace=True)
    listed = list_assets(connect(db_url))
    assert listed["bars"].tolist() == ([stored] if stored else [])
    if stored:
        same(read_bars(connect(db_url), **BTC), bars[:stored])


def test_an_interrupted_write_of_features_leaves_the_old_ones(db_url, bars, monkeypatch):
    monkeypatch.setattr(store, "_CHUNK", 50)
    write_bars(connect(db_url), bars, **BTC)
    write_features(connect(db_url), features_of(bars, rsi=1.0), **BTC)
    engine = connect(db_url)
    stop_at(engine, "INSERT INTO features", 3)
    with pytest.raises(KeyboardInterrupt):
        write_features(engine, features_of(bars, rsi=2.0, mfi=3.0), **BTC)
    same(read_features(connect(db_url), **BTC), features_of(bars, rsi=1.0))
    with connect(db_url).connect() as connection:
        assert "mfi" not in [column["name"] for column in sa.inspect(connection).get_columns("features")]


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
