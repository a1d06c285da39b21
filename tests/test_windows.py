"""What a backtest may be judged on: the forecasts of every command, files without a manifest, looks and charges."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kallos.core.config import TuneSettings
from kallos.core.errors import ArtifactError, ConfigError
from kallos.core.runs import read_json, write_json, write_manifest
from kallos.core.schemas import FORECASTS, check_table
from kallos.data.sample import sample_bars
from kallos.evaluation import charges, windows
from kallos.evaluation.evaluation import evaluate
from kallos.evaluation.evaluation_settings import evaluation_settings
from kallos.evaluation.held_out import looks_path
from kallos.models import tuner
from kallos.models.container import TimeSeriesDataContainer
from kallos.models.cross_validation import ValidationSettings, cross_validate
from kallos.models.label_trainer import LabelTrainSettings, train_on_labels
from kallos.models.labelled import complete_from_splits
from kallos.models.parameters import merge_params
from kallos.models.partition import DataSettings, partition_bars
from kallos.models.tables import write_tables
from tests.study_runs import END, write_market

UNTIL = pd.Timestamp(END, tz="UTC")
SHORT = {"schemes": "cv", "n_splits": 3, "importance_repeats": 0}


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    """A folder with a small market, a study of three trials, and its evaluation over three bars ahead."""
    folder = tmp_path_factory.mktemp("windows")
    write_market(f"sqlite:///{folder}/kallos.db")
    given = {
        "asset_id": "BTC",
        "end_date": END,
        "model_name": "linear",
        "horizon": 3,
        "output_path": str(folder / "out"),
    }
    tuner.tune(TuneSettings.from_values(given | {"n_trials": 3, "folds": 2}), db=database(folder), progress=False)
    params = {"params_file": str(folder / "out" / "linear_BTC_best_params.json")}
    evaluate(evaluation_settings(given | params | SHORT), db=database(folder), progress=False)
    return folder


@pytest.fixture
def folder(market, tmp_path) -> Path:
    """A copy of that folder of one's own."""
    return Path(shutil.copytree(market, tmp_path / "market"))


def database(folder: Path) -> str:
    return f"sqlite:///{folder}/kallos.db"


def forecasts_in(folder: Path) -> Path:
    return folder / "out" / "linear_BTC_evaluation" / "test_forecasts.parquet"


def make_older(place: Path) -> None:
    """Takes out of a manifest what earlier versions did not write."""
    manifest = read_json(place)
    del manifest["data"]["seen"]
    manifest["results"]["test_seen"].pop("key", None)
    write_json(place, manifest)


# The boundary


def test_the_first_test_row_is_the_one_made_at_the_end_date(market):
    seen = windows.seen_until(forecasts_in(market))
    forecasts = check_table(pd.read_parquet(seen.path), FORECASTS, what="test forecasts")
    assert seen.until == UNTIL == forecasts["ts"].min()
    rows, marked = windows.test_rows(forecasts, seen)
    assert not marked and len(rows) == len(forecasts)
    moment = forecasts["ts"] - pd.Timedelta(days=2)
    earlier = forecasts.assign(ts=moment, target_ts=moment + pd.Timedelta(days=3))  # two of them reach over the end
    rows, marked = windows.test_rows(earlier, seen)
    assert not marked and rows["ts"].min() == UNTIL and len(rows) == len(forecasts) - 2
    whole, marked = windows.test_rows(earlier, seen, in_sample=True)
    assert marked and whole.equals(earlier)


@pytest.mark.parametrize("bars_before", [1, 2, 3, 4])
def test_a_forecast_that_reaches_over_the_boundary_is_left_out_and_an_earlier_one_refused(market, bars_before):
    seen = windows.seen_until(forecasts_in(market))
    later = pd.read_parquet(seen.path).query("ts >= @UNTIL")
    made = UNTIL - pd.Timedelta(days=bars_before)
    mixed = pd.concat([later.head(1).assign(ts=made, target_ts=made + pd.Timedelta(days=3)), later])
    assert windows.test_rows(mixed, seen, in_sample=True)[1]
    if bars_before < 3:
        rows, marked = windows.test_rows(mixed, seen)
        assert not marked and [*rows["ts"]] == [*later["ts"]]
        return
    with pytest.raises(ConfigError, match=r"1 of \d+ forecasts") as refused:
        windows.test_rows(mixed, seen)
    assert "--in-sample" in str(refused.value) and "kallos-run evaluate" in str(refused.value)


