"""The service against senders that mean it ill, or do not know what they send: 4xx with the reason, never a crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference.api_keys import new_key
from tests.bundles import small_bars, small_bundle
from tests.service import ASK, MODEL, questions, serving

# a body that keeps the schema may still hold bars that are none, for rules that no schema can tell: 422
SCHEMATHESIS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "404", "409", "413", "422"]
"""
MIB = 2**20


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service with a key and a database."""
    folder = tmp_path_factory.mktemp("hostile")
    small_bundle(folder / "bundles")
    url = f"sqlite:///{folder / 'kallos.db'}"
    write_bars(connect(url), small_bars(), asset_id="BTC", timeframe="1d")
    key = new_key(folder / "keys.json", "tests")
    with serving(folder / "bundles", "--keys", folder / "keys.json", "--db-url", url, "--timeout", 5) as running:
        running.key = key
        yield running


@pytest.fixture(scope="module")
def sound() -> dict:
    """Bars that get a forecast."""
    return json.loads(questions(small_bars(), [1000])[1000])["bars"]


@pytest.mark.slow
def test_the_document_tells_the_truth(service, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    tool = Path(sys.executable).with_name("schemathesis")
    if not tool.exists():
        pytest.skip("needs schemathesis")
    words = [tool, "--config-file", "schemathesis.toml", "run", f"{service.url}/openapi.json", "--checks", "all"]
    words += ["--max-examples", 25, "--seed", 1, "--generation-database", "none", "--no-color"]
    words += ["--header", f"X-API-Key: {service.key}"]
    done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 selected / 8 total" in done.stdout
    assert service.ask("/health")[0] == 200


def with_last(bars: dict, name: str, value: object) -> dict:
    """The bars with another newest value in one column."""
    return {"bars": bars | {name: [*bars[name][:-1], value]}}


def hostile(bars: dict) -> dict[str, tuple[int, bytes | object, str]]:
    """By what it is: the status that it gets, the body, and what the reason says."""
    text = json.dumps({"bars": bars})
    nan, infinite = (json.dumps(with_last(bars, "close", float(word))) for word in ("nan", "inf"))
    deep = b'{"bars": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    wrong_types = {"bars": dict.fromkeys(bars, "x")}
    return {
        "nothing": (400, b"", "is no JSON"),
        "no JSON": (400, b"ts,open\n1,2", "is no JSON"),
        "half of it": (400, text[: len(text) // 2].encode(), "is no JSON"),
        "NaN": (400, nan.encode(), "is no JSON"),
        "infinity": (400, infinite.encode(), "is no JSON"),
        "a number beyond numbers": (400, text.replace(str(bars["close"][-1]), "1e999").encode(), "is no JSON"),
        "deep brackets": (400, deep, "is no JSON"),
        "deep objects": (400, b'{"bars":' * 5000 + b"1" + b"}" * 5000, "is no JSON"),
        "no UTF-8": (400, b'{"bars": "\xff\xfe"}', "is no JSON"),
        "a zip bomb's beginning": (400, b"\x1f\x8b\x08\x00" + b"\x00" * 1000, "is no JSON"),
        "a list": (422, [1, 2], "no JSON object"),
        "a number": (422, b"5", "no JSON object"),
        "null": (422, b"null", "no JSON object"),
        "no bars": (422, {}, "says nothing about bars"),
        "bars of null": (422, {"bars": None}, "not what this model reads"),
        "bars of text": (422, wrong_types, "not what this model reads"),
        "bars of lists": (422, {"bars": {name: [[1]] for name in bars}}, "something"),
        "bars of objects": (422, {"bars": {name: [{}] for name in bars}}, "something"),
        "no rows": (422, {"bars": {name: [] for name in bars}}, "no bars"),
        "one row": (422, {"bars": {name: column[-1:] for name, column in bars.items()}}, "are needed"),
        "a huge integer": (422, with_last(bars, "close", 10**30), "highest"),
        "a huge number": (422, with_last(bars, "volume", 1.7e308) | {"level": 2}, "level"),
        "a negative price": (422, with_last(bars, "low", -1e-300), "no positive number"),
        "a price of zero": (422, with_last(bars, "close", 0), "no positive number"),
        "a text for a number": (422, with_last(bars, "close", "61000"), "wrong type"),
        "truth for a number": (422, with_last(bars, "close", True), "wrong type"),
        "nothing for a number": (422, with_last(bars, "open", None), "wrong type"),
        "a huge time": (422, with_last(bars, "ts", 2**63), "no time"),
        "a negative time": (422, with_last(bars, "ts", -1), "no time"),
        "a time of words": (
            422,
            with_last({"ts": ["now"] * 320} | {k: v for k, v in bars.items() if k != "ts"}, "open", 1),
            "no time",
        ),
        "seconds for milliseconds": (422, {"bars": bars | {"ts": [moment // 1000 for moment in bars["ts"]]}}, "not 1d"),
        "bars backwards": (422, {"bars": {name: column[::-1] for name, column in bars.items()}}, "do not come after"),
        "a bar twice": (422, with_last(bars, "ts", bars["ts"][-2]), "do not come after"),
        "columns of other lengths": (422, {"bars": bars | {"close": bars["close"][1:]}}, "differ in length"),
        "a missing column": (422, {"bars": {name: bars[name] for name in ("ts", "close")}}, "lack columns"),
        "another asset": (422, {"bars": {"ETH": bars}}, "not what this model reads"),
        "a path for an asset": (422, {"asset_id": "../../etc/passwd", "timeframe": "1d"}, "is of asset_id"),
        "SQL for an asset": (422, {"asset_id": "BTC'; DROP TABLE bars; --", "timeframe": "1d"}, "is of asset_id"),
        "a list for an asset": (422, {"asset_id": ["BTC"], "timeframe": "1d"}, "is of asset_id"),
        "a word too many": (422, {"bars": bars, "__class__": {}}, "mean nothing"),
        "a level of none": (422, {"bars": bars, "level": 0}, "level"),
        "a level of text": (422, {"bars": bars, "level": "0.9"}, "level"),
        "a level that is not there": (422, {"bars": bars, "level": 0.123}, "no interval of this level"),
        "a long text among few numbers": (422, with_last(bars, "close", "9" * 3 * MIB), "wrong type"),
    }


NAMES = [*hostile({name: [1.0] * 320 for name in ("ts", "open", "high", "low", "close", "volume")})]


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_body_is_refused_with_the_reason(name, service, sound):
    status, body, words = hostile(sound)[name]
    found, _, said = service.ask(ASK, body, X_API_Key=service.key)
    assert found == status and words in said["error"]["reason"], said
    assert len(said["error"]["reason"]) < 600


def test_a_hundred_megabytes_are_refused_and_not_kept(service):
    (worker,) = service.workers()
    before = worker.memory_info().rss
    status, _, said = service.ask(ASK, b" " * (100 * MIB), X_API_Key=service.key)
    assert status == 413 and "longer than the 4,194,304 bytes" in said["error"]["reason"]
    status, _, said = service.ask(ASK, b" " * (20 * MIB))
    assert status == 401
    assert worker.memory_info().rss - before < 20 * MIB


def test_all_of_it_again_leaves_the_service_as_it_was(service, sound):
    (worker,) = service.workers()
    for _ in range(2):
        for _, body, _ in hostile(sound).values():
            service.ask(ASK, body, X_API_Key=service.key)
        before = worker.memory_info().rss
    assert service.ask(ASK, {"bars": sound}, X_API_Key=service.key)[0] == 200
    assert worker.memory_info().rss - before < 10 * MIB and worker.memory_info().rss < 250 * MIB
    assert not [line for line in service.lines() if line["message"] == "a bug" or line.get("status") == 500]


def test_other_ways_in_are_closed(service, sound):
    asked = {"X_API_Key": service.key}
    for path in (
        "/models/..%2f..%2fetc%2fpasswd/predict",
        f"/models/{MODEL}%00/predict",
        "/models//predict",
        "/models/%FF/predict",
    ):
        assert service.ask(path, {"bars": sound}, **asked)[0] in (404, 405), path
    assert service.ask(ASK, {"bars": sound}, "PUT", **asked)[0] == 405
    assert service.ask(ASK, json.dumps({"bars": sound}).encode(), Content_Type="text/plain", **asked)[0] == 415
    assert service.ask(ASK, b"\x1f\x8b", Content_Encoding="gzip", **asked)[0] == 415
    for path in ("/docs", "/redoc", "/models/", "/favicon.ico", "/.env"):
        assert service.ask(path, **asked)[0] == 404, path


def raw(service, sent: bytes) -> bytes:
    """What comes back for these bytes."""
    with service.connect() as door:
        door.sendall(sent)
        door.settimeout(20)
        return door.recv(10_000)


def test_what_is_no_http_is_refused(service):
    length = b"Content-Length: "
    for sent, begins in {
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": b"HTTP/1.1 400 ",
        b"GET / HTTP/9.9\r\n\r\n": b"HTTP/1.1 400 ",
        b"POST /x HTTP/1.1\r\n" + length + b"5\r\n" + length + b"6\r\n\r\nhello!": b"HTTP/1.1 400 ",
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + length + b"5\r\n\r\n0\r\n\r\n": b"HTTP/1.1 400 ",
        b"POST /x HTTP/1.1\r\n" + length + b"-5\r\n\r\n": b"HTTP/1.1 400 ",
        b"GET /health HTTP/1.1\r\nX: " + b"y" * 300_000 + b"\r\n\r\n": b"HTTP/1.1 431 ",
        b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n": b"HTTP/1.1 431 ",
    }.items():
        assert raw(service, sent).startswith(begins), sent[:60]
    assert service.ask("/health")[0] == 200
