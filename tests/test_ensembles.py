"""Ensembles: what a model that learned by heart gains, what chance gains, and the command line from end to end."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsRegressor

from kallos.core.columns import NAIVE_PROBABILITIES, PROBABILITIES
from kallos.core.errors import ArtifactError
from kallos.core.metrics import skill
from kallos.core.runs import read_json, verify_manifest, write_json
from kallos.data.features import compute_features
from kallos.data.purged import CombinatorialPurgedCV, PurgedKFold
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.evaluation.verdict import judge
from kallos.models import base_forecasts, stacked_folds
from kallos.models.base_forecasts import ensemble_settings, forecast_bases
from kallos.models.ensemble_training import out_of_sample
from kallos.models.ensembles import EnsembleMethod, align_forecasts, fit_combination
from kallos.models.labelled import tables_digest
from kallos.models.partition import DataSettings, partition_bars
from kallos.models.saved_ensembles import load_ensemble, load_ensemble_rows
from kallos.models.stacked_folds import stack_folds
from kallos.models.tables import write_tables
from tests.study_runs import END, assert_refused, run_command, start_command, write_market

LINEAR = {"input_chunk_length": 4, "alpha": 100.0}
TREES = {"input_chunk_length": 3, "max_iter": 10, "max_leaf_nodes": 4}
BY_HEART = {
    "input_chunk_length": 5, "max_iter": 200, "learning_rate": 0.3, "max_leaf_nodes": 63, "min_samples_leaf": 1,
}  # fmt: skip
NETWORK = {
    "hidden_dim": 8, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 64, "input_chunk_length": 30,
    "learning_rate": 1e-3,
}  # fmt: skip
METHODS = {
    "mean": {"method": "voting"},
    "median": {"method": "voting", "weighting": "median"},
    "inverse error": {"method": "voting", "weighting": "inverse_error"},
    "stacking": {"method": "stacking"},
    "blending": {"method": "blending"},
}


# A model that learned its rows by heart

N, FOLDS = 1000, 5
TS = pd.date_range("2020-01-01", periods=N, freq="1D", tz="UTC")
GROUP = np.arange(N) * FOLDS // N


CLASSES = np.eye(3)


def forecasts_of(model: str, said: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """(N) numbers, or (N, 3) probabilities of classes."""
    names = {"asset_id": "BTC", "timeframe": "1d", "model": model, "fold": GROUP, "horizon": 1, "target": "log_return"}
    rows = pd.DataFrame({"ts": TS - pd.Timedelta("1D"), "target_ts": TS, **names, "close_at_ts": 100.0})
    if said.ndim == 1:
        return rows.assign(y_true=truth, y_pred=said, y_naive=0.0)
    p = dict(zip(PROBABILITIES, said.T, strict=True)) | dict.fromkeys(NAIVE_PROBABILITIES, 1 / 3)
    rows = rows.assign(target="label", y_true=truth.argmax(axis=1) - 1.0, y_pred=said[:, 2] - said[:, 0])
    return rows.assign(y_naive=0.0, return_true=0.0, **p)


def forecast_parts(inputs: np.ndarray, truth: np.ndarray, splitter) -> list[np.ndarray]:
    """For each fold what a nearest neighbour, trained on the fold's training rows, says of all rows."""
    folds = [np.flatnonzero(parts == 1) for parts in splitter.parts(TS)]
    return [KNeighborsRegressor(1).fit(inputs[train], truth[train]).predict(inputs) for train in folds]


