"""The service against bare FastAPI endpoints that compute the same: requests a second, and the slowest of a hundred.

Each endpoint takes raw bars as JSON, the same bytes as the service, computes the features of the newest window by the
bundle's own code, runs the same graph and answers with a number. None of them checks a bar, counts, logs or limits
anything. They differ in how they read: `await request.json()` as people write it, lists of floats declared to pydantic,
and orjson, which is the least that can be done. All run one process of uvicorn with uvloop and httptools.

Every server is bound to one core and the client to another. The client keeps 8 or 64 connections busy: each sends its
next request when it has the answer. The bodies are all different ones, 400 in turn, so that no memory of answers helps.
Servers are asked in turns, round by round, after a warm-up; the others are idle meanwhile. Run it with `make bench`.

`--mlflow PYTHON` adds `mlflow models serve` of the same graph in the environment of that Python, which gets ready
windows in the place of bars. Without mlflow it is left out.
"""

import argparse
import asyncio
import importlib.util
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import psutil
import torch
import uvloop
from packed import Packed, packed_gru

from kallos.inference.bundle import load_bundle

BODIES = 400
SERVICE = """import sys
from pathlib import Path
from kallos.inference.server import serve
from kallos.inference.service_settings import ServiceSettings
settings = ServiceSettings(bundles=Path(sys.argv[1]).parent, port=0, stale_after=1e8)
serve(settings, tell=lambda address: print(address.rsplit(":", 1)[1], flush=True))"""
BARE = """import socket, sys
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from kallos.inference.bundle import load_bundle
from kallos.inference.members import deviations, newest_window

app, bundle = FastAPI(), load_bundle(sys.argv[1])
member, (of_target, of_features) = bundle.members[0], bundle.members[0].inputs

def forecast(table):
    bars = {name: np.array(table[name], "float64") for name in bundle.columns if name != "ts"}
    bars["ts"] = np.array(table["ts"], "int64").view("datetime64[ms]").astype("datetime64[us]")
    window = newest_window(member, bars)
    said = bundle.session.run([member.output], {of_target: window.target, of_features: window.features})[0]
    return {"y_pred": float(deviations(member, said, window.last)[0])}
"""
ENDPOINTS = {
    "request.json()": """
@app.post("/models/{name}/predict")
async def predict(name: str, request: Request):
    return forecast((await request.json())["bars"])
""",
    "pydantic": """
from pydantic import BaseModel

class Bars(BaseModel):
    ts: list[int]
    open: list[float]
    high: list[float]
    low: list[float]
    close: list[float]
    volume: list[float]

class Question(BaseModel):
    bars: Bars

@app.post("/models/{name}/predict")
async def predict(name: str, question: Question):
    return forecast(vars(question.bars))
""",
    "orjson": """
import orjson

@app.post("/models/{name}/predict")
async def predict(name: str, request: Request):
    return forecast(orjson.loads(await request.body())["bars"])
""",
}
SAVE = "import sys, mlflow, onnx; mlflow.onnx.save_model(onnx.load(sys.argv[1]), sys.argv[2])"
OPEN = """
door = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(door.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, loop="uvloop", http="httptools", log_level="error")).run(sockets=[door])
"""


def request(path: str, said: dict) -> bytes:
    """A whole request."""
    body = json.dumps(said).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def requests(packed: Packed) -> list[bytes]:
    """Requests for forecasts; each body is the newest bars of another minute."""
    bundle, found = load_bundle(packed.bundle), []
    n, names = bundle.bars_needed, bundle.columns
    columns = {name: packed.bars[name] for name in names if name != "ts"}
    columns["ts"] = packed.bars["ts"].dt.as_unit("ms").astype("int64")
    for end in range(len(packed.bars) - BODIES, len(packed.bars)):
        bars = {name: columns[name].iloc[end - n : end].tolist() for name in names}
        found.append(request(f"/models/{bundle.id}/predict", {"bars": bars}))
    return found


