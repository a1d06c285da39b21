"""Processes really killed in the middle of an ingest: the tables are as before or as after, never between."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kallos.core.runs import fingerprint
from kallos.data.assets import list_assets
from kallos.data.records import read_quarantine, read_repairs
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, stale_from
from kallos.data.tables import connect

BTC = {"asset_id": "BTC", "timeframe": "5m"}
WORDS = ("--asset-id", "BTC", "--timeframe", "5m")
STORED, ROWS = 2_000, 40_000


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """What is stored first, and what comes next: it changes every stored bar, adds many and must be repaired."""
    folder = tmp_path_factory.mktemp("raw")
    bars = sample_bars(timeframe="5m", start="2024-01-01", end="2024-12-31", seed=3).iloc[:ROWS]
    bars.iloc[:STORED].to_csv(folder / "old.csv", index=False)
    spoiled = bars.assign(volume=bars["volume"] * 2, quote_asset_volume=bars["quote_asset_volume"] * 2).iloc[::-1]
    spoiled = pd.concat([spoiled, spoiled.iloc[500:900]])
    spoiled.iloc[np.arange(100, ROWS, 997), spoiled.columns.get_loc("close")] = -1.0
    spoiled.to_csv(folder / "new.csv", index=False)
    return folder / "old.csv", folder / "new.csv"


def ingest(file: Path, db_url: str, folder: Path) -> subprocess.Popen:
    code = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    words = [sys.executable, "-c", code, "ingest", str(file), *WORDS, "--db-url", db_url]
    return subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> float:
    begun = time.perf_counter()
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, said + complained
    return time.perf_counter() - begun


def state(db_url: str) -> str:
    """All that an ingest may change, as one hash."""
    engine = connect(db_url)
    try:
        if list_assets(engine).empty:
            return "nothing"
        tables = [read(engine, **BTC) for read in (read_bars, read_quarantine, read_repairs)]
        return " ".join([*map(fingerprint, tables), str(stale_from(engine, **BTC))])
    finally:
        engine.dispose()


def emptied(db_url: str, folder: Path, old: Path) -> None:
    """The database as before: only the old file is stored."""
    engine = connect(db_url)
    with engine.begin() as connection:
        names = ("features", "bars", "quarantine", "repairs", "funding", "series", "assets")
        for name in names:
            connection.exec_driver_sql(f"DELETE FROM {name}")
    engine.dispose()
    finished(ingest(old, db_url, folder))


def kill_at_random(db_url: str, folder: Path, files: tuple[Path, Path], kills: int) -> list[str]:
    """What was found after each kill: `before` or `after`; AssertionError on anything else."""
    old, new = files
    connect(db_url).dispose()
    emptied(db_url, folder, old)
    before, took = state(db_url), finished(ingest(new, db_url, folder))
    after = state(db_url)
    assert before != after
    rng, found = random.Random(7), []
    for _ in range(kills):
        if found[-1:] != ["before"]:
            emptied(db_url, folder, old)
        process = ingest(new, db_url, folder)
        time.sleep(took * rng.uniform(0.4, 1.0))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = state(db_url)
        assert now in (before, after)
        found.append("before" if now == before else "after")
    if found[-1] == "before":
        finished(ingest(new, db_url, folder))
    assert state(db_url) == after
    return found


@pytest.mark.slow
def test_three_kills_leave_no_half_written_batch(db_url, tmp_path, files):
    assert "before" in kill_at_random(db_url, tmp_path, files, 3)


@pytest.mark.soak
def test_twenty_kills_leave_no_half_written_batch(db_url, tmp_path, files):
    found = kill_at_random(db_url, tmp_path, files, 20)
    print(f"{db_url.split(':')[0]}: {found.count('before')} killed before the commit, {found.count('after')} after it")
    assert found.count("before") >= 5
