"""Fetching from an exchange: against a server on this machine that speaks as Binance does, and fails as networks do."""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import exchange_server as faults
import numpy as np
import pandas as pd
import pytest
from exchange_server import ExchangeServer, Listing, candles, serving

from kallos.core.columns import BAR_COLUMNS
from kallos.core.errors import ConfigError, DataError
from kallos.data.assets import list_assets
from kallos.data.bars import gap_map
from kallos.data.exchange import ExchangeError, Pace, Patience, open_exchange
from kallos.data.fetch import fetch_bars
from kallos.data.pages import exchange_now, fetch_funding_pages, fetch_pages, find_instruments
from kallos.data.records import read_funding, read_quarantine
from kallos.data.repair import repair_bars
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars
from kallos.data.tables import connect

pytest.importorskip("ccxt", reason="needs ccxt: pip install 'kallos[exchange]'")

START, NOW = pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2024-04-30 13:37", tz="UTC")
HOUR = pd.Timedelta("1h")
BTC, PERP, ETH = "BTC/USDT", "BTC/USDT:USDT", "ETH/USDT"


@pytest.fixture(scope="session")
def hours() -> pd.DataFrame:
    """2,918 bars of an hour, the last of them still open at NOW."""
    bars = sample_bars(timeframe="1h", start="2024-01-01", end="2024-05-01")
    return bars[bars["ts"] <= NOW].reset_index(drop=True)


@pytest.fixture
def btc(hours) -> Listing:
    days = sample_bars(timeframe="1d", start="2023-01-01", end="2024-05-01")
    return Listing("BTCUSDT", "BTC", "USDT", {"1h": candles(hours, "1h"), "1d": candles(days, "1d")})


@pytest.fixture
def perpetual(hours) -> Listing:
    dues = pd.date_range("2023-01-01", "2024-05-01", freq="8h", tz="UTC").as_unit("ms").asi8.tolist()
    rates = [(due + place % 3, f"{(place % 7 - 3) / 10000:.8f}") for place, due in enumerate(dues)]
    return Listing("BTCUSDT", "BTC", "USDT", {"1h": candles(hours, "1h")}, host="fapi", funding=rates)


@pytest.fixture
def ether(btc) -> Listing:
    return Listing("ETHUSDT", "ETH", "USDT", btc.candles)


@pytest.fixture
def exchange(btc, perpetual, ether) -> Iterator[ExchangeServer]:
    with serving(btc, perpetual, ether, now=NOW) as server:
        yield server


def opened(server: ExchangeServer, **patience):
    """A client without the waits of a real exchange."""
    client = open_exchange("binance", url=server.url, pace=Pace(patience=Patience(**{"first": 0.002, **patience})))
    client.rateLimit = 0.01
    return client


def loaded(server: ExchangeServer, *symbols: str, **patience):
    client = opened(server, **patience)
    find_instruments(client, list(symbols or (BTC,)))
    return client


def whole(server: ExchangeServer, symbol: str = BTC, since=START, until=NOW, **patience) -> pd.DataFrame:
    pages = fetch_pages(loaded(server, symbol, **patience), symbol, timeframe="1h", since=since, until=until)
    return pd.concat(pages, ignore_index=True)


def same(fetched: pd.DataFrame, bars: pd.DataFrame) -> None:
    names = ["ts", *BAR_COLUMNS]
    pd.testing.assert_frame_equal(fetched[names], bars[names].reset_index(drop=True), check_exact=True)


# Instruments


def test_a_symbol_is_one_instrument(exchange):
    spot, perpetual = find_instruments(opened(exchange), [BTC, PERP])
    assert (spot.asset_id, spot.market, spot.venue, spot.quote) == ("BTCUSDT", "spot", "binance", "USDT")
    assert (perpetual.asset_id, perpetual.market, perpetual.quote) == ("BTCUSDT_PERP", "perpetual", "USDT")


def test_only_the_hosts_that_the_symbols_need_are_asked(exchange):
    find_instruments(opened(exchange), [BTC])
    assert {path for _, path, _ in exchange.requests} == {"/api/v3/exchangeInfo"}
    exchange.requests.clear()
    client = loaded(exchange, PERP)
    exchange_now(client)
    assert {path for _, path, _ in exchange.requests} == {"/fapi/v1/exchangeInfo", "/fapi/v1/time"}


