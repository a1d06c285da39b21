"""The file of settings: what is refused and how that is told, what is read and typed, what each step gets."""

import json
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from kallos.core.config import TrainSettings, TuneSettings, as_parameters
from kallos.core.errors import ConfigError
from kallos.evaluation.backtest_settings import BacktestSettings
from kallos.evaluation.evaluation_settings import EvaluateSettings
from kallos.workflow.pipeline_settings import PipelineSettings
from kallos.workflow.setting_words import overrides_of, setting_options
from kallos.workflow.settings import (
    backtest_settings,
    data_settings,
    end_date_of,
    evaluate_settings,
    read_settings,
    settings_of,
    train_settings,
    tune_settings,
)
from kallos.workflow.settings_text import all_settings, settings_text

END = datetime(2023, 1, 1, tzinfo=UTC)
WHERE = {"asset_id": "BTC", "timeframe": "1h", "end_date": END, "folder": Path("out")}
PRUNERS = "none, median, successive_halving, hyperband, wilcoxon, progressive"


@pytest.fixture
def file(tmp_path):
    """A function that writes a file of settings and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(path: Path | None, **typed: object) -> str:
    with pytest.raises(ConfigError) as refused:
        read_settings(path, overrides=typed)
    return str(refused.value)


# What is refused, with its line and what is allowed

REFUSED = {
    "a choice": ("hpo:\n  pruner: foo\n", f"line 3: hpo.pruner: must be one of {PRUNERS}; got 'foo'"),
    "a number": ("hpo:\n  trials: many\n", "line 3: hpo.trials: must be a whole number, 1 or more; got 'many'"),
    "a limit": ("hpo:\n\n  trials: 0\n", "line 4: hpo.trials: must be a whole number, 1 or more; got 0"),
    "a truth for a number": (
        "hpo: {trials: true}\n",
        "line 2: hpo.trials: must be a whole number, 1 or more; got True",
    ),
    "both limits": ("labels: {horizon: 501}\n", "labels.horizon: must be a whole number, from 1 to 500; got 501"),
    "an open limit": ("split: {test_share: 1}\n", "must be a number, more than 0 and below 1; got 1"),
    "a date": ("split: {end_date: soon}\n", "line 2: split.end_date: must be a date such as 2023-01-01"),
    "a timeframe": ("timeframes: [1h, 7m]\n", "line 2: timeframes.1: unknown timeframe; got '7m'. Use one of 1m, 3m"),
    "workers": ("workers: {n_jobs: 0}\n", "workers.n_jobs: must be 1 or more, or -1 for one a core; got 0"),
    "a model": ("model: {name: grue}\n", "model.name: must be one of gru, lstm, rnn"),
    "a scheme": ("evaluation: {schemes: [cvv]}\n", "evaluation.schemes: must be some of cv, walk-forward, cpcv"),
    "a section": ("hpo: 5\n", "line 2: hpo: must be a table of trials, timeout"),
    "a typo": (
        "hpo:\n  trails: 5\n",
        "line 3: hpo.trails: no such setting; did you mean trials? Known are trials, timeout",
    ),
    "an unknown section": ("hpoo: {trials: 5}\n", "line 2: hpoo: no such setting; did you mean hpo? Known are assets"),
    "twice": ("seed: 1\nseed: 2\n", "line 3: seed stands in line 2 already"),
    "no asset": ("assets: []\n", "line 1: assets: must be a list of 1 or more, each a name of letters"),
    "a bad name": ("assets: [../BTC]\n", "assets.0: may hold letters, digits"),
    "an asset twice": ("assets: [BTC, BTC]\n", "line 1: assets: names BTC twice"),
    "skip alone": ("hpo: {skip: true}\n", "line 2: hpo.skip: must be false unless hpo.params_file names"),
    "no skip": ("hpo: {params_file: a.json}\n", "line 2: hpo.params_file: has no meaning beside a search"),
    "groups": (
        "evaluation:\n  n_groups: 4\n  n_test_groups: 4\n",
        "line 4: evaluation.n_test_groups: must be below evaluation.n_groups, 4, or no group is left to train on",
    ),
    "long files": ("data: {files_timeframe: 1h}\n", "line 2: data.files_timeframe: must divide 15m"),
    "files of two assets": (
        "assets: [BTC, ETH]\ndata: {files: [a.csv]}\n",
        "line 2: data.files: holds the bars of one asset",
    ),
    "odd files": ("timeframes: [4h]\ndata: {files_timeframe: 3m}\n", None),
    "files between": (
        "timeframes: [4h, 2h]\ndata: {files_timeframe: 8h}\n",
        "data.files_timeframe: must divide 4h, 2h",
    ),
    "an end after the data": (
        "data: {end: 2023-01-01}\nsplit: {end_date: 2023-06-01}\n",
        "line 3: split.end_date: must be before data.end, 2023-01-01, or no row is left to test on; got '2023-06-01'",
    ),
    "an end before the data": (
        "data: {start: 2023-01-01}\nsplit: {end_date: 2022-06-01}\n",
        "must be after data.start",
    ),
    "a backward range": ("data: {start: 2023-01-01, end: 2022-01-01}\n", "data.end: must be after data.start"),
    "no such hyperparameter": (
        "model:\n  search_space:\n    dropuot: 0.1\n",
        "line 4: model.search_space.dropuot: no such hyperparameter of gru; did you mean dropout?",
    ),
    "no range": (
        "model: {search_space: {dropout: {low: 1, high: 0}}}\n",
        "search_space.dropout: must have low below high",
    ),
    "a class from a number": (
        "labels: {target_col: label}\nbacktest: {signal: probability}\n",
        "line 2: model.name: gru forecasts numbers, not classes",
    ),
    "a return of a class": (
        "labels: {target_col: label}\nmodel: {name: logistic_classifier}\n",
        "line 2: backtest.signal: must be probability or rank for the target label",
    ),
    "a size of a class": (
        "labels: {target_col: label}\nmodel: {name: logistic_classifier}\nbacktest: {signal: rank, sizing: kelly}\n",
        "line 4: backtest.sizing: must be fixed or volatility for the target label",
    ),
    "too far": ("model: {name: tcn}\nlabels: {horizon: 40}\n", "model.name: tcn forecasts fewer than 30 bars ahead"),
    "mixed on cuda": ("training: {precision: mixed, device: cuda}\n", "must be one of auto, 32, bf16, 16 on cuda"),
    "half on a processor": ("training: {precision: 16, device: cpu}\n", "training.precision: must be one of auto, 32"),
    "exact and mixed": ("training: {precision: mixed, exact: true}\n", "must not be mixed with training.exact: true"),
    "no network": ("model: {name: linear}\ntraining: {gradient_clip: 1}\n", "has no meaning for linear"),
    "said twice": (
        "model: {search_space: {batch_size: 32}}\ntraining: {batch_size: 32}\n",
        "line 3: training.batch_size: says what model.search_space says too",
    ),
    "a feature": ("features: {bounded_features: [moonphase]}\n", "line 2: features: unknown feature; got 'moonphase'"),
    "no leverage on spot": ("backtest: {market: spot, leverage: 2}\n", "leverage on spot needs a lender"),
    "no short on spot": ("backtest: {market: spot, side: both}\n", "backtest.side: must be long on spot"),
    "two clocks": ("backtest: {leave: horizon, holding: 4}\n", "holding is for positions that leave by signal"),
    "no rank": ("backtest: {signal: cross_rank}\n", "backtest.signal: must be return, probability or rank"),
    "no timeframe of its": ("per_timeframe: {1d: {}}\n", "per_timeframe.1d: must be one of timeframes, 15m, 1h, 4h"),
    "a typo of its own": (
        "per_timeframe:\n  15m:\n    hpo: {trails: 3}\n",
        "line 4: per_timeframe.15m.hpo.trails: no such setting; did you mean trials?",
    ),
    "a combination of its own": (
        "per_timeframe:\n  15m:\n    evaluation: {n_groups: 2}\n",
        "line 4: per_timeframe.15m.evaluation.n_groups: with it, evaluation.n_test_groups must be below",
    ),
    "what is shared": ("per_timeframe: {15m: {workers: {at_once: 2}}}\n", "is one for all timeframes"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_file_is_refused_with_its_line_and_what_is_allowed(text, said, file):
    path = file(text if text.startswith("assets") else f"assets: [BTC]\n{text}")
    if said is None:
        assert read_settings(path)
        return
    told = refusal(path)
    assert said in told and told.startswith(f"{path}, line "), told
    assert told.count("\n") == 0, told


def test_all_faults_of_a_file_are_told_together(file):
    path = file("assets: [BTC]\nhpo:\n  pruner: foo\n  trails: 3\n  skip: true\nseed: -1\nevaluation: {n_groups: 2}\n")
    told = refusal(path, **{"training.patience": 0}).splitlines()
    places = sorted(line.split(": ")[0].split(", ")[-1] + " " + line.split(": ")[1] for line in told)
    assert places == [
        "line 3 hpo.pruner",
        "line 4 hpo.trails",
        "line 5 hpo.skip",
        "line 6 seed",
        "line 7 evaluation.n_test_groups",
        "the command line training.patience",
    ]
    assert told[-1].endswith("`kallos-run config` lists every setting.")


def test_a_combination_is_not_judged_where_a_part_of_it_is_wrong(file):
    told = refusal(file("assets: [BTC]\nevaluation: {n_groups: two, n_test_groups: 9}\n"))
    assert "n_groups: must be a whole number" in told and "n_test_groups" not in told


def test_what_asks_for_an_asset_says_so(file):
    assert "mine.yaml: assets: is required, a list of 1 or more" in refusal(file("seed: 1\n"))


# Own files, timeframes, overrides


def test_features_and_paths_may_have_files_of_their_own(file, tmp_path, monkeypatch):
    file("bounded_features: [rsi]\n", "features.yaml")
    file("reports: elsewhere\n", "paths.yaml")
    path = file("assets: [BTC]\nfeatures: features.yaml\npaths: paths.yaml\n")
    monkeypatch.chdir("/")
    settings = read_settings(path)
    assert (settings.features.names, settings.paths.reports) == (["rsi"], Path("elsewhere"))
    file("bounded_features: [rsi]\nother: [x]\n", "features.yaml")
    assert f"{tmp_path}/features.yaml, line 2: features.other: no such setting" in refusal(path)
    (tmp_path / "features.yaml").unlink()
    assert refusal(path).startswith(f"{path}, line 2: features: cannot read")


def test_own_files_are_found_from_the_projects_root_too(file, tmp_path, monkeypatch):
    for name in ("settings.ini", "config/train.yaml", "config/features.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("bounded_features: [mfi]\n")
    (tmp_path / "runs").mkdir()
    path = file("assets: [BTC]\nfeatures: config/features.yaml\n", "runs/mine.yaml")
    monkeypatch.chdir(tmp_path / "runs")
    assert read_settings(path).features.names == ["mfi"]


def test_a_timeframe_has_what_it_names_and_else_what_all_have(file):
    path = file("assets: [BTC]\ntraining: {patience: 3}\nper_timeframe: {15m: {training: {train_stride: 4}}}\n")
    settings = read_settings(path)
    own, other = settings_of(settings, "15m"), settings_of(settings, "4h")
    assert (own.training.train_stride, own.training.patience, other.training.train_stride) == (4, 3, 1)
    assert (own.timeframes, own.per_timeframe, own.data.files_timeframe) == (["15m"], {}, "15m")
    assert other.data.files_timeframe == "15m"
    assert PipelineSettings.from_values(as_parameters(own)) == own


def test_what_is_typed_wins_over_the_file_and_its_timeframes(file):
    text = (
        "assets: [BTC]\nhpo: &hpo {trials: 5}\nper_timeframe: {15m: {hpo: *hpo}, 1h: {hpo: {trials: 2, timeout: 9}}}\n"
    )
    path = file(text)
    settings = read_settings(
        path, overrides=overrides_of(["--hpo-trials", "7", "--set", "per_timeframe.4h.hpo.trials=3"])
    )
    found = {name: settings_of(settings, name).hpo for name in settings.timeframes}
    assert {name: hpo.trials for name, hpo in found.items()} == {"15m": 7, "1h": 7, "4h": 3}
    assert found["1h"].timeout == 9


def test_every_setting_can_be_typed(tmp_path):
    default = as_parameters(PipelineSettings(assets=["BTC"]))
    words = ["--assets", "BTC"]
    for option, name in setting_options().items():
        section, _, key = name.partition(".")
        value = default[section].get(key) if key else default.get(section)
        if value is not None and section != "assets" and name not in ("features", "paths"):
            words += [f"{option}={json.dumps(value) if not isinstance(value, str) else value}"]
    assert len(words) > 70
    assert read_settings(None, overrides=overrides_of(words)) == PipelineSettings(assets=["BTC"])


# There and back


@pytest.mark.parametrize(
    "text",
    [
        "",
        "split: {end_date: 2023-01-01T06:00}\ndata: {venue: binance, start: 2020-01-01}\npaths: {reports: a/b}\n",
        "model: {search_space: {dropout: [0, 0.1], learning_rate: {low: 1e-4, high: 1e-2, log: true}}}\n",
        "per_timeframe: {15m: {hpo: {timeout: null, trials: 2}, features: {bounded_features: [rsi]}}, 1h: {}}\n",
    ],
)
def test_settings_survive_a_manifest(text, file):
    settings = read_settings(file(f"assets: [BTC, ETH]\n{text}"))
    kept = json.loads(json.dumps(as_parameters(settings)))
    assert PipelineSettings.from_values(kept) == settings
    assert as_parameters(PipelineSettings.from_values(kept)) == kept
    assert pickle.loads(pickle.dumps(settings)) == settings


# What each step gets

CHANGED = {
    "n_trials": 50,
    "pruner": "median",
    "deterministic": True,
    "n_jobs": -1,
}  # what the pipeline decides otherwise


def test_the_study_gets_the_defaults_of_its_command(file):
    settings = settings_of(PipelineSettings(assets=["BTC"]), "1h")
    expected = {"asset_id": "BTC", "timeframe": "1h", "end_date": END, "output_path": "out"} | CHANGED
    assert tune_settings(settings, **WHERE) == TuneSettings.from_values(expected)
    assert tune_settings(settings, **WHERE, n_rows=10_000).val_length == 800
    assert tune_settings(settings, **WHERE, n_rows=100).val_length == 71


def test_training_evaluation_and_backtest_get_the_defaults_of_their_commands(file):
    settings = settings_of(PipelineSettings(assets=["BTC"]), "1h")
    best = file(json.dumps({"model_name": "gru", "n_epochs": 4, "hyperparameters": {}}), "best.json")
    shared = {
        "asset_id": "BTC",
        "timeframe": "1h",
        "end_date": END,
        "output_path": "out",
        "params_file": best,
        "n_epochs": 4,
    }
    assert train_settings(settings, **WHERE, params_file=best) == TrainSettings.from_values(shared)
    expected = EvaluateSettings.from_values(shared | {"n_jobs": -1})
    assert evaluate_settings(settings, **WHERE, params_file=best) == expected
    traded = {"forecasts": "f.parquet", "output_path": "out", "n_jobs": -1}
    made = backtest_settings(settings, forecasts=Path("f.parquet"), folder=Path("out"))
    assert made == BacktestSettings.from_values(traded)


def test_what_is_set_reaches_the_step(file):
    values = {
        "labels": {"horizon": 3, "kind": "forward_return", "profit_taking": 2},
        "training": {"gradient_clip": 1.5, "batch_size": 16, "max_samples_per_epoch": 99},
        "hpo": {"sampler": "random", "pruner": "progressive", "optuna_schema": "mine"},
        "model": {"search_space": {"dropout": 0.1}},
        "workers": {"n_jobs": 2, "gpus": 1},
        "split": {"val_share": 0.3, "embargo": 5},
        "data": {"start": "2021-02-03", "end": "2024-05-06"},
        "seed": 9,
    }
    settings = PipelineSettings.from_values({"assets": ["BTC"]} | values)
    study = tune_settings(settings, **WHERE)
    for name, value in {
        "horizon": 3, "gradient_clip": 1.5, "batch_size": 16, "max_samples_per_epoch": 99, "sampler": "random",
        "growing_epochs": True, "optuna_schema": "mine", "search_space": {"dropout": 0.1}, "n_jobs": 2, "gpus": 1,
        "embargo": 5, "seed": 9, "start_date": datetime(2021, 2, 3, tzinfo=UTC),
    }.items():  # fmt: skip
        assert getattr(study, name) == value, name
    tables = data_settings(settings, **WHERE)
    assert (tables.horizons, tables.labels, tables.profit_taking, tables.embargo) == ((3,), "forward_return", 2, 5)
    assert (round(tables.train_share, 9), tables.val_share, tables.end_date) == (0.7, 0.3, END)
    end = datetime(2024, 5, 6, tzinfo=UTC)
    judged = evaluate_settings(settings, **WHERE, params_file=file('{"hyperparameters": {}}', "best.json"))
    assert (judged.start_date, judged.last_date) == (study.start_date, end)
    assert backtest_settings(settings, forecasts=Path("f.parquet"), folder=Path("out")).last_date == end


def test_the_boundary_is_a_day_or_what_was_named():
    first, last = datetime(2023, 1, 1, 3, tzinfo=UTC), datetime(2023, 4, 11, 7, tzinfo=UTC)
    assert end_date_of(PipelineSettings(assets=["BTC"]), first, last) == datetime(2023, 3, 22, tzinfo=UTC)
    named = PipelineSettings(assets=["BTC"], split={"end_date": "2023-02-03T04:00"})
    assert end_date_of(named, first, last) == datetime(2023, 2, 3, 4, tzinfo=UTC)


# The commented file and the command


def test_the_committed_file_is_current_and_says_the_defaults(root):
    path = root / "config" / "train.yaml"
    assert path.read_text(encoding="utf8") == settings_text()
    assert read_settings(path) == PipelineSettings(assets=["BTC"])


def test_the_file_names_every_setting_below_its_section():
    lines, found, section = settings_text().splitlines(), set(), ""
    for line in lines:
        key = line.removeprefix("  ").removeprefix("# ").partition(":")[0]
        if not line.startswith((" ", "#")) and ":" in line:
            section = key
        found |= {section, f"{section}.{key}"}
    assert {*all_settings()} <= found
    assert max(map(len, lines)) <= 120


@pytest.fixture
def kallos_run(typed, monkeypatch, tmp_path):
    """A command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return typed


