"""Models on labels by the real command line: what a run leaves, tuning, judging, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import pandas as pd
import pytest

from kallos.core.runs import read_json, verify_manifest, write_json
from kallos.data.sample import sample_bars
from kallos.evaluation.evaluation import Evaluation, evaluate
from kallos.evaluation.evaluation_settings import EvaluateSettings
from kallos.evaluation.held_out import load_all_rows, look_once
from kallos.models import validation
from kallos.models.container import TimeSeriesDataContainer
from kallos.models.cross_validation import ValidationSettings, cross_validate
from kallos.models.label_trainer import load_run
from kallos.models.labelled import complete_from_splits
from kallos.models.partition import DataSettings, partition_bars
from kallos.models.tables import write_tables


def write_splits(folder: Path, bars: pd.DataFrame, horizons: str = "1,5", **settings: object) -> Path:
    """Labelled tables of the bars in that folder."""
    made = DataSettings(asset_id="BTC", timeframe="4h", horizons=horizons, output_path=folder / "splits", **settings)
    write_tables(partition_bars(bars, settings=made))
    return folder / "splits"


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    bars = sample_bars(timeframe="4h", start="2022-01-01", end="2022-12-31", seed=3)
    return write_splits(tmp_path_factory.mktemp("labels"), bars)


def run(folder: Path, *words: object, code: int = 0) -> tuple[str, str]:
    """What the command printed to both streams, run in the folder without a database; it must leave with the code."""
    command = [str(Path(sys.executable).with_name("kallos-run")), *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_training_leaves_a_run_that_can_be_loaded(splits, tmp_path):
    words = ("--splits", splits, "--horizon", 5, "--output-path", "runs")
    for name, more in (("hist_gradient_boosting", ["--no-report"]), ("hist_gradient_boosting_classifier", [])):
        said, _ = run(tmp_path, "train", *words, "--model-name", name, *more)
        assert "On the validation rows: " in said and "skill" in said.lower() and "kallos-run tune" in said
        (folder,) = (path for path in (tmp_path / "runs").glob(f"{name}_h5_2*") if path.is_dir())
        pages = [folder.with_name(f"{folder.name}_train.{end}") for end in ("ipynb", "html")]
        assert all(page.exists() != bool(more) and (str(page.name) in said) != bool(more) for page in pages)
        manifest = verify_manifest(folder / "manifest.json")
        paths = {item["path"] for item in manifest["artifacts"].values()}
        assert {"checkpoints/best_model/model.pt", "forecasts.parquet", "metrics.json"} < paths
        model, transformer, _ = load_run(folder)
        assert model.output_chunk_shift == 4 and transformer.target_scaler is not None
        assert read_json(folder / "metrics.json")["numbers"]["n"] == len(pd.read_parquet(folder / "forecasts.parquet"))
    assert 0 < read_json(folder / "metrics.json")["classes"]["log_loss"] < 3
    assert not [*(tmp_path / "runs").glob(".*")]
    report = nbformat.read(pages[0], as_version=4)
    outputs = [output for cell in report.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    verdict = said.splitlines()[0].removeprefix("On the validation rows: ")
    assert verdict in outputs[0]["data"]["text/markdown"]  # before anything else
    assert len([one for one in outputs if "application/vnd.plotly.v1+json" in one.get("data", {})]) == 2


@pytest.mark.slow
def test_labels_are_tuned_trained_and_cross_validated(splits, tmp_path):
    tuned = ("--splits", splits, "--horizon", 5, "--model-name", "logistic_classifier", "--pruner", "none")
    said, _ = run(tmp_path, "tune", *tuned, "--n-trials", 2, "--folds", 2)
    assert "Brier" in said or "skill" in said.lower()
    report = nbformat.read(tmp_path / "logistic_classifier_BTC_tune.ipynb", as_version=4)
    outputs = [output for cell in report.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("brier_skill" in output.get("data", {}).get("text/html", "") for output in outputs)
    params = ("--splits", splits, "--params-file", "logistic_classifier_BTC_best_params.json")
    said, _ = run(tmp_path, "train", *params)
    assert "may have been chosen by these rows" in said
    said, _ = run(tmp_path, "cv", *params, "--n-splits", 3)
    assert "3 folds" in said
    found = pd.read_parquet(tmp_path / "logistic_classifier_BTC_cv" / "forecasts.parquet")
    assert np.allclose(found[["p_down", "p_flat", "p_up"]].sum(axis=1), 1)
    assert (found["target_ts"] > found["ts"]).all() and (found["target_ts"] - found["ts"]).max() == 5 * pd.Timedelta(
        "4h"
    )


def martingale(seed: int, since: int = 0) -> pd.DataFrame:
    """A year of four-hourly bars; from the row `since` on, prices that nobody can forecast."""
    bars, steps = sample_bars(timeframe="4h", start="2022-01-01", end="2022-12-31", seed=4), np.random.default_rng(seed)
    start = bars["open"][since]
    close = start * np.exp(np.cumsum(0.01 * steps.standard_normal(len(bars) - since)))
    opened = np.r_[start, close[:-1]]
    prices = {"open": opened, "close": close, "high": np.maximum(opened, close), "low": np.minimum(opened, close)}
    bars.loc[since:, [*prices]] = pd.DataFrame(prices, index=bars.index[since:])
    return bars


@pytest.mark.parametrize("name", ["random_forest_classifier", "hist_gradient_boosting"])
def test_long_labels_of_a_martingale_are_not_forecast(name, tmp_path):
    """Labels of twenty bars overlap; a model that remembers its rows would know the label next door."""
    splits = write_splits(tmp_path, martingale(4), "20")
    deep = (
        {"max_depth": 12, "n_estimators": 20} if name.endswith("classifier") else {"max_leaf_nodes": 63, "max_iter": 50}
    )
    write_json(tmp_path / "best.json", {"input_chunk_length": 1, **deep})
    values = {
        "splits": splits,
        "model_name": name,
        "params_file": tmp_path / "best.json",
        "output_path": tmp_path / "out",
    }
    found = cross_validate(ValidationSettings.from_values(complete_from_splits(values)), progress=False).forecasts
    if name.endswith("classifier"):
        said, naive = ([f"p_{kind}{side}" for side in ("down", "flat", "up")] for kind in ("", "naive_"))
        happened = found["y_true"].to_numpy()[:, None] == (-1, 0, 1)
        losses = [np.square(found[names].to_numpy() - happened).sum(axis=1).mean() for names in (said, naive)]
    else:
        losses = [np.square(found["y_true"] - found[column]).mean() for column in ("y_pred", "y_naive")]
    assert losses[0] > losses[1]


# The whole verdict

PARAMETERS = {
    "logistic_classifier": {"input_chunk_length": 2, "C": 0.1},
    "linear": {"input_chunk_length": 2, "alpha": 10.0},
    "nlinear": {"input_chunk_length": 5, "batch_size": 256, "learning_rate": 1e-3},
}


def evaluation_settings(splits: Path, folder: Path, name: str, **more: object) -> EvaluateSettings:
    """The settings of the evaluation of one of `PARAMETERS` on these tables."""
    file = write_json(folder / f"{name}.json", PARAMETERS[name])
    values = {"splits": splits, "model_name": name, "params_file": str(file), "output_path": str(folder), "horizon": 5}
    return EvaluateSettings.from_values(complete_from_splits(values | {"importance_repeats": 0} | more))


@pytest.mark.slow
def test_labels_are_evaluated_on_a_page(splits, tmp_path):
    test = TimeSeriesDataContainer.load(splits).test
    for name, error in (("logistic_classifier", "Brier score"), ("linear", "RMSE")):
        write_json(tmp_path / f"{name}.json", PARAMETERS[name])
        words = ("--splits", splits, "--horizon", 5, "--model-name", name, "--params-file", f"{name}.json")
        said, _ = run(tmp_path, "evaluate", *words, "--n-splits", 2, "--schemes", "cv", "--importance-repeats", 1)
        folder = tmp_path / f"{name}_BTC_evaluation"
        found = read_json(folder / "evaluation.json")
        assert found["sentence"] in said and "on the test rows, which decide" in said and error in found["sentence"]
        forecasts = pd.read_parquet(folder / "test_forecasts.parquet")
        assert forecasts["ts"].isin(test["ts"]).all() and len(forecasts) > 0.9 * len(test)
        report = nbformat.read(tmp_path / f"{name}_BTC_evaluate.ipynb", as_version=4)
        outputs = [output for cell in report.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
        shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
        assert (
            f"{error}, naive" in shown
            and f"{error} grows by" in shown
            and ("area under ROC" in shown) == (error == "Brier score")
        )
        assert len([one for one in outputs if "application/vnd.plotly.v1+json" in one.get("data", {})]) >= 6
    looks = verify_manifest(folder / "manifest.json")["results"]["test_seen"]["looks"]
    assert [look["model_name"] for look in looks] == ["logistic_classifier", "linear"] and "looked at 2 times" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic_classifier", "linear"])
def test_nothing_but_the_last_word_reads_the_test_table(name, tmp_path):
    """Two markets that part at the first test row: all that is said before the last word is the same to the bit."""
    found, tables = [], []
    for number in range(2):
        (folder := tmp_path / str(number)).mkdir()
        splits = write_splits(folder, martingale(number, since=1960))
        how = {"importance_repeats": 1, "n_splits": 3, "n_groups": 4, "refit_every": 300}
        found.append(evaluate(evaluation_settings(splits, folder, name, **how), progress=False))
        tables.append(TimeSeriesDataContainer.load(splits))
    one, other = found
    assert all(tables[0].table(part).equals(tables[1].table(part)) for part in ("train", "val"))
    assert one.settings.end_date == other.settings.end_date and not tables[0].test.equals(tables[1].test)
    for scheme in ("cv", "walk-forward", "cpcv"):
        assert one.runs[scheme].forecasts.equals(other.runs[scheme].forecasts)
    assert one.verdicts == other.verdicts and one.importance.equals(other.importance)
    assert not one.held_out.forecasts["y_true"].equals(other.held_out.forecasts["y_true"])
    assert one.held_out_verdict != other.held_out_verdict


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_last_fit_learns_nothing_of_a_test_label(name, tmp_path):
    """Barriers touched early let labels of twenty bars end shortly before the test: none reaches into it."""
    splits, fitted = write_splits(tmp_path, martingale(4), "20", profit_taking=0.3, stop_loss=0.3), []
    settings = evaluation_settings(splits, tmp_path, name, horizon=20, max_epochs=1, device="cpu", precision="32")
    watched = validation.fit_fold

    def watch(fold, *args, **how):
        fitted.append(fold)
        return watched(fold, *args, **how)

    with patch.object(validation, "fit_fold", watch):
        table = load_all_rows(settings)
        held = look_once(settings, PARAMETERS[name], table=table, n_epochs=None, folder=tmp_path)
    sides = [*fitted[0].train, *(fitted[0].stop or [])]
    learned = pd.DatetimeIndex(np.concatenate([target.time_index for target, _ in sides])).tz_localize("UTC")
    tables = TimeSeriesDataContainer.load(splits)
    begins = held.forecasts["ts"].min()
    assert held.forecasts["ts"].isin(tables.test["ts"]).all()
    assert table.loc[learned, "t1"].max() <= learned.max() <= tables.val["ts"].iloc[-1] < begins
    known = tables.val["ts"].iloc[-1] - tables.val["ts"].iloc[0]
    assert learned.max() - tables.val["ts"].iloc[0] > 0.9 * known  # and yet the validation rows are learned from
    assert tables.test["ts"].iloc[0] - tables.val["ts"].iloc[-1] < 20 * pd.Timedelta("4h")  # the border is a tight one


def test_a_martingale_has_no_skill_on_labels(tmp_path):
    found: list[Evaluation] = []
    for seed in range(3):
        (folder := tmp_path / str(seed)).mkdir()
        splits = write_splits(folder, martingale(seed), "5")
        for name in ("logistic_classifier", "linear"):
            settings = evaluation_settings(splits, folder, name, schemes="cv")
            found.append(evaluate(settings, progress=False))
    assert sum(one.has_skill for one in found) <= 1
    assert all(("No skill" in one.sentence) != one.has_skill for one in found)
    assert sum(path.verdict.has_skill for one in found for path in one.verdicts["cv"]) <= 1


REFUSED = {
    "no horizon": (("train",), "labels of several horizons"),
    "no such horizon": (("train", "--horizon", 7), "no labels of this horizon"),
    "classes by a network": (("train", "--horizon", 5, "--model-name", "gru", "--target-col", "label"), "not classes"),
    "numbers by a classifier": (
        ("train", "--horizon", 5, "--model-name", "logistic_classifier", "--target-col", "return"),
        "forecasts classes",
    ),
    "another asset": (("tune", "--horizon", 5, "--asset-id", "ETH"), "another asset_id"),
    "a database": (("train", "--horizon", 5, "--db-url", "sqlite:///x.db"), "--db-url has no meaning beside --splits"),
    "a price": (("tune", "--horizon", 5, "--target-col", "log_return"), "return and label are the targets"),
    "epochs of the last fit": (
        ("evaluate", "--horizon", 5, "--n-epochs", 3, "--params-file", "best.json"),
        "--n-epochs has no meaning beside --splits",
    ),
    "too late": (("tune", "--horizon", 5, "--end-date", "2024-01-01"), "are known by"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, splits, tmp_path):
    said, problem = run(tmp_path, *words[:1], "--splits", splits, *words[1:], code=2)
    assert message in problem and said == "" and not [*tmp_path.iterdir()]


def test_an_evaluation_refuses_what_the_model_cannot_say(splits, tmp_path):
    write_json(tmp_path / "best.json", {"input_chunk_length": 2})
    words = ("evaluate", "--splits", splits, "--params-file", "best.json", "--model-name", "logistic_classifier")
    said, problem = run(tmp_path, *words, "--horizon", 5, "--target-col", "return", code=2)
    assert "forecasts classes" in problem and said == "" and [*tmp_path.iterdir()] == [tmp_path / "best.json"]


def test_a_classifier_needs_labelled_tables(tmp_path):
    words = ("tune", "--asset-id", "BTC", "--end-date", "2022-01-01", "--model-name", "logistic_classifier")
    _, problem = run(tmp_path, *words, "--no-report", code=2)
    assert "kallos-run: " in problem
    _, problem = run(tmp_path, "train", "--splits", tmp_path, "--horizon", 5, code=2)
    assert "no folder of tables" in problem
    _, problem = run(tmp_path, "train", "--asset-id", "BTC", "--end-date", "2022-01-01", code=2)
    assert "--params-file" in problem
