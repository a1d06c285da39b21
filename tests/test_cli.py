"""The command line as a person meets it: help, wrong input, data in, what tune and train are given, interruption."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import optuna
import pytest

import kallos
from kallos import main as command_line
from kallos import options, run_commands
from kallos.core.config import TrainSettings, TuneSettings
from kallos.core.runs import read_json
from kallos.data.assets import list_assets
from kallos.data.sample import sample_bars
from kallos.data.tables import connect
from kallos.evaluation import multiple_testing, trials
from kallos.workflow import reports
from kallos.workflow.parts import parts_of
from kallos.workflow.settings import read_settings
from kallos.workflow.steps import Work, do_step

SECRET = "pa55word"
GIVEN = {"asset_id": "BTC", "end_date": "2023-01-01"}
BTC = ("--asset-id", "BTC", "--timeframe", "1d")
RUN = ("--asset-id", "BTC", "--end-date", "2023-01-01")
PLAIN = "open_time,open,high,low,close,volume\n2023-01-01,1,2,1,2,5\n2023-01-02,2,3,1,1,6\n"


def kallos_run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command line, run where and how a person would."""
    code = "import sys; sys.argv[0] = 'kallos-run'; from kallos.main import main; main()"
    inherited = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=inherited | environment)


# Help


def test_the_top_says_what_the_exit_codes_mean(tmp_path):
    said = " ".join(kallos_run(cwd=tmp_path).stdout.split())
    for code, meaning in {
        0: "done",
        1: "a crash",
        2: "wrong use or input",
        3: "interrupted",
        4: "a step failed",
    }.items():
        assert f"{code} {meaning}" in said
    assert kallos_run("--version", cwd=tmp_path).stdout == f"kallos {kallos.__version__}\n"


# Defaults: said in three places, true in one


def shown_default(name: str) -> object:
    return options.OPTIONS[name].__metadata__[0].show_default


def test_the_options_show_the_defaults_of_the_settings():
    for settings in (TuneSettings, TrainSettings):
        for name, field in settings.model_fields.items():
            if isinstance(field.default, str | int) and not isinstance(field.default, bool):
                assert shown_default(name) == str(field.default), name


@pytest.mark.parametrize(("function", "names"), [(sample_bars, "start end seed signal")])
def test_the_options_show_the_defaults_of_the_functions(function, names):
    for name in names.split():
        assert shown_default(name) == str(inspect.signature(function).parameters[name].default), name


# Wrong input


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    """A folder whose data/kallos.db holds BTC with features, and ETH without."""
    folder = tmp_path_factory.mktemp("market")
    for asset in ("BTC", "ETH"):
        assert kallos_run("sample", "--asset-id", asset, "--timeframe", "1d", cwd=folder).returncode == 0
    assert kallos_run("features", *BTC, cwd=folder).returncode == 0
    (folder / "wrong.yaml").write_text("hpo:\n  trails: 5\n")
    (folder / "mine.yaml").write_text("assets: [BTC]\ntimeframes: [1d]\nhpo: {trials: 7}\nsplit: {folds: 3}\n")
    sample_bars(start="2024-01-01", end="2024-03-01").to_csv(folder / "days.csv", index=False)
    (folder / "wrong.json").write_text("[1, 2")
    (folder / "wrong.csv").write_text(PLAIN.replace("2,3,1,1,6", "2,3,1,4,6").replace("1,2,1,2,5", "1,0,1,2,5"))
    rows = "2023-01-01,BTC/USDT,1,2,1,2,5\n2023-01-01,ETH/USDT,1,2,1,2,5\n"
    (folder / "two.csv").write_text("open_time,symbol,open,high,low,close,volume\n" + rows)
    return folder


