"""Every command that the README and the notebooks show can be typed, and the quick ones of the README are run."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import house
from kallos.core.errors import KallosError
from kallos.data.sample import sample_bars
from kallos.main import app
from kallos.workflow.setting_words import overrides_of

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`(kallos-run [^`]+)`(?!`)")


def fenced(text: str) -> Iterator[str]:
    """The whole commands of a page's blocks, with lines that go on put together."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"\s*(kallos-run .*)", line):
                yield found[1]


def pages() -> dict[str, str]:
    """The prose of README.md and of every notebook, by path."""
    found = {"README.md": (ROOT / "README.md").read_text(encoding="utf8")}
    for path in house.notebooks(ROOT):
        found[str(path.relative_to(ROOT))] = "\n\n".join(map(house.source, house.cells(path, "markdown")))
    return found


SHOWN = sorted({(line, name, True) for name, text in pages().items() for line in fenced(text)})
MENTIONED = sorted({(line, name, False) for name, text in pages().items() for line in SPAN.findall(text)})


def fault(line: str, *, whole: bool) -> str | None:
    """What the command line would say to it before anything runs; of a mention, options may be left out."""
    words, command = shlex.split(line, comments=True)[1:], typer.main.get_command(app)
    parent, name = None, "kallos-run"
    if words and words[0].startswith("--"):  # which would act at once, as --install-completion does
        known = {"--help", *(name for one in command.params for name in one.opts)}
        return None if words[0] in known else f"no option {words[0]}"
    try:
        while hasattr(command, "commands"):
            context = command.make_context(name, [*words], parent=parent, resilient_parsing=not words)
            if not context._protected_args and not context.args:
                return None
            rest = [*context._protected_args, *context.args]
            name, command, words = command.resolve_command(context, rest)
            parent = context
        context = command.make_context(name, words, parent=parent)
        overrides_of(context.args)
    except typer.Exit:
        return None
    except (typer.TyperException, KallosError) as error:
        said = f"{type(error).__name__}: {error.format_message() if hasattr(error, 'format_message') else error}"
        return None if not whole and ("MissingParameter" in said or "requires an argument" in said) else said
    return None


@pytest.mark.parametrize(("line", "page", "whole"), [*SHOWN, *MENTIONED])
def test_a_command_that_is_shown_can_be_typed(line: str, page: str, whole: bool):
    assert fault(line, whole=whole) is None


@pytest.mark.parametrize(
    "line",
    [
        "kallos-run tuen --asset-id BTC",
        "kallos-run tune --asset-id BTC --n-trails 3",
        "kallos-run features --timeframe 1d",
        "kallos-run runs lst",
        "kallos-run --instal-completion",
        "kallos-run evaluate --asset-id BTC --n-jobs many",
    ],
)
def test_a_command_that_cannot_be_typed_is_found_out(line: str):
    assert fault(line, whole=True)


# Run


QUICK = ("ingest", "features", "doctor", "config", "data")
ELSEWHERE = {  # command -> the file of tests that runs it in a process of its own, with smaller numbers
    "all": "test_pipeline",
    "cpcv": "test_cross_validation",
    "cv": "test_cross_validation",
    "ensemble": "test_ensembles",
    "fetch": "test_data_floor",
    "preflight": "test_preflight",
    "reproduce": "test_run_records",
    "runs": "test_run_records",
    "serve": "service",
    "walk-forward": "test_cross_validation",
}


def test_every_command_of_the_readme_is_run_by_a_test():
    cells = [house.source(cell) for path in house.notebooks(ROOT) for cell in house.cells(path, "code")]
    in_tutorials = {
        name for cell in cells if cell.startswith("%%bash") for name in re.findall("kallos-run ([a-z-]+)", cell)
    }
    shown = {line.split()[1] for line in fenced(pages()["README.md"])}
    assert shown <= {*QUICK, *ELSEWHERE} | in_tutorials
    for name, file in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf8"), name


@pytest.mark.slow
def test_the_quick_commands_of_the_readme_run_as_they_stand_there(tmp_path: Path):
    bars = sample_bars(start="2020-01-01", end="2023-12-31")
    klines = bars.assign(open_time=bars["ts"].astype("int64") // 1000, close_time=0, ignore=0)
    names = ["open_time", *bars.columns[1:6], "close_time", *bars.columns[6:], "ignore"]
    with zipfile.ZipFile(tmp_path / "BTCUSDT-1d-2023.zip", "w") as archive:
        archive.writestr("BTCUSDT-1d-2023.csv", klines[names].to_csv(index=False, header=False))
    text = pages()["README.md"]
    lines = [line for line in fenced(text) if line.split()[1] in QUICK]
    assert {line.split()[1] for line in lines} == {*QUICK}
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "KALLOS_DB_URL": f"sqlite:///{tmp_path}/kallos.db"}
    script = "set -e\n" + "\n".join(lines)
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", script], timeout=200, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    (block,) = (code for code in FENCE.findall(text) if "TimeSeriesDataContainer.load" in code)
    done = subprocess.run([sys.executable, "-c", block], timeout=100, check=False, **how)
    assert done.returncode == 0, done.stderr