def test_the_command_writes_checks_and_lists(kallos_run, tmp_path):
    assert kallos_run("config", "--write", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == settings_text()
    code, _, error = kallos_run("config", "--write", "mine.yaml")
    assert code == 2 and "mine.yaml is there already" in error
    assert kallos_run("config", "--write", "mine.yaml", "--replace")[0] == 0
    _, said, _ = kallos_run("config", "--config", "mine.yaml", "--hpo-trials", "5", "--no-backtest-sensitivity")
    table = yaml.safe_load(said)
    assert (table["hpo"]["trials"], table["backtest"]["sensitivity"], table["assets"]) == (5, False, ["BTC"])
    code, _, error = kallos_run("config", "--config", "mine.yaml", "--hpo-trails", "5")
    assert code == 2 and "No such option: --hpo-trails; did you mean --hpo-trials?" in error
    assert error.count("\n") == 1
    _, listed, _ = kallos_run("config")
    assert all(f"  {name} " in listed for name in all_settings())
    assert {*json.loads(kallos_run("config", "--json")[1])["properties"]} >= {"assets", "per_timeframe"}


def test_help_says_that_any_setting_can_be_typed(kallos_run):
    for command in ("config", "tune", "train"):
        said = " ".join(kallos_run(command, "--help")[1].split())
        assert "Any setting of the file can be typed: --hpo-trials 50" in said
