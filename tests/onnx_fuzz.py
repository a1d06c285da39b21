"""Damaged ONNX graphs, checked, opened and run in a process that may crash without taking the tests with it."""

import random
import sys
from pathlib import Path

import numpy as np

from kallos.core.errors import ArtifactError
from kallos.inference.onnx_guard import check_onnx, open_session, runtime_faults

TELLING = (0, 1, 2, 64, 127, 128, 254, 255)  # bytes at which numbers of the format change their length or sign


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to sixteen flips, writes, cuts, insertions or repetitions."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, other, size = rng.randrange(len(found)), rng.randrange(len(found)), rng.randrange(1, 30)
        kind = rng.random()
        if kind < 0.4:
            found[at] ^= 1 << rng.randrange(8)
        elif kind < 0.7:
            found[at] = rng.choice(TELLING)
        elif kind < 0.8:
            found[at : at + size] = found[other : other + size]
        elif kind < 0.9:
            found[at:at] = rng.randbytes(size)
        elif kind < 0.97:
            del found[at : at + size]
        else:
            del found[at:]
        found = found or bytearray(b"\0")
    return bytes(found)


def outcome(data: bytes) -> str:
    """How far the bytes get: refused, not opened, failed or ran; any other exception is the caller's to see."""
    try:
        check_onnx(data)
    except ArtifactError:
        return "refused"
    try:
        session = open_session(data)
    except ArtifactError:
        return "not opened"
    sizes = {one.name: [min(size, 10_000) for size in one.shape[1:]] for one in session.get_inputs()}
    try:
        session.run(None, {name: np.ones((3, *size), "float32") for name, size in sizes.items()})
    except runtime_faults():
        return "failed"
    return "ran"


def main(folder: str, seed: str, count: str) -> None:
    """Prints how often each outcome came, of graphs in the folder damaged at random, and the largest memory in MB."""
    rng, graphs = random.Random(int(seed)), [path.read_bytes() for path in sorted(Path(folder).glob("*.onnx"))]
    found = dict.fromkeys(("refused", "not opened", "failed", "ran"), 0)
    for _ in range(int(count)):
        found[outcome(damaged(rng.choice(graphs), rng))] += 1
    status = Path("/proc/self/status").read_text()  # what getrusage tells begins with the memory of the parent
    found["megabytes"] = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    print(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
