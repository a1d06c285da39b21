"""The service as clients meet it: real processes on the loopback, swaps, crashes, signals, keys, and load."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.inference.api_keys import new_key, revoke_key
from kallos.inference.bundle import load_bundle
from kallos.inference.client import Client, as_columns
from tests.bundles import small_bars, small_bundle
from tests.service import ASK, MODEL, lay, questions, serving, under_load, wait_for

HEAVY = ("torch", "darts", "sqlalchemy", "pandera", "scipy", "sklearn", "numba", "plotly", "matplotlib")
SECRET = "pa55word-of-the-tests"
SAME = 2e-8  # 1e-6 of the standard deviation of daily returns
ENDS = [*range(400, 1400, 50)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> tuple[list[Path], dict, dict]:
    """Three versions of a bundle, bodies by the place of their newest bar, and by digest what the bundle says."""
    folder, bars = tmp_path_factory.mktemp("versions"), small_bars()
    paths = [small_bundle(folder / str(seed), seed) for seed in range(3)]
    bodies, expected = questions(bars, ENDS), {}
    for path in paths:
        bundle = load_bundle(path)
        said = bundle.predict(bars.iloc[: max(ENDS)], since=str(bars["ts"].iloc[min(ENDS) - 1]))
        found = dict(zip(said["ts"], said["y_pred"], strict=True))
        closes = {end: bars["ts"].iloc[end] for end in ENDS}
        expected[bundle.digest] = {end: found[close] for end, close in closes.items()}
    return paths, bodies, expected


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A database with the bars."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'kallos.db'}"
    write_bars(connect(url), small_bars(), asset_id="BTC", timeframe="1d")
    return url


@pytest.fixture(scope="module")
def service(versions, store, tmp_path_factory):
    """One worker, no keys, a database; nobody changes its bundle."""
    folder = tmp_path_factory.mktemp("plain") / "bundles"
    lay_version(versions[0][0], folder)
    with serving(folder, "--db-url", store, "--timeout", 2, "--max-body", 1, "--max-rows", 2000) as running:
        yield running


def lay_version(path: Path, folder: Path) -> None:
    """Puts a version on the shelf."""
    folder.mkdir(exist_ok=True)
    lay(path, folder / "model_bundle")


# Forecasts


def test_a_forecast_is_that_of_the_bundle(service, versions):
    paths, bodies, expected = versions
    bundle = load_bundle(paths[0])
    for end, body in bodies.items():
        status, headers, said = service.ask(ASK, body)
        assert (status, said["digest"]) == (200, bundle.digest)
        assert said["y_pred"] == pytest.approx(expected[bundle.digest][end], abs=SAME)
        assert headers["x-request-id"]
    row = bundle.predict(small_bars().iloc[: ENDS[-1]]).iloc[0]
    assert said["target_ts"] == row["target_ts"].strftime("%Y-%m-%dT%H:%M:%SZ") and said["stale"]
    bounds = [said["y_lower"], said["y_upper"], said["y_naive"]]
    assert bounds == pytest.approx([row["y_lower"], row["y_upper"], row["y_naive"]], abs=SAME)
    assert said["age_seconds"] == pytest.approx(time.time() - row["ts"].timestamp(), abs=60)


def test_bars_of_the_store_give_the_forecast_of_the_bundle(service, versions):
    expected = load_bundle(versions[0][0]).predict(small_bars()).iloc[0]
    found = Client(service.url).predict(MODEL, asset_id="BTC", timeframe="1d", level=0.5)
    assert found["y_pred"] == pytest.approx(expected["y_pred"], abs=SAME) and found["level"] == 0.5
    assert service.ask(f"/models/{MODEL}/bars?last=3")[2]["bars"]["close"] == small_bars()["close"].tail(3).tolist()
    status, _, said = service.ask(ASK, {"asset_id": "ETH", "timeframe": "1d"})
    assert status == 422 and "is of asset_id 'BTC'; got 'ETH'" in said["error"]["reason"]


def test_the_client_sends_a_table(service, versions):
    client, bars = Client(service.url), small_bars()
    assert client.predict(MODEL, bars)["y_pred"] == client.predict(MODEL, as_columns(bars.tail(400)))["y_pred"]
    assert [model["id"] for model in client.models()] == [MODEL]
    assert client.model(MODEL)["card"].startswith("#")


def test_what_is_remembered_is_never_said_of_other_bars(service, versions):
    body = versions[1][ENDS[0]]
    given = json.loads(body)
    before = service.metric("kallos_remembered_total")
    first, again = (service.ask(ASK, body)[2] for _ in range(2))
    assert service.metric("kallos_remembered_total") >= before + 1
    assert again["y_pred"] == first["y_pred"] and again["age_seconds"] >= first["age_seconds"]
    for name in ("close", "volume"):
        changed = json.loads(body)
        changed["bars"][name][-3] = changed["bars"][name][-3] * 1.0001 if name == "volume" else given["bars"]["low"][-3]
        other = service.ask(ASK, changed)[2]
        assert other["y_pred"] != first["y_pred"]
    assert service.ask(ASK, given | {"level": 0.5})[2]["y_lower"] != first["y_lower"]


def test_no_bars_that_allow_no_forecast_get_one(service, versions):
    given = json.loads(versions[1][ENDS[0]])["bars"]

    def refused(kind: str, words: str, **changed: list) -> None:
        status, _, said = service.ask(ASK, {"bars": given | changed})
        assert (status, said["error"]["kind"]) == (422, kind) and words in said["error"]["reason"], said

    refused("too_short", "bars up to here", **{name: column[-30:] for name, column in given.items()})
    gap = {name: [*column[:200], *column[201:]] for name, column in given.items()}
    refused("gap", "bars are missing before", **gap)
    refused("bad_bars", "do not come after", ts=given["ts"][::-1])
    refused("bad_bars", "do not come after", ts=[*given["ts"][:-1], given["ts"][-2]])
    refused("bad_bars", "not 1d", ts=[given["ts"][0] + 3_600_000 * row for row in range(len(given["ts"]))])
    refused("bad_bars", "grid", ts=[moment + 1000 for moment in given["ts"]])
    refused("bad_bars", "high is not the highest", high=[value * 0.5 for value in given["high"]])
    refused("bad_bars", "no positive number", close=[*given["close"][:-1], -1.0])
    refused("filled", "no exchange printed", is_filled=[False] * (len(given["ts"]) - 1) + [True])
    days = int(time.time() / 86_400) - int(given["ts"][-1] / 86_400_000)
    refused("not_closed", "closes only at", ts=[moment + days * 86_400_000 for moment in given["ts"]])
    closed = service.ask(ASK, {"bars": given | {"ts": [moment + (days - 1) * 86_400_000 for moment in given["ts"]]}})
    assert closed[0] == 200 and not closed[2]["stale"] and closed[2]["age_seconds"] < 86_400


def test_old_bars_are_refused_where_that_is_wished(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    with serving(tmp_path / "bundles", "--refuse-stale", "--stale-after", 1.5) as running:
        status, _, said = running.ask(ASK, versions[1][ENDS[0]])
    assert status == 409 and "old bars are refused here" in said["error"]["reason"]


# Bounds


HEAD = f"POST {ASK} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


def half_sent(service, body: bytes) -> socket.socket:
    """A connection on which half of a body has been sent."""
    door = service.connect()
    door.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
    return door


def test_a_slow_sender_is_told(service, versions):
    with half_sent(service, versions[1][ENDS[0]]) as door:
        said = door.recv(10_000).decode()
    assert (
        said.startswith("HTTP/1.1 408 ") and "did not arrive within 2 seconds" in said and "connection: close" in said
    )


def test_a_body_without_a_length_is_counted_as_it_comes(service):
    with service.connect() as door:
        door.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            door.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        door.sendall(b"0\r\n\r\n")
        assert door.recv(10_000).startswith(b"HTTP/1.1 413 ")
    chunked = b"".join(
        b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (b'{"asset_id": "BTC", ', b'"timeframe": "1d"}')
    )
    with service.connect() as door:
        door.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n")
        assert door.recv(10_000).startswith(b"HTTP/1.1 200 ")


def test_too_many_rows_are_too_many(service):
    bars = {name: [1] * 2001 for name in ("ts", "open", "high", "low", "close", "volume")}
    status, _, said = service.ask(ASK, {"bars": bars})
    assert status == 422 and "more bars of BTC than the 2,000 that are read" in said["error"]["reason"]


def test_beyond_its_room_a_service_says_when_to_come_back(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    body = versions[1][ENDS[0]]
    with serving(tmp_path / "bundles", "--concurrency", 2, "--connections", 6) as running:
        doors = [half_sent(running, body) for _ in range(2)]
        wait_for(lambda: running.ask(ASK, body)[0] == 503)
        status, headers, said = running.ask(ASK, body)
        assert (status, headers["retry-after"], said["error"]["kind"]) == (503, "1", "busy")
        assert running.ask("/health")[0] == running.ask("/ready")[0] == 200
        doors[0].sendall(body[len(body) // 2 :])
        assert doors[0].recv(10_000).startswith(b"HTTP/1.1 200 ")
        assert running.ask(ASK, body)[0] == 200
        idle = [running.connect() for _ in range(8)]
        assert any(door.recv(100).startswith(b"HTTP/1.1 503 ") for door in idle[-3:])
        for door in (*doors, *idle):
            door.close()
        wait_for(lambda: running.ask(ASK, body)[0] == 200)


# Versions


@pytest.mark.slow
def test_a_new_version_takes_over_and_a_bad_one_does_not(versions, tmp_path):
    paths, bodies, _ = versions
    folder = tmp_path / "bundles"
    folder.mkdir()
    with serving(folder) as running:
        assert running.ask("/health")[0] == 200
        status, headers, _ = running.ask("/ready")
        assert status == 503 and headers["retry-after"]
        seen = []
        for path in paths:
            lay_version(path, folder)
            digest = load_bundle(path).digest
            wait_for(lambda digest=digest: running.ask(ASK, bodies[ENDS[0]])[2].get("digest") == digest)
            seen.append(running.ask(ASK, bodies[ENDS[0]])[2]["y_pred"])
        assert running.ask("/ready")[0] == 200 and len({*seen}) == 3
        model = folder / "model_bundle" / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"x")
        small_bundle(folder / "elsewhere", 0).rename(folder / "broken_bundle")
        (folder / "broken_bundle" / "extra.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        shutil.rmtree(folder / "elsewhere")
        wait_for(lambda: len(refused(running)) == 2)
        found = refused(running)
        assert {*found} == {"model_bundle", "broken_bundle"} and all(len(reason) > 20 for reason in found.values())
        assert running.ask(ASK, bodies[ENDS[0]])[2]["digest"] == digest
        assert running.metric("kallos_bundles_refused") == 2 and running.metric("kallos_bundles ") == 1
        shutil.rmtree(folder / "model_bundle")
        wait_for(lambda: running.ask(ASK, bodies[ENDS[0]])[0] == 404)
        assert any(line["message"] == "bundle refused" for line in running.lines())


def refused(service) -> dict[str, str]:
    """By entry, why it is not used."""
    said = service.ask("/models")[2]
    found = {one["entry"]: one["reason"] for one in said["refused"]}
    return found | {model["entry"]: model["refused"] for model in said["models"] if model["refused"]}


def test_a_signature_is_asked_for(versions, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "private.pem").write_bytes(pem)
    (tmp_path / "public.pem").write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    small_bundle(tmp_path / "bundles", 0, name="signed", sign_with=tmp_path / "private.pem")
    small_bundle(tmp_path / "bundles", 0, name="unsigned")
    with serving(tmp_path / "bundles", "--public-key", tmp_path / "public.pem") as running:
        said = running.ask("/models")[2]
    assert [model["id"] for model in said["models"]] == ["signed"] and said["refused"][0]["entry"] == "unsigned"


def test_drift_that_was_found_is_told(versions, tmp_path):
    folder = tmp_path / "bundles"
    lay_version(versions[0][0], folder)
    report = {"fired": True, "at": "2024-03-02T00:00:00+00:00", "bundle": load_bundle(versions[0][0]).digest}
    report["features"] = {"rsi": {"psi": 0.4, "ks": 0.2, "threshold": 0.1, "fired": True}}
    with serving(folder) as running:
        assert running.ask(f"/models/{MODEL}")[2]["drift"] is None
        assert running.metric("kallos_drift_fired{") is None
        (folder / "drift").mkdir()
        (folder / "drift" / f"{MODEL}.json").write_text(json.dumps(report))
        wait_for(lambda: running.ask(f"/models/{MODEL}")[2]["drift"] is True)
        assert running.ask(f"/models/{MODEL}")[2]["drift_report"] == report
        assert running.metric("kallos_drift_fired{") == 1 and running.metric("kallos_drift_psi{") == 0.4


# Keys


@pytest.mark.slow
def test_keys_open_and_are_taken_back(versions, store, tmp_path):
    folder, keys = tmp_path / "bundles", tmp_path / "keys.json"
    lay_version(versions[0][0], folder)
    first, second = new_key(keys, "first"), new_key(keys, "second")
    with serving(folder, "--keys", keys, "--db-url", store, "--workers", 2, "--host", "0.0.0.0") as running:
        body = versions[1][ENDS[0]]
        for path, given in ((ASK, body), ("/models", None), ("/metrics", None), ("/openapi.json", None)):
            status, headers, said = running.ask(path, given)
            assert (status, headers["www-authenticate"], said["error"]["kind"]) == (401, "Bearer", "unauthorized")
            assert running.ask(path, given, Authorization=f"Bearer {first}")[0] == 200
            assert running.ask(path, given, X_API_Key=second)[0] == 200
        assert running.ask("/")[0] == running.ask("/health")[0] == running.ask("/ready")[0] == 200
        revoke_key(keys, "first")
        third = new_key(keys, "third")
        for key, expected in ((first, 401), (second, 200), (third, 200)):
            asked = {"X_API_Key": key}
            wait_for(
                lambda asked=asked, expected=expected: (
                    {running.ask("/models", **asked)[0] for _ in range(8)} == {expected}
                )
            )
        keys.write_text("{")
        wait_for(lambda: {running.ask("/models", X_API_Key=second)[0] for _ in range(8)} == {401})
    log = running.log.read_text()
    assert not any(key in log for key in (first, second, third)) and "authorization" not in log.lower()
    holders = {line.get("key") for line in running.lines() if line["message"] == "request"}
    assert holders == {None, "first", "second", "third"}


def test_the_log_holds_no_body_and_no_secret(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    bars = json.loads(versions[1][ENDS[0]])["bars"] | {"close": [123456.789] * 320}
    url = f"postgresql://me:{SECRET}@127.0.0.1:9/nowhere"
    with serving(tmp_path / "bundles", KALLOS_DB_URL=url) as running:
        assert (
            running.ask(ASK, {"bars": bars, "asset_id": "BTC"}, X_Request_ID="mine", Authorization=f"Bearer {SECRET}")[
                0
            ]
            == 422
        )
        assert running.ask(f"{ASK}?token={SECRET}", {"bars": bars})[0] == 422
        status, headers, said = running.ask(ASK, {"asset_id": "BTC", "timeframe": "1d"})
        assert (status, said["error"]["kind"]) == (503, "no_store") and headers["retry-after"]
        assert SECRET not in json.dumps(said)
    log = running.log.read_text()
    assert SECRET not in log and "123456" not in log
    line = next(line for line in running.lines() if line.get("request_id") == "mine")
    assert {"ts", "level", "method", "route", "status", "ms", "model", "rows", "key", "kind"} <= {*line}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--host", "0.0.0.0"), "for this machine alone; got '0.0.0.0'"),
        (("--keys", "nowhere.json"), "cannot read the file of keys"),
        (("--bundles", "nowhere"), "no such folder of bundles"),
        (("--workers", 0), "--workers must lie from 1"),
        (("--public-key", "nowhere.pem"), "nowhere.pem"),
    ],
)
def test_what_cannot_be_served_is_refused(words, reason, tmp_path):
    code = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--bundles", tmp_path, "--port", 0, *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr


# Processes


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_begun_is_finished_before_the_end(workers, number, versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    body = versions[1][ENDS[0]]
    with serving(tmp_path / "bundles", "--workers", workers) as running:
        door = half_sent(running, body)
        time.sleep(0.3)
        running.process.send_signal(number)
        time.sleep(1)
        with pytest.raises(OSError), running.connect() as late:
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if not late.recv(100):
                raise ConnectionResetError
        door.sendall(body[len(body) // 2 :])
        assert door.recv(10_000).startswith(b"HTTP/1.1 200 ")
        door.close()
        assert running.process.wait(30) == 0
    assert "Traceback" not in running.log.read_text()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_keeps_the_good_version(versions, tmp_path):
    paths, bodies, _ = versions
    folder = tmp_path / "bundles"
    lay_version(paths[0], folder)
    digest = load_bundle(paths[0]).digest
    with serving(folder, "--workers", 2) as running:
        model = folder / "model_bundle" / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"x")
        wait_for(lambda: refused(running))
        count = running.metric("kallos_forecasts_total") or 0
        before = {worker.pid for worker in running.workers()}
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len({w.pid for w in running.workers()} - before) == 1 and len(running.workers()) == 2)
        wait_for(lambda: sum(line["message"] == "Application startup complete." for line in running.lines()) == 3)
        asked = [running.ask(ASK, bodies[ENDS[0]]) for _ in range(40)]
        assert {(status, said.get("digest")) for status, _, said in asked} == {(200, digest)}
        assert running.metric("kallos_forecasts_total") == count + 40
        assert running.metric("kallos_in_flight") == 1  # the one that asks for it


@pytest.mark.slow
def test_workers_do_not_outlive_their_supervisor(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    with serving(tmp_path / "bundles", "--workers", 2) as running:
        workers = running.workers()
        running.stop(signal.SIGKILL)
        wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), seconds=60)


@pytest.mark.slow
def test_nor_do_workers_that_had_not_begun_when_it_died(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    code = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    words = [sys.executable, "-c", code, "serve", "--bundles", tmp_path / "bundles", "--port", 0, "--workers", 2]
    with subprocess.Popen([*map(str, words)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        supervisor = psutil.Process(process.pid)
        wait_for(lambda: len(supervisor.children()) > 2, seconds=60)  # a tracker of resources, and the workers
        workers = supervisor.children()
        process.kill()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), seconds=60)


def test_the_service_loads_nothing_that_it_does_not_need(versions, tmp_path):
    lay_version(versions[0][0], tmp_path / "bundles")
    (tmp_path / "body.json").write_bytes(versions[1][ENDS[0]])
    code = f"""import asyncio, json, sys
