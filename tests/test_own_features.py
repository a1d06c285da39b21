"""A person's own features: looked up wherever a name is read, in this process and in those that it begins."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import joblib
import pytest

from kallos.core.errors import ConfigError
from kallos.core.runs import read_json
from kallos.data.features import feature_info, group_of, registered, unregister
from kallos.data.own_files import telling_own_file
from kallos.filed_settings import file_settings
from kallos.workflow.part_runs import read_part
from kallos.workflow.parts import digest_of, read_steps
from kallos.workflow.steps import Work, do_step, inputs_of
from tests import pipelines as p

CODE = """
from pathlib import Path

import numpy as np

from kallos.data.features import feature

with Path(__file__).with_name("ran.txt").open("a") as file:
    file.write("x")


@feature("unbounded_features", inputs=["high", "low"], warmup=1)
def own_range(bars):
    "Range of the bar."
    return FACTOR * np.log(bars["high"] / bars["low"])
"""
STEPS = ("preflight", "data", "tune", "train", "evaluate")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with one feature, named in the environment."""
    file = tmp_path / "own.py"
    file.write_text(CODE.replace("FACTOR", "1"))
    monkeypatch.setenv("KALLOS_OWN_FEATURES", str(file))
    yield file
    if "own_range" in registered.__globals__["_REGISTRY"]:
        unregister("own_range")


def test_a_name_that_is_not_registered_is_looked_for_in_the_file_which_runs_once(own):
    assert group_of("rsi") == "bounded_features"
    assert not own.with_name("ran.txt").exists()
    assert group_of("own_range") == group_of("own_range_1w") == "unbounded_features"
    assert "own_range" in registered()
    assert own.with_name("ran.txt").read_text() == "x"


def test_a_relative_path_is_seen_from_the_working_folder(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    monkeypatch.setenv("KALLOS_OWN_FEATURES", "own.py")
    assert feature_info("own_range").warmup == 1


def test_a_file_that_changed_is_run_again_and_what_it_lost_is_unknown(own):
    assert feature_info("own_range").warmup == 1
    own.write_text(CODE.replace("FACTOR", "1").replace("warmup=1", "warmup=7"))
    assert registered()["own_range"].warmup == 7
    own.write_text(CODE.replace("own_range", "own_other"))
    assert "own_range" not in registered()
    unregister("own_other")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "there is no such file of features"),
        ("1 / 0", "does not run (ZeroDivisionError: division by zero)"),
        ("raise SystemExit(3)", "does not run (SystemExit: 3)"),
        ("1 + 1", "the file registers no feature"),
        (CODE.replace("FACTOR", "1").replace("own_range", "own_other"), "KALLOS_OWN_FEATURES names, does not register"),
        (CODE.replace("FACTOR", "1") + "1 / 0", "does not run"),
    ],
    ids=["missing", "raises", "leaves", "empty", "another name", "raises at its end"],
)
def test_a_file_that_is_no_good_is_one_clear_error(own, code, said):
    own.unlink() if code is None else own.write_text(code)
    with pytest.raises(ConfigError) as error:
        feature_info("own_range")
    assert said in str(error.value)
    if "own_other" in registered.__globals__["_REGISTRY"]:
        unregister("own_other")


def test_without_a_file_the_error_says_what_to_do():
    with pytest.raises(ConfigError, match="name the file that registers it in KALLOS_OWN_FEATURES"):
        feature_info("own_range")


def test_processes_that_are_begun_know_the_feature(own):
    code = "from kallos.data.features import group_of; print(group_of('own_range'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "unbounded_features"
    with joblib.parallel_config(backend="loky"):
        found = joblib.Parallel(n_jobs=2)(joblib.delayed(group_of)(name) for name in ("own_range", "rsi"))
    assert found == ["unbounded_features", "bounded_features"]


def test_a_file_of_settings_tells_its_file_of_features(own, monkeypatch):
    monkeypatch.delenv("KALLOS_OWN_FEATURES")
    config = own.with_name("mine.yaml")
    config.write_text(f"assets: [BTC]\ndata: {{own_features: {own}}}\nfeatures: {{unbounded_features: [own_range]}}\n")
    assert file_settings({"config": config}).features.names == ["own_range"]
    assert group_of("own_range") == "unbounded_features"


# A run