def of_classes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) what happened, of three classes that are as frequent, and the forecasts of a model of no worth."""
    noise = 1 / 3 + rng.uniform(-0.1, 0.1, (N, 3))
    return CLASSES[rng.integers(0, 3, N)], noise / noise.sum(axis=1, keepdims=True)


def by_heart(seed: int, seen: float = 0.0, classes: bool = False) -> dict[str, object]:
    """A nearest neighbour's forecasts of a martingale, out of sample and in sample, beside a model of some worth."""
    rng = np.random.default_rng(seed)
    inputs, truth = rng.normal(size=(N, 3)), rng.normal(0, 0.03, N)
    said = seen * truth + rng.normal(0, 0.01, N)
    truth, said = of_classes(rng) if classes else (truth, said)
    fair, kfold, pairs = forecasts_of("fair", said, truth), PurgedKFold(FOLDS), CombinatorialPurgedCV(FOLDS, 2)
    outside = np.stack(forecast_parts(inputs, truth, kfold))[GROUP, np.arange(N)]
    inside = KNeighborsRegressor(1).fit(inputs, truth).predict(inputs)
    nested = dict(zip(pairs.test_groups(), forecast_parts(inputs, truth, pairs), strict=True))

    def known(fold: int):
        none = np.zeros_like(truth[0])
        said = np.array([nested[tuple(sorted({g, fold}))][i] if g != fold else none for i, g in enumerate(GROUP)])
        return aligned(said).select(fold != GROUP)

    def aligned(said: np.ndarray):
        return align_forecasts({"heart": forecasts_of("heart", said, truth), "fair": fair})

    return {"outside": aligned(outside), "inside": aligned(inside), "known": known}


def stacked(tested, known, how: EnsembleMethod) -> pd.DataFrame:
    number = tested.rows["fold"].to_numpy()
    folds = {fold: tested.select(number == fold) for fold in range(FOLDS)}
    return stack_folds(folds, known, how, name="stack").forecasts


@pytest.mark.parametrize("name", ["stacking", "blending", "inverse error"])
def test_a_model_that_learned_its_rows_by_heart_gains_nothing(name):
    how = EnsembleMethod(**METHODS[name])
    for seed in range(6):
        made = by_heart(seed)
        assert not judge(stacked(made["outside"], made["known"], how)).has_skill
        final = fit_combination(made["outside"], how)
        if name == "inverse error":  # which must share out all of its weight
            assert final.weights[0] < 0.5  # less than the model that knows nothing but is quiet
        else:
            assert final.weights[0] < 5 / np.sqrt(final.n_rows)  # mere noise: four of its standard deviations


@pytest.mark.parametrize("name", ["stacking", "blending", "inverse error"])
def test_the_same_stack_would_be_fooled_by_forecasts_in_sample(name):
    """The test above can fail: with forecasts that their model was fitted on, a stack shows skill where none is."""
    how, made = EnsembleMethod(**METHODS[name]), by_heart(0)
    inside = made["inside"]
    assert np.allclose(inside.deviations[:, 0], inside.truth)
    weight = fit_combination(inside, how).weights[0]
    assert weight > 0.85
    number = inside.rows["fold"].to_numpy()
    fooled = stacked(inside, lambda fold: inside.select(number != fold), how)
    assert judge(fooled).has_skill
    trusting = stacked(made["outside"], lambda fold: inside.select(number != fold), how)
    assert skill(trusting["y_true"], trusting["y_pred"], trusting["y_naive"]) < -0.5  # pays for its trust


@pytest.mark.parametrize("name", ["stacking", "blending", "inverse error"])
def test_a_classifier_that_learned_its_rows_by_heart_gains_nothing(name):
    how = EnsembleMethod(**METHODS[name])
    for seed in range(3):
        made = by_heart(seed, classes=True)
        assert not judge(stacked(made["outside"], made["known"], how)).has_skill
    inside = made["inside"]  # and the test can fail: in sample the classifier is always right
    number = inside.rows["fold"].to_numpy()
    assert judge(stacked(inside, lambda fold: inside.select(number != fold), how)).has_skill
    trusting = judge(stacked(made["outside"], lambda fold: inside.select(number != fold), how))
    assert trusting.skill < -0.3  # pays for its trust


def test_a_model_of_worth_is_found_beside_one_that_learned_by_heart():
    made, how = by_heart(1, seen=0.1), EnsembleMethod()
    forecasts = stacked(made["outside"], made["known"], how)
    alone = made["outside"].rows.assign(y_pred=made["outside"].deviations[:, 1])
    mean = stacked(made["outside"], made["known"], EnsembleMethod(method="voting"))
    stack, fair, vote = (skill(t["y_true"], t["y_pred"], t["y_naive"]) for t in (forecasts, alone, mean))
    assert judge(forecasts).has_skill and stack > fair - 0.005 and vote < 0