def test_an_unknown_symbol_is_refused_with_its_likes(exchange):
    with pytest.raises(ConfigError, match=r"no such symbol; got 'BTC/USD'.*BTC/USDT"):
        find_instruments(opened(exchange), ["BTC/USD"])


@pytest.mark.parametrize("wrong", ["binanse", "Binance", "", "Exchange"])
def test_an_unknown_exchange_is_refused(wrong):
    with pytest.raises(ConfigError, match="knows no such exchange"):
        open_exchange(wrong)


# Pages


def test_pages_hold_every_closed_bar_and_all_columns_bit_for_bit(exchange, hours):
    fetched = whole(exchange)
    same(fetched, hours.iloc[:-1])
    assert fetched["row"].tolist() == list(range(1, len(hours)))
    assert set(fetched["source"]) == {"binance"}
    assert [int(given["startTime"]) for given in exchange.asked()] == [
        (START + place * HOUR).value // 10**6 for place in (0, 1000, 2000)
    ]


def test_the_bounds_of_a_range_hold(exchange, hours):
    since, until = pd.Timestamp("2024-02-01 00:30", tz="UTC"), pd.Timestamp("2024-03-20", tz="UTC")
    inside = (hours["ts"] >= since) & (hours["ts"] + HOUR <= until)
    same(whole(exchange, since=since, until=until), hours[inside])
    assert list(fetch_pages(loaded(exchange), BTC, timeframe="1h", since=NOW, until=NOW)) == []


def test_the_exchange_says_what_time_it_is(exchange):
    assert exchange_now(opened(exchange)) == NOW


@pytest.mark.parametrize("by_window", [False, True])
def test_missing_candles_stay_missing_and_the_rest_is_fetched(exchange, btc, hours, by_window):
    gone = np.r_[5:6, 100:2400, 2700:2710]
    btc.candles["1h"] = [row for place, row in enumerate(btc.candles["1h"]) if place not in gone]
    exchange.by_window = by_window
    same(whole(exchange, since=START - 3000 * HOUR), hours.drop(index=gone).iloc[:-1])


def test_duplicate_candles_come_as_they_are(exchange, btc):
    btc.candles["1h"].insert(500, btc.candles["1h"][500])
    btc.candles["1h"].insert(999, btc.candles["1h"][999])  # across the border of a page
    doubles = whole(exchange)["ts"]
    assert doubles[doubles.duplicated()].tolist() == [START + 500 * HOUR]
    assert doubles.is_monotonic_increasing


def test_the_same_page_for_ever_ends_with_an_error(exchange):
    exchange.stuck = True
    with pytest.raises(ExchangeError, match="every page is the same one; got '1000 rows before the time"):
        whole(exchange)
    assert len(exchange.asked()) == 2


def test_a_delisted_market_ends(exchange, btc, hours):
    del btc.candles["1h"][1500:]
    same(whole(exchange), hours.iloc[:1500])
    assert len(exchange.asked()) == 4  # two pages, an empty one, and the newest row


def test_an_empty_answer_in_the_middle_is_not_the_end(exchange, hours):
    exchange.faults = [lambda handler, body: handler.reply(200, body), faults.nothing]
    same(whole(exchange), hours.iloc[:-1])


# Faults