from pathlib import Path
from kallos.main import main
from kallos.inference.server import build
from kallos.inference.service_settings import ServiceSettings
app = build(ServiceSettings(bundles=Path({str(tmp_path / "bundles")!r})), Path())
body, said = Path({str(tmp_path / "body.json")!r}).read_bytes(), []
async def receive(): return {{"type": "http.request", "body": body, "more_body": False}}
async def send(message): said.append(message)
for method, path in (("POST", {ASK!r}), ("GET", "/metrics"), ("GET", "/models"), ("GET", "/openapi.json")):
    scope = {{"type": "http", "path": path, "raw_path": path.encode(), "method": method}}
    scope |= {{"query_string": b"", "root_path": ""}}
    scope["headers"] = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    asyncio.run(app(scope, receive, send))
assert [m["status"] for m in said if "status" in m] == [200] * 4, said
print(json.dumps([*sys.modules]))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert not [
        name for name in loaded if name.split(".")[0] in HEAVY or name in ("kallos.core.config", "kallos.data.store")
    ]


# Load


def keep_swapping(paths: list[Path], folder: Path, stop: threading.Event) -> None:
    """Lays one version after the other, and now and then a bad one."""
    number = 0
    while not stop.wait(0.7):
        number += 1
        lay_version(paths[number % len(paths)], folder)
        if number % 3 == 0:
            (folder / "model_bundle" / "extra").touch()