def windows(packed: Packed) -> list[bytes]:
    """Requests to mlflow; each body is a ready window."""
    (member,), rng = load_bundle(packed.bundle).members, np.random.default_rng(0)
    sizes = dict(zip(member.inputs, (1, len(member.recipes)), strict=True))
    shapes = {name: (1, member.length, size) for name, size in sizes.items()}
    made = ({name: rng.normal(size=shape).tolist() for name, shape in shapes.items()} for _ in range(BODIES))
    return [request("/invocations", {"inputs": inputs}) for inputs in made]


class Connection(asyncio.Protocol):
    """Sends a request, waits for the whole answer, and sends the next, until the time is over."""

    def __init__(self, load: "Load"):
        self.load, self.held, self.answered = load, b"", False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.begun = time.perf_counter()
        if self.begun >= self.load.end:
            self.transport.close()
            self.done.set_result(None)
            return
        self.transport.write(self.load.requests[self.load.sent % len(self.load.requests)])
        self.load.sent += 1

    def data_received(self, data: bytes) -> None:
        self.held += data
        head, blank, body = self.held.partition(b"\r\n\r\n")
        if not blank or len(body) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            return
        self.load.note(self, head, body)
        self.held = b""
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server hung up"))


class Load:
    """What some connections sent within some seconds, and how long each answer took.

    The seconds begin when every connection has had an answer: a loaded server accepts connections one after the other.
    """

    def __init__(self, requests: list[bytes], connections: int, seconds: float):
        self.requests, self.seconds, self.waiting, self.end = requests, seconds, connections, float("inf")
        self.sent, self.failed, self.took, self.last, self.busy = 0, 0, [], b"", 0.0

    def note(self, connection: Connection, head: bytes, body: bytes) -> None:
        now = time.perf_counter()
        self.failed += not head.startswith(b"HTTP/1.1 200")
        self.last = body
        if self.end > now > self.end - self.seconds:
            self.took.append(now - connection.begun)
        elif not connection.answered:
            connection.answered = True
            self.waiting -= 1
            if not self.waiting:
                self.end, self.busy = now + self.seconds, -time.process_time()

    async def run(self, port: int, connections: int) -> None:
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(lambda: Connection(self), "127.0.0.1", port) for _ in range(connections)]
        await asyncio.gather(*(protocol.done for _, protocol in made))
        self.busy += time.process_time()


def ask(port: int, requests: list[bytes], *, connections: int, seconds: float) -> tuple[float, float, float]:
    """Answers a second, the 99th percentile of their milliseconds, and the client's share of its core."""
    load = Load(requests, connections, seconds)
    uvloop.run(load.run(port, connections))
    assert not load.failed, f"{load.failed} of {len(load.took)} failed, such as {load.last[:200]!r}"
    return len(load.took) / seconds, 1e3 * statistics.quantiles(load.took, n=100)[98], load.busy / seconds


@contextmanager
def running(command: list[object], core: int, log: Path, *, port: int | None = None) -> Iterator[tuple]:
    """A server that answers, bound to the core, and its port, which it prints first if it is not told."""
    words = [*map(str, command)]
    beside = os.pathsep.join([str(Path(words[0]).parent), os.environ["PATH"]])  # mlflow calls the uvicorn that it finds
    quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": beside}
    with log.open("wb") as file:
        how = {"env": quiet, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
        process = subprocess.Popen(words, stdout=file if port else subprocess.PIPE, stderr=file, **how)
        try:
            port = port or int(process.stdout.readline())
            until = time.monotonic() + 60
            while not answers(port):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            yield psutil.Process(process.pid), port
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for one in [process, *children]:
                with suppress(psutil.NoSuchProcess):
                    one.terminate()
            process.wait(20)


def answers(port: int) -> bool:
    """Whether something there speaks HTTP."""
    try:
        urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5).read()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


def mlflow_command(python: str, packed: Packed, folder: Path, port: int) -> list[object]:
    """What starts `mlflow models serve` of the bundle's graph."""
    with zipfile.ZipFile(packed.bundle) as archive:
        graph = Path(archive.extract("model.onnx", folder))
    subprocess.run([python, "-c", SAVE, graph, folder / "mlflow"], check=True, capture_output=True)
    served = ["models", "serve", "-m", folder / "mlflow", "-p", port, "--env-manager", "local", "--workers", 1]
    return [python, "-m", "mlflow", *served]


