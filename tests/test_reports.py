"""The report runner with real kernels: what it refuses, what it keeps, and how it stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kallos.core.config import Settings
from kallos.core.errors import ArtifactError, ConfigError, DataError, KallosError, TrainingError
from kallos.workflow.reports import find_notebook, run_notebook

SECRET = "pa55:w/rd"
PARAMETERS = "asset_id = 'BTC'\nsteps: int = 1\ngroups = None"


class Small(Settings):
    """Settings of a small run."""

    asset_id: str = "ETH"
    steps: int = 3
    groups: dict[str, list[str]] | None = None


class Wrong(Settings):
    """Settings that the notebook knows nothing of."""

    asset: str = "BTC"


def write(path: Path, *sources: str, tags: tuple[str, ...] = ("parameters",), **kernel: str | None) -> Path:
    """A notebook of these cells, its first tagged."""
    spec = {"name": "python3", "language": "python", "display_name": "python3"} | kernel
    cells = [new_markdown_cell("# A small <report>"), *map(new_code_cell, sources)]
    cells[1].metadata["tags"] = [*tags]
    spec = {key: value for key, value in spec.items() if value}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


# What is refused before a kernel starts


@pytest.mark.parametrize(
    ("tags", "kernel", "settings", "message"),
    [
        ((), {}, Small(), "exactly one cell tagged 'parameters'; got 0"),
        (("parameters",), {"name": "other"}, Small(), "must ask for the kernel 'python3'"),
        (("parameters",), {"language": None}, Small(), "must ask for the kernel 'python3'"),
        (("parameters",), {}, Wrong(), r"has no parameter asset. It has asset_id, groups, steps."),
    ],
)
def test_a_notebook_that_cannot_take_its_parameters_is_refused(tmp_path, tags, kernel, settings, message):
    notebook = write(tmp_path / "small.ipynb", PARAMETERS, tags=tags, **kernel)
    with pytest.raises(ConfigError, match=message):
        run_notebook(notebook, settings, output=tmp_path / "out" / "report.ipynb")
    assert not (tmp_path / "out").exists()


def test_a_kernel_of_another_interpreter_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = ["/opt/elsewhere/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="belongs to another interpreter; got '/opt/elsewhere/bin/python'"):
        run_notebook(write(tmp_path / "small.ipynb", PARAMETERS), Small(), output=tmp_path / "report.ipynb")


def test_an_unknown_run_notebook_is_refused():
    with pytest.raises(ArtifactError, match="no such run notebook"):
        find_notebook("nothing")


# A good run


LOOKS = """import plotly.graph_objects as go
figure = go.Figure(go.Scatter(y=[1, 2, 3]), layout={"title": "a & <b>"})
figure.show("plotly_mimetype")
figure.show("plotly_mimetype")"""
SPEAKS = """import os, sys
for step in range(steps):
    print(f"\\rstep {step} ", end="", file=sys.stderr, flush=True)
print(asset_id, type(steps).__name__, groups)
print(os.environ["KALLOS_DB_URL"])
print("cannot reach", os.environ["KALLOS_DB_URL"], file=sys.stderr)
{"url": os.environ["KALLOS_DB_URL"], "nested": [os.environ["KALLOS_DB_URL"]]}"""
URL = f"postgresql://user:{SECRET}@localhost/crypto"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, str]:
    """The report of a good run in a folder of its own, and what the terminal saw of it."""
    folder = tmp_path_factory.mktemp("good {x}")
    notebook = write(folder / "small.ipynb", PARAMETERS, SPEAKS, LOOKS)
    run = drive(notebook, folder / "out" / "report.ipynb", db_url=URL, groups={"a": ["b"]}, wait=True)
    return folder / "out" / "report.ipynb", run.stderr.read()


def drive(notebook: Path, output: Path, *, db_url: str | None = None, wait: bool = False, **values) -> subprocess.Popen:
    """A process of its own that runs the notebook."""
    code = f"""import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from test_reports import Small
from kallos.workflow.reports import run_notebook
try:
    run_notebook(Path({str(notebook)!r}), Small(**{values!r}), output=Path({str(output)!r}), db_url={db_url!r})
