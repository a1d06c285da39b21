"""Studies on SQLite and on a real PostgreSQL: a budget that holds through stops and kills, and what is refused."""

import signal
from concurrent.futures import ThreadPoolExecutor

import optuna
import psycopg
import pytest

from kallos.core.config import TuneSettings
from kallos.core.devices import has_bf16_products
from kallos.core.errors import ConfigError, KallosError, TrainingError
from kallos.models import budget, studies
from kallos.models.budget import finished_trials
from kallos.models.datasets import load_table
from kallos.models.layouts import study_layout
from kallos.models.storages import folder_storage, study_storage
from kallos.models.tuner import replay, run_tuning, tune
from kallos.models.validation import prepare_fold
from tests.study_runs import END, SMALL, is_spent, replays, small_settings, start_tune, study_of, write_market


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_study_ends_with_its_exact_budget(market, tmp_path, stop):
    settings = small_settings(tmp_path, n_trials=12)
    process = start_tune(market, settings)
    study = study_of(market, settings)
    while len(finished_trials(study)) < 5:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(stop)
    stderr = process.communicate(timeout=60)[1]
    before = finished_trials(study)
    assert 5 <= len(before) < 12, stderr
    if stop == signal.SIGINT:
        assert process.returncode == 3
        assert "resume" in stderr
        assert "Traceback" not in stderr
    assert start_tune(market, settings).wait(timeout=180) == 0
    trials = finished_trials(study_of(market, settings))
    assert is_spent(market, settings)
    assert [t.params for t in trials[: len(before)]] == [t.params for t in before]
    assert replays(market, settings)
    if stop == signal.SIGINT:  # nothing but the time of the stop was lost: the study is that of a run without a stop
        whole = tune(small_settings(tmp_path / "whole", n_trials=12, study_name="whole"), db=market, progress=False)
        by_slot = {trial.user_attrs["slot"]: trial for trial in trials}
        assert [by_slot[slot].params for slot in range(12)] == [trial.params for trial in whole.trials]


def test_many_may_open_the_studies_of_a_new_folder_at_once(tmp_path):
    """A dashboard may make the very tables that a study is about to make."""
    folders = [tmp_path / str(n) for n in range(4)]
    for folder in folders:
        folder.mkdir()
        with ThreadPoolExecutor(6) as pool:
            names = [*pool.map(lambda _: optuna.get_all_study_names(folder_storage(folder)), range(6))]  # noqa: B023
        assert names == [[]] * 6


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16_products(), reason="this processor has no products of bf16 (AVX512-BF16)")
def test_a_study_of_mixed_precision_is_not_mixed_with_another(tmp_path, monkeypatch):
    local_market = f"sqlite:///{tmp_path / 'kallos.db'}"
    write_market(local_market)
    settings = small_settings(tmp_path, n_trials=1, model_name="gru", max_epochs=1)
    study = tune(settings, db=local_market, progress=False)
    assert study.trials[0].user_attrs["precision"] == "mixed"
    assert replays(local_market, settings)
    monkeypatch.setattr("kallos.core.devices.has_bf16_products", lambda: False)  # another machine
    with pytest.raises(
        ConfigError, match=r"cannot be compared with new ones: precision: the study has mixed, this run 32"
    ):
        tune(settings.model_copy(update={"n_trials": 2}), db=local_market, progress=False)
    with pytest.raises(ConfigError, match="this CPU has no bf16 products"):
        replays(local_market, settings)
    in_full = settings.model_copy(update={"study_name": "in_full", "precision": "32"})
    assert tune(in_full, db=local_market, progress=False).trials[0].user_attrs["precision"] == "32"
    assert replays(local_market, in_full)


def test_studies_of_postgresql_live_in_their_schemas(postgres_kwargs, postgres_url, tmp_path, monkeypatch):
    write_market(postgres_url)
    groups = {"volume_features": ["volume", "taker_buy_base_asset_volume"], "bounded_features": ["rsi", "mfi"]}
    groups |= {"unbounded_features": ["macd_diff"]}
    for schema, n_trials in (("optuna_studies", 2), ("second", 3), ("optuna_studies", 3)):
        study = run_tuning(
            asset_id="BTC", end_date=END, db_kwargs=postgres_kwargs, optuna_schema=schema, model_name="linear",
            study_name="linear_btc", target_col="close", feature_groups=groups, n_trials=n_trials,
            folds=2, output_path=str(tmp_path / schema), progress=False,
        )  # fmt: skip
        assert len(study.trials) == n_trials
        copy = optuna.load_study(study_name="linear_btc", storage=f"sqlite:///{tmp_path / schema / 'optuna.db'}")
        assert [t.params for t in copy.trials] == [t.params for t in study.trials]
        assert copy.best_trial.intermediate_values == study.best_trial.intermediate_values
    with psycopg.connect(postgres_url) as connection:
        names = connection.execute(
            "SELECT table_schema FROM information_schema.tables WHERE table_name = 'trials'"
        ).fetchall()
    assert {name for (name,) in names} == {"optuna_studies", "second"}


