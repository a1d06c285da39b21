"""The whole verdict on a tuned model: the page by the real command, and what it answers where there is nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from kallos.core.config import TuneSettings
from kallos.core.runs import read_json, verify_manifest, write_json
from kallos.data.features import compute_features
from kallos.data.sample import sample_bars
from kallos.data.store import write_bars, write_features
from kallos.data.tables import connect
from kallos.evaluation.evaluation import Evaluation, evaluate
from kallos.evaluation.evaluation_settings import EvaluateSettings
from kallos.evaluation.multiple_testing import judge_returns, strategy_returns
from kallos.models import tuner
from tests.study_runs import END, write_market

WHAT = ["--asset-id", "BTC", "--end-date", END]
LINEAR = {"model_name": "linear", "hyperparameters": {"input_chunk_length": 5, "alpha": 10.0}}
NETWORK = {
    "model_name": "gru", "n_epochs": 2,
    "hyperparameters": {
        "input_chunk_length": 30, "hidden_dim": 8, "n_rnn_layers": 1, "dropout": 0.0, "batch_size": 64,
        "learning_rate": 1e-3,
    },
}  # fmt: skip


def start(folder: Path, *words: object) -> subprocess.Popen:
    """The command line in that folder."""
    command = [str(Path(sys.executable).with_name("kallos-run")), *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "KALLOS_DB_URL"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(folder: Path, *words: object, code: int = 0) -> str:
    """What the command printed, or its problem; it must leave with the code, and without a traceback."""
    process = start(folder, *words)
    said, problem = process.communicate(timeout=280)
    assert process.returncode == code, said + problem
    assert "Traceback" not in problem, problem
    return problem if code else said


@pytest.fixture
def folder(tmp_path) -> Path:
    """A working folder with a small market in its database, and parameters that no study has found."""
    return with_market(tmp_path)


def with_market(folder: Path) -> Path:
    (folder / "data").mkdir()
    write_market(f"sqlite:///{folder}/data/kallos.db")
    write_json(folder / "linear.json", LINEAR)
    write_json(folder / "gru.json", NETWORK)
    return folder


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, str, dict[Path, int]]:
    """The folder of a study and its evaluation, what was printed, and the folds that `cv` had fitted before."""
    folder = with_market(tmp_path_factory.mktemp("page"))
    run(folder, "tune", *WHAT, "--model-name", "linear", "--n-trials", 4, "--folds", 2, "--no-report")
    model = ["--params-file", "linear_BTC_best_params.json"]
    run(folder, "cv", *WHAT, *model)
    done = {path: path.stat().st_mtime_ns for path in (folder / "linear_BTC_cv" / "folds").iterdir()}
    said = run(folder, "evaluate", *WHAT, *model, "--refit-every", 100, "--importance-repeats", 2)
    return folder, said, done


@pytest.mark.slow
def test_the_page_holds_the_whole_verdict(page):
    folder, said, done = page
    found = read_json(folder / "linear_BTC_evaluation" / "evaluation.json")
    assert found["sentence"] in said and found["search_sentence"] in said
    assert ("No skill" in found["sentence"]) != found["has_skill"]
    assert found["search"]["n_trials"] == 4 and "After 4 trials" in said
    report = nbformat.read(folder / "linear_BTC_evaluate.ipynb", as_version=4)
    outputs = [output for cell in report.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr" and "Warning" in output.text]
    shown = [output.data.get("text/markdown", "") for output in outputs if "data" in output]
    assert any(f"**{found['sentence']}**" in text for text in shown)
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) >= 13
    assert done == {path: path.stat().st_mtime_ns for path in (folder / "linear_BTC_cv" / "folds").iterdir()}
    assert "linear_BTC_evaluate.html" in said


@pytest.mark.slow
def test_the_look_at_the_test_rows_is_on_record(page):
    folder, _, _ = page
    manifest = verify_manifest(folder / "linear_BTC_evaluation" / "manifest.json")
    looks = manifest["results"]["test_seen"]["looks"]
    forecasts = pd.read_parquet(folder / "linear_BTC_evaluation" / "test_forecasts.parquet")
    assert [look["rows"] for look in looks] == [len(forecasts)]
    assert forecasts["ts"].min() >= pd.Timestamp(END, tz="UTC") and forecasts["target_ts"].is_unique
    assert len(forecasts) == manifest["results"]["test_seen"]["looks"][0]["rows"] > 150
    later = ("--asset-id", "BTC", "--end-date", "2022-11-30", "--params-file", "linear_BTC_best_params.json")
    assert "would be seen without being counted" in run(folder, "walk-forward", *later, code=2)


@pytest.mark.slow
def test_another_model_on_the_same_rows_is_a_second_look(page, tmp_path):
    folder = shutil.copytree(page[0], tmp_path / "copy")
    words = ("evaluate", *WHAT, "--params-file", "linear.json", "--schemes", "cv", "--importance-repeats", 0)
    said = run(folder, *words, "--no-report")
    assert "were looked at 2 times" in said and "less than 2.50% of cases" in said and "names no study" in said
    found = read_json(folder / "linear_BTC_evaluation" / "evaluation.json")
    assert (found["level"], found["held_out"]["level"]) == (0.05, 0.025)
    assert len(read_json(folder / "BTC_1d_test_looks.json")["looks"]) == 2
    again = run(folder, *words, "--no-report")
    assert again == said
    assert len(read_json(folder / "BTC_1d_test_looks.json")["looks"]) == 2


@pytest.mark.slow
def test_a_network_is_judged_in_the_same_way(folder):
    words = ("--params-file", "gru.json", "--n-splits", 2, "--schemes", "cv", "--max-epochs", 2)
    said = run(folder, "evaluate", *WHAT, *words, "--importance-repeats", 1)
    found = read_json(folder / "gru_BTC_evaluation" / "evaluation.json")
    assert found["sentence"] in said
    inputs = {row["input"] for row in found["importance"]}
    assert {"past of the target", "all features", "rsi"} <= inputs
    html = (folder / "gru_BTC_evaluate.html").read_text(encoding="utf8")
    assert found["sentence"].split(":")[0] in html


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_where_it_was(folder):
    words = ("evaluate", *WHAT, "--params-file", "gru.json", "--schemes", "cv", "--max-epochs", 20, "--no-report")
    process, kept = start(folder, *words, "--importance-repeats", 1), folder / "gru_BTC_cv" / "importance"
    while process.poll() is None and not [*kept.glob("[!.]*.parquet")]:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, problem = process.communicate(timeout=100)
    assert process.returncode == 3 and "the same command fits the rest" in problem, said + problem
    assert not (folder / "gru_BTC_evaluation").exists() and "Traceback" not in problem
    done = {path: path.stat().st_mtime_ns for path in kept.glob("[!.]*.parquet")}
    assert 1 <= len(done) < 5
    run(folder, *words, "--importance-repeats", 1)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert (folder / "gru_BTC_evaluation" / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_opens_in_a_browser(page):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs Chromium")
    folder, _, _ = page
    problems, asked = [], []
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900})
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((folder / "linear_BTC_evaluate.html").as_uri())
        tab.wait_for_function("[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('svg'))")
        drawn = tab.locator(".plotly-graph-div").count()
        text = tab.inner_text("main")
        too_wide = tab.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        browser.close()
    assert not problems and drawn >= 13 and not too_wide
    assert all(url.startswith("file:") for url in asked)
    assert read_json(folder / "linear_BTC_evaluation" / "evaluation.json")["sentence"] in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schemes", "cv,loo"), "schemes: must be some of cv, walk-forward, cpcv"),
        (("--level", 0.7), "level: Input should be less than 0.5"),
        (("--fee", -1), "fee: Input should be greater than or equal to 0"),
        (("--importance-repeats", 1000), "importance_repeats: "),
        (("--model-name", "gru"), "was tuned for something else: model_name"),
        (("--n-groups", 30, "--n-test-groups", 10, "--schemes", "cpcv", "--importance-repeats", 0), "more than 20,000"),
        (("--params-file", "none.json"), "cannot read the parameters file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_wrong_input_is_one_message_and_exit_code_2(words, message, folder):
    given = words if "--params-file" in words else ("--params-file", "linear.json", *words)
    said = run(folder, "evaluate", *WHAT, *given, "--no-report", code=2)
    assert message in said and said.startswith("kallos-run: ") and said.count("\n") == 1, said


# What it answers


def evaluation_of(folder: Path, seed: int, strength: float, n_trials: int = 0, **more) -> Evaluation:
    """The evaluation of a ridge regression on a sample market, after a study of so many trials."""
    folder.mkdir()
    url, bars = f"sqlite:///{folder}/kallos.db", sample_bars(timeframe="1d", seed=seed, signal=strength)
    engine = connect(url)
    write_bars(engine, bars, asset_id="BTC", timeframe="1d", venue="sample")
    write_features(engine, compute_features(bars, timeframe="1d"), asset_id="BTC", timeframe="1d")
    engine.dispose()
    what = {
        "asset_id": "BTC",
        "end_date": "2023-01-01",
        "model_name": "linear",
        "output_path": str(folder),
        "seed": seed,
    }
    file = write_json(folder / "best.json", LINEAR)
    if n_trials:
        tuner.tune(TuneSettings.from_values(what | {"n_trials": n_trials, "folds": 3}), db=url, progress=False)
        file = folder / "linear_BTC_best_params.json"
    how = {"params_file": str(file), "importance_repeats": 0, "schemes": "cv"} | more
    return evaluate(EvaluateSettings.from_values(what | how), db=url, progress=False)


@pytest.mark.slow
def test_a_martingale_has_no_skill_and_a_signal_has(tmp_path):
    nothing = [evaluation_of(tmp_path / f"none{seed}", seed, 0.0) for seed in range(4)]
    assert sum(found.has_skill for found in nothing) <= 1
    assert all(("No skill" in found.sentence) != found.has_skill for found in nothing)
    there = evaluation_of(tmp_path / "there", 0, 0.3)
    assert there.has_skill and there.sentence.startswith("Skill on the rows after 2023-01-01, which decide: ")
    assert [path.verdict.has_skill for path in there.verdicts["cv"]] == [True]


def random_search(seed: int, n_trials: int = 20, fee: float = 0.0):
    """The verdict on the best of so many random strategies on a martingale."""
    rng, bars = np.random.default_rng(seed), sample_bars(timeframe="1d", start="2021-01-01", seed=seed, signal=0.0)
    moved = np.diff(np.log(bars["close"]))
    names = {"asset_id": "BTC", "timeframe": "1d", "model": "noise", "fold": 0, "horizon": 1, "target": "log_return"}
    times = {"ts": bars["ts"][:-1].to_numpy(), "target_ts": bars["ts"][1:].to_numpy()}
    table = pd.DataFrame(times).apply(lambda ts: ts.dt.tz_localize("UTC") if ts.dt.tz is None else ts)
    table = table.assign(**names, close_at_ts=bars["close"].to_numpy()[:-1], y_true=moved, y_naive=0.0)
    tried = {n: strategy_returns(table.assign(y_pred=rng.normal(size=len(table))), fee=fee) for n in range(n_trials)}
    returns = pd.DataFrame(tried)
    best = (returns.mean() / returns.std()).idxmax()
    return judge_returns(returns, best=best, n_trials=n_trials, periods_per_year=365)


def most(n: int, level: float = 0.05) -> int:
    """The upper end of the 95 % binomial band."""
    return int(binom.ppf(0.975, n, level))


@pytest.mark.slow
def test_the_best_of_random_strategies_is_not_believed():
    found = [random_search(seed) for seed in range(40)]
    pbo = [one.selection.pbo for one in found]
    charged = sum(one.deflated.probability > 0.95 for one in found)
    free = sum(one.probabilistic > 0.95 for one in found)
    print(f"mean PBO {np.mean(pbo):.3f}; the DSR passes {charged} of 40, the PSR, which charges nothing, {free}")
    assert 0.4 <= np.mean(pbo) <= 0.6
    assert charged <= most(40) < free  # uncharged, luck passes for skill


@pytest.mark.soak
def test_forty_martingales_keep_the_level_through_the_whole_evaluation(tmp_path):
    run_of = lambda seed: evaluation_of(tmp_path / str(seed), seed, 0.0, 8, schemes="cv,walk-forward")  # noqa: E731
    found = [run_of(seed) for seed in range(40)]
    counts = {"held out": sum(one.has_skill for one in found)}
    for scheme in ("cv", "walk-forward"):
        counts[scheme] = sum(one.verdicts[scheme][0].verdict.has_skill for one in found)
    charged = [one.search for one in found if one.search.deflated]  # not those whose trials made the same bets
    passed, pbo = sum(one.deflated.probability > 0.95 for one in charged), [one.selection.pbo for one in charged]
    print(f"of 40 martingales skill is found in {counts}; the DSR passes {passed}; mean PBO {np.mean(pbo):.3f}")
    assert all(binom.ppf(0.025, 40, 0.05) <= count <= most(40) for count in counts.values())
    assert passed <= most(40)
    assert all(("No skill" in one.sentence) != one.has_skill for one in found)