SETTINGS = ("model.name=linear", "hpo.trials=2", "split.folds=2", "features.bounded_features=[rsi]")
SETTINGS += ("features.unbounded_features=[log_return_1,own_range]", "data.own_features=own.py")
SETTINGS += ("evaluation.n_splits=2", "evaluation.importance_repeats=1", "backtest.n_shuffles=10")
SETTINGS += ("backtest.sensitivity=false", "workers.n_jobs=1")


def all_of(folder: Path, *words: str, code: int = 0) -> str:
    """What `kallos-run all` says of a small run with the own feature."""
    typed = [word for setting in SETTINGS for word in ("--set", setting)]
    where = ("--assets", "BTC", "--timeframes", "1d", "--evaluation-schemes", "[cv]")
    return p.kallos(folder, "all", *where, *typed, *words, code=code)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a finished run, and what was said of it."""
    folder = p.with_market(tmp_path_factory.mktemp("own"))
    (folder / "own.py").write_text(CODE.replace("FACTOR", "1"))
    return folder, all_of(folder, "--run-id", "own")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_an_own_feature_delivers_all_but_the_bundle(done):
    folder, said = done
    run = folder / "reports" / "own"
    found = p.summary(run)
    assert (found["status"], found["exit_code"]) == ("done", 0)
    assert all(line["ok"] for line in found["checklist"])
    told = [line["why"] for line in found["checklist"] if line["path"] == "1d/bundle"]
    assert told == [found["parts"]["1d"]["no_bundle"]]
    assert told[0].startswith("no bundle: own features are code, which a bundle does not carry")
    assert told[0] in said
    assert "no bundle" in (run / "index.html").read_text()
    assert not (run / "1d" / "bundle").exists()
    assert {step["status"] for step in found["parts"]["1d"]["steps"].values()} == {"done"}
    assert len(read_json(run / "manifest.json")["data"]["1d"]["own_features"]["sha256"]) == 64


def current(work: Work) -> dict[str, bool]:
    """Of each step, whether what went into it is what would go into it now."""
    steps = read_steps(work.part)
    return {step: steps[step]["inputs"] == digest_of(inputs_of(work, step)) for step in STEPS}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_file_redoes_the_steps_and_is_no_reproduction(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "copy")
    monkeypatch.chdir(folder)
    work = Work(read_part(folder / "reports" / "own", "1d"), f"sqlite:///{folder / 'kallos.db'}")
    assert current(work) == dict.fromkeys(STEPS, True)
    p.kallos(folder, "features", "--asset-id", "BTC", "--timeframe", "1d")  # which drops the column
    assert current(work) == {"preflight": False, "data": False, "tune": True, "train": True, "evaluate": True}
    (folder / "own.py").write_text(CODE.replace("FACTOR", "(2 + (bars['low'] > 30_000))"))
    assert current(work) == dict.fromkeys(STEPS, False)
    assert "own.py is not as it was" in p.kallos(folder, "reproduce", "own", code=5)
    before = read_json(folder / "reports" / "own" / "1d" / "steps" / "data.json")["features"]["fingerprint"]
    with telling_own_file("own.py"):
        for step in ("preflight", "data"):  # which make the columns those of the file; the rest is other inputs
            do_step(work, step)
    assert read_json(work.part.steps / "data.json")["features"]["fingerprint"] != before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_single_commands_know_the_feature_by_the_variable(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "copy", ignore=shutil.ignore_patterns("reports"))
    groups = '{"unbounded_features": ["log_return_1", "own_range"]}'
    one = ("--asset-id", "BTC", "--timeframe", "1d", "--model-name", "linear", "--end-date", "2024-06-01")
    one += ("--feature-groups", groups)
    best = ("--params-file", "linear_BTC_best_params.json")
    tuning = ("tune", *one, "--n-trials", "2", "--folds", "2", "--n-jobs", "2", "--no-report")
    assert "name the file that registers it in KALLOS_OWN_FEATURES" in p.kallos(folder, *tuning, code=2)
    monkeypatch.setenv("KALLOS_OWN_FEATURES", os.fspath(folder / "own.py"))
    p.kallos(folder, *tuning)
    p.kallos(folder, "train", *one, *best)
    p.kallos(folder, "evaluate", *one, *best, "--schemes", "cv", "--n-splits", "2", "--importance-repeats", "1")