SMALL = ("--no-report", "--feature-groups")
WRONG = {
    "no such command": (("tuen",), "No such command 'tuen'"),
    "no such option": (("tune", "--n-trails", "3"), "No such option: --n-trails"),
    "a value is missing": (("features", "--timeframe", "1d"), "Missing option '--asset-id'"),
    "no name": (("ingest", "good.csv", "--timeframe", "1d"), "the instrument has no name"),
    "two symbols": (("ingest", "two.csv", *BTC), "two.csv: several instruments; got 'BTCUSDT, ETHUSDT'"),
    "no mapping": (("ingest", "good.csv", *BTC, "--map", "volume"), "--map takes column=name"),
    "unknown column": (("ingest", "good.csv", *BTC, "--map", "volume=amount"), "no column for --map volume=amount"),
    "wrong distance": (("ingest", "days.csv", "--asset-id", "X", "--timeframe", "1h"), "most bars are 1d apart"),
    "no number": (("tune", *RUN, "--n-trials", "many"), "Invalid value for '--n-trials'"),
    "nothing required": (("tune",), "asset_id is required; end_date is required"),
    "unknown asset": (("tune", "--asset-id", "DOGE", "--end-date", "2023-01-01"), "BTC 1d"),
    "unknown timeframe": (("tune", *RUN, "--timeframe", "7m"), "unknown timeframe"),
    "another timeframe": (("tune", *RUN, "--timeframe", "4h"), "no features of 'BTC' in '4h'"),
    "bad name": (("tune", "--asset-id", "../BTC", "--end-date", "2023-01-01"), "asset_id: may hold letters"),
    "no features": (("tune", "--asset-id", "ETH", "--end-date", "2023-01-01"), "no features of 'ETH'"),
    "wrong date": (("tune", "--asset-id", "BTC", "--end-date", "soon"), "end_date: must be a date"),
    "before the data": (("tune", "--asset-id", "BTC", "--end-date", "2011-01-01"), "in that range"),
    "unknown model": (("tune", *RUN, "--model-name", "grue"), "unknown model; got 'grue'"),
    "unknown target": (("tune", *RUN, "--target-col", "open"), "target_col: "),
    "no horizon": (("tune", *RUN, "--horizon", "0"), "horizon: "),
    "no such sampler": (("tune", *RUN, "--sampler", "grid"), "sampler: "),
    "no search space": (("tune", *RUN, "--search-space", "{"), "search_space: is not valid JSON"),
    "unknown hyperparameter": (("tune", *RUN, "--search-space", '{"depth": 3}'), "The model's own space is hidden_dim"),
    "no gradient": (("tune", *RUN, "--model-name", "linear", "--gradient-clip", "1"), "linear has no gradient"),
    "no trials": (("tune", *RUN, "--n-trials", "0"), "n_trials: "),
    "no groups": (("tune", *RUN, "--feature-groups", "{"), "not valid JSON"),
    "unknown group": (("tune", *RUN, "--feature-groups", '{"big": ["rsi"]}'), "unknown setting 'big'"),
    "no groups file": (("tune", *RUN, "--feature-groups", "none.yaml"), "cannot read none.yaml"),
    "unknown key": (("tune", *RUN, "--config", "wrong.yaml"), "wrong.yaml, line 2: hpo.trails: no such setting"),
    "unknown setting": (("tune", "--config", "mine.yaml", "--hpo-trails", "3"), "did you mean --hpo-trials?"),
    "no file of it": (("tune", *RUN, "--hpo-trials", "3"), "--hpo-trials is a setting of a file"),
    "another asset": (("tune", "--config", "mine.yaml", "--asset-id", "DOGE"), "no features of 'DOGE' in '1d'"),
    "no settings file": (("tune", *RUN, "--config", "none.yaml"), "cannot read none.yaml"),
    "unknown feature": (("tune", *RUN, *SMALL, '{"bounded_features": ["moonphase"]}'), "moonphase"),
    "wrong group": (("tune", *RUN, *SMALL, '{"volume_features": ["macd_diff"]}'), "not volumes: macd_diff"),
    "too few rows": (("tune", *RUN, "--folds", "50", "--no-report"), "50 folds need at least"),
    "short window": (("tune", *RUN, "--val-length", "5", "--no-report"), "val_length is too short; got 5"),
    "no parameters": (("train", *RUN, "--params-file", "none.json"), "cannot read the parameters file"),
    "no JSON": (("train", *RUN, "--params-file", "wrong.csv"), "it is not JSON"),
    "another model": (
        ("train", *RUN, "--params-file", "lstm.json", "--model-name", "gru"),
        "tuned for lstm, given gru",
    ),
    "no epochs": (("train", *RUN, "--params-file", "plain.json", "--no-report"), "names no n_epochs"),
    "no hyperparameter": (
        ("train", *RUN, "--params-file", "odd.json", "--no-report"),
        "gru has no hyperparameter depth",
    ),
    "unknown database": (("tune", *RUN, "--db-url", f"mysql://me:{SECRET}@host/name"), "unknown kind of database"),
    "no database": (("tune", *RUN, "--db-url", "sqlite:///none.db"), "there is no such database"),
    "no URL": (("features", *BTC, "--db-url", f"postgresql//me:{SECRET}@host"), "no URL of a database"),
    "no files": (("ingest", *BTC), "no files of bars"),
    "missing file": (("ingest", "none.csv", *BTC), "none.csv"),
    "no table": (("ingest", "wrong.json", *BTC), "wrong.json"),
    "unknown kind of file": (("ingest", "wrong.yaml", *BTC), "unknown kind of file"),
    "unknown exchange": (
        ("fetch", "--exchange", "bunance", "--symbol", "BTC/USDT", "--since", "2024-01-01"),
        "bunance",
    ),
    "two assets": (("features", "--asset-id", "BTC,ETH", "--timeframe", "1d"), "several instruments are named"),
    "no own features": (("features", *BTC, "--own-features", "none.py"), "there is no such file of features"),
    "no horizon to label": (("data", *BTC, "--horizons", "0"), "horizons: must be whole numbers from 1 to 500"),
    "no share": (("data", *BTC, "--train-share", "2"), "train_share: "),
    "wrong bars": (("ingest", "wrong.csv", *BTC), "no bar of wrong.csv can be used"),
    "another venue": (("ingest", "good.csv", *BTC, "--venue", "kraken"), "is another instrument in the database"),
    "no bars": (("features", "--asset-id", "DOGE", "--timeframe", "1d"), "no bars of 'DOGE' in '1d'"),
    "impossible signal": (("sample", *BTC, "--signal", "1"), "signal must lie between -1 and 1"),
    "empty range": (("sample", *BTC, "--start", "2025-01-02", "--end", "2025-01-01"), "no whole bar"),
    "wrong start": (("sample", *BTC, "--start", "soon"), "soon"),
    "no studies": (("dashboard",), "no optuna.db in this folder"),
    "no schema": (("dashboard", "--optuna-schema", "studies"), "no such schema in the database; got 'studies'"),
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_message_and_exit_code_2(words, market):
    typed, message = words
    (market / "good.csv").write_text(PLAIN)
    tables = {"lstm": {"model_name": "lstm", "hyperparameters": {}}, "plain": {"input_chunk_length": 30}}
    for name, table in (tables | {"odd": {"n_epochs": 1, "hyperparameters": {"depth": 3}}}).items():
        (market / f"{name}.json").write_text(json.dumps(table))
    run = kallos_run(*typed, cwd=market)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("kallos-run: ") and run.stderr.count("\n") == 1, run.stderr
    assert message in run.stderr
    assert run.stdout == "" and SECRET not in run.stderr


def test_mixed_precision_is_refused_where_the_processor_has_none(market):
    run = kallos_run("tune", *RUN, "--precision", "mixed", cwd=market, NUMBA_CPU_NAME="generic")
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "this CPU has no bf16 products; got 'mixed'. Use --precision 32" in run.stderr


def test_an_unreachable_database_is_named_without_its_password(market):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://me:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/crypto"
        runs = [
            kallos_run("tune", *RUN, "--db-url", url, cwd=market),
            kallos_run("tune", *RUN, cwd=market, KALLOS_DB_URL=url),
        ]
    for run in runs:
        assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
        assert "me:***@127.0.0.1" in run.stderr and SECRET not in run.stderr + run.stdout


# Data in


def test_data_goes_in_once_however_often_it_is_written(db_url, tmp_path):
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "BTC.csv").write_text(PLAIN)
    runs = [kallos_run("ingest", *BTC, "--venue", "here", cwd=tmp_path, KALLOS_DB_URL=db_url) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert "2 bars, 2023-01-01 00:00 to 2023-01-02 00:00; 2 new, 0 changed, 0 known" in runs[0].stdout
    assert "0 new, 0 changed, 2 known" in runs[1].stdout
    replaced = kallos_run("sample", *BTC, "--end", "2019-12-31", "--replace", "--db-url", db_url, cwd=tmp_path)
    assert "730 new, 0 changed, 0 known" in replaced.stdout, replaced.stderr
    features = kallos_run("features", *BTC, "--db-url", db_url, cwd=tmp_path)
    assert features.returncode == 0 and "430 rows of 730 bars" in features.stdout, features.stdout + features.stderr
    engine = connect(db_url)
    stored = list_assets(engine).iloc[0]
    engine.dispose()
    assert (stored["venue"], stored["bars"]) == ("sample", 730) and stored["features"] > 365


def test_one_wrong_file_among_many_changes_nothing(tmp_path):
    (tmp_path / "a.csv").write_text(PLAIN)
    (tmp_path / "b.csv").write_text("nonsense\n")
    run = kallos_run("ingest", "a.csv", "b.csv", *BTC, cwd=tmp_path)
    assert run.returncode == 2 and "b.csv" in run.stderr
    assert list_assets(connect(f"sqlite:///{tmp_path}/data/kallos.db")).empty


# What tune and train are given, and what they tell


METRICS = {"score": 0.9, "rmse": 0.03, "rmse_naive": 0.029, "rmse_price": 900.0, "rmse_price_naive": 880.0}
BEST = {"study_name": "demo", "n_trials": 3, "trial": 1, "metrics": METRICS | {"skill": -0.013, "folds": 3}}


@pytest.fixture
def in_process(market, tmp_path, monkeypatch, capsys):
    """A function that runs a command line in this process, with the notebook replaced by what it writes."""
    runs = []

    def run_notebook(kind, settings, *, output, db_url=None):
        runs.append((kind, settings, output, db_url))
        best = output.with_name(f"{settings.model_name}_{settings.asset_id}_best_params.json")
        output.parent.mkdir(exist_ok=True, parents=True)
        best.write_text(json.dumps(BEST))
        output.touch()

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kallos-run", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out + said.err

    run.runs = runs
    monkeypatch.setattr(reports, "run_notebook", run_notebook)
    verdict = SimpleNamespace(sentence="No skill: 3 %.")
    monkeypatch.setattr(trials, "judge_best_trial", lambda settings, db: verdict)
    charged = SimpleNamespace(sentence="Luck.")
    monkeypatch.setattr(multiple_testing, "judge_search", lambda settings, db: charged)
    monkeypatch.setenv("KALLOS_DB_URL", f"sqlite:///{market}/data/kallos.db")
    monkeypatch.chdir(tmp_path)
    return run


def test_only_what_was_typed_differs_from_the_defaults(in_process):
    code, said = in_process("tune", *RUN, "--seed", "0", "--patience", "7")
    assert code == 0, said
    [(kind, settings, output, db_url)] = in_process.runs
    assert (kind, output, db_url) == ("tune", Path("gru_BTC_tune.ipynb"), None)
    assert settings == TuneSettings.from_values(GIVEN | {"output_path": ".", "patience": 7})


def test_a_file_says_what_is_not_typed(in_process, market):
    code, said = in_process("tune", "--config", market / "mine.yaml")
    assert code == 0, said
    settings = in_process.runs[0][1]
    assert (settings.asset_id, settings.timeframe, settings.n_trials, settings.folds) == ("BTC", "1d", 7, 3)
    assert (settings.pruner, settings.deterministic, settings.output_path) == ("median", True, Path())


@pytest.mark.parametrize("span", [{}, {"data.start": "2021-02-03", "data.end": "2023-07-08"}])
def test_one_step_learns_from_the_rows_that_the_whole_run_learns_from(in_process, market, tmp_path, span):
    typed = [word for name, day in span.items() for word in (f"--{name.replace('.', '-')}", day)]
    code, said = in_process("tune", "--config", market / "mine.yaml", *typed)
    assert code == 0, said
    settings = in_process.runs[0][1]
    part = parts_of(read_settings(market / "mine.yaml", overrides=span), tmp_path / "run")[0]
    do_step(Work(part, f"sqlite:///{market}/data/kallos.db"), "data")
    found = read_json(part.steps / "data.json")
    end = datetime.fromisoformat(found["end_date"])
    assert settings.end_date == end
    first, last = (datetime.fromisoformat(found["bars"][name]) for name in ("first", "last"))
    assert (last - end) / (last - first) == pytest.approx(0.2, abs=0.001)  # a fifth of the time lies after it
    assert settings.val_length == int(0.4 * found["rows_before"]) // 3


def test_what_is_typed_wins_over_the_file(in_process, market):
    words = (
        "--folds",
        2,
        "--end-date",
        "2023-01-01",
        "--training-patience",
        9,
        "--hpo-trials=4",
        "--output-path",
        "here",
    )
    code, said = in_process("tune", "--config", market / "mine.yaml", *words)
    assert code == 0, said
    settings = in_process.runs[0][1]
    assert (settings.folds, settings.patience, settings.n_trials, settings.output_path) == (2, 9, 4, Path("here"))
    assert f"{settings.end_date:%Y-%m-%d}" == "2023-01-01"


def test_training_takes_what_the_parameters_say_over_the_file(in_process, market, tmp_path):
    best = {"model_name": "lstm", "horizon": 2, "n_epochs": 3, "train_stride": 2, "hyperparameters": {}}
    (tmp_path / "best.json").write_text(json.dumps(best | {"metrics": METRICS | {"skill": 0.1}}))
    code, said = in_process("train", "--config", market / "mine.yaml", "--params-file", "best.json", "--seed", 5)
    assert code == 0, said
    settings = in_process.runs[0][1]
    assert (settings.model_name, settings.horizon, settings.n_epochs, settings.train_stride) == ("lstm", 2, 3, 2)
    assert (settings.asset_id, settings.seed, settings.timeframe) == ("BTC", 5, "1d")


def test_tune_tells_its_result_in_words_and_the_next_command_whole(in_process):
    code, said = in_process("tune", *RUN, "--output-path", "my models", "--end-date", "2023-01-01T06:00")
    assert code == 0, said
    assert "demo: 3 finished trials; the best is number 1" in said
    assert "-1.3 % of squared error saved (worse than naive)\nOn the folds that chose it: No skill: 3 %.\n" in said
    assert "\nThe search charged: Luck.\n" in said
    assert "  my models/gru_BTC_best_params.json\n" in said and "  my models/gru_BTC_tune.ipynb\n" in said
    assert (
        "kallos-run train --model-name gru --asset-id BTC --params-file 'my models/gru_BTC_best_params.json' "
        "--end-date 2023-01-01T06:00:00 --output-path 'my models'\n"
    ) in said
    assert "kallos-run dashboard --folder 'my models'" in said


def test_the_next_command_names_the_database_but_no_password(in_process, market, monkeypatch):
    url = f"sqlite:///{market}/data/kallos.db"
    code, said = in_process("tune", *RUN, "--db-url", url)
    assert code == 0 and f"--db-url {url}\n" in said, said
    assert in_process.runs[0][3] == url
    monkeypatch.setattr(run_commands, "_check_run", lambda settings, db_url: None)
    code, said = in_process("tune", *RUN, "--db-url", f"postgresql://me:{SECRET}@host/name")
    assert code == 0 and '--db-url "$URL"\n' in said and SECRET not in said, said


def test_ctrl_c_says_how_to_go_on(in_process, monkeypatch):
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, "run_notebook", interrupt)
    code, said = in_process("tune", *RUN)
    assert code == 3
    assert said == (
        "kallos-run: interrupted; the finished trials of the study are kept, and the same command resumes it.\n"
    )


