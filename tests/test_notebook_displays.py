"""Objects show themselves in JupyterLab, frames and studies with the extension; notebooks run as they are."""

import json
import re
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest
from bundles import small_bundle
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from kallos.core.errors import ArtifactError
from kallos.data.purged import CombinatorialPurgedCV, PurgedKFold
from kallos.data.sample import sample_bars
from kallos.data.splits import ChronologicalSplit, WalkForwardSplit
from kallos.inference.bundle import load_bundle
from kallos.workflow.notebook_displays import bars_html, study_html
from kallos.workflow.run_records import read_run


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> InteractiveShell:
    """A shell of IPython; it takes the place of `__main__`, which is given back."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))


def shown(shell: InteractiveShell, thing: object) -> dict[str, str]:
    """What the shell shows of it, by kind; nothing may be complained of meanwhile."""
    return shell.display_formatter.format(thing)[0]


def test_the_extension_adds_to_bars_and_studies_and_leaves_all_else_alone(shell, capfd):
    bars, study = sample_bars(start="2022-01-01", end="2022-06-30"), optuna.create_study(study_name="gru_BTC_1d")
    study.add_trial(optuna.create_trial(value=0.9, user_attrs={"skill": 0.05}))
    others = [bars[["ts", "close"]], bars.set_index("ts"), bars["close"], bars.assign(rule="spike"), 3, "text"]
    before = [shown(shell, thing) for thing in [bars, study, *others]]
    shell.run_line_magic("load_ext", "kallos")
    found = shown(shell, bars)
    assert found["text/html"] == bars_html(bars) + before[0]["text/html"]
    assert found["text/plain"] == before[0]["text/plain"]
    assert "181 bars" in found["text/html"] and "1d, as 100.00% of the steps are" in found["text/html"]
    assert shown(shell, study)["text/html"] == study_html(study) and "+5.00%" in study_html(study)
    assert [shown(shell, thing) for thing in others] == before[2:]
    shell.run_line_magic("unload_ext", "kallos")
    assert [shown(shell, thing) for thing in [bars, study, *others]] == before
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_extension_is_loaded_in_a_cell_that_shows_bars(shell):
    lines = ["%load_ext kallos", "from kallos.data.sample import sample_bars"]
    done = shell.run_cell("\n".join([*lines, "sample_bars(start='2024-01-01', end='2024-01-09')"]))
    assert done.success and "9 bars" in shown(shell, done.result)["text/html"]


def test_every_object_of_ours_shows_itself_without_colours(tmp_path, root):
    days = pd.date_range("2024-01-01", periods=50, tz="UTC")
    ends = pd.Series(days + pd.Timedelta(days=3), days)
    run, bundle = read_run(root / "reports" / "showcase"), load_bundle(small_bundle(tmp_path))
    expected = [
        (ChronologicalSplit(t1=ends), ("ChronologicalSplit", "50 label ends", "0.7")),
        (WalkForwardSplit(val_length=1_234, train_length=5), ("WalkForwardSplit", "1,234", "expanding")),
        (PurgedKFold(n_splits=7, embargo=pd.Timedelta("2h")), ("PurgedKFold", "0 days 02:00:00", "7")),
        (CombinatorialPurgedCV(n_groups=6), ("CombinatorialPurgedCV", "fits", "15", "paths", "5")),
        (run, ("Run showcase", "12h", "done", "kallos-run dashboard showcase")),
        (bundle, ("Bundle small_BTC_1d", "No skill: made of random weights.", "1 bar of 1d ahead", bundle.digest[:12])),
    ]
    for thing, words in expected:
        html = thing._repr_html_()
        assert all(word in html for word in words), (words, html)
        assert not re.search(r"(?<![-\w])color\s*:|background", html)


def test_what_comes_from_a_file_stays_text(tmp_path):
    bundle = load_bundle(small_bundle(tmp_path))
    bundle.manifest["evaluation"]["sentence"] = "<img src=x onerror=alert(1)>"
    bundle.manifest["unit"] = "<script>"
    html = bundle._repr_html_()
    assert "<img" not in html and "<script" not in html and "&lt;img src=x" in html


# The run notebooks, opened by a person who changes nothing


def settled(root: Path, name: str) -> dict[str, object]:
    """The variables of a run notebook after the cell that makes its settings."""
    cells = json.loads((root / "nbs" / f"{name}.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    known: dict[str, object] = {}
    for code in (next(c for c in codes if c.startswith(("asset_id =", "ensemble =", "forecasts =", "bundle ="))),
                 next(c for c in codes if "settings = " in c)):  # fmt: skip
        exec(compile(re.sub(r"^%.*", "", code, flags=re.M), name, "exec"), known)
    return known


NEEDS = {
    "train": ("BTC/1d/gru_BTC_best_params.json", "parameters file", "Run tune.ipynb"),
    "evaluate": ("BTC/1d/gru_BTC_best_params.json", "parameters file", "Run tune.ipynb"),
    "backtest": ("BTC/1d/gru_BTC_evaluation/test_forecasts.parquet", "file of test forecasts", "Run evaluate.ipynb"),
    "monitor": ("BTC/1d/gru_BTC_bundle/manifest.json", "trained model", "Run train.ipynb"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_run_notebook_takes_what_was_made_last_or_says_what_makes_it(name, root, tmp_path, monkeypatch):
    file, what, todo = NEEDS[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=f"there is no {what}.* yet") as error:
        settled(root, name)
    assert todo in str(error.value)
    made = tmp_path / "reports" / file
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps({"model_name": "linear", "hyperparameters": {}, "timeframe": "1d"}))
    settings = settled(root, name)["settings"]
    taken = {"backtest": "forecasts", "monitor": "bundle"}.get(name, "params_file")
    assert getattr(settings, taken) == (made.parent if name == "monitor" else made)
    if taken == "params_file":
        assert (settings.model_name, settings.asset_id, settings.timeframe) == ("linear", "BTC", "1d")
        assert settings.folder == tmp_path / "reports" / "BTC" / "1d"
    if name == "monitor":
        assert settings.folder == made.parent.parent / "drift"
