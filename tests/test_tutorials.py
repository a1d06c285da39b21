"""The tutorials run from top to bottom as their readers run them, and a command that fails does not go unseen."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

import house

TUTORIALS = sorted(path.name for path in (Path(__file__).parents[1] / "nbs/tutorials").glob("*.ipynb"))
SAID = {  # what the reader must have been told at the end, beside no error
    "a_dask_cluster.ipynb": ("dask-",),
    "from_a_run_to_a_service.ipynb": ('"y_pred"', "drift left with"),
    "how_kallos_keeps_you_honest.ipynb": ("No skill", "scaler"),
    "several_machines_with_postgresql.ipynb": ("COMPLETE",),
    "your_own_csv.ipynb": ("Volume BTC", "on the rows after", "duplicate"),
    "your_own_feature.ipynb": ("LEAK in centred_distance", "no leak found"),
    "your_own_model.ipynb": ("elastic_net",),
    "your_own_strategy.ipynb": ("buy and hold", "by forecasts that had not been made"),
}


def run(notebook: Path, folder: Path) -> tuple[int, str, Path]:
    """What papermill left with and said, and the executed notebook; no proxy leads out of the machine."""
    away = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = os.environ | away | {"no_proxy": "127.0.0.1,localhost", "TMPDIR": str(temporary)}
    output, work = folder / "executed.ipynb", folder / "work"
    work.mkdir()
    line = [sys.executable, "-m", "papermill", str(notebook), str(output), "-k", "python3", "--no-progress-bar"]
    done = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, timeout=560, check=False)
    return done.returncode, done.stdout + done.stderr, output


def told(executed: Path) -> str:
    """All that the cells printed and displayed."""
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [one for one in outputs if one.output_type == "error"]
    return "\n".join(one.get("text", "") + str(one.get("data", {}).get("text/plain", "")) for one in outputs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_top_to_bottom(name: str, root: Path, tmp_path: Path, request: pytest.FixtureRequest):
    if "postgresql" in name:
        request.getfixturevalue("postgres")  # as root, two servers must not be the first of a machine at once
    code, said, executed = run(root / "nbs/tutorials" / name, tmp_path)
    assert code == 0, said[-4000:]
    found = told(executed)
    assert not [text for text in SAID[name] if text not in found], found[-4000:]
    assert not [*(tmp_path / "work").iterdir()], "it left something in the folder that it was started in"


@pytest.mark.slow
def test_a_command_that_fails_fails_the_notebook(tmp_path: Path):
    cells = [v4.new_code_cell("%%bash -e\nkallos-run sample --asset-id BTC\necho went on")]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "failing.ipynb")
    code, said, _ = run(tmp_path / "failing.ipynb", tmp_path)
    assert code == 1 and "CalledProcessError" in said and "went on" not in said.replace("echo went on", "")


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_shell_cell_stops_at_the_first_command_that_fails(name: str, root: Path):
    codes = [house.source(cell) for cell in house.cells(root / "nbs/tutorials" / name, "code")]
    assert not [code for code in codes if code.startswith("%%") and not code.startswith("%%bash -e\n")]
    assert not [code for code in codes if any(line.startswith("!") for line in code.splitlines())]


def test_the_readme_names_every_tutorial(root: Path):
    text = (root / "README.md").read_text(encoding="utf8")
    assert not [name for name in TUTORIALS if f"(nbs/tutorials/{name})" not in text]
