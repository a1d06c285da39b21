"""Preflight: every line about data, settings and model is made to fail once; what mends itself is mended and kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa

from kallos.data.features import unregister
from kallos.data.mending import mend_bars
from kallos.data.records import read_quarantine
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, write_bars
from kallos.data.tables import connect
from kallos.workflow import preflight as module
from kallos.workflow.bar_checks import Tolerances
from kallos.workflow.checks import Check
from kallos.workflow.fit_costs import FitCost, Measured
from kallos.workflow.preflight import Preflight, run_preflight
from kallos.workflow.preparation import prepare_features
from kallos.workflow.settings import read_settings, settings_of

KEY = {"asset_id": "BTC", "timeframe": "1d"}
BARS = sample_bars(timeframe="1d", start="2018-01-01", end="2021-12-31")
TYPED = {"assets": ["BTC"], "timeframes": ["1d"], "model.name": "linear", "hpo.trials": 2, "split.folds": 3}
COST = FitCost({"input_chunk_length": 5, "alpha": 1.0}, 0.0, 1e-4, 1e-5, at=100)
MEASURED = Measured([COST], None, 5.0, 0.1, 1000, 700.0)


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """The measurement needs a process of its own, which only the tests about it wait for."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(module, "measure", lambda *_, **__: MEASURED)


@pytest.fixture
def url(tmp_path) -> str:
    """A database with bars and features of four years."""
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    engine = connect(url)
    write_bars(engine, BARS, **KEY, venue="sample")
    engine.dispose()
    prepare_features(url, **KEY)
    return url


def flown(url: str, typed: dict | None = None, **how) -> Preflight:
    settings = settings_of(read_settings(None, overrides=TYPED | (typed or {})), "1d")
    return run_preflight(settings, **KEY, db=url, **how)


def lines(flight: Preflight) -> dict[str, Check]:
    return {one.name: one for one in flight.findings}


