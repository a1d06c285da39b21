"""Imports run downward, notebooks and modules belong together and agree, and the numbers of the style are kept."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

import house
from tools.sync import stale

CHECKS = (
    house.upward_imports,
    house.orphans,
    house.lazy_names,
    house.stored_outputs,
    house.no_kernel,
    house.run_notebook_faults,
    house.sizes,
    house.untested,
    house.long_functions,
    house.undocumented,
    house.broken_links,
    stale,
)


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_keeps_its_rules(check: Callable, root: Path):
    findings = [*check(root)]
    assert not findings, "\n".join(findings)


def test_importing_the_floors_loads_next_to_nothing(root: Path):
    code = "import sys; before = {*sys.modules}; import kallos.core, kallos.data, kallos.models, kallos.evaluation, "
    code += (
        "kallos.inference, kallos.workflow; print(*sorted({name.split('.')[0] for name in {*sys.modules} - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert {*run.stdout.split()} - sys.stdlib_module_names == {"kallos"}


# Below, a small house that keeps every rule is broken in one place at a time.

PROSE = "# Errors\n\n> What can go wrong.\n\n" + "An error says what is wrong. " * 10
HALVE = '''#| export
def halve(
    value: float,  # any number
) -> float:
    """Half of the value."""
    return value / 2'''
ROOT_INIT = '''__version__ = "0.1.0"


def lazy(package, modules):
    """The names of a folder."""
    return None, None, sorted(modules)


__getattr__, __dir__, __all__ = lazy(__name__, {"core": (), "data": ()})
'''
FLOOR_INIT = "from kallos import lazy\n\n__getattr__, __dir__, __all__ = lazy(__name__, {'MODULE': ('halve',)})\n"
SETTINGS = """[DEFAULT]
repo = kallos
lib_name = kallos
lib_path = kallos
nbs_path = nbs
version = 0.1.0
user = kallos
author = nobody
branch = main
git_url =
doc_host =
doc_baseurl =
update_pyproject = False
allowed_cell_metadata_keys = tags
"""


def notebook(
    path: Path, *sources: str, tagged: str = "parameters", language: str = "python", **outputs: object
) -> None:
    """Writes a notebook: a source that begins with `# ` is prose, one that holds `asset_id =` is tagged."""
    made = []
    for number, source in enumerate(sources):
        cell = v4.new_markdown_cell if source.startswith("# ") else v4.new_code_cell
        metadata = {"tags": [tagged]} if "asset_id =" in source else {}
        made.append(cell(source, metadata=metadata, id=f"cell{number}"))
    if outputs:
        made[-1].update(outputs)
    kernel = {"display_name": "python3", "language": language, "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=made, metadata={"kernelspec": kernel}), path)


def room(root: Path, *codes: str, name: str = "core/00_errors", prose: str = PROSE, test: str = "assert True") -> None:
    """Writes the notebook of a module, and the module."""
    floor, _, module = name.partition("/")
    notebook(root / f"nbs/{name}.ipynb", prose, f"#| default_exp {floor}.{module.partition('_')[2]}", *codes, test)
    current(root)


def run_notebook(root: Path, *codes: str, prose: str = "# Tune\n\n- skip_exec: true", **how: object) -> None:
    """Writes the notebook of a run."""
    notebook(root / "nbs/tune.ipynb", prose, *(codes or ("asset_id = 'BTC'", "asset_id")), **how)


def current(root: Path) -> None:
    """Makes what the notebooks make, as `make export` does."""
    for path, content in stale(root).items():
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


def edit(root: Path, path: str, old: str, new: str) -> None:
    """Changes a file's text."""
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A house that keeps every rule."""
    root = tmp_path_factory.mktemp("sound")
    (root / "settings.ini").write_text(SETTINGS)
    for floor, module in {"core": "errors", "data": "bars"}.items():
        (root / "kallos" / floor).mkdir(parents=True)
        (root / "kallos" / floor / "__init__.py").write_text(FLOOR_INIT.replace("MODULE", module))
    (root / "kallos/__init__.py").write_text(ROOT_INIT)
    notebook(root / "nbs/index.ipynb", "# kallos\n\n[errors](core/00_errors.ipynb) and [Python](https://python.org)")
    run_notebook(root)
    room(root, HALVE)
    room(root, "#| export\nfrom kallos.core.errors import KallosError", HALVE, name="data/10_bars")
    return root


BREAKS = {
    "an import of a higher floor": (
        house.upward_imports,
        lambda root: room(root, "#| export\nfrom kallos.data.bars import halve as half", HALVE),
        "kallos.core.errors imports kallos.data.bars, which is not below it",
    ),
    "an import inside a function": (
        house.upward_imports,
        lambda root: room(root, HALVE + "\n\n\ndef _late():\n    import kallos.data.bars"),
        "kallos.core.errors imports kallos.data.bars, which is not below it",
    ),
    "an import by name": (
        house.upward_imports,
        lambda root: room(root, HALVE + "\n\n\ndef _late():\n    return importlib.import_module('kallos.data')"),
        "kallos.core.errors imports kallos.data, which is not below it",
    ),
    "an import of a higher number of the same floor": (
        house.upward_imports,
        lambda root: [
            room(root, HALVE, name="core/02_config"),
            room(root, "#| export\nfrom kallos.core import config", HALVE, name="core/01b_runs"),
        ],
        "kallos.core.runs imports kallos.core.config, which is not below it",
    ),
    "a module without a notebook": (
        house.orphans,
        lambda root: (root / "kallos/core/runs.py").touch(),
        "kallos/core/runs.py has no notebook",
    ),
    "a notebook without a module": (
        house.orphans,
        lambda root: (root / "kallos/core/errors.py").unlink(),
        "00_errors.ipynb has no module",
    ),
    "a lazy name that is not there": (
        house.lazy_names,
        lambda root: edit(root, "kallos/core/__init__.py", "halve", "double"),
        "kallos/core/__init__.py names errors.double, which is not there",
    ),
    "a module that its folder does not name": (
        house.lazy_names,
        lambda root: room(root, HALVE, name="core/03_runs"),
        "kallos/core/__init__.py does not name runs",
    ),
    "a public name that its folder does not name": (
        house.lazy_names,
        lambda root: room(root, HALVE, "#| export\nHALF = 0.5"),
        "kallos/core/__init__.py does not name errors.HALF",
    ),
    "a stored output": (
        house.stored_outputs,
        lambda root: run_notebook(root, outputs=[v4.new_output("stream", text="BTC")]),
        "nbs/tune.ipynb has stored outputs",
    ),
    "an execution count": (
        house.stored_outputs,
        lambda root: run_notebook(root, execution_count=3),
        "nbs/tune.ipynb has stored outputs",
    ),
    "a kernel without its language": (
        house.no_kernel,
        lambda root: run_notebook(root, language=""),
        "nbs/tune.ipynb has no kernelspec with name and language",
    ),
    "a run notebook without parameters": (
        house.run_notebook_faults,
        lambda root: run_notebook(root, tagged="other"),
        "tune.ipynb has 0 parameters cells",
    ),
    "two parameters cells": (
        house.run_notebook_faults,
        lambda root: run_notebook(root, "asset_id = 'BTC'", "asset_id = 'ETH'"),
        "tune.ipynb has 2 parameters cells",
    ),
    "a run notebook that nbdev would execute": (
        house.run_notebook_faults,
        lambda root: run_notebook(root, prose="# Tune"),
        "tune.ipynb does not say skip_exec: true",
    ),
    "a function in a run notebook": (
        house.run_notebook_faults,
        lambda root: run_notebook(root, "asset_id = 'BTC'", "%time 1\ndef score():\n    return 1"),
        "tune.ipynb defines score",
    ),
    "a class in a run notebook": (
        house.run_notebook_faults,
        lambda root: run_notebook(root, "asset_id = 'BTC'", "if asset_id:\n    class Score: ..."),
        "tune.ipynb defines Score",
    ),
    "many cells": (
        house.sizes,
        lambda root: run_notebook(root, *["asset_id"] * 69),
        "nbs/tune.ipynb has 70 cells",
    ),
    "a long module": (
        house.sizes,
        lambda root: room(root, *["#| export\na = 1\nb = 2"] * 100, prose=PROSE * 5),
        "nbs/core/00_errors.ipynb has 300 exported lines",
    ),
    "a long export cell": (
        house.sizes,
        lambda root: room(root, "#| export" + "\na = 1" * 25),
        "nbs/core/00_errors.ipynb has an export cell of 25 lines",
    ),
    "export cells in a row": (
        house.sizes,
        lambda root: room(root, *[HALVE] * 3),
        "nbs/core/00_errors.ipynb has 3 export cells in a row",
    ),
    "little prose": (
        house.sizes,
        lambda root: room(root, HALVE, prose="# Errors"),
        "nbs/core/00_errors.ipynb has 2 words of prose for 6 exported lines",
    ),
    "no test": (
        house.untested,
        lambda root: room(root, HALVE, test="halve(2)"),
        "00_errors.ipynb tests nothing",
    ),
    "a long function": (
        house.long_functions,
        lambda root: room(root, "#| export\ndef _long():" + "\n    a = 1" * 40),
        "kallos/core/errors.py: _long has 41 lines",
    ),
    "no docstring": (
        house.undocumented,
        lambda root: room(root, HALVE.replace('"""Half of the value."""', "half = 2")),
        "kallos/core/errors.py: halve has no docstring of one line",
    ),
    "an unexplained parameter": (
        house.undocumented,
        lambda root: room(root, HALVE.replace("  # any number", "")),
        "kallos/core/errors.py: halve does not say what value is",
    ),
    "a link to nowhere": (
        house.broken_links,
        lambda root: edit(root, "README.md", "00_errors", "00_faults"),
        "README.md links to nbs/core/00_faults.ipynb, which is not there",
    ),
    "a module that is out of sync": (
        stale,
        lambda root: edit(root, "kallos/core/errors.py", "value / 2", "value / 3"),
        "kallos/core/errors.py",
    ),
    "a module that no notebook makes": (
        stale,
        lambda root: (root / "kallos/core/runs.py").touch(),
        "kallos/core/runs.py",
    ),
    "a README that is out of date": (stale, lambda root: edit(root, "README.md", "kallos", "Kallos"), "README.md"),
    "a notebook that is not clean": (
        stale,
        lambda root: edit(root, "nbs/tune.ipynb", '"tags"', '"collapsed": true, "tags"'),
        "nbs/tune.ipynb",
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_house_has_no_findings(check: Callable, sound: Path):
    assert not [*check(sound)]


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_house_is_found_out(fault: str, sound: Path, tmp_path: Path):
    check, break_it, finding = BREAKS[fault]
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    break_it(tmp_path)
    assert finding in [*check(tmp_path)]
