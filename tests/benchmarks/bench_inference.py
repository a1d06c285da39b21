"""Forecasts of a packed gru: one window against darts' predict, the first one of a process, and whole files.

The gru has 32 units and reads 40 rows of 15 features. kallos begins with raw bars and computes the features; darts gets
them ready and scaled, in series that are made beforehand, and answers with the model that was packed, on one thread.
Calls alternate in blocks, and both must say the same. Then a new process, from its start to its first forecast, and a
Parquet file of half a million bars, read, forecast and written by one thread and by two. Run it with `make bench`.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from darts import TimeSeries
from market import span
from packed import Packed, arrays, database, packed_gru

from kallos.data.sample import sample_bars
from kallos.inference.bundle import load_bundle
from kallos.inference.bundle_sources import read_source

HEAVY = "torch darts sklearn scipy sqlalchemy pandera pydantic numba plotly matplotlib optuna pyarrow.dataset".split()  # noqa: SIM905
FIRST = """import sys, time
begun = time.perf_counter()
import pandas as pd
bars = pd.read_csv({bars!r}, parse_dates=["ts"])
from kallos.inference.bundle import load_bundle
found = load_bundle({bundle!r}).predict(bars)["y_pred"].iloc[0]
print(time.perf_counter() - begun, found, *[name for name in {heavy} if name in sys.modules])"""
BATCH = """import sys
from kallos.inference.bar_feeds import file_chunks
from kallos.inference.bar_files import files_of, given_files
from kallos.inference.batch import write_forecasts
from kallos.inference.bundle import load_bundle
one = {"asset_id": "BTC", "timeframe": "1m"}
files = files_of(given_files([sys.argv[2]]), **one)
feeds = {"BTC": lambda after, overlap: file_chunks(files, **one)}
report = write_forecasts(load_bundle(sys.argv[1]), feeds, folder=sys.argv[3], full=True, n_jobs=int(sys.argv[4]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(report.forecasts, report.seconds, int(status["VmHWM"].split()[0]) / 1024)"""


def of_darts(packed: Packed, url: str) -> tuple[Callable[[], float], int]:
    """A call that forecasts the bar after the last row of training, and the place of that row's bar."""
    (one,) = read_source(packed.manifest, url).models
    rows = one.table.tail(one.base.lookback)
    scaled = one.base.transformer.transform(rows)
    index, features = rows.index.tz_localize(None), [*one.base.transformer.names]
    target = [name for name in features if name not in rows.columns or name == one.settings.target_col]
    series = TimeSeries.from_times_and_values(index, scaled[[one.settings.target_col]].to_numpy("float32"), freq="1min")
    past = TimeSeries.from_times_and_values(index, scaled.drop(columns=target).to_numpy("float32"), freq="1min")
    quiet = {"verbose": False, "show_warnings": False}
    place = int(packed.bars["ts"].searchsorted(rows.index[-1]))
    return lambda: float(one.base.model.predict(1, series, past_covariates=past, **quiet).values()[0, 0]), place


def blocks(calls: dict[str, tuple[Callable, int]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call, by side, one a block."""
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, times) in calls.items():
            begun = time.perf_counter()
            for _ in range(times):
                call()
            found[name].append((time.perf_counter() - begun) / times * 1e3)
    return found


def one_window(packed: Packed, url: str, rounds: int) -> None:
    """Prints what one forecast takes, in process."""
    bundle = load_bundle(packed.bundle)
    peer, place = of_darts(packed, url)
    tail = packed.bars.iloc[place - bundle.bars_needed : place]
    columns = arrays(tail, bundle.columns)
    member = bundle.members[0]
    own, theirs = bundle.forecast(columns).y_pred, peer() * member.scale + member.center
    assert abs(own - theirs) < 1e-6 * member.scale, (own, theirs)
    sides = {"kallos": (lambda: bundle.forecast(columns), 200), "darts": (peer, 20)}
    found = blocks(sides, rounds)
    ratios = [theirs / own for own, theirs in zip(found["kallos"], found["darts"], strict=True)]
    print(f"one window: kallos from {len(tail)} raw bars {span(found['kallos'], 3)} ms, "
          f"darts from ready features {span(found['darts'])} ms; {span(ratios, 1)} times, 20 wanted")  # fmt: skip


def first_forecast(packed: Packed, folder: Path, rounds: int) -> None:
    """Prints what a new process takes to its first forecast, and which heavy packages it did without."""
    bars = folder / "newest.csv"
    packed.bars.tail(1000).to_csv(bars, index=False)
    code = FIRST.format(bars=str(bars), bundle=str(packed.bundle), heavy=HEAVY)
    took, inside = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        took.append(time.perf_counter() - begun)
        inside.append(float(said[0]))
    without = ", ".join(name for name in HEAVY if name not in said[2:])
    print(f"a new process to its first forecast: {span(took)} s, under 1.5 s wanted; without Python's own start "
          f"{span(inside)} s")  # fmt: skip
    print(f"  loaded were {', '.join(said[2:]) or 'none'} of the heavy packages; not loaded: {without}")


def batch(packed: Packed, folder: Path, rounds: int, days: str) -> None:
    """Prints forecasts a second from Parquet to Parquet."""
    path = folder / "BTC_1m.parquet"
    sample_bars(timeframe="1m", start="2023-01-01", end=days).to_parquet(path)
    rates, peaks = {1: [], 2: []}, {1: [], 2: []}
    for _ in range(rounds):
        for jobs in rates:
            command = [sys.executable, "-c", BATCH, str(packed.bundle), str(path), str(folder), str(jobs)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            rates[jobs].append(int(said[0]) / float(said[1]))
            peaks[jobs].append(float(said[2]))
    for jobs, found in rates.items():
        told = f"{span(found, 0)} forecasts/s, peak memory {span(peaks[jobs], 0)} MiB"
        print(f"a file of {int(said[0]):,} forecasts, {jobs} thread{'s' * (jobs > 1)}: {told}; 20,000 a second wanted")


def main() -> None:
    """Trains and packs the model, and runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--until", default="2023-12-31", help="last day of the file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as kallos does
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = packed_gru(folder)
        one_window(packed, database(folder), options.rounds)
        first_forecast(packed, folder, max(3, options.rounds // 2))
        batch(packed, folder, max(3, options.rounds // 3), options.until)


if __name__ == "__main__":
    main()