TUNED = {"hyperparameters": {"input_chunk_length": 5, "alpha": 1.0}, "model_name": "linear", "horizon": 1}
UNFIT = {
    "missing": (None, "cannot read the parameters file: No such file"),
    "broken": ("{", "it is not JSON"),
    "no table": ({"hyperparameters": [1]}, "are no table"),
    "another question": (TUNED | {"horizon": 3}, "horizon: tuned for 3, given 1"),
    "later rows": (TUNED | {"end_date": "2021-10-01"}, "later than this training may see"),
    "no date": (TUNED | {"end_date": "soon"}, "end_date: must be a date such as"),
    "no such hyperparameter": ({"alhpa": 1.0, "input_chunk_length": 5}, "linear has no hyperparameter alhpa"),
    "no input": ({"alpha": 1.0}, "input_chunk_length"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_without_a_search_the_file_of_parameters_is_checked_as_training_would(url, tmp_path, name):
    content, said = UNFIT[name]
    file = tmp_path / "best.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    flight = flown(url, {"hpo.skip": True, "hpo.params_file": str(file)})
    assert flight.verdict == "BLOCKED"
    assert [said in one.text for one in flight.findings if one.status == "BLOCKED"] == [True], flight.findings


def test_without_a_search_no_folds_of_it_are_asked_for(url, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(module, "measure", lambda *asked, **how: tried.append((asked[1], how["largest"])) or MEASURED)
    (tmp_path / "best.json").write_text(json.dumps(TUNED))
    skip = {"hpo.skip": True, "hpo.params_file": str(tmp_path / "best.json"), "split.folds": 500}
    flight = flown(url, skip)
    assert flight.verdict == "OK_TO_TRAIN", flight.findings
    assert "folds" not in lines(flight) and lines(flight)["parameters"].status == "OK"
    assert tried == [([TUNED["hyperparameters"]], None)]
    assert lines(flown(url, {"split.folds": 500}))["folds"].status == "BLOCKED"


def run_sql(url: str, *statements: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def moment(row: int) -> int:
    return BARS["ts"].iloc[row].value // 10**6


def bars_of(url: str) -> pd.DataFrame:
    engine = connect(url)
    bars = read_bars(engine, **KEY)
    engine.dispose()
    return bars


def test_sound_data_may_be_trained_on(url):
    flight = flown(url)
    assert flight.verdict == "OK_TO_TRAIN", flight.findings
    assert [*flight.estimate["seconds"]] == ["preflight", "data", "tune", "train", "evaluate", "backtest", "bundle"]
    told = flight.as_json()
    assert told["verdict"] == "OK_TO_TRAIN" and told["end_date"] == flight.end_date


@pytest.mark.parametrize(
    ("name", "statement", "rule"),
    [
        ("values", "UPDATE bars SET close = NULL WHERE ts = {0}", "not_finite"),
        ("values", "UPDATE bars SET high = 9e999 WHERE ts = {0}", "not_finite"),
        ("values", "UPDATE bars SET low = -1 WHERE ts = {0}", "non_positive_price"),
        ("stamps", "UPDATE bars SET ts = ts + 60000 WHERE ts = {0}", "off_grid"),
    ],
)
def test_a_bar_that_is_none_is_kept_out_or_blocks(url, name, statement, rule):
    run_sql(url, statement.format(moment(700)))
    before = bars_of(url)
    kept = flown(url, fix=False)
    assert kept.verdict == "BLOCKED" and lines(kept)[name].is_bad and bars_of(url).equals(before)
    flight = flown(url)
    assert flight.verdict == "FIXED_AND_OK" and lines(flight)[name].status == "FIXED"
    assert "quarantine" in lines(flight)[name].original and lines(flight)["features"].status == "FIXED"
    engine = connect(url)
    assert read_quarantine(engine, **KEY)["rule"].tolist() == [rule]
    engine.dispose()
    assert flown(url).verdict == "OK_TO_TRAIN"


def test_bars_that_stand_twice_are_kept_once(url):
    run_sql(
        url,
        "CREATE TABLE others AS SELECT * FROM bars",
        "DROP TABLE bars",
        "ALTER TABLE others RENAME TO bars",
        f"INSERT INTO bars SELECT * FROM bars WHERE ts = {moment(500)}",
    )
    assert lines(flown(url, fix=False))["duplicates"].status == "BLOCKED"
    assert lines(flown(url))["duplicates"].status == "FIXED"
    assert bars_of(url)["ts"].equals(BARS["ts"])


def test_a_table_in_which_most_bars_are_none_is_left_to_a_person(url):
    run_sql(url, "UPDATE bars SET close = -close WHERE ts % 172800000 = 0 OR ts % 259200000 = 0")
    flight = flown(url)
    assert flight.verdict == "BLOCKED" and "cannot be mended here" in lines(flight)["values"].text


def test_a_column_that_a_feature_reads_is_missed(url):
    run_sql(url, "UPDATE bars SET taker_buy_base_asset_volume = NULL")
    features = {"features": {"bounded_features": ["taker_buy_ratio"]}}
    assert lines(flown(url, features))["columns"].status == "BLOCKED"
    run_sql(url, f"UPDATE bars SET taker_buy_base_asset_volume = 1 WHERE ts > {moment(100)}")
    assert lines(flown(url, features))["columns"].status == "WARN"


def test_a_feature_that_an_own_file_does_not_register_blocks(url, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from kallos.data.features import feature\n"
        "@feature('unbounded_features', inputs=['close'])\n"
        "def registered_here(columns):\n"
        "    return columns['close']\n"
    )
    flight = flown(url, {"features": {"bounded_features": ["no_such"]}, "data.own_features": str(own)})
    assert flight.verdict == "BLOCKED" and "no_such" in lines(flight)["settings"].text
    unregister("registered_here")


def test_gaps_are_warned_of_and_block(url):
    run_sql(url, f"DELETE FROM bars WHERE ts BETWEEN {moment(300)} AND {moment(350)}")
    assert lines(flown(url))["gaps"].status == "WARN"
    assert lines(flown(url, tolerances=Tolerances(missing=0.02)))["gaps"].status == "BLOCKED"


def test_lacking_bars_are_ingested_or_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "market.csv"
    BARS.to_csv(file, index=False)
    url, typed = f"sqlite:///{tmp_path / 'new.db'}", {"data.files": [str(file)]}
    assert flown(url, typed, fix=False).verdict == "BLOCKED" and not (tmp_path / "new.db").exists()
    flight = flown(url, typed)
    assert flight.verdict == "FIXED_AND_OK" and lines(flight)["data"].status == "FIXED"
    assert Path(lines(flight)["data"].original.split(";")[0]).is_file()
    assert flown(url, typed).verdict == "OK_TO_TRAIN"
    assert flown(f"sqlite:///{tmp_path / 'other.db'}").verdict == "BLOCKED"


def test_longer_bars_are_made_of_shorter_ones(tmp_path):
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    engine = connect(url)
    hours = sample_bars(timeframe="6h", start="2018-01-01", end="2021-12-31")
    write_bars(engine, hours[:-1], asset_id="BTC", timeframe="6h", venue="sample")
    engine.dispose()
    assert "Without --no-fix" in lines(flown(url, fix=False))["data"].mend
    flight = flown(url)
    assert lines(flight)["data"].original == "the bars of 6h" and len(bars_of(url)) == len(BARS) - 1


def test_a_database_that_is_none_blocks(tmp_path):
    (tmp_path / "kallos.db").write_text("no database " * 200)
    flight = flown(f"sqlite:///{tmp_path / 'kallos.db'}")
    assert flight.verdict == "BLOCKED" and lines(flight)["data"].is_bad


def test_features_that_are_not_those_of_the_bars_are_computed_anew(url):
    run_sql(url, f"UPDATE bars SET close = close * 1.001 WHERE ts = {moment(900)}")
    assert lines(flown(url, fix=False))["features"].status == "BLOCKED"
    assert lines(flown(url))["features"].status == "FIXED"
    run_sql(url, "DELETE FROM features", "UPDATE series SET features = NULL")
    assert "any of them" in lines(flown(url, fix=False))["features"].text


def test_a_dead_feature_is_warned_of(url, monkeypatch):
    flight = flown(url, tolerances=Tolerances(stuck=1e-9))
    assert lines(flight)["feature values"].status == "WARN" and flight.verdict == "OK_TO_TRAIN"


def test_a_target_that_stands_still_blocks_and_a_rare_direction_is_warned_of(url):
    assert lines(flown(url, tolerances=Tolerances(rare_class=0.6)))["label balance"].status == "WARN"
    run_sql(url, "UPDATE bars SET open = 100, high = 101, low = 99, close = 100")
    assert lines(flown(url))["label balance"].status == "BLOCKED"


def test_an_end_date_outside_the_data_blocks(url):
    assert lines(flown(url, {"split.end_date": "2030-01-01"}))["end date"].status == "BLOCKED"


def test_too_few_rows_for_the_folds_or_for_a_verdict_block(url):
    assert lines(flown(url, {"split.folds": 40}))["folds"].status == "BLOCKED"
    late = lines(flown(url, {"split.end_date": "2021-12-28"}))
    assert late["test rows"].status == "BLOCKED" and late["end date"].status == "OK"


def test_own_features_must_be_readable(url, tmp_path):
    assert lines(flown(url, {"data.own_features": str(tmp_path / "none.py")}))["own features"].status == "BLOCKED"


def test_bars_outside_the_named_span_are_not_looked_at(url):
    run_sql(url, f"UPDATE bars SET close = NULL WHERE ts = {moment(5)}")
    assert lines(flown(url, fix=False))["values"].status == "BLOCKED"
    span = {"data.start": "2019-06-01", "data.end": "2021-06-01"}
    found = lines(flown(url, span, fix=False))
    assert found["values"].status == "OK" and "731 bars" in found["values"].text
    assert found["features"].status == "BLOCKED"  # which were computed from all bars
    run_sql(url, f"UPDATE bars SET close = {float(BARS['close'].iloc[5])} WHERE ts = {moment(5)}")
    flight = flown(url, span, fix=False)
    found = lines(flight)
    assert "2019-06-03 00:00 to 2021-06-01 00:00" in found["end date"].text  # the first return needs two closes
    assert f"{flight.end_date:%Y-%m-%d}" == "2021-01-05"  # a fifth of the span is left to test on
    assert lines(flown(url, {"data.start": "2030-01-01"}))["settings"].status == "BLOCKED"


def test_longer_bars_go_as_far_as_shorter_ones(url):
    engine, half = connect(url), sample_bars(timeframe="12h", start="2018-01-01", end="2022-01-10")
    write_bars(engine, half, asset_id="BTC", timeframe="12h")
    engine.dispose()
    found = lines(flown(url, fix=False))["data"]
    assert found.status == "BLOCKED" and "shorter ones reach further" in found.text
    assert "made 10 bars of 1d" in lines(flown(url))["data"].text
    assert lines(flown(url, fix=False))["data"].status == "OK"
    assert bars_of(url)[: len(BARS)].equals(BARS[bars_of(url).columns])


def test_a_device_that_is_not_there_blocks(url):
    typed = {"model.name": "gru", "training.device": "cuda"}
    assert flown(url, typed).verdict == "BLOCKED"


@pytest.mark.parametrize("wrong", [{"loss": np.nan}, {"gradient": 0.0}, {"gradient": np.inf}])
def test_a_step_without_a_gradient_blocks(url, monkeypatch, wrong):
    cost = FitCost(**(vars(COST) | {"loss": 0.7, "gradient": 0.1} | wrong))
    monkeypatch.setattr(module, "measure", lambda *_, **__: Measured([cost], None, 5.0, 0.1, 1000, 700.0))
    assert lines(flown(url))["step"].status == "BLOCKED"


def test_a_model_larger_than_the_memory_blocks(url, monkeypatch):
    monkeypatch.setattr(module, "free_memory_mb", lambda: 600.0)
    assert lines(flown(url))["memory"].status == "BLOCKED"


@pytest.mark.slow
def test_a_network_goes_one_step_and_is_priced(url):
    flight = flown(url, {"model.name": "gru", "hpo.trials": 1}, seconds=0.1)
    assert flight.verdict == "OK_TO_TRAIN" and "forward and backward" in lines(flight)["step"].text
    assert flight.estimate["memory_mb"] > 300 and flight.estimate["seconds"]["tune"] > 1


@pytest.mark.slow
def test_the_command_ends_with_the_verdict(url, tmp_path):
    command = [sys.executable, "-c", "from kallos.main import main; main()", "preflight", "--config", "run.yaml"]
    (tmp_path / "run.yaml").write_text(
        "assets: [BTC]\ntimeframes: [1d]\nmodel: {name: linear}\nhpo: {trials: 2}\nsplit: {folds: 3}\n"
    )
    how = {"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | {"KALLOS_DB_URL": url}}
    done = subprocess.run([*command, "--json"], **how)
    assert done.returncode == 0 and json.loads(done.stdout)["verdict"] == "OK_TO_TRAIN", done.stderr
    run_sql(url, f"UPDATE bars SET close = NULL WHERE ts = {moment(700)}")
    done = subprocess.run([*command, "--no-fix"], **how)
    assert done.returncode == 5 and done.stdout.splitlines()[-1] == "BLOCKED", done.stderr


def test_mending_leaves_sound_bars_alone(url):
    engine = connect(url)
    done = mend_bars(engine, **KEY)
    engine.dispose()
    assert (done.kept_out, done.changed, done.copies) == (0, 0, 0)