@pytest.mark.parametrize("scheme", ["cv", "walk-forward", "cpcv"])
def test_forecasts_out_of_fold_are_no_test(folder, scheme):
    given = {"asset_id": "BTC", "end_date": END, "model_name": "linear", "output_path": str(folder / "out")}
    given |= {"scheme": scheme, "n_splits": 3, "n_groups": 4, "refit_every": 200}
    settings = ValidationSettings.from_values(merge_params(given, folder / "out" / "linear_BTC_best_params.json"))
    run = cross_validate(settings, db=database(folder), progress=False)
    seen = windows.seen_until(run.folder / "forecasts.parquet")
    assert (seen.until, seen.kind) == (UNTIL, scheme)
    assert windows.is_seen(run.forecasts, seen).all()
    assert charges.charge_of(seen, database(folder))[0].n_trials == 3


def test_a_study_that_saw_later_rows_moves_the_boundary(folder):
    """As nobody can ask for on the command line, but in Python."""
    file = folder / "later.json"
    known = read_json(folder / "out" / "linear_BTC_best_params.json")
    write_json(file, known | {"end_date": "2022-09-30T00:00:00Z"})
    given = {"asset_id": "BTC", "end_date": END, "model_name": "linear", "horizon": 3, "params_file": str(file)}
    given |= {"output_path": str(folder / "later")} | SHORT
    found = evaluate(evaluation_settings(given | {"end_date": "2022-09-30"}), db=database(folder), progress=False)
    settings = found.settings.model_copy(update={"end_date": UNTIL.to_pydatetime()})
    earlier = evaluate(settings, db=database(folder), progress=False)
    seen = windows.seen_until(earlier.folder / "test_forecasts.parquet")
    assert seen.until == pd.Timestamp("2022-09-30", tz="UTC")
    with pytest.raises(ConfigError, match="are about rows that were seen"):
        windows.test_rows(pd.read_parquet(seen.path), seen)


def test_on_labels_the_end_of_the_validation_part_is_the_boundary(tmp_path):
    bars = sample_bars(timeframe="1d", start="2019-01-01", end="2021-12-31", seed=1)
    made = DataSettings(asset_id="BTC", timeframe="1d", horizons="2,5", output_path=tmp_path / "tables")
    write_tables(partition_bars(bars, settings=made))
    tables = TimeSeriesDataContainer.load(tmp_path / "tables")
    asked = {"splits": tmp_path / "tables", "model_name": "logistic_classifier", "horizon": 2}
    run = train_on_labels(LabelTrainSettings.from_values(complete_from_splits(asked | {"output_path": tmp_path / "r"})))
    known = windows.seen_until(run.folder / "forecasts.parquet")
    assert known.kind == "train-labels" and known.until == tables.val["t1_h5"].max()
    assert windows.is_seen(run.forecasts, known).all() and charges.charge_of(known)[0] is None
    params = str(write_json(tmp_path / "best.json", {"input_chunk_length": 3}))
    settings = evaluation_settings(asked | SHORT | {"params_file": params, "output_path": str(tmp_path / "out")})
    found = evaluate(settings, progress=False)
    seen = windows.seen_until(found.folder / "test_forecasts.parquet")
    assert seen.until == known.until <= found.held_out.forecasts["ts"].min()
    assert not windows.test_rows(found.held_out.forecasts, seen)[1]
    assert charges.charge_of(seen)[1].startswith("The parameters file names no study")
    make_older(seen.manifest_path)
    shutil.rmtree(tmp_path / "tables")  # the key can not be made once more, but it stands among the looks
    older = windows.seen_until(seen.path)
    assert older.until == seen.until
    assert charges.record_backtest(found.held_out.forecasts, older).models == 1


