"""An exchange on this machine: Binance's public REST for spot and USD-M perpetuals, with the faults of real ones."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import pandas as pd

from kallos.core.columns import TIMEFRAMES

MAX_ROWS = {"api": 1000, "fapi": 1500}  # candles an answer


@dataclass
class Listing:
    """One market: its candles by timeframe (raw rows of Binance, in time), and its funding rates."""

    symbol: str
    base: str
    quote: str
    candles: dict[str, list[list]]
    host: str = "api"  # "api" is spot, "fapi" are perpetuals
    funding: list[tuple[int, str]] = field(default_factory=list)

    def info(self) -> dict:
        found = {"symbol": self.symbol, "status": "TRADING", "baseAsset": self.base, "quoteAsset": self.quote}
        return found if self.host == "api" else {**found, "contractType": "PERPETUAL", "marginAsset": self.quote}


def candles(bars: pd.DataFrame, timeframe: str) -> list[list]:
    """The bars as Binance sends them: prices and amounts as text, times in milliseconds."""
    step = TIMEFRAMES[timeframe] // pd.Timedelta("1ms")
    stamps = bars["ts"].dt.as_unit("ms").astype("int64")
    columns = [[repr(value) for value in bars[name].tolist()] for name in bars.columns[1:10]]
    rows = zip(stamps.tolist(), *columns, strict=True)
    return [[t, o, h, lo, c, v, t + step - 1, q, int(float(n)), b, k, "0"] for t, o, h, lo, c, v, q, n, b, k in rows]


# Faults: each answers in place of the server, with the body that it would have sent

Fault = Callable[["Handler", bytes], None]


def status(code: int, *, retry_after: float | str | None = None, body: str = "{}") -> Fault:
    """An answer with that HTTP status."""

    def fault(handler: "Handler", _: bytes) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        handler.reply(code, body.encode(), headers)

    return fault


def hang_up(handler: "Handler", _: bytes) -> None:
    """The connection ends before the answer begins."""
    handler.close_connection = True


def cut(handler: "Handler", body: bytes) -> None:
    """The connection ends in the middle of the answer."""
    handler.reply(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
    handler.close_connection = True


def cut_chunked(handler: "Handler", body: bytes) -> None:
    """The same for an answer in chunks, whose end nobody announced."""
    half = body[: len(body) // 2]
    handler.reply(200, b"%x\r\n%b\r\n" % (len(half), half), {"Transfer-Encoding": "chunked"})
    handler.close_connection = True


def half(handler: "Handler", body: bytes) -> None:
    """A complete HTTP answer with half of the JSON in it."""
    handler.reply(200, body[: len(body) // 2])


def web_page(handler: "Handler", _: bytes) -> None:
    """What a proxy in between says, with a status of success."""
    handler.reply(200, b"<html><body>Checking your browser</body></html>", {"Content-Type": "text/html"})


def nothing(handler: "Handler", _: bytes) -> None:
    """An empty list where there are rows."""
    handler.reply(200, b"[]")


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: "ExchangeServer"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        code, answer = self.server.answer(path, dict(parse_qsl(query)))
        body = json.dumps(answer).encode()
        fault = self.server.next_fault(path)
        if fault:
            fault(self, body)
        else:
            self.reply(code, body)

    def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        given = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        if "Transfer-Encoding" in given:
            del given["Content-Length"]
        self.send_response(code)
        for header in given.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class ExchangeServer(ThreadingHTTPServer):
    """Serves the listings as of `now`; the newest candle is the open one."""

    daemon_threads = True

    def __init__(self, *listings: Listing, now: pd.Timestamp):
        super().__init__(("127.0.0.1", 0), Handler)
        self.listings = {(listing.host, listing.symbol): listing for listing in listings}
        self.now = now
        self.faults: list[Fault] = []  # of the next answers that hold candles or rates, one each
        self.first_faults: list[Fault] = []  # of the next answers to anything
        self.random_fault: Callable[[], Fault | None] = lambda: None
        self.stuck = False  # every page is the first one
        self.page: int | None = None  # the most rows of a page, if fewer than Binance's
        self.refused: dict[str, int] = {}  # symbols, and after how many pages the exchange refuses them
        self.by_window = False  # a page ends `limit` bars after its start, as on many exchanges
        self.requests: list[tuple[float, str, dict[str, str]]] = []
        self.delay = 0.0  # seconds before an answer
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, name: str = "klines") -> list[dict[str, str]]:
        """The parameters of the requests for that resource so far."""
        return [given for _, path, given in self.requests if path.endswith(f"/{name}")]

    def next_fault(self, path: str) -> Fault | None:
        with self._lock:
            if self.first_faults:
                return self.first_faults.pop(0)
            if not path.endswith(("klines", "fundingRate")):
                return None
            return self.faults.pop(0) if self.faults else self.random_fault()

    def answer(self, path: str, given: dict[str, str]) -> tuple[int, object]:
        with self._lock:
            self.requests.append((time.monotonic(), path, given))
        time.sleep(self.delay)
        _, host, _, name = path.split("/")
        if name == "exchangeInfo":
            return 200, {"symbols": [found.info() for key, found in self.listings.items() if key[0] == host]}
        if name == "time":
            return 200, {"serverTime": self._now()}
        listing = self.listings.get((host, given.get("symbol", "")))
        if listing is None:
            return 400, {"code": -1121, "msg": "Invalid symbol."}
        if listing.symbol in self.refused:
            self.refused[listing.symbol] -= 1
            if self.refused[listing.symbol] < 0:
                return 403, {"msg": "this market is closed to you"}
        return self._candles(listing, given) if name == "klines" else self._rates(listing, given)

    def _now(self) -> int:
        return self.now.value // 10**6

    def _candles(self, listing: Listing, given: dict[str, str]) -> tuple[int, object]:
        if given.get("interval") not in listing.candles:
            return 400, {"code": -1120, "msg": "Invalid interval."}
        rows = [row for row in listing.candles[given["interval"]] if row[0] <= self._now()]
        limit = min(int(given.get("limit", 500)), self.page or MAX_ROWS[listing.host])
        step = TIMEFRAMES[given["interval"]] // pd.Timedelta("1ms")
        return 200, self._page(rows, given, limit, limit * step)

    def _rates(self, listing: Listing, given: dict[str, str]) -> tuple[int, object]:
        rows = [row for row in listing.funding if row[0] <= self._now()]
        page = self._page(rows, given, min(int(given.get("limit", 100)), 1000), 10**10)
        return 200, [{"symbol": listing.symbol, "fundingTime": due, "fundingRate": rate} for due, rate in page]

    def _page(self, rows: list, given: dict[str, str], limit: int, window: int) -> list:
        if self.stuck:
            return rows[:limit]
        if "startTime" not in given:
            return rows[-limit:]
        start = int(given["startTime"])
        end = min(int(given.get("endTime", 2**62)), start + window - 1 if self.by_window else 2**62)
        return [row for row in rows if start <= row[0] <= end][:limit]


@contextmanager
def serving(*listings: Listing, now: pd.Timestamp) -> Iterator[ExchangeServer]:
    """The exchange, running in a thread of this process."""
    server = ExchangeServer(*listings, now=now)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
