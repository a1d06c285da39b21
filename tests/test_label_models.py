"""Models on labels by the real command line: what a run leaves, tuning, cross-validation, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from kallos.core.runs import read_json, verify_manifest, write_json
from kallos.data.sample import sample_bars
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
    for name in ("hist_gradient_boosting", "hist_gradient_boosting_classifier"):
        said, _ = run(tmp_path, "train", *words, "--model-name", name)
        assert "On the validation rows: " in said and "skill" in said.lower() and "kallos-run tune" in said
        (folder,) = (tmp_path / "runs").glob(f"{name}_h5_2*")
        manifest = verify_manifest(folder / "manifest.json")
        paths = {item["path"] for item in manifest["artifacts"].values()}
        assert {"checkpoints/best_model/model.pt", "forecasts.parquet", "metrics.json"} < paths
        model, transformer, _ = load_run(folder)
        assert model.output_chunk_shift == 4 and transformer.target_scaler is not None
        assert read_json(folder / "metrics.json")["numbers"]["n"] == len(pd.read_parquet(folder / "forecasts.parquet"))
    assert 0 < read_json(folder / "metrics.json")["classes"]["log_loss"] < 3
    assert not [*(tmp_path / "runs").glob(".*")]


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


@pytest.mark.parametrize("name", ["random_forest_classifier", "hist_gradient_boosting"])
def test_long_labels_of_a_martingale_are_not_forecast(name, tmp_path):
    """Labels of twenty bars overlap; a model that remembers its rows would know the label next door."""
    bars, steps = sample_bars(timeframe="4h", start="2022-01-01", end="2022-12-31", seed=4), np.random.default_rng(4)
    close = 100 * np.exp(np.cumsum(0.01 * steps.standard_normal(len(bars))))
    opened = np.r_[100, close[:-1]]
    bars = bars.assign(open=opened, close=close, high=np.maximum(opened, close), low=np.minimum(opened, close))
    splits = write_splits(tmp_path, bars, "20")
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
    "too late": (("tune", "--horizon", 5, "--end-date", "2024-01-01"), "are known by"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, splits, tmp_path):
    said, problem = run(tmp_path, *words[:1], "--splits", splits, *words[1:], code=2)
    assert message in problem and said == "" and not [*tmp_path.iterdir()]


def test_a_classifier_needs_labelled_tables(tmp_path):
    words = ("tune", "--asset-id", "BTC", "--end-date", "2022-01-01", "--model-name", "logistic_classifier")
    _, problem = run(tmp_path, *words, "--no-report", code=2)
    assert "kallos-run: " in problem
    _, problem = run(tmp_path, "train", "--splits", tmp_path, "--horizon", 5, code=2)
    assert "no folder of tables" in problem
    _, problem = run(tmp_path, "train", "--asset-id", "BTC", "--end-date", "2022-01-01", code=2)
    assert "--params-file" in problem
