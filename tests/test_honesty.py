"""What makes a number believable: the future changes nothing, validation rows train nothing, luck is not skill."""

import numpy as np
import optuna
import pandas as pd
import pytest

from kallos.core.config import TuneSettings
from kallos.core.devices import resolve_device
from kallos.data.features import compute_features
from kallos.data.sample import sample_bars
from kallos.evaluation.verdict import judge
from kallos.models.architectures import MODELS
from kallos.models.budget import run_budget
from kallos.models.datasets import DartsFold, add_target
from kallos.models.layouts import study_layout
from kallos.models.tuner import objective
from kallos.models.validation import FitPlan, forecast_after, prepare_fold, run_fold

PARAMS = {
    "gru": {"hidden_dim": 32, "n_rnn_layers": 1, "batch_size": 64, "input_chunk_length": 30, "learning_rate": 3e-3},
    "linear": {"input_chunk_length": 4, "alpha": 100.0},
    "hist_gradient_boosting": {"input_chunk_length": 4, "max_iter": 20},
}


def settings_of(model_name: str, target_col: str = "log_return", horizon: int = 1) -> TuneSettings:
    what = {"model_name": model_name, "target_col": target_col, "horizon": horizon}
    return TuneSettings.from_values({"asset_id": "BTC", "end_date": "2023-01-01", "folds": 3, "n_trials": 12} | what)


def rows_of(bars: pd.DataFrame, settings: TuneSettings) -> pd.DataFrame:
    table = compute_features(bars, timeframe="1d").set_index("ts")
    return add_target(table, settings.target_col, timeframe="1d")


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    return sample_bars(timeframe="1d", start="2019-01-01", end="2022-12-31", seed=5)


def score(table: pd.DataFrame, settings: TuneSettings, fold: int, layout) -> tuple[float, DartsFold]:
    prepared = prepare_fold(table, layout[fold], settings=settings)
    plan = FitPlan(n_epochs=3, device=resolve_device("cpu"))
    return run_fold(prepared, PARAMS[settings.model_name], settings=settings, plan=plan, seed=3).score, prepared


@pytest.mark.parametrize(
    ("model_name", "target_col", "horizon"),
    [
        ("gru", "log_return", 1),
        ("gru", "close", 2),
        ("linear", "log_return", 3),
        ("hist_gradient_boosting", "log_close", 1),
    ],
)
def test_bars_after_the_window_change_no_score(bars, model_name, target_col, horizon):
    settings = settings_of(model_name, target_col, horizon)
    table = rows_of(bars, settings)
    layout = study_layout(table, settings)
    for fold in (0, 1):
        end = table.index[layout[fold].val_stop - 1]  # the close of the window's last bar
        future = bars["ts"] >= end  # bars that open at that moment or later
        wild = bars.copy()
        noise = np.random.default_rng(0).uniform(0.2, 5.0, (int(future.sum()), 1))
        columns = bars.columns.drop(["ts", "is_filled"], errors="ignore")
        wild.loc[future, columns] = bars.loc[future, columns].to_numpy() * noise
        changed = rows_of(wild, settings)
        assert not changed.equals(table)
        assert score(changed, settings, fold, layout)[0] == score(table, settings, fold, layout)[0]


@pytest.mark.parametrize("target_col", ["log_return", "close"])
def test_validation_rows_change_no_scaler(bars, target_col):
    settings = settings_of("linear", target_col)
    table = rows_of(bars, settings)
    layout = study_layout(table, settings)
    wild = table.copy()
    wild.iloc[layout[0].train_stop :] *= 3.7
    ours, theirs = (prepare_fold(t, layout[0], settings=settings) for t in (table, wild))
    names = [*settings.feature_groups.names, target_col]
    pd.testing.assert_frame_equal(
        ours.transformer.transform(table[names]), theirs.transformer.transform(table[names]), check_exact=True
    )
    for (a, b), (c, d) in zip(ours.train, theirs.train, strict=True):
        assert np.array_equal(a.values(), c.values())
        assert np.array_equal(b.values(), d.values())
    assert not np.array_equal(ours.val[0][0].values(), theirs.val[0][0].values())


def test_a_training_row_does_change_the_score(bars):
    settings = settings_of("linear")
    table = rows_of(bars, settings)
    layout = study_layout(table, settings)
    wild = table.copy()
    wild.iloc[layout[0].train_stop - 10] *= 1.5
    assert score(wild, settings, 0, layout)[0] != score(table, settings, 0, layout)[0]


def tuned(table: pd.DataFrame, settings: TuneSettings) -> dict:
    """The best of a few trials on walk-forward folds of the rows known by the end date."""
    known = table.loc[: settings.end_date]
    folds = [prepare_fold(known, bounds, settings=settings) for bounds in study_layout(known, settings)]
    study = optuna.create_study()
    space = MODELS[settings.model_name].space
    run_budget(study, lambda trial, *_: objective(trial, folds, settings=settings), space=space, settings=settings)
    return study.best_params


def verdict_of(seed: int, signal: float, model_name: str):
    """The verdict on the rows after the end date of a market, of a model made from what was known by then."""
    settings = settings_of(model_name)
    table = rows_of(sample_bars(timeframe="1d", seed=seed, signal=signal), settings)
    params = tuned(table, settings) if model_name == "linear" else PARAMS[model_name]
    forecasts = forecast_after(
        table, settings.end_date, hyperparameters=params, settings=settings, n_epochs=5
    ).forecasts
    assert forecasts["ts"].min() >= settings.end_date
    return judge(forecasts)


def test_a_linear_model_finds_what_is_there():
    assert sum(verdict_of(seed, 0.2, "linear").has_skill for seed in range(3)) >= 2  # the test's power is about 0.7


def test_a_linear_model_finds_nothing_on_a_martingale():
    verdicts = [verdict_of(seed, 0.0, "linear") for seed in range(6)]
    assert sum(verdict.has_skill for verdict in verdicts) <= 1
    assert all(("No skill" in v.sentence) != v.has_skill for v in verdicts)


@pytest.mark.soak
@pytest.mark.parametrize("model_name", ["linear", "gru"])
def test_forty_martingales_show_no_more_skill_than_chance(model_name):
    found = [seed for seed in range(40) if verdict_of(seed, 0.0, model_name).has_skill]
    print(f"{model_name}: {len(found)} of 40 martingales show skill at the 5 % level: {found}")
    assert len(found) <= 5


@pytest.mark.soak
@pytest.mark.parametrize("model_name", ["linear", "gru"])
def test_the_predictable_market_is_found(model_name):
    verdicts = [verdict_of(seed, 0.2, model_name) for seed in range(10)]
    print(
        f"{model_name}: skill {[round(v.skill, 4) for v in verdicts]}, found {sum(v.has_skill for v in verdicts)} of 10"
    )
    # of 1,096 forecasts that save 4 % of the squared error the test recognises about seven in ten; by chance it is 5 %
    assert sum(verdict.has_skill for verdict in verdicts) >= 6
    assert sum(verdict.skill > 0 for verdict in verdicts) >= 9