# Real models on markets whose truth is known


def market(url: str, *, seed: int = 1, power: float = 0.2, assets: tuple[str, ...] = ("BTC",)) -> None:
    engine = connect(url)
    for number, asset in enumerate(assets):
        bars = sample_bars(timeframe="1d", start="2019-01-01", end="2022-12-31", seed=seed + number, signal=power)
        write_bars(engine, bars, asset_id=asset, timeframe="1d", venue="sample")
        write_features(engine, compute_features(bars, timeframe="1d"), asset_id=asset, timeframe="1d")
    engine.dispose()


def ensemble_of(folder: Path, models: str, **changes):
    given = {"asset_id": "BTC", "end_date": "2022-12-31", "output_path": str(folder), "device": "cpu"}
    return ensemble_settings(given | {"models": models} | changes)


def all_ways(folder: Path, url: str, models: str, **changes) -> dict[str, pd.DataFrame]:
    """The forecasts out of sample of each way to combine the models."""
    found = {}
    for name, how in METHODS.items():
        settings = ensemble_of(folder, models, **how, **changes)
        bases = forecast_bases(settings, db=url, progress=False)
        before = settings.own.scheme == "walk-forward"
        stack = stack_folds(bases.tested, bases.known, settings, name=name, lookback=5, only_before=before)
        found[name] = stack.forecasts
    for k, model in enumerate(bases.whole.models):
        rows = bases.whole.rows
        found[model] = rows.assign(model=model, y_pred=rows["y_naive"] + bases.whole.deviations[:, k])
    return found


def skills(forecasts: dict[str, pd.DataFrame]) -> dict[str, float]:
    return {name: skill(t["y_true"], t["y_pred"], t["y_naive"]) for name, t in forecasts.items()}


@pytest.mark.slow
def test_a_stack_of_a_good_and_a_useless_model_is_as_good_as_the_good_one(tmp_path):
    url = f"sqlite:///{tmp_path}/kallos.db"
    market(url, power=0.3)
    write_json(tmp_path / "linear_BTC_best_params.json", LINEAR)
    write_json(tmp_path / "hist_gradient_boosting_BTC_best_params.json", BY_HEART)
    found = skills(all_ways(tmp_path, url, "linear,hist_gradient_boosting"))
    assert found["linear"] > 0.02 > 0 > found["hist_gradient_boosting"]
    assert found["stacking"] > found["linear"] - 0.01 and found["blending"] > found["linear"] - 0.03
    assert found["stacking"] > found["mean"] + 0.01


def verdicts_on_a_martingale(folder: Path, seed: int) -> dict[str, bool]:
    url = f"sqlite:///{folder}/kallos{seed}.db"
    market(url, seed=seed, power=0.0)
    write_json(folder / "linear_BTC_best_params.json", LINEAR)
    write_json(folder / "hist_gradient_boosting_BTC_best_params.json", TREES)
    found = all_ways(folder / str(seed), url, "linear,hist_gradient_boosting", params_files=[
        folder / "linear_BTC_best_params.json", folder / "hist_gradient_boosting_BTC_best_params.json"
    ])  # fmt: skip
    return {name: judge(found[name]).has_skill for name in METHODS}


@pytest.mark.slow
def test_no_ensemble_finds_anything_on_a_martingale(tmp_path):
    for seed in (3, 4):
        assert not any(verdicts_on_a_martingale(tmp_path, seed).values())


@pytest.mark.soak
def test_ensembles_of_forty_martingales_show_no_more_skill_than_chance(tmp_path):
    found = pd.DataFrame([verdicts_on_a_martingale(tmp_path, seed) for seed in range(40)])
    print(found.sum())
    assert (found.sum() <= 5).all()


