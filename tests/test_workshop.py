"""The workshop works: a wheel holds what it must, constraints pin everything, and make says what is wrong."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import house


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What make said and left with, in a folder that holds a copy of the Makefile."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def bare(root: Path, tmp_path: Path) -> Path:
    """A folder with the files that an environment is made from, and nothing else."""
    for name in ("Makefile", "setup.py", "settings.ini", "constraints.txt", "README.md"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "tests/benchmarks", tmp_path / "tests/benchmarks")
    return tmp_path


def test_make_alone_lists_the_targets(bare: Path):
    listed = make(bare)
    assert listed.returncode == 0
    for target in ("demo", "test", "check", "soak", "lab", "docs", "bench", "export", "clean"):
        assert re.search(rf"^  {target} +\S", listed.stdout, re.M), target


@pytest.mark.parametrize("target", ["demo", "test", "check", "soak", "lab", "docs", "bench", "export"])
def test_another_python_is_told_before_anything_is_made(target: str, bare: Path):
    python = bare / "python3.13"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.13.0\nexit 1\n')
    python.chmod(0o755)
    before = {*bare.iterdir()}
    told = make(bare, target, f"PYTHON={python}")
    assert told.returncode == 2
    assert f"kallos needs Python 3.11, but {python} is: Python 3.13.0." in told.stderr
    assert {*bare.iterdir()} == before


def test_a_wheel_holds_the_modules_and_the_run_notebooks(root: Path, bare: Path):
    for name in ("kallos", "nbs"):
        shutil.copytree(root / name, bare / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, bare)
    # the wheel is built from the source distribution, so that both are seen to be complete
    subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=bare, check=True)
    (wheel,) = bare.glob("dist/kallos-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {
        path.relative_to(root).as_posix() for kind in ("py", "html") for path in (root / "kallos").rglob(f"*.{kind}")
    }
    runs = {f"kallos/notebooks/{path.name}" for path in house.run_notebooks(root)}
    assert runs
    assert held == code | runs


def pulled_in(name: str, extra: str, found: dict[str, str]) -> dict[str, str]:
    """Version by name of what a package needs, transitively, as installed here; other platforms may need more."""
    for requirement in map(Requirement, distribution(name).requires or []):
        child = canonicalize_name(requirement.name)
        if child in found or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        found[child] = distribution(child).version.partition("+")[0]
        for each in ("", *requirement.extras):
            pulled_in(child, each, found)
    return found


def test_constraints_pin_every_package_that_is_pulled_in(root: Path):
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    pulled = pulled_in("kallos", "dev", {})
    assert pulled == {name: pins.get(name) for name in pulled}
    assert pins["torch"] == "2.13.0"
