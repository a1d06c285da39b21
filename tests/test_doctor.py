"""Doctor: every line about the machine is made to fail once, the way it would really fail."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import psycopg
import pytest
import sqlalchemy as sa
import torch

from kallos.core.errors import ConfigError
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars
from kallos.data.tables import connect
from kallos.workflow import machine, services
from kallos.workflow.checks import checks_text
from kallos.workflow.doctor import run_doctor, worst_of
from kallos.workflow.machine import Needs
from tests.exchange_server import serving, status

SECRET = "pa55word"


def examined(folder: Path, *, db: str | None = None, **how) -> dict:
    """The lines of a doctor whose folders lie in that folder, by name."""
    db = db or f"sqlite:///{folder / 'data' / 'kallos.db'}"
    found = run_doctor(db, **({"reports": folder / "reports"} | how))
    return {one.name: one for one in found}


@pytest.fixture
def url(tmp_path) -> str:
    """A database with a few bars."""
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    engine = connect(url)
    bars = sample_bars(timeframe="1d", start="2022-01-01", end="2022-01-31")
    write_bars(engine, bars, asset_id="BTC", timeframe="1d")
    engine.dispose()
    return url


def test_a_sound_machine_has_nothing_to_mend(tmp_path, url):
    found = examined(tmp_path, db=url)
    assert worst_of([*found.values()]) == "OK", checks_text([*found.values()])
    assert "1 assets" in found["database"].text and not (tmp_path / "reports").exists()


def test_another_python_fails():
    assert machine.python_check("3.12.1").status == "FAIL"


def test_a_wrong_pin_is_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==1.0\npandas==3.0.6\nno-such-package==1\n")
    found = examined(tmp_path, constraints=pins)["packages"]
    assert found.status == "WARN" and "numpy" in found.text and "pandas" not in found.text and "-c" in found.mend


def test_a_package_that_kallos_needs_and_lacks_fails(tmp_path, monkeypatch):
    pins = tmp_path / "constraints.txt"
    pins.write_text("no-such-package==1\n")
    monkeypatch.setattr(machine, "_needed", lambda: {"no-such-package"})
    found = machine.packages_check(pins)
    assert found.status == "FAIL" and "lacking: no-such-package" in found.text


def test_a_wheel_has_the_bounds_of_its_own_requirements(monkeypatch):
    assert machine.packages_check(None).status == "OK"
    monkeypatch.setattr(machine, "requires", lambda name: ["pandas<2", "ccxt; extra == 'exchange'"])
    found = machine.packages_check(None)
    assert found.status == "WARN" and "pandas" in found.text and "ccxt" not in found.text


def test_a_build_for_cuda_without_a_driver_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert examined(tmp_path)["torch"].status == "WARN"


def test_a_torch_that_cannot_be_imported_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine.torch_check().status == "FAIL"


def test_a_full_disk_and_memory_fail(tmp_path):
    found = examined(tmp_path, needs=Needs(disk_mb=1e12, fair_disk_mb=1e12, memory_mb=1e12, fair_memory_mb=1e12))
    assert {found[name].status for name in ("disk reports", "disk data", "memory")} == {"FAIL"}
    found = examined(tmp_path, needs=Needs(fair_disk_mb=1e12, fair_memory_mb=1e12))
    assert {found[name].status for name in ("disk reports", "disk data", "memory")} == {"WARN"}


def test_a_file_in_the_place_of_a_folder_cannot_be_written(tmp_path):
    for name in ("reports", "data"):
        (tmp_path / name).write_text("in the way")
    found = examined(tmp_path, db=f"sqlite:///{tmp_path / 'kallos.db'}", data=tmp_path / "data")
    assert {found[name].status for name in ("write reports", "write data", "optuna storage")} == {"FAIL"}


def test_a_disk_without_room_for_a_byte_cannot_be_written(tmp_path):
    """The limit of a file's size stands for a disk that is full."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
