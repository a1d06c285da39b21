"""A service as it is started by hand, and clients that ask it: well-behaved, many at once, slow, or hostile."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, rmtree
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pandas as pd
import psutil

from kallos.inference.client import as_columns

MODEL = "small_BTC_1d"
ASK = f"/models/{MODEL}/predict"
JSON = {"Content-Type": "application/json"}


class Service:
    """A `kallos-run serve` that runs: its address, process and log."""

    def __init__(self, process: subprocess.Popen, address: str, log: Path):
        self.process, self.url, self.log = process, address, log
        self.port = int(address.rsplit(":", 1)[1])

    def ask(
        self, path: str, body: object = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict, object]:
        """Status, headers in lower case, and what was said, as JSON where it is."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = (JSON if data is not None else {}) | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urlopen(Request(self.url + path, data, given, method=method), timeout=60) as answer:
                status, found, said = answer.status, answer.headers, answer.read()
        except HTTPError as error:
            status, found, said = error.code, error.headers, error.read()
        found = {name.lower(): value for name, value in found.items()}
        return status, found, json.loads(said) if found.get("content-type") == "application/json" else said.decode()

    def metric(self, start: str, **headers: str) -> float | None:
        """The value of the line of /metrics that begins so."""
        lines = self.ask("/metrics", **headers)[2].splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(start)), None)

    def workers(self) -> list[psutil.Process]:
        """The processes that answer."""
        own = psutil.Process(self.process.pid)
        alive = [child for child in own.children() if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in alive if "spawn_main" in " ".join(child.cmdline())] or [own]

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def lines(self) -> list[dict]:
        """The log; a line that is no JSON is an error."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def serving(folder: Path, *words: object, log: Path | None = None, **environment: str) -> Iterator[Service]:
    """A service of the bundles in the folder, with these options, while the block runs."""
    log = log or folder.parent / f"{folder.name}.log"
    code = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    command = [sys.executable, "-c", code, "serve", "--bundles", folder, "--port", 0, *words]
    inherited = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=stderr, text=True, env=inherited | environment
        )
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), log.read_text()
        service = Service(process, address, log)
        wait_for(lambda: service.ask("/health")[0] == 200, seconds=60)
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()
        process.stdout.close()


def wait_for(what, seconds: float = 20) -> None:
    """Returns when it is true; fails if that takes too long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if what():
                return
        except (OSError, psutil.Error):
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.05)


def lay(source: Path, target: Path) -> None:
    """Puts a bundle where another one may lie, at one stroke."""
    draft, old = target.with_name(f".new_{target.name}"), target.with_name(f".old_{target.name}")
    rmtree(old, ignore_errors=True)
    rmtree(draft, ignore_errors=True)
    copytree(source, draft)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    rmtree(old, ignore_errors=True)


def questions(bars: pd.DataFrame, ends: list[int], *, rows: int = 320) -> dict[int, bytes]:
    """By the place of the newest bar, a body as clients send it."""
    cut = {end: bars.iloc[end - rows : end] for end in ends}
    return {end: json.dumps({"bars": as_columns(table)}).encode() for end, table in cut.items()}


class Load:
    """What many clients saw: answers that were wrong, statuses, connections that were cut."""

    def __init__(self) -> None:
        self.answers, self.cut, self.statuses, self.wrong, self.seconds = 0, 0, {}, [], []


async def _client(service: Service, bodies: dict[int, bytes], expected: dict, load: Load, until: float, first: int):
    keys, number = [*bodies], first
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            while time.monotonic() < until:
                number += 1
                end = keys[number % len(keys)]
                body = bodies[end] + b" " * (number * 7919 % 4999)  # nearly always one that nobody remembers
                begun = time.monotonic()
                head = f"POST {ASK} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                status, said = await _answer(reader)
                load.seconds.append(time.monotonic() - begun)
                load.statuses[status] = load.statuses.get(status, 0) + 1
                if status == 200:
                    load.answers += 1
                    if abs(said["y_pred"] - expected[said["digest"]][end]) > 2e-8:
                        load.wrong.append((end, said))
                elif status == 503:
                    await asyncio.sleep(0.05)
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            load.cut += 1
            await asyncio.sleep(0.01)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    return int(head[9:12]), json.loads(await reader.readexactly(length))


async def _many(service: Service, connections: int, seconds: float, **asked: object) -> Load:
    load, until = Load(), time.monotonic() + seconds
    clients = (_client(service, load=load, until=until, first=7 * number, **asked) for number in range(connections))
    await asyncio.gather(*clients)
    return load


def under_load(service: Service, *, connections: int, seconds: float, bodies: dict[int, bytes], expected: dict) -> Load:
    """What that many clients saw who asked for so long, each answer compared with that of the bundle it names."""
    return asyncio.run(_many(service, connections, seconds, bodies=bodies, expected=expected))