PASSING = {
    "429": faults.status(429, retry_after=0),
    "418": faults.status(418, retry_after=0),
    "500": faults.status(500, body='{"code": -1000, "msg": "An unknown error occurred"}'),
    "502": faults.status(502, body="<html>Bad Gateway</html>"),
    "503": faults.status(503, body=""),
    "disconnected": faults.status(400, body='{"code": -1001, "msg": "Internal error; unable to process."}'),
    "hang up": faults.hang_up,
    "cut": faults.cut,
    "cut chunks": faults.cut_chunked,
    "half": faults.half,
    "web page": faults.web_page,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(exchange, hours, name):
    exchange.first_faults = [PASSING[name]]
    exchange.faults = [PASSING[name]] * 3
    same(whole(exchange), hours.iloc[:-1])
    assert len(exchange.asked()) == 6


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_ends_with_a_sentence(exchange, name):
    client = loaded(exchange, tries=3)
    exchange.faults = [PASSING[name]] * 99
    with pytest.raises(ExchangeError, match=r"binance failed 3 times in a row; got .+\. Check the network") as caught:
        next(fetch_pages(client, BTC, timeframe="1h", since=START, until=NOW))
    assert caught.value.exit_code == 4
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("code", [400, 401, 403, 404, 451])
def test_a_refusal_is_not_repeated(exchange, code):
    client = loaded(exchange)
    exchange.faults = [faults.status(code, body='{"msg": "not for you"}')]
    with pytest.raises(ExchangeError, match=rf"binance refuses; got 'HTTP {code}.*not for you"):
        next(fetch_pages(client, BTC, timeframe="1h", since=START, until=NOW))
    assert len(exchange.asked()) == 1


def test_a_dead_port_is_told_in_words(exchange):
    client = open_exchange("binance", url="http://127.0.0.1:9", pace=Pace(patience=Patience(tries=2, first=0.001)))
    with pytest.raises(ExchangeError, match=r"failed 2 times in a row; got '.*Connection refused"):
        find_instruments(client, [BTC])


def test_a_password_in_the_url_is_not_shown(exchange):
    url = exchange.url.replace("//", "//me:hunter2@")
    client = open_exchange("binance", url=url, pace=Pace(patience=Patience(tries=1)))
    for fault in (faults.status(403), faults.hang_up, faults.cut, faults.status(500)):
        exchange.first_faults = [fault]
        with pytest.raises(ExchangeError) as caught:
            find_instruments(client, [BTC])
        assert "hunter2" not in str(caught.value)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.naps = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.naps.append(round(seconds, 3))


def test_back_off_doubles_and_retry_after_wins(exchange):
    clock = Clock()
    client = open_exchange("binance", url=exchange.url, pace=Pace(clock=lambda: clock.now, sleep=clock.sleep))
    soon = (pd.Timestamp.now("UTC") + pd.Timedelta("100s")).strftime("%a, %d %b %Y %H:%M:%S GMT")
    plan = [
        faults.cut,
        faults.cut,
        faults.status(429, retry_after=17),
        faults.cut,
        faults.status(503, retry_after=soon),
    ]
    find_instruments(client, [BTC])
    exchange.faults, clock.naps = plan, []
    next(fetch_pages(client, BTC, timeframe="1h", since=START, until=NOW))
    naps = [nap for nap in clock.naps if nap > 0.5]
    assert naps[:4] == [1, 2, 17, 8]
    assert 90 < naps[4] <= 100


def test_a_ban_of_hours_is_not_sat_out(exchange):
    client = loaded(exchange)
    exchange.faults = [faults.status(418, retry_after=7200)]
    with pytest.raises(ExchangeError, match="demands to be left alone for 7200 s"):
        next(fetch_pages(client, BTC, timeframe="1h", since=START, until=NOW))


def test_threads_share_one_rate(exchange):
    client = loaded(exchange)
    client.rateLimit = 75  # a page of candles costs 0.4 of that
    exchange.requests.clear()
    threads = [
        threading.Thread(target=lambda: list(fetch_pages(client, BTC, timeframe="1h", since=START, until=NOW)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(moment for moment, _, _ in exchange.requests)
    assert len(times) == 9
    assert times[-1] - times[0] > 8 * 0.030 * 0.9


# Funding rates


def test_funding_rates_come_whole_and_on_the_second(exchange, perpetual):
    client = loaded(exchange, PERP)
    exchange.faults = [faults.status(429, retry_after=0), faults.cut]
    since = pd.Timestamp("2023-01-01", tz="UTC")
    pages = list(fetch_funding_pages(client, PERP, since=since, until=NOW))
    rates = pd.concat(pages, ignore_index=True)
    due = [(ts, rate) for ts, rate in perpetual.funding if ts <= NOW.value // 10**6]
    assert len(pages) == 2
    assert rates["rate"].tolist() == [float(rate) for _, rate in due]
    assert (rates["ts"] == pd.to_datetime([ts // 1000 for ts, _ in due], unit="s", utc=True)).all()


def test_funding_rates_that_do_not_move_forward_are_an_error(exchange):
    exchange.stuck = True
    client = loaded(exchange, PERP)
    with pytest.raises(ExchangeError, match="same one"):
        list(fetch_funding_pages(client, PERP, since=pd.Timestamp("2023-01-01", tz="UTC"), until=NOW))


# Imports


def test_ccxt_is_imported_only_to_open_an_exchange():
    code = "import sys, kallos.data.exchange, kallos.data.pages; assert not {'ccxt', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ccxt_the_error_says_how_to_get_it():
    code = """
import sys
sys.modules["ccxt"] = None
from kallos.core.errors import ConfigError
from kallos.data.exchange import open_exchange
try:
    open_exchange("binance")
except ConfigError as error:
    assert "pip install 'kallos[exchange]'" in str(error), error
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Into the database


def request(server: ExchangeServer, **changes) -> dict:
    return {"exchange": opened(server), "symbols": [BTC], "timeframes": ["1h"], "since": START, **changes}


def stored(engine, asset_id: str = "BTCUSDT", timeframe: str = "1h") -> pd.DataFrame:
    return read_bars(engine, asset_id=asset_id, timeframe=timeframe)


@pytest.fixture
def engine(db_url: str):
    return connect(db_url)


@pytest.fixture
def sqlite(tmp_path):
    return connect(f"sqlite:///{tmp_path / 'kallos.db'}")


def test_what_is_fetched_is_stored_bit_for_bit(exchange, engine, hours):
    [done] = fetch_bars(engine, **request(exchange))
    same(stored(engine), hours.iloc[:-1])
    assert (done.written.inserted, done.asset_id, done.done) == (len(hours) - 1, "BTCUSDT", True)
    asset = list_assets(engine).iloc[0]
    assert (asset["venue"], asset["market"], asset["quote"]) == ("binance", "spot", "USDT")


def test_the_next_fetch_asks_only_for_what_is_new(exchange, engine, hours):
    exchange.now = START + 1500 * HOUR
    fetch_bars(engine, **request(exchange))
    exchange.requests.clear()
    exchange.now = NOW
    [done] = fetch_bars(engine, **request(exchange))
    same(stored(engine), hours.iloc[:-1])
    assert int(exchange.asked()[0]["startTime"]) == (START + 1400 * HOUR).value // 10**6
    assert done.written.unchanged == 100
    [again] = fetch_bars(engine, **request(exchange, since=None))
    assert (again.written.inserted, again.written.unchanged) == (0, 100)


def test_a_bar_is_stored_only_when_it_has_closed(exchange, sqlite, hours):
    for minutes in range(0, 150, 10):
        exchange.now = START + 10 * HOUR + pd.Timedelta(minutes=minutes)
        fetch_bars(sqlite, **request(exchange))
        same(stored(sqlite), hours[hours["ts"] + HOUR <= exchange.now])


def test_a_bar_that_the_exchange_revised_is_revised(exchange, btc, sqlite, hours):
    exchange.now = START + 20 * HOUR
    fetch_bars(sqlite, **request(exchange))
    btc.candles["1h"][19][8] += 1
    exchange.now = START + 21 * HOUR
    [done] = fetch_bars(sqlite, **request(exchange))
    assert (done.written.inserted, done.written.updated) == (1, 1)
    assert stored(sqlite)["number_of_trades"].iloc[19] == hours["number_of_trades"][19] + 1


def test_older_history_comes_in_front(exchange, sqlite, hours, monkeypatch):
    monkeypatch.setattr("kallos.data.fetch._PIECE", 300)
    fetch_bars(sqlite, **request(exchange, since=START + 2000 * HOUR))
    [done] = fetch_bars(sqlite, **request(exchange, since=START - 9999 * HOUR))
    same(stored(sqlite), hours.iloc[:-1])
    assert done.written.inserted == 2000
    exchange.requests.clear()
    fetch_bars(sqlite, **request(exchange, since=START - 9999 * HOUR))
    assert len(exchange.asked()) == 2  # is there anything older, and is there anything new


def test_older_history_that_fails_leaves_no_hole(exchange, sqlite, hours, monkeypatch):
    monkeypatch.setattr("kallos.data.fetch._PIECE", 300)
    fetch_bars(sqlite, **request(exchange, since=START + 2000 * HOUR))
    exchange.faults = [lambda handler, body: handler.reply(200, body)] * 4 + [faults.status(403)]
    with pytest.raises(ExchangeError):
        fetch_bars(sqlite, **request(exchange))
    some = stored(sqlite)
    assert START < some["ts"].iloc[0] < START + 2000 * HOUR
    assert gap_map(some["ts"], timeframe="1h").empty
    fetch_bars(sqlite, **request(exchange))
    same(stored(sqlite), hours.iloc[:-1])


def test_a_stored_series_goes_on_without_a_hole_whatever_since_says(exchange, sqlite, hours):
    fetch_bars(sqlite, **request(exchange, until=START + 500 * HOUR))
    fetch_bars(sqlite, **request(exchange, since=START + 2000 * HOUR))
    same(stored(sqlite), hours.iloc[:-1])


def test_older_history_reaches_the_stored_bars_whatever_until_says(exchange, sqlite, hours):
    fetch_bars(sqlite, **request(exchange, since=START + 2000 * HOUR))
    fetch_bars(sqlite, **request(exchange, until=START + 500 * HOUR))
    same(stored(sqlite), hours.iloc[:-1])


def test_gaps_and_copies_of_the_exchange(exchange, btc, sqlite, hours):
    gone = np.r_[5:6, 900:1100, 2700:2710]
    rows = [row for place, row in enumerate(btc.candles["1h"]) if place not in gone]
    btc.candles["1h"] = sorted(rows + rows[40:43] + rows[995:1005], key=lambda row: row[0])
    [done] = fetch_bars(sqlite, **request(exchange))
    same(stored(sqlite), hours.drop(index=gone).iloc[:-1])
    assert done.reports[0].gaps["missing"].tolist() == [1, 200, 10]


def test_resuming_at_a_gap(exchange, btc, sqlite, hours):
    del btc.candles["1h"][100:130]
    exchange.now = START + 100 * HOUR
    fetch_bars(sqlite, **request(exchange))
    for after in (0, 1, 2):
        exchange.now = START + (130 + after) * HOUR
        fetch_bars(sqlite, **request(exchange))
        same(stored(sqlite), hours[hours["ts"] + HOUR <= exchange.now].drop(index=range(100, 130), errors="ignore"))


def test_several_symbols_and_timeframes(exchange, engine, hours):
    told = []
    batch = request(exchange, symbols=[BTC, PERP, ETH], timeframes=["1h", "1d"], allow_batch_symbols=True)
    del exchange.listings["fapi", "BTCUSDT"].candles["1h"][2000:]
    exchange.listings["fapi", "BTCUSDT"].candles["1d"] = exchange.listings["api", "BTCUSDT"].candles["1d"]
    done = fetch_bars(engine, **batch, progress=told.append)
    assert [(one.asset_id, one.series) for one in done] == [
        (asset, series) for asset in ("BTCUSDT", "BTCUSDT_PERP", "ETHUSDT") for series in ("1h", "1d")
    ]
    same(stored(engine), hours.iloc[:-1])
    same(stored(engine, "BTCUSDT_PERP"), hours.iloc[:2000])
    assert set(list_assets(engine)["market"]) == {"spot", "perpetual"}
    assert sum(one.done for one in told) == len(done)
    for one in done:
        shares = [step.share for step in told if (step.asset_id, step.series) == (one.asset_id, one.series)]
        assert shares == sorted(shares)
        assert 0 <= shares[0] <= shares[-1] == 1


def test_symbols_stay_alone_unless_allowed(exchange, sqlite):
    with pytest.raises(ConfigError, match=r"several symbols in one fetch.*--allow-batch-symbols"):
        fetch_bars(sqlite, **request(exchange, symbols=[BTC, ETH]))
    with pytest.raises(ConfigError, match=r"two symbols under one asset id; got \['X'\]"):
        ids = {BTC: "X", ETH: "X"}
        fetch_bars(sqlite, **request(exchange, symbols=[BTC, ETH], allow_batch_symbols=True, asset_ids=ids))
    assert exchange.asked() == []
    assert list_assets(sqlite).empty


def test_another_instrument_under_the_same_name_is_refused(exchange, sqlite):
    fetch_bars(sqlite, **request(exchange))
    with pytest.raises(DataError, match=r"BTC/USDT:USDT 1h: .*another instrument"):
        fetch_bars(sqlite, **request(exchange, symbols=[PERP], asset_ids={PERP: "BTCUSDT"}))


def test_one_that_fails_is_named_and_the_others_go_on(exchange, engine, hours):
    batch = request(exchange, symbols=[BTC, ETH], allow_batch_symbols=True)
    exchange.refused = {"ETHUSDT": 2}
    with pytest.raises(
        ExchangeError, match=r"1 of 2 series failed, what is stored stays: ETH/USDT 1h: binance refuses"
    ):
        fetch_bars(engine, **batch)
    same(stored(engine), hours.iloc[:-1])
    some = stored(engine, "ETHUSDT")
    assert 900 < len(some) < 1100
    exchange.refused = {}
    fetch_bars(engine, **batch)
    same(stored(engine, "ETHUSDT"), hours.iloc[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_change_nothing(exchange, engine, hours, seed):
    rng = random.Random(seed)
    plan = [*PASSING.values(), faults.nothing]
    exchange.random_fault = lambda: rng.choice(plan) if rng.random() < 0.3 else None
    client = opened(exchange, tries=30, longest=0.01)
    client.pace.patience = Patience(tries=30, first=1e-9)
    batch = request(exchange, exchange=client, symbols=[BTC, PERP], allow_batch_symbols=True, funding=True)
    fetch_bars(engine, **batch)
    for asset in ("BTCUSDT", "BTCUSDT_PERP"):
        same(stored(engine, asset), hours.iloc[:-1])


def test_funding_rates_are_stored_and_resumed(exchange, engine, perpetual):
    wanted = request(exchange, symbols=[PERP], timeframes=[], funding=True)
    exchange.now = pd.Timestamp("2024-02-01", tz="UTC")
    fetch_bars(engine, **wanted)
    exchange.now = NOW
    fetch_bars(engine, **wanted)
    [done] = fetch_bars(engine, **{**wanted, "since": "2022-01-01"})
    rates = read_funding(engine, asset_id="BTCUSDT_PERP")
    due = [(ts // 1000 * 1000, float(rate)) for ts, rate in perpetual.funding if ts <= NOW.value // 10**6]
    assert list(zip(rates["ts"].astype("int64") // 10**3, rates["rate"], strict=True)) == due
    assert done.series == "funding"
    with pytest.raises(ConfigError, match="only perpetuals have funding rates"):
        fetch_bars(engine, **request(exchange, funding=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timeframes": ["7h"]}, "unknown timeframe"),
        ({"symbols": []}, "no symbol"),
        ({"symbols": ["BTCUSDT"]}, "no such symbol"),
        ({"since": "2024-13-01"}, "no date"),
        ({"since": "2024-02-01", "until": "2024-01-01"}, "nothing to fetch"),
        ({"since": None}, "BTC/USDT 1h|nothing is stored"),
        ({"url": "localhost"}, "no address"),
    ],
)
def test_wrong_requests_are_refused_in_words(exchange, sqlite, changes, said):
    wanted = {**request(exchange), **changes}
    if "url" in changes:
        wanted["exchange"] = "binance"
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        fetch_bars(sqlite, **wanted)
    assert caught.value.exit_code == 2


def test_a_client_that_was_stopped_can_be_used_again(exchange, sqlite, hours):
    wanted, steps = request(exchange), []

    def interrupt(fetched):
        steps.append(fetched)
        wanted["exchange"].pace.stopped.set()

    with pytest.raises(ExchangeError, match="the fetch was stopped"):
        fetch_bars(sqlite, **wanted, progress=interrupt)
    assert len(steps) == 1
    fetch_bars(sqlite, **wanted)
    same(stored(sqlite), hours.iloc[:-1])


# Processes that die


CHILD = """
import sys
from kallos.data.exchange import Pace, Patience, open_exchange
from kallos.data.fetch import fetch_bars
from kallos.data.tables import connect

url, db_url = sys.argv[1:]
client = open_exchange("binance", url=url, pace=Pace(patience=Patience(first=0.01)))
client.rateLimit = 0.01
try:
    fetch_bars(connect(db_url), exchange=client, symbols=["BTC/USDT", "ETH/USDT"], timeframes=["1h"],
               since="2024-01-01", allow_batch_symbols=True)
except KeyboardInterrupt:
    sys.exit(3)
"""


def child(server: ExchangeServer, db_url: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url, db_url], stderr=subprocess.PIPE)


def wait_for(server: ExchangeServer, pages: int) -> None:
    end = time.monotonic() + 30
    while len(server.asked()) < pages and time.monotonic() < end:
        time.sleep(0.005)
    assert len(server.asked()) >= pages


@pytest.mark.parametrize("pages", [3, 5])
def test_a_killed_fetch_leaves_whole_pages_and_the_next_completes_it(exchange, db_url, hours, pages):
    engine = connect(db_url)
    exchange.page = 300
    exchange.delay = 0.02
    process = child(exchange, db_url)
    wait_for(exchange, 2 * pages)
    process.kill()
    process.wait()
    before = {}
    for asset in ("BTCUSDT", "ETHUSDT"):
        bars = stored(engine, asset)
        before[asset] = len(bars)
        same(bars, hours.iloc[: len(bars)])
        assert 0 < len(bars) < len(hours) - 1
    exchange.page, exchange.delay = None, 0
    done = fetch_bars(engine, **request(exchange, symbols=[BTC, ETH], allow_batch_symbols=True))
    for one in done:
        same(stored(engine, one.asset_id), hours.iloc[:-1])
        assert read_quarantine(engine, asset_id=one.asset_id, timeframe="1h").empty
        assert one.written.inserted == len(hours) - 1 - before[one.asset_id]


def test_ctrl_c_stops_all_threads_at_once(exchange, tmp_path, hours):
    db_url = f"sqlite:///{tmp_path / 'kallos.db'}"
    exchange.page = 100
    exchange.delay = 0.1
    process = child(exchange, db_url)
    wait_for(exchange, 6)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(timeout=20) == 3
    assert time.monotonic() - start < 5
    bars = stored(connect(db_url))
    same(bars, hours.iloc[: len(bars)])


# What the repair keeps out


def test_a_bad_candle_is_quarantined_once_however_often_it_is_fetched(exchange, btc, engine, hours):
    btc.candles["1h"][1450][2] = "0.01"
    exchange.now = START + 1500 * HOUR
    for later in (0, 1, 5):
        exchange.now = START + (1500 + later) * HOUR
        fetch_bars(engine, **request(exchange))
    kept_out = read_quarantine(engine, asset_id="BTCUSDT", timeframe="1h")
    assert kept_out["rule"].tolist() == ["high_low"]
    assert kept_out["ts"].tolist() == [START + 1450 * HOUR]
    assert kept_out["high"].tolist() == [0.01]
    same(stored(engine), hours.iloc[:1505].drop(index=1450))


def test_a_sparse_market_goes_on(exchange, btc, sqlite, hours):
    gone = np.random.default_rng(0).permutation(np.r_[1500:2000])[:300]
    btc.candles["1h"] = [row for place, row in enumerate(btc.candles["1h"]) if place not in gone]
    for bars in (1400, 1600, 1603, 1606):
        exchange.now = START + bars * HOUR
        fetch_bars(sqlite, **request(exchange))
    same(stored(sqlite), hours.iloc[:1606].drop(index=gone[gone < 1606]))


@pytest.mark.parametrize("timeframe", ["1h", "1d"])
def test_the_repair_of_pages_is_the_repair_of_the_whole(exchange, btc, sqlite, timeframe):
    rng = random.Random(1)
    rows = btc.candles[timeframe]
    for place in rng.sample(range(len(rows)), 30):
        column, value = rng.choice(
            [(1, "-1"), (2, "0.001"), (4, "NaN"), (5, "-3"), (5, "Infinity"), (9, "1e12"), (4, "1e9")]
        )
        rows[place][column] = value
    exchange.page = 397
    [done] = fetch_bars(sqlite, **request(exchange, timeframes=[timeframe], since="2023-01-01"))
    pages = fetch_pages(
        loaded(exchange), BTC, timeframe=timeframe, since=pd.Timestamp("2023-01-01", tz="UTC"), until=NOW
    )
    whole, report = repair_bars(pd.concat(pages, ignore_index=True), timeframe=timeframe, what="whole", now=NOW)
    same(stored(sqlite, timeframe=timeframe), whole.bars)
    kept_out = read_quarantine(sqlite, asset_id="BTCUSDT", timeframe=timeframe)
    assert sorted(kept_out["ts"]) == sorted(whole.quarantine["ts"])
    assert done.reports[0].counts == report.counts
