"""What a part of a run remembers from one attempt to the next: which results are its own, and which data."""

import io
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from kallos.core.errors import TrainingError
from kallos.core.runs import read_json, write_json
from kallos.data.records import write_funding
from kallos.data.sample import sample_bars
from kallos.data.store import read_bars, write_bars
from kallos.data.tables import connect
from kallos.workflow import part_runs
from kallos.workflow.boards import Board
from kallos.workflow.deliverables import checklist, part_summary
from kallos.workflow.part_runs import run_part
from kallos.workflow.parts import Part, data_end, doubt_steps, keep_data_end, parts_of
from kallos.workflow.preparation import prepare_features
from kallos.workflow.settings import read_settings
from kallos.workflow.steps import Work, do_step, inputs_of

FILES = {
    "preflight": {"steps/preflight.json": {"verdict": "OK_TO_TRAIN", "estimate": {}}},
    "data": {"steps/data.json": {"bars": {}}},
    "tune": {"optuna_best.json": {"hyperparameters": {}}},
    "evaluate": {"metrics_test.json": {"sentence": "", "has_skill": True, "test": {"skill": 0.1}}},
    "backtest": {"backtest_metrics.json": {"sentence": "", "sharpe": 1.0}},
}


def part_of(folder: Path, **typed: object) -> Part:
    """The one part of a run in that folder."""
    return parts_of(read_settings(None, overrides={"assets": ["BTC"], "timeframes": ["1d"]} | typed), folder / "run")[0]


@pytest.fixture
def fails(monkeypatch) -> set[str]:
    """Steps that fail; the others leave files that name their model, and go by the model's name alone."""
    broken: set[str] = set()

    def do(work: Work, step: str) -> list[Path]:
        if step in broken:
            raise TrainingError(f"{step} fails")
        made = FILES.get(step, {}).items()
        said = {"sentence": work.part.settings.model.name}
        return [write_json(work.part.folder / name, content | said) for name, content in made]

    monkeypatch.setattr(part_runs, "do_step", do)
    monkeypatch.setattr(part_runs, "inputs_of", lambda work, step: {"model": work.part.settings.model.name})
    return broken


def verdicts(part: Part) -> tuple:
    """What a part says of itself: status, sentence, whether there is a backtest, and what the checklist holds well."""
    said, well = part_summary(part), {line.path for line in checklist(part) if line.ok}
    return said["status"], said["sentence"], said["backtest"] is not None, "1d/metrics_test.json" in well


def test_a_run_that_goes_on_with_other_settings_shows_nothing_of_the_earlier_ones(tmp_path, fails):
    gru, lstm = part_of(tmp_path), part_of(tmp_path, **{"model.name": "lstm"})
    assert run_part(gru) == 0 and verdicts(gru) == ("done", "gru", True, True)
    doubt_steps(lstm)
    assert verdicts(lstm) == ("waiting", None, False, False)  # as of a part whose turn has not come
    fails.add("tune")
    assert run_part(lstm) == 4
    said = part_summary(lstm)
    assert verdicts(lstm) == ("failed", None, False, False) and said["error"]["message"] == "tune fails"
    assert said["preflight"] == "OK_TO_TRAIN" and said["best"] is None
    fails.clear()
    doubt_steps(lstm)
    assert run_part(lstm) == 0 and verdicts(lstm) == ("done", "lstm", True, True)


def test_what_is_the_same_is_kept_and_sure_again(tmp_path, fails):
    part = part_of(tmp_path)
    assert run_part(part) == 0
    before = {path: path.stat().st_mtime_ns for path in part.folder.rglob("*.json") if path.name != "state.json"}
    doubt_steps(part)
    fails.update(FILES)
    assert run_part(part) == 0 and verdicts(part) == ("done", "gru", True, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_error_before_a_step_is_told_and_no_older_one(tmp_path, fails, monkeypatch):
    part = part_of(tmp_path)
    fails.add("tune")
    run_part(part)
    doubt_steps(part)

    def away(work: Work, step: str) -> None:
        raise TrainingError("the database is away")

    monkeypatch.setattr(part_runs, "inputs_of", away)
    assert run_part(part) == 4
    assert part_summary(part)["error"] == {
        "step": "preflight",
        "kind": "TrainingError",
        "message": "the database is away",
    }


def test_the_end_of_the_data_is_settled_until_another_is_asked_for(tmp_path):
    part, end = part_of(tmp_path), datetime(2024, 5, 1, tzinfo=UTC)
    keep_data_end(part, end)
    assert data_end(part) == end
    assert data_end(part_of(tmp_path, **{"data.end": "2024-03-01"})) is None


def test_a_blocked_part_does_not_take_the_table_down(tmp_path):
    part, shown = part_of(tmp_path), io.StringIO()
    write_json(part.steps / "preflight.json", {"verdict": "BLOCKED", "estimate": {}})
    with Board([part], console=Console(file=shown, force_terminal=True, width=100)) as board:
        board.tick()
    assert "preflight" in shown.getvalue()


@pytest.fixture
def market(tmp_path) -> str:
    """A database with bars, features and funding rates of a perpetual."""
    url = f"sqlite:///{tmp_path / 'kallos.db'}"
    engine, key = connect(url), {"asset_id": "BTC", "timeframe": "1d"}
    bars = sample_bars(timeframe="1d", start="2020-01-01", end="2022-12-31")
    write_bars(engine, bars, **key, venue="sample", market="perpetual")
    write_funding(engine, rates(0.0001), asset_id="BTC")
    engine.dispose()
    prepare_features(url, **key)
    return url


def rates(rate: float, end: str = "2023-01-01") -> pd.DataFrame:
    """The same rate every eight hours."""
    return pd.DataFrame({"ts": pd.date_range("2022-06-01", end, freq="8h", tz="UTC"), "rate": rate})


def test_funding_rates_are_data_of_the_run(market, tmp_path):
    work = Work(part_of(tmp_path), market)
    do_step(work, "data")
    found = read_json(work.part.steps / "data.json")
    assert found["funding"]["rows"] == len(rates(0.0)) and found["bars"]["end"] == "2023-01-01T00:00:00Z"
    write_json(work.params_file, {"hyperparameters": {}, "n_epochs": 1})
    before = [inputs_of(work, step) for step in ("data", "backtest")]
    engine = connect(market)
    write_funding(engine, rates(0.0002, "2023-02-01").tail(3), asset_id="BTC")  # after the end of the data
    assert [inputs_of(work, step) for step in ("data", "backtest")] == before
    write_funding(engine, rates(0.0002), asset_id="BTC")
    engine.dispose()
    assert inputs_of(work, "data") != before[0]
    do_step(work, "data")
    assert inputs_of(work, "backtest") != before[1]


def test_features_that_are_others_now_make_the_data_step_do_its_work_again(market, tmp_path):
    work = Work(part_of(tmp_path), market)
    do_step(work, "data")
    before, engine = inputs_of(work, "data"), connect(market)
    key = {"asset_id": "BTC", "timeframe": "1d"}
    assert before["tables"].keys() == {"bars", "features", "funding"}
    write_bars(engine, read_bars(engine, **key).tail(1).assign(volume=1e9), **key)  # its features are stale now
    engine.dispose()
    assert inputs_of(work, "data")["tables"] is None
    do_step(work, "data")
    assert inputs_of(work, "data")["tables"]["features"] != before["tables"]["features"]