def span(values: list[float], digits: int) -> str:
    """The median and the range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def compare(sides: dict[str, tuple], *, connections: int, rounds: int, seconds: float) -> None:
    """Prints a line a server, and how the service stands to it."""
    found = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name, (port, sent) in sides.items():
            one = ask(port, sent, connections=connections, seconds=min(2, seconds) if number < 0 else seconds)
            if number >= 0:
                found[name].append(one)
    busiest = max(one[2] for ones in found.values() for one in ones)
    print(f"{connections} connections, {rounds} rounds of {seconds:g} s; the client is busy for {busiest:.0%} at most")
    own = found["kallos"]
    for name, ones in found.items():
        rates, slow = ([one[place] for one in ones] for place in (0, 1))
        line = f"  {name:16}{span(rates, 0):>24} requests/s, p99 {span(slow, 2):>22} ms"
        if name != "kallos":
            more = statistics.median(mine[0] / other[0] for mine, other in zip(own, ones, strict=True))
            slower = statistics.median(mine[1] / other[1] for mine, other in zip(own, ones, strict=True))
            line += f"; kallos: {more:.0%} of the requests, {slower:.2f} times the p99"
        print(line)


def same_answers(sides: dict[str, tuple]) -> None:
    """Nothing; all servers say the same of a body."""
    for place in range(5):
        said = {}
        for name, (port, sent) in sides.items():
            load = Load([sent[place]], 1, 0.05)
            uvloop.run(load.run(port, 1))
            said[name] = json.loads(load.last)["y_pred"]
        assert max(said.values()) - min(said.values()) < 1e-9, said


def memory(service: psutil.Process) -> float:
    """MiB that the service holds, with its children."""
    return sum(one.memory_info().rss for one in [service, *service.children(recursive=True)]) / 2**20


def packed_in(folder: Path) -> Packed:
    """The model, alone in a folder of bundles."""
    (folder / "bundles").mkdir()
    packed = packed_gru(folder)
    return packed._replace(bundle=packed.bundle.rename(folder / "bundles" / packed.bundle.name))


def main() -> None:
    """Trains and packs the model, starts the servers, and asks them in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    here = sys.executable if importlib.util.find_spec("mlflow") else None
    parser.add_argument("--mlflow", metavar="PYTHON", default=here, help="of an environment with mlflow and onnx")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        packed = packed_in(folder)
        sent, core = requests(packed), cores[0]
        programs = {"kallos": SERVICE} | {name: BARE + code + OPEN for name, code in ENDPOINTS.items()}
        commands = {name: [sys.executable, "-c", code, packed.bundle] for name, code in programs.items()}
        servers = {n: stack.enter_context(running(c, core, folder / f"{n[:6]}.log")) for n, c in commands.items()}
        sides = {name: (port, sent) for name, (_, port) in servers.items()}
        same_answers(sides)
        if options.mlflow:
            with socket.create_server(("127.0.0.1", 0)) as door:
                port = door.getsockname()[1]
            command = mlflow_command(options.mlflow, packed, folder, port)
            stack.enter_context(running(command, core, folder / "mlflow.log", port=port))
            sides["mlflow"] = (port, windows(packed))
        else:
            print("mlflow models serve: left out, mlflow is not installed")
        os.sched_setaffinity(0, {cores[-1]})
        print(f"servers on core {core}, the client on core {cores[-1]}; bodies of {len(sent[0]):,} bytes")
        service, before = servers["kallos"][0], memory(servers["kallos"][0])
        for connections in (8, 64):
            compare(sides, connections=connections, rounds=options.rounds, seconds=options.seconds)
        print(f"memory of the service: {before:.0f} MiB before, {memory(service):.0f} MiB after; 250 wanted")


if __name__ == "__main__":
    main()