# What is refused


def test_what_nothing_vouches_for_is_refused(folder):
    lost = Path(shutil.move(forecasts_in(folder), folder / "lost.parquet"))
    copied = Path(shutil.copy(lost, forecasts_in(folder).with_name("other.parquet")))
    kept = next((folder / "out" / "linear_BTC_evaluation" / "test").glob("*.parquet"))
    for path in (lost, copied, kept):
        with pytest.raises(ArtifactError, match="no manifest vouches for these forecasts") as refused:
            windows.seen_until(path)
        assert "test_forecasts.parquet" in str(refused.value) and "--seen-until" in str(refused.value)
        assert windows.seen_until(path, stated=END).kind == "stated"


def test_a_changed_file_is_refused_and_its_boundary_stays(folder):
    path = forecasts_in(folder)
    pd.read_parquet(path).assign(y_pred=0.5).to_parquet(path)
    with pytest.raises(ArtifactError, match=r"changed since manifest\.json vouched for them"):
        windows.seen_until(path)
    with pytest.raises(ConfigError, match="says that rows known by 2022-06-30 were seen"):
        windows.seen_until(path, stated="2022-06-29T23:59")
    stated = windows.seen_until(path, stated="2022-07-31")
    assert stated.kind == "stated" and "was changed since" in stated.sentence
    assert charges.charge_of(stated)[0] is None


def test_a_later_statement_wins_and_an_equal_one_changes_nothing(folder):
    plain = windows.seen_until(forecasts_in(folder))
    assert windows.seen_until(forecasts_in(folder), stated=END) == plain
    moved = windows.seen_until(forecasts_in(folder), stated="2022-10-01")
    forecasts = pd.read_parquet(moved.path)
    with pytest.raises(ConfigError, match=r"\d+ of \d+ forecasts, made from 2022-06-30"):
        windows.test_rows(forecasts, moved)
    assert charges.record_backtest(forecasts, moved).models == 1  # it is still the evaluation's model


@pytest.mark.parametrize("manifest", [{"kind": "data"}, {"schema": 2}, {"settings": None}, {"kind": None}])
def test_a_manifest_that_does_not_say_what_was_seen_is_refused(folder, manifest):
    place = forecasts_in(folder).with_name("manifest.json")
    write_json(place, read_json(place) | manifest)
    with pytest.raises(ArtifactError):
        windows.seen_until(forecasts_in(folder))


@pytest.mark.parametrize("artifacts", [None, [], {"a": 1}, {"a": {}}, {"a": {"path": None}}])
def test_a_manifest_that_names_nothing_vouches_for_nothing(folder, artifacts):
    place = forecasts_in(folder).with_name("manifest.json")
    write_json(place, read_json(place) | {"artifacts": artifacts})
    with pytest.raises(ArtifactError, match="no manifest vouches"):
        windows.seen_until(forecasts_in(folder))


def test_a_table_that_holds_no_forecasts_is_refused(tmp_path):
    pd.DataFrame({"close": [1.0]}).to_parquet(tmp_path / "bars.parquet")
    write_manifest(
        tmp_path / "manifest.json", "data", settings={}, seed=0, data={}, artifacts=[tmp_path / "bars.parquet"]
    )
    (tmp_path / "text.parquet").write_text("ts,y_pred")
    for name in ("bars", "text"):
        with pytest.raises(ArtifactError, match="this is no file of forecasts"):
            windows.seen_until(tmp_path / f"{name}.parquet", stated=END)
    with pytest.raises(ArtifactError, match="there is no such file"):
        windows.seen_until(tmp_path)


# Looks and charges