# Studies


@pytest.fixture
def study(db_url, tmp_path) -> tuple[str, ...]:
    """The words that name a study, in a folder or in a schema of PostgreSQL."""
    connect(db_url).dispose()
    if db_url.startswith("sqlite"):
        optuna.create_study(storage=f"sqlite:///{tmp_path}/optuna.db", study_name="of_the_test")
        return ("--folder", str(tmp_path))
    engine = connect(db_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA studies")
    engine.dispose()
    storage = db_url.replace("postgresql:", "postgresql+psycopg:") + "?options=-csearch_path%3Dstudies"
    optuna.create_study(storage=storage, study_name="of_the_test")
    return ("--db-url", db_url, "--optuna-schema", "studies")


def test_the_dashboard_shows_the_study_until_it_is_stopped(study, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from kallos.main import main; main()"
    words = [sys.executable, "-c", code, "dashboard", *study, "--port", str(port), "--json"]
    server = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answer = ""
    for _ in range(300):
        try:
            with urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as page:
                answer = page.read().decode()
            break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    taken = kallos_run("dashboard", *study, "--port", port, cwd=tmp_path)
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    assert "of_the_test" in answer
    assert json.loads(server.stdout.read()) == {"url": f"http://127.0.0.1:{port}"}
    assert taken.returncode == 2 and "cannot listen at 127.0.0.1" in taken.stderr, taken.stderr
    assert taken.stdout == ""