from pathlib import Path
from kallos.workflow.machine import study_check, write_check
folder = Path({str(tmp_path)!r})
print(write_check(folder, name="write").status, study_check(folder).status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["FAIL", "FAIL"], done.stderr


def test_a_database_that_is_not_there_is_a_warning(tmp_path):
    found = examined(tmp_path)["database"]
    assert found.status == "WARN" and "kallos-run sample" in found.mend and not (tmp_path / "data").exists()


def test_a_file_that_is_no_database_fails(tmp_path):
    (tmp_path / "kallos.db").write_text("this is no database, however long it may be. " * 50)
    assert examined(tmp_path, db=f"sqlite:///{tmp_path / 'kallos.db'}")["database"].status == "FAIL"


def test_an_empty_database_lacks_the_tables(tmp_path, db_url):
    if db_url.startswith("sqlite"):
        sa.create_engine(db_url).connect().close()
    found = examined(tmp_path, db=db_url)["database"]
    assert found.status == "WARN" and "no tables" in found.text


def test_a_database_of_an_older_kallos_lacks_a_table_or_a_column(tmp_path, url):
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE funding")
    found = examined(tmp_path, db=url)["database"]
    assert found.status == "WARN" and "funding" in found.text
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE bars DROP COLUMN is_filled")
    found = examined(tmp_path, db=url)["database"]
    assert found.status == "FAIL" and "bars.is_filled" in found.text


def test_a_postgresql_that_was_stopped_fails_and_keeps_its_password(tmp_path, own_postgres):
    server, url = own_postgres
    connect(url).dispose()
    assert examined(tmp_path, db=url)["database"].status == "OK"
    server.stop()
    found = examined(tmp_path, db=url)
    assert found["database"].status == found["optuna storage"].status == "FAIL"
    assert "secret-of-the-tests" not in checks_text([*found.values()])
    server.start()


def test_a_user_who_may_make_no_schema_can_keep_no_study(tmp_path, postgres_url):
    connect(postgres_url).dispose()
    assert examined(tmp_path, db=postgres_url)["optuna storage"].status == "OK"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS reader")
        connection.execute("CREATE ROLE reader LOGIN")
    as_reader = sa.make_url(postgres_url).set(username="reader").render_as_string(hide_password=False)
    found = examined(tmp_path, db=as_reader)["optuna storage"]
    assert found.status == "FAIL" and "CREATE SCHEMA" in found.mend


def test_a_clock_behind_the_newest_bar_fails(tmp_path, url):
    late = datetime.now(UTC) + timedelta(days=2)
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE bars SET ts = {int(late.timestamp() * 1000)} WHERE ts = (SELECT max(ts) FROM bars)"
        )
    found = examined(tmp_path, db=url)["clock"]
    assert found.status == "FAIL" and "newest stored bar" in found.text


def test_a_clock_behind_the_package_fails(tmp_path, url):
    before = services.built_at() - timedelta(days=1)
    assert services.clock_check(tmp_path, db=url, now=before).status == "FAIL"


def test_clocks_that_disagree_are_a_warning(tmp_path, url, monkeypatch):
    asked = datetime.now(UTC)
    monkeypatch.setattr(services.time, "time", lambda: asked.timestamp() - 60)
    found = services.clock_check(tmp_path, db=url, now=asked)
    assert found.status == "WARN" and "the file system +60 s" in found.text


def test_a_zone_is_told_and_an_impossible_one_fails(tmp_path, url, monkeypatch):
    before = os.environ.get("TZ")
    try:
        for zone, expected in (("Asia/Kolkata", "OK"), ("ABC-20", "FAIL")):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            found = services.clock_check(tmp_path, db=url)
            assert found.status == expected and ("+05:30" in found.text or "+20:00" in found.text)
    finally:
        monkeypatch.undo()
        assert os.environ.get("TZ") == before
        time.tzset()


def test_a_kernel_of_another_interpreter_fails(tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/opt/other/bin/python"], "language": "python", "display_name": "other"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    found = examined(tmp_path)["kernel"]
    assert found.status == "FAIL" and "/opt/other" in found.text and "ipykernel install" in found.mend


def test_an_exchange_answers_is_late_or_is_away(tmp_path, url):
    with serving(now=pd.Timestamp.now("UTC")) as server:
        asked = {"db": url, "exchange": "binance", "exchange_url": server.url}
        assert examined(tmp_path, **asked)["exchange binance"].status == "OK"
        server.now -= pd.Timedelta("10min")
        found = examined(tmp_path, **asked)["exchange binance"]
        assert found.status == "WARN" and "behind" in found.text
        server.first_faults = [status(403)] * 9
        assert examined(tmp_path, **asked)["exchange binance"].status == "FAIL"
    assert examined(tmp_path, **asked)["exchange binance"].status == "FAIL"
    assert examined(tmp_path, db=url, exchange="no-such")["exchange no-such"].status == "FAIL"


def test_a_name_that_is_no_database_is_wrong_use():
    with pytest.raises(ConfigError):
        run_doctor("mysql://somewhere")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_command_leaves_with_five_where_something_fails(tmp_path, words):
    command = [sys.executable, "-c", "from kallos.main import main; main()", "doctor", *words]
    environment = os.environ | {"KALLOS_DB_URL": f"postgresql://me:{SECRET}@127.0.0.1:1/kallos"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 5 and SECRET not in done.stdout + done.stderr, done.stderr
    if words:
        record = json.loads(done.stdout)
        assert record["status"] == "FAIL" and {one["name"] for one in record["checks"]} > {"database", "clock"}
    else:
        assert "FAIL    database" in done.stdout