def test_a_backtest_of_what_was_evaluated_is_the_same_look(folder):
    seen = windows.seen_until(forecasts_in(folder))
    forecasts = pd.read_parquet(seen.path)
    before = read_json(folder / "out" / "BTC_1d_test_looks.json")["looks"]
    looks = charges.record_backtest(forecasts, seen)
    assert [*looks.looks] == before == read_json(folder / "out" / "BTC_1d_test_looks.json")["looks"]
    assert looks.strategies == 0 and before[0]["rows"] == len(forecasts)
    short = charges.record_backtest(forecasts.tail(20), seen, strategy={"threshold": np.float64(0.1)})
    assert [look["rows"] for look in short.looks] == [len(forecasts)] and short.strategies == 1
    assert charges.record_backtest(forecasts, seen, strategy={"threshold": 0.1}).strategies == 1
    assert charges.record_backtest(forecasts, seen, strategy={"threshold": 0.2}).strategies == 2
    make_older(seen.manifest_path)
    assert charges.record_backtest(forecasts, windows.seen_until(seen.path)).models == 1


def test_an_evaluation_after_a_backtest_keeps_what_was_tried(folder):
    seen = windows.seen_until(forecasts_in(folder))
    charges.record_backtest(pd.read_parquet(seen.path), seen, strategy="a")
    given = {name: value for name, value in seen.settings.items() if name not in ("hyperparameters", "params_file")}
    params = {"params_file": str(folder / "out" / "linear_BTC_best_params.json"), "output_path": str(folder / "out")}
    found = evaluate(evaluation_settings(given | params), db=database(folder), progress=False)
    assert found.held_out.is_first and len(found.held_out.looks[0]["strategies"]) == 1


def test_stated_forecasts_are_a_look_of_their_own(folder):
    path = Path(shutil.copy(forecasts_in(folder), folder / "mine.parquet"))
    pd.read_parquet(path).assign(model="my own model!").to_parquet(path)
    seen, forecasts = windows.seen_until(path, stated=END), pd.read_parquet(path)
    looks = charges.record_backtest(forecasts, seen, strategy=1, folder=folder / "out")
    assert [look["model_name"] for look in looks.looks] == ["linear", "my own model!"]
    assert looks.looks[-1]["params_file"] == "mine.parquet" and "models: 2" in looks.sentence
    everything = windows.seen_until(path, stated="2030-01-01")
    assert charges.record_backtest(forecasts, everything, folder=folder / "new").looks == ()
    assert not (folder / "new").exists()


def test_a_folder_that_was_moved_is_understood(folder):
    moved = Path(shutil.move(folder / "out", folder.parent / "elsewhere"))
    make_older(moved / "linear_BTC_evaluation" / "manifest.json")
    shutil.rmtree(folder)
    seen = windows.seen_until(moved / "linear_BTC_evaluation" / "test_forecasts.parquet")
    assert "the study linear_BTC_1d_log_return_h3 chose its parameters" in seen.sentence


def test_another_study_is_not_charged_in_place_of_a_lost_one(folder):
    file = folder / "out" / "linear_BTC_best_params.json"
    seen, known = windows.seen_until(forecasts_in(folder)), read_json(file)
    manifest = read_json(seen.manifest_path)
    manifest["settings"]["params_file"] = str(file)
    write_json(seen.manifest_path, manifest)
    seen = windows.seen_until(seen.path)
    charge, said = charges.charge_of(seen, database(folder))
    assert charge.n_trials == 3 and "After 3 trials" in said
    assert charge.variance(365 / 3) == pytest.approx(charge.annual_variance * 3 / 365)
    write_json(file, known | {"hyperparameters": known["hyperparameters"] | {"alpha": 123.0}})
    assert "the parameters file has changed since" in charges.charge_of(seen, database(folder))[1]
    file.unlink()
    assert charges.charge_of(seen, database(folder))[0] is None


def test_the_record_of_looks_is_the_evaluations_own(folder):
    seen = windows.seen_until(forecasts_in(folder))
    charges.record_backtest(pd.read_parquet(seen.path), seen, strategy="a")
    own = evaluation_settings(
        {"asset_id": "BTC", "end_date": END, "params_file": seen.settings["params_file"], "output_path": folder / "out"}
    )
    assert len(read_json(looks_path(own))["looks"]) == 1