def endure(versions, tmp_path: Path, *, connections: int, seconds: float) -> None:
    """Load while bundles are swapped and a worker is killed: no wrong answer, no 5xx but 503, memory flat."""
    paths, bodies, expected = versions
    folder = tmp_path / "bundles"
    lay_version(paths[0], folder)
    with serving(folder, "--workers", 2) as running:
        asked = {"bodies": bodies, "expected": expected}
        under_load(running, connections=connections, seconds=min(1 + seconds / 10, 5), **asked)
        used = {worker.pid: worker.memory_info().rss for worker in running.workers()}
        killed = min(used)
        stop = threading.Event()
        swaps = threading.Thread(target=keep_swapping, args=(paths, folder, stop))
        kill = threading.Timer(seconds / 2, os.kill, (killed, signal.SIGKILL))
        swaps.start()
        kill.start()
        load = under_load(running, connections=connections, seconds=seconds, **asked)
        stop.set()
        swaps.join()
        wait_for(lambda: len(running.workers()) == 2 and killed not in {worker.pid for worker in running.workers()})
        left = {worker.pid: worker.memory_info().rss for worker in running.workers()}
        counted = running.metric('kallos_forecasts_total{model="small_BTC_1d",status="ok"}')
        assert running.stop() == 0
    print(f"{connections} connections: {load.answers / seconds:,.0f} answers a second, {load.statuses}, cut {load.cut}")
    print("MiB before and after:", *(f"{size / 2**20:.0f}" for size in (*used.values(), *left.values())))
    assert not load.wrong and {*load.statuses} <= {200, 503} and load.answers > 20 * seconds
    assert load.cut <= connections and counted >= load.answers
    (stayed,) = used.keys() & left.keys()
    assert left[stayed] - used[stayed] < 20 * 2**20 and max(left.values()) < 250 * 2**20


@pytest.mark.slow
def test_load_while_bundles_are_swapped_and_a_worker_dies(versions, tmp_path):
    endure(versions, tmp_path, connections=8, seconds=4)


@pytest.mark.soak
@pytest.mark.parametrize("connections", [8, 64])
def test_a_minute_of_load(connections, versions, tmp_path):
    endure(versions, tmp_path, connections=connections, seconds=60)
