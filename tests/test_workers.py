"""Studies with many workers, on a journal, on PostgreSQL and on a Dask cluster, of which some are really killed."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import optuna
import psutil
import pytest
from distributed import LocalCluster

from kallos.core.errors import ConfigError, DataError
from kallos.core.runs import read_json
from kallos.data.database import to_url
from kallos.models import studies
from kallos.models.budget import best_trial, finished_trials
from kallos.models.storages import JOURNAL, DatabaseArtifactStore
from kallos.models.tuner import tune
from tests.study_runs import (
    is_spent,
    kill_workers,
    replays,
    running,
    small_settings,
    start_tune,
    study_of,
    workers_of,
    write_market,
)

NETWORK = {"model_name": "nlinear", "max_epochs": 6}  # trains by epochs, and fast


@pytest.fixture
def local_market(tmp_path) -> str:
    """The same in SQLite."""
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    write_market(url)
    return url


def await_running(process: subprocess.Popen, url: str, settings, count: int) -> optuna.Study:
    while True:
        assert process.poll() is None, process.communicate()[1]
        study = study_of(url, settings)
        if len(running(study)) >= count:
            return study
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_workers_change_nothing(market, tmp_path):
    settings = small_settings(tmp_path / "out", n_trials=12, n_jobs=2, model_name="nlinear", max_epochs=6)
    process = start_tune(market, settings)
    assert kill_workers(process, market, settings, kills=3) == 3
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    assert is_spent(market, settings)
    assert replays(market, settings)
    assert not (tmp_path / "out" / JOURNAL).exists()
    lost = [trial.user_attrs["lost"] for trial in study_of(market, settings).trials if "lost" in trial.user_attrs]
    assert len(lost) <= 3 and set(lost) <= {"killed by signal 9"}
    copy = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'out' / 'optuna.db'}")
    assert len(finished_trials(copy)) == 12


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0])
def test_twenty_kills_change_nothing(market, tmp_path, seed):
    settings = small_settings(tmp_path / "out", n_trials=30, n_jobs=3, model_name="gru", max_epochs=4, folds=3)
    process = start_tune(market, settings)
    done = kill_workers(process, market, settings, kills=20, seed=seed)
    assert process.wait(timeout=3600) == 0, process.communicate()[1]
    assert is_spent(market, settings)
    assert replays(market, settings)
    assert done == 20


@pytest.mark.slow
def test_idle_workers_help_with_the_last_trial_and_change_nothing(market, tmp_path):
    sizes = {"n_trials": 1, "model_name": "gru", "max_epochs": 6, "folds": 3}
    settings = small_settings(tmp_path / "out", n_jobs=2, **sizes)
    process = start_tune(market, settings)
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    (trial,) = finished_trials(study_of(market, settings))
    helped = {int(name[-1]): said for name, said in trial.system_attrs.items() if name.startswith("kallos:fold:")}
    assert any(said["result"] for said in helped.values()), "nobody helped: the test shows nothing"
    assert "worker died" not in (tmp_path / "out" / "gru_BTC_tune.log").read_text()
    alone = tune(small_settings(tmp_path / "alone", study_name="alone", **sizes), db=market, progress=False)
    kept = {name: value for name, value in trial.user_attrs.items() if name.startswith(("fold_", "score", "rmse"))}
    del kept["fold_seconds"]
    assert {name: alone.trials[0].user_attrs[name] for name in kept} == kept
    assert alone.trials[0].intermediate_values == trial.intermediate_values


@pytest.mark.slow
def test_a_run_that_was_killed_as_a_whole_takes_its_workers_along_and_goes_on(local_market, tmp_path):
    settings = small_settings(tmp_path / "out", n_trials=6, n_jobs=2, **NETWORK)
    process = start_tune(local_market, settings)
    await_running(process, local_market, settings, 1)
    workers = workers_of(process)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert (tmp_path / "out" / JOURNAL).exists()
    again = start_tune(local_market, settings.model_copy(update={"n_jobs": 1}))
    assert again.wait(timeout=200) == 0, again.communicate()[1]
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert is_spent(local_market, settings)


@pytest.mark.slow
def test_ctrl_c_once_finishes_the_epoch_and_twice_stops_now(local_market, tmp_path):
    settings = small_settings(tmp_path / "out", n_trials=40, n_jobs=2, model_name="gru")
    process = start_tune(local_market, settings)
    await_running(process, local_market, settings, 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "resume" in said and "Traceback" not in said, said
    study = study_of(local_market, settings)
    assert not running(study)
    assert [trial.user_attrs.get("stopped") for trial in study.trials if trial.state.name == "FAIL"]
    again = start_tune(local_market, settings)
    await_running(again, local_market, settings, 1)
    workers = workers_of(again)
    again.send_signal(signal.SIGINT)
    time.sleep(0.3)
    again.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert again.wait(timeout=20) == 3, again.communicate()[1]
    assert time.monotonic() - begun < 10
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
def test_two_machines_join_one_study(postgres_url, tmp_path):
    write_market(postgres_url)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    settings = [small_settings(folder / "out", n_trials=14, **NETWORK) for folder in folders]
    machines = [
        start_tune(postgres_url, its, cwd=folder, output_path="out")
        for its, folder in zip(settings, folders, strict=True)
    ]
    for machine in machines:
        assert machine.wait(timeout=240) == 0, machine.communicate()[1]
    study = study_of(postgres_url, settings[0])
    assert is_spent(postgres_url, settings[0])
    assert len({trial.user_attrs["worker"] for trial in finished_trials(study)}) == 2
    ours, theirs = (read_json(folder / "out" / "nlinear_BTC_best_params.json") for folder in folders)
    assert ours == theirs
    store = studies.artifact_store(settings[0], postgres_url)
    for trial in finished_trials(study):
        if trial.state.name == "COMPLETE":
            assert len(studies.download_table(trial, "forecasts", storage=study._storage, store=store))


def outlasts_an_outage(server, url: str, settings, seconds: float) -> None:
    process = start_tune(url, settings)
    await_running(process, url, settings, 1)
    server.stop()
    time.sleep(seconds)
    server.start()
    assert process.wait(timeout=1200) == 0, process.communicate()[1]
    assert is_spent(url, settings)
    assert replays(url, settings)


@pytest.mark.slow
def test_a_database_that_restarts_stops_nothing(own_postgres, tmp_path):
    server, url = own_postgres
    write_market(url)
    outlasts_an_outage(server, url, small_settings(tmp_path / "out", n_trials=12, n_jobs=2, **NETWORK), seconds=3)


@pytest.mark.slow
def test_a_table_that_is_uploaded_while_the_database_is_away_arrives(own_postgres):
    server, url = own_postgres
    store = DatabaseArtifactStore(to_url(url))
    store.write("before", io.BytesIO(b"1"))
    server.stop()
    back = threading.Timer(2, server.start)
    back.start()
    store.write("during", io.BytesIO(b"2"))
    back.join()
    assert [store.open_reader(name).read() for name in ("before", "during")] == [b"1", b"2"]
    store.write("during", io.BytesIO(b"3"))
    assert store.open_reader("during").read() == b"3"


@pytest.mark.soak
def test_a_database_that_is_away_for_twenty_seconds_stops_nothing(own_postgres, tmp_path):
    server, url = own_postgres
    write_market(url)
    settings = small_settings(tmp_path / "out", n_trials=30, n_jobs=3, model_name="gru", max_epochs=4, folds=3)
    outlasts_an_outage(server, url, settings, seconds=20)


@pytest.mark.slow
def test_a_dask_cluster_runs_the_workers(postgres_url, tmp_path):
    market = postgres_url
    write_market(market)
    settings = small_settings(tmp_path / "out", n_trials=8, **NETWORK)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        run = settings.model_copy(update={"dask_scheduler": cluster.scheduler_address, "n_jobs": -1})
        study = tune(run, db=market, progress=False)
        logs = json.dumps([dict(cluster.get_logs())], default=str)
    assert is_spent(market, settings)
    assert len({trial.user_attrs["worker"] for trial in finished_trials(study)}) == 2
    assert replays(market, settings)
    assert "secret-of-the-tests" not in logs


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_deterministic_study(local_market, tmp_path):
    found = []
    for n_jobs in (1, 2):
        pruned = {"pruner": "successive_halving", "deterministic": True, "study_name": "d"}
        settings = small_settings(tmp_path / str(n_jobs), n_trials=17, n_jobs=n_jobs, **NETWORK, **pruned)
        study = tune(settings, db=local_market, progress=False)
        trials = sorted(finished_trials(study), key=lambda trial: trial.user_attrs["slot"])
        found.append([(trial.params, trial.state, trial.value, trial.intermediate_values) for trial in trials])
    assert found[0] == found[1]
    assert {state.name for _, state, _, _ in found[0]} == {"COMPLETE", "PRUNED"}


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "wilcoxon", "hyperband", "progressive"])
def test_a_pruned_trial_keeps_what_it_had_and_replays(local_market, tmp_path, pruner):
    settings = small_settings(tmp_path, n_trials=9, pruner=pruner, model_name="nlinear", max_epochs=7, folds=3)
    study = tune(settings, db=local_market, progress=False)
    pruned = study.get_trials(states=(optuna.trial.TrialState.PRUNED,))
    assert pruned, "nothing was pruned: the test shows nothing"
    for trial in pruned:
        scores = trial.user_attrs["fold_scores"]
        assert 1 <= len(scores) <= 3
        assert trial.value == (scores[-1] if pruner == "wilcoxon" else sum(scores) / 3)
    assert replays(local_market, settings)


def test_a_worker_that_is_wrong_from_the_start_says_why(local_market, tmp_path, monkeypatch):
    settings = small_settings(tmp_path, n_trials=2, n_jobs=2)
    monkeypatch.setattr("kallos.models.crews.as_parameters", lambda s: {"asset_id": "ETH", "end_date": "2022-01-01"})
    with pytest.raises(DataError, match="no features of 'ETH'"):
        tune(settings, db=local_market, progress=False)


def test_a_scheduler_that_is_not_there(local_market, tmp_path):
    settings = small_settings(tmp_path, n_trials=2, dask_scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no Dask scheduler answers"):
        tune(settings, db=local_market, progress=False)


@pytest.mark.slow
def test_the_dashboard_shows_fold_scores_during_and_after_a_run(local_market, tmp_path):
    settings = small_settings(tmp_path / "out", n_trials=10, n_jobs=2, **NETWORK)
    process = start_tune(local_market, settings)
    while not finished_trials(study_of(local_market, settings)):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    during = dashboard_trials(tmp_path / "out")
    assert process.wait(timeout=200) == 0, process.communicate()[1]
    after = dashboard_trials(tmp_path / "out")
    assert during and len(after) >= 10
    best = best_trial(study_of(local_market, settings))
    shown = next(trial for trial in after if trial["number"] == best.number)
    by_step = {point["step"]: float(point["value"]) for point in shown["intermediate_values"]}
    assert [by_step[settings.max_epochs + 1 + fold] for fold in range(2)] == best.user_attrs["fold_scores"]


def dashboard_trials(folder: Path) -> list[dict]:
    """The trials of the folder's only study, as `kallos-run dashboard` hands them to the browser."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        str(Path(sys.executable).with_name("kallos-run")),
        "dashboard",
        "--folder",
        str(folder),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=os.environ)
    address = f"http://127.0.0.1:{port}/api/studies"
    try:
        for _ in range(300):
            try:
                listed = json.load(urlopen(address, timeout=5))
                break
            except OSError:
                time.sleep(0.1)
        number = listed["study_summaries"][0]["study_id"]
        return json.load(urlopen(f"{address}/{number}?after=0", timeout=5))["trials"]
    finally:
        server.terminate()  # a background job may be deaf to SIGINT
        server.wait(20)