def test_forecasts_of_every_trial_are_kept(market, tmp_path):
    settings = small_settings(tmp_path, n_trials=2)
    study = tune(settings, db=market, progress=False)
    storage, store = study_storage(settings, market), studies.artifact_store(settings, market)
    table = load_table(settings, market)
    layout = study_layout(table, settings)
    for trial in study.trials:
        forecasts = studies.download_table(trial, "forecasts", storage=storage, store=store)
        for fold, part in forecasts.groupby("fold"):
            assert list(part["target_ts"]) == list(table.index[layout[fold].val_start : layout[fold].val_stop])
        assert {"fold_rmse_price", "fold_rmse_price_naive", "fold_skill", "fold_epochs", "fold_seconds"} <= set(
            trial.user_attrs
        )
        folds = [prepare_fold(table, bounds, settings=settings) for bounds in layout]
        assert replay(trial, folds, settings=settings) == trial.value


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_col": "close"}, "target_col"),
        ({"horizon": 2}, "horizon"),
        ({"folds": 3}, "fold_layout"),
        ({"feature_groups": {"bounded_features": ["rsi"]}}, "feature_groups"),
        ({"end_date": "2022-06-29"}, "data_fingerprint"),
        ({"seed": 1}, "seed"),
        ({"max_epochs": 3}, "max_epochs"),
        ({"model_name": "random_forest"}, "model_name"),
    ],
)
def test_another_question_under_the_same_name_is_refused(tmp_path, change, named):
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    write_market(url)
    same = SMALL | {"study_name": "one", "output_path": str(tmp_path), "n_trials": 1}
    tune(TuneSettings.from_values(same), db=url, progress=False)
    with pytest.raises(ConfigError, match=rf"study 'one' exists.*{named}"):
        tune(TuneSettings.from_values(same | change), db=url, progress=False)
    assert len(finished_trials(study_of(url, small_settings(tmp_path, study_name="one")))) == 1


def test_a_failing_network_fills_its_slot_and_says_why(market, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise TrainingError("the loss is NaN", received="epoch 2")

    monkeypatch.setattr("kallos.models.tuner.validate", fails)
    settings = small_settings(tmp_path, n_trials=2)
    with pytest.raises(TrainingError, match=r"no trial .* completed: the loss is NaN; got 'epoch 2'"):
        tune(settings, db=market, progress=False)
    assert len(finished_trials(study_of(market, settings))) == 2


def test_a_trial_that_died_before_its_first_heartbeat_is_run_again(market, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "GRACE_SECONDS", 1)
    settings = small_settings(tmp_path, n_trials=1)
    study = tune(settings, db=market, progress=False)
    study.enqueue_trial(study.trials[0].params, user_attrs={"slot": 1, "worker": "gone", "claim": "c"})
    study.ask()  # and nothing more is heard of it
    more = tune(settings.model_copy(update={"n_trials": 3}), db=market, progress=False)
    assert sorted(trial.user_attrs["slot"] for trial in finished_trials(more)) == [0, 1, 2]
    assert [trial.state.name for trial in more.trials].count("FAIL") == 1


def test_the_right_to_create_a_schema_is_needed_only_where_there_is_none(postgres_url, tmp_path):
    name = f"trader_{tmp_path.name.replace('-', '_')[-20:]}".lower()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'")
        connection.execute(f"CREATE SCHEMA mine AUTHORIZATION {name}")
    url = postgres_url.replace("postgres:secret-of-the-tests", f"{name}:x")
    settings = small_settings(tmp_path, optuna_schema="mine")
    assert optuna.get_all_study_names(study_storage(settings, url)) == []
    with pytest.raises(KallosError, match="permission denied"):
        study_storage(settings.model_copy(update={"optuna_schema": "yours"}), url)


def test_a_study_that_began_in_sqlite_is_not_replaced_by_a_copy(postgres_url, tmp_path):
    settings = small_settings(tmp_path, n_trials=1)
    for url in (f"sqlite:///{tmp_path / 'kallos.db'}", postgres_url):
        write_market(url)
    tune(settings, db=f"sqlite:///{tmp_path / 'kallos.db'}", progress=False)
    with pytest.raises(ConfigError, match=r"optuna.db holds a study of its own of that name"):
        tune(settings, db=postgres_url, progress=False)
    assert len(finished_trials(study_of(f"sqlite:///{tmp_path / 'kallos.db'}", settings))) == 1


def test_no_password_is_written_anywhere(postgres_kwargs, postgres_url, tmp_path):
    write_market(postgres_url)
    tune(small_settings(tmp_path, n_trials=1), db=postgres_url, progress=False)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if postgres_kwargs["postgres_password"].encode() in path.read_bytes()]