except KeyboardInterrupt:
    sys.exit(3)"""
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    if wait:
        assert run.wait(60) == 0, run.stderr.read()
    return run


def test_parameters_arrive_with_their_types(good):
    report, _ = good
    text = next(output.text for output in outputs(report) if output.get("name") == "stdout")
    assert text.startswith("ETH int {'a': ['b']}\n")


def test_progress_is_shown_as_it_comes_and_kept_as_its_last_state(good):
    report, terminal = good
    assert [output.text for output in outputs(report) if output.get("name") == "stderr"] == [
        "step 2 cannot reach postgresql://user:***@localhost/crypto\n"
    ]
    assert "step 0" in terminal and "step 2" in terminal


def test_no_password_is_in_any_file_or_on_the_terminal(good):
    report, terminal = good
    written = [path.read_text(encoding="utf8") for path in report.parent.iterdir()]
    assert len(written) == 3
    for text in [*written, terminal]:
        assert SECRET not in text and "w/rd" not in text
    assert "postgresql://user:***@localhost/crypto" in report.read_text(encoding="utf8")


def test_the_report_names_no_folder_of_this_machine(good):
    report, _ = good
    metadata = nbformat.read(report, as_version=4).metadata.papermill
    assert (metadata.input_path, metadata.output_path) == ("small.ipynb", "report.ipynb")
    assert str(report.parent) not in report.read_text(encoding="utf8")


def test_the_page_opens_without_a_network(good):
    report, _ = good
    page = report.with_suffix(".html").read_text(encoding="utf8")
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:https?:)?//", page)
    assert not re.findall(r"(?:import|fetch)\s*\(?\s*[\"'](?:https?:)?//|url\([\"']?https?:|@import", page)
    assert re.findall(r'<script src="([^"]*)"', page) == ["plotly.min.js"]
    assert report.with_name("plotly.min.js").stat().st_size > 1_000_000
    assert len(page) < 1_000_000
    assert page.count("Plotly.newPlot") == 2 and "figure-1" in page
    assert "<title>report: A small &lt;report&gt;</title>" in page


def test_only_the_runs_parameters_are_unfolded(good):
    report, _ = good
    page = report.with_suffix(".html").read_text(encoding="utf8")
    assert page.count("<details>") == 3 and len(re.findall(r'<details open(?:="")?>', page)) == 1


def test_the_parents_environment_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KALLOS_DB_URL", "sqlite:///mine.db")
    notebook = write(tmp_path / "small.ipynb", PARAMETERS, "import os\nprint(os.environ['KALLOS_DB_URL'])")
    report = run_notebook(notebook, Small(), output=tmp_path / "a.ipynb", db_url="sqlite:///other.db")
    assert os.environ["KALLOS_DB_URL"] == "sqlite:///mine.db"
    assert outputs(report.notebook)[0].text == "sqlite:///other.db\n"


# A failed run


@pytest.mark.parametrize("kind", [KallosError, DataError, ConfigError, ArtifactError, TrainingError])
def test_an_error_of_kallos_comes_through_as_itself(tmp_path, kind):
    raises = f"from kallos.core.errors import *\nraise {kind.__name__}('wrong', received=asset_id, next_step='Do it.')"
    output = tmp_path / "report.ipynb"
    output.write_text("the earlier report")
    with pytest.raises(kind, match=re.escape("wrong; got 'ETH'. Do it.")) as caught:
        run_notebook(write(tmp_path / "small.ipynb", PARAMETERS, raises), Small(), output=output)
    assert type(caught.value) is kind
    assert output.read_text() == "the earlier report"
    assert {path.name for path in tmp_path.iterdir()} == {"small.ipynb", "report.ipynb"}


def test_any_other_error_keeps_its_notebook_beside_the_earlier_report(tmp_path):
    output = tmp_path / "report.ipynb"
    output.write_text("the earlier report")
    raises = "import os\nraise ValueError('cannot reach ' + os.environ['KALLOS_DB_URL'] + '\\nat all')"
    with pytest.raises(TrainingError) as caught:
        run_notebook(write(tmp_path / "small.ipynb", PARAMETERS, raises), Small(), output=output, db_url=URL)
    message = str(caught.value)
    assert "report stopped at ValueError: cannot reach postgresql://user:***@localhost/crypto at all." in message
    assert message.endswith("report.failed.ipynb.")
    assert output.read_text() == "the earlier report"
    assert SECRET not in (tmp_path / "report.failed.ipynb").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"small.ipynb", "report.ipynb", "report.failed.ipynb"}
    run_notebook(write(tmp_path / "small.ipynb", PARAMETERS), Small(), output=output)
    assert not (tmp_path / "report.failed.ipynb").exists()


def test_a_dead_kernel_is_an_error_with_a_notebook(tmp_path):
    notebook = write(tmp_path / "small.ipynb", PARAMETERS, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainingError, match=r"DeadKernelError: Kernel died \(as it does when memory runs out\)"):
        run_notebook(notebook, Small(), output=tmp_path / "report.ipynb")
    assert (tmp_path / "report.failed.ipynb").exists()


# A stopped run


WAITS = """import os, sys, time
from pathlib import Path
Path(f"{asset_id}.pid").write_text(str(os.getpid()))
try:
    time.sleep(60)
except KeyboardInterrupt:
    Path(f"{asset_id}.interrupted").touch()
    ENDING
"""
GOES_ON = "Path(f'{asset_id}.next').touch()"


def start(folder: Path, ending: str, monkeypatch) -> tuple[subprocess.Popen, psutil.Process]:
    """A run that waits in its cell, and its kernel."""
    monkeypatch.chdir(folder)
    notebook = write(folder / "small.ipynb", PARAMETERS, WAITS.replace("ENDING", ending), GOES_ON)
    run = drive(notebook, folder / "report.ipynb")
    pid = folder / "ETH.pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            return run, psutil.Process(int(pid.read_text()))
        time.sleep(0.05)
    raise AssertionError(run.stderr.read())


def is_gone(kernel: psutil.Process, seconds: float) -> bool:
    try:
        kernel.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ending", ["raise", "pass"])
def test_the_first_signal_interrupts_the_cell(tmp_path, monkeypatch, number, ending):
    run, kernel = start(tmp_path, ending, monkeypatch)
    run.send_signal(number)
    assert run.wait(20) == 3
    assert is_gone(kernel, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"small.ipynb", "ETH.pid", "ETH.interrupted"}
    assert "Traceback" not in run.stderr.read()


def test_the_second_signal_kills(tmp_path, monkeypatch):
    run, kernel = start(tmp_path, "time.sleep(60)", monkeypatch)
    run.send_signal(signal.SIGINT)
    while not (tmp_path / "ETH.interrupted").exists():
        time.sleep(0.05)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 3
    assert is_gone(kernel, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"small.ipynb", "ETH.pid", "ETH.interrupted"}


def test_a_kernel_does_not_outlive_its_parent(tmp_path, monkeypatch):
    run, kernel = start(tmp_path, "raise", monkeypatch)
    run.kill()
    run.wait(10)
    assert is_gone(kernel, 10)