@pytest.mark.slow
def test_what_comes_after_a_window_changes_nothing_in_it(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/kallos.db"
    market(url)
    for name, params in {"linear": LINEAR, "hist_gradient_boosting": TREES}.items():
        write_json(tmp_path / f"{name}_BTC_best_params.json", params)
    how = {"scheme": "walk-forward", "refit_every": 100}
    ours = all_ways(tmp_path, url, "linear,hist_gradient_boosting", **how)
    last = ours["mean"]["fold"].max() - 1
    end = ours["mean"].loc[ours["mean"]["fold"] == last, "target_ts"].max()
    load = base_forecasts.load_rows

    def wild(settings, db):
        table = load(settings, db)
        later = table.index > end
        table.loc[later] = table[later].sample(frac=1, random_state=0).to_numpy()
        return table

    monkeypatch.setattr(base_forecasts, "load_rows", wild)
    theirs = all_ways(tmp_path, url, "linear,hist_gradient_boosting", **how)
    for name in METHODS:
        before, after = (made[name][made[name]["fold"] <= last] for made in (ours, theirs))
        assert len(before) > 100 and before.equals(after), name
        assert not ours[name].equals(theirs[name])


# Labelled tables

PAIR = "logistic_classifier,hist_gradient_boosting_classifier"


def label_folder(folder: Path, *, end: str = "2022-12-31") -> Path:
    """The folder, with labelled tables that have a gap and end raggedly, and what tune leaves of four models."""
    bars = sample_bars(timeframe="1d", start="2019-01-01", end=end, seed=4).drop(range(900, 903))
    made = DataSettings(asset_id="BTC", horizons="10", output_path=folder / "splits")
    write_tables(partition_bars(bars.reset_index(drop=True), settings=made))
    tables = {"tables": tables_digest(folder / "splits"), "horizon": 10}
    for model, params in {
        "logistic_classifier": {"input_chunk_length": 2, "C": 0.001},
        "hist_gradient_boosting_classifier": TREES,
        "linear": LINEAR,
        "hist_gradient_boosting": TREES,
    }.items():
        write_json(folder / f"{model}_BTC_best_params.json", tables | {"hyperparameters": params})
    return folder


def touching(rows: pd.DataFrame, judged: pd.DataFrame) -> int:
    """How many of the rows have a label whose span shares a moment with that of a judged one."""
    ours, theirs = ((table["ts"].to_numpy(), table["target_ts"].to_numpy()) for table in (rows, judged))
    overlap = (ours[0][:, None] <= theirs[1]) & (ours[1][:, None] >= theirs[0])
    return int(overlap.any(axis=1).sum())


@pytest.mark.slow
def test_no_combination_is_fitted_on_a_label_that_touches_a_judged_one(tmp_path, monkeypatch):
    folder, fitted = label_folder(tmp_path), []
    fit = stacked_folds.fit_combination
    monkeypatch.setattr(stacked_folds, "fit_combination", lambda base, how: fitted.append(base.rows) or fit(base, how))
    ways = {
        "cv": {"models": PAIR, "n_splits": 4},
        "cpcv": {"models": PAIR, "n_groups": 4, "n_test_groups": 2},
        "walk-forward": {"models": "linear,hist_gradient_boosting", "refit_every": 90},
    }
    for scheme, how in ways.items():
        settings = ensemble_settings({"splits": folder / "splits", "output_path": folder, "scheme": scheme} | how)
        bases, before = forecast_bases(settings, progress=False), scheme == "walk-forward"
        fitted.clear()
        unpurged = 0
        made = out_of_sample(settings, bases)
        for fold, rows in zip(made.combinations, fitted, strict=True):
            judged = bases.tested[fold].rows
            assert len(rows) >= 50 and touching(rows, judged) == 0
            last = rows["ts"].max() + pd.Timedelta("10D")  # what a label settled early says waits for the others
            assert not before or last < judged["ts"].min()
            unpurged += touching(bases.known(fold).rows, judged)
        assert unpurged > 0  # or the assertion above could not fail


@pytest.mark.slow
def test_the_command_takes_labelled_tables(tmp_path):
    folder = label_folder(tmp_path)
    tuned = ("--splits", "splits", "--model-name", "logistic_classifier", "--n-trials", 2, "--folds", 2)
    run_command(folder, "tune", *tuned, "--pruner", "none", "--no-report")
    best = read_json(folder / "logistic_classifier_BTC_best_params.json")
    assert best["tables"] == tables_digest(folder / "splits")
    said = run_command(folder, "ensemble", "--splits", "splits", "--models", PAIR, "--n-splits", 4)
    out = folder / "stacking_BTC_ensemble"
    manifest, metrics = verify_manifest(out / "manifest.json"), read_json(out / "metrics.json")
    assert metrics["sentence"] in said and "Brier" in said and "4 folds" in said
    scores = manifest["results"]["scores"]
    assert {*scores} == {*PAIR.split(","), "stacking"}
    assert metrics["classes"]["pooled"][0]["brier"] == pytest.approx(scores["stacking"]["brier"])
    ensemble = load_ensemble(out / "manifest.json")
    rows = load_ensemble_rows(ensemble, splits=folder / "splits")
    whole = load_ensemble_rows(ensemble, splits=folder / "splits", end_date=best["end_date"])["BTC"]
    assert (whole.index[len(rows["BTC"])] - rows["BTC"].index[-1]).days > 1  # a hole, which is not forecast across
    ahead = ensemble.predict(rows, n_rows=3)
    assert np.allclose(ahead[PROBABILITIES].sum(axis=1), 1)
    assert np.allclose(ahead["y_pred"], ahead["p_up"] - ahead["p_down"]) and ahead["y_pred"].nunique() == 3
    judged = ("evaluate", "--ensemble", out / "manifest.json", "--schemes", "cv", "--n-splits", 4, "--no-report")
    said = run_command(folder, *judged)
    assert read_json(folder / "stacking_BTC_evaluation" / "evaluation.json")["sentence"] in said and "test rows" in said
    scaler = out / "logistic_classifier_BTC" / "logistic_classifier_BTC_scaler.pkl"
    scaler.write_bytes(scaler.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="is changed"):
        load_ensemble(out / "manifest.json")
    words = ("ensemble", "--splits", "splits", "--models")
    assert_refused(
        folder, *words, "logistic_classifier,linear", message="no classifier goes with a regressor (logistic"
    )
    assert_refused(folder, *words, PAIR, "--horizon", 7, message="was tuned for something else: horizon")
    label_folder(folder / "later", end="2023-06-30")
    others = ("ensemble", "--splits", "later/splits", "--models", PAIR)
    assert_refused(folder, *others, message="logistic_classifier was tuned on other tables")


# The command line


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with a small market in its database, and what tune would have left of two models."""
    (tmp_path / "data").mkdir()
    write_market(f"sqlite:///{tmp_path}/data/kallos.db")
    write_json(tmp_path / "linear_BTC_best_params.json", {"model_name": "linear", "hyperparameters": LINEAR})
    write_json(tmp_path / "hist_gradient_boosting_BTC_best_params.json", TREES)
    return tmp_path


WHAT = ("--asset-id", "BTC", "--end-date", END, "--n-splits", 4)
TWO = ("--models", "linear,hist_gradient_boosting")


@pytest.mark.slow
def test_the_command_judges_trains_and_saves_and_a_model_that_joins_is_fitted_alone(folder):
    said = run_command(folder, "ensemble", *WHAT, *TWO, "--max-epochs", 3)
    out = folder / "stacking_BTC_ensemble"
    manifest, metrics = verify_manifest(out / "manifest.json"), read_json(out / "metrics.json")
    assert manifest["kind"] == "ensemble" and metrics["sentence"] in said and "4 folds" in said
    forecasts = pd.read_parquet(out / "forecasts.parquet")
    assert forecasts["target_ts"].is_unique and forecasts["target_ts"].max() <= pd.Timestamp(END, tz="UTC")
    assert metrics["paths"][0]["n"] == len(forecasts) and set(forecasts["model"]) == {"stacking"}
    assert all(name in said for name in ("linear", "hist_gradient_boosting", "weight"))
    ensemble = load_ensemble(out / "manifest.json")
    rows = load_ensemble_rows(ensemble, f"sqlite:///{folder}/data/kallos.db", end_date=END)
    ahead = ensemble.predict(rows, n_rows=2)
    assert ahead["target_ts"].iloc[-1] == rows["BTC"].index[-1] + pd.Timedelta("1D") and ahead["y_pred"].notna().all()

    words = ("evaluate", "--ensemble", out / "manifest.json")
    said = run_command(folder, *words, "--schemes", "cv", "--n-splits", 4)
    found = read_json(folder / "stacking_BTC_evaluation" / "evaluation.json")
    assert found["sentence"] in said and "linear: The parameters file names no study" in found["search_sentence"]
    assert [look["model_name"] for look in found["held_out"]["looks"]] == ["stacking"]
    assert "An ensemble of linear" in (folder / "stacking_BTC_evaluate.html").read_text(encoding="utf8")
    message = "--model-name has no meaning beside --ensemble"
    assert_refused(folder, *words, "--model-name", "linear", message=message)
    assert_refused(folder, "evaluate", *WHAT, message="nothing says what is to be evaluated")

    kept = folder / "folds_BTC_1d"
    files = [*kept.glob("*.parquet"), *(out / "linear_BTC").glob("*.pt")]
    done = {path: path.stat().st_mtime_ns for path in files}
    assert len(done) == 2 * (4 + 6) + 1
    write_json(folder / "gru_BTC_best_params.json", {"model_name": "gru", "n_epochs": 2, "hyperparameters": NETWORK})
    run_command(
        folder, "ensemble", *WHAT, "--models", "linear,hist_gradient_boosting,gru", "--max-epochs", 3, "--n-jobs", 2
    )
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len([*kept.glob("*.parquet")]) == 3 * (4 + 6)
    assert load_ensemble(out / "manifest.json").combination.models == ("linear", "hist_gradient_boosting", "gru")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WHAT, "--models", "linear,gru,lstm"), "without a parameters file; got 'gru: gru_BTC_best_params.json, lstm"),
        ((*WHAT[:4], "--n-splits", 2, *TWO), "use 3 or more, got 2"),
        ((*WHAT, *TWO, "--weighting", "median"), "weighting is of voting, and this is stacking"),
        (
            (*WHAT, "--models", "linear,linear@ETH", "--params-files", ",".join(["linear_BTC_best_params.json"] * 2)),
            "no features of 'ETH' in '1d'",
        ),
        (WHAT, "Missing option '--models'"),
        ((*WHAT, "--models", "linear"), "an ensemble needs at least two models"),
        ((*WHAT, *TWO, "--dask-scheduler", "tcp://127.0.0.1:1"), "no Dask scheduler answers"),
    ],
    ids=["no file", "few groups", "idle option", "no features", "no models", "one model", "no scheduler"],
)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, folder):
    assert_refused(folder, "ensemble", *words, message=message)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_folds_that_are_done(folder):
    write_json(folder / "gru_BTC_best_params.json", {"model_name": "gru", "n_epochs": 2, "hyperparameters": NETWORK})
    words = (*WHAT[:4], "--models", "linear,gru", "--max-epochs", 15, "--scheme", "walk-forward", "--refit-every", 80)
    process, kept = start_command(folder, "ensemble", *words), folder / "folds_BTC_1d"
    while process.poll() is None and (not kept.exists() or len([*kept.glob("[!.]*.parquet")]) < 6):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in kept.glob("[!.]*.parquet")}
    assert not (folder / "stacking_BTC_ensemble" / "manifest.json").exists()
    run_command(folder, "ensemble", *words)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    run_command(
        folder,
        "ensemble",
        *words,
        "--output-path",
        "whole",
        "--params-files",
        "linear_BTC_best_params.json,gru_BTC_best_params.json",
    )
    ours, theirs = (
        pd.read_parquet(f / "stacking_BTC_ensemble" / "forecasts.parquet") for f in (folder, folder / "whole")
    )
    assert ours.equals(theirs)
