"""The index of runs on both kinds of database: rows that come, change and go, and neither secrets nor doubles."""

from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import sqlalchemy as sa

from kallos.core.errors import ConfigError
from kallos.data import tables
from kallos.data.assets import delete_asset
from kallos.data.database import writing
from kallos.data.run_index import find_run, forget_run, list_runs, record_run
from kallos.data.tables import connect

FIRST = {"run_id": "r1", "folder": "reports/r1", "created_at": "2024-05-01T10:30:00.250+02:00", "seed": 7}


@pytest.fixture
def engine(db_url):
    engine = connect(db_url)
    yield engine
    engine.dispose()


def test_a_row_grows_from_begin_to_end_and_keeps_what_it_was_told(engine):
    record_run(engine, FIRST | {"settings": {"hpo": {"trials": 8}}})
    assert (find_run(engine, "r1")["status"], find_run(engine, "r1")["kind"]) == ("running", "pipeline")
    end = {"run_id": "r1", "status": "done", "finished_at": pd.Timestamp("2024-05-01T09:00Z"), "peak_memory_mb": 512.5}
    record_run(engine, end | {"metrics": {"15m": {"skill": 0.25, "sharpe": float("nan")}}, "git_commit": None})
    found = find_run(engine, "r1")
    assert found["created_at"] == pd.Timestamp("2024-05-01T08:30:00.250Z")
    assert found["finished_at"] == pd.Timestamp("2024-05-01T09:00Z")
    assert found["settings"] == {"hpo": {"trials": 8}}
    assert found["metrics"] == {"15m": {"skill": 0.25, "sharpe": None}}
    assert (found["seed"], found["status"], found["peak_memory_mb"]) == (7, "done", 512.5)


def test_the_newest_comes_first_and_a_forgotten_run_is_gone(engine):
    assert list_runs(engine).empty and list(list_runs(engine)) == tables.RUNS.c.keys()
    for number, day in enumerate(("2024-05-02", "2024-05-03", "2024-05-01")):
        record_run(engine, FIRST | {"run_id": f"r{number}", "created_at": day})
    assert list(list_runs(engine)["run_id"]) == ["r1", "r0", "r2"]
    assert str(list_runs(engine)["finished_at"].dtype).endswith("UTC]")
    assert (forget_run(engine, "r0"), forget_run(engine, "r0")) == (True, False)
    assert list(list_runs(engine)["run_id"]) == ["r1", "r2"] and find_run(engine, "r0") is None


def test_no_secret_enters_the_database(engine):
    settings = {"db_url": "postgresql://me:hunter2@host/db", "api_key": "hunter2", "list": ["password=hunter2"]}
    record_run(engine, FIRST | {"settings": settings})
    with engine.connect() as connection:
        assert "hunter2" not in str(connection.execute(sa.select(tables.RUNS)).all())
    assert find_run(engine, "r1")["settings"]["db_url"] == "postgresql://me:***@host/db"


def test_what_is_no_run_is_refused_and_leaves_no_trace(engine):
    for wrong, message in {
        (("status", "fine"),): "unknown status of a run; got 'fine'",
        (("sead", 1),): "no such field; got 'sead'",
        (("folder", None),): "lacks fields; got 'folder'",
        (("run_id", ""),): "needs an id",
    }.items():
        with pytest.raises(ConfigError, match=message):
            record_run(engine, FIRST | dict(wrong))
    assert list_runs(engine).empty


def test_processes_that_record_the_same_run_at_once_leave_one_row(engine):
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(record_run, engine, FIRST | {"seed": number}) for number in range(24)]
        assert [one.result() for one in done] == [None] * 24
    assert len(list_runs(engine)) == 1


def test_an_older_database_gets_the_table_and_keeps_its_runs_when_an_asset_goes(db_url):
    engine = connect(db_url)
    tables.METADATA.drop_all(engine, tables=[tables.RUNS])
    assert "runs" not in sa.inspect(engine).get_table_names()
    engine.dispose()
    engine = connect(db_url, create=False)
    record_run(engine, FIRST)
    with writing(engine) as connection:
        delete_asset(connection, "BTC")
    assert len(list_runs(engine)) == 1
    engine.dispose()
