"""Cleans the notebooks and writes what is made from them: kallos/ and README.md. `--check` says what is not current."""

import argparse
import re
import shutil
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

NOTE = "<!-- Made from nbs/index.ipynb by `make export`. Edit the notebook. -->\n\n"


def readme(
    index: Path,  # the notebook that README.md is made from
) -> str:
    """Returns the text of README.md, with the notebook's links and pictures as seen from the folder above."""
    text, _ = MarkdownExporter().from_filename(str(index))
    text = re.sub(r"\]\((?!\w+:|#)", "](nbs/", text)
    return NOTE + text.strip() + "\n"


def made(
    root: Path,  # a checkout
) -> dict[str, bytes]:
    """Returns the cleaned notebooks, and the modules and README.md that follow from them, by path in `root`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns(".ipynb_checkpoints")
        shutil.copytree(root / "nbs", copy / "nbs", ignore=ignored)
        shutil.copy(root / "settings.ini", copy)
        for init in (root / "kallos").rglob("__init__.py"):
            target = copy / init.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(init, target)
        with chdir(copy):
            # nbdev remembers the first settings.ini it read
            get_config.cache_clear()
            nbdev_clean()
            nbdev_export()
        get_config.cache_clear()
        (copy / "README.md").write_text(readme(copy / "nbs/index.ipynb"), encoding="utf8")
        return {path.relative_to(copy).as_posix(): path.read_bytes() for path in files(copy)}


def files(
    root: Path,  # a checkout
) -> list[Path]:
    """Returns the files of `root` that are made from its notebooks, and the notebooks."""
    found = [*(root / "nbs").rglob("*.ipynb"), *(root / "kallos").rglob("*.py"), root / "README.md"]
    return sorted(path for path in found if path.is_file() and ".ipynb_checkpoints" not in path.parts)


def stale(
    root: Path,  # a checkout
) -> dict[str, bytes | None]:
    """Returns what must change to make `root` current: new content by path, None for a file that no notebook makes."""
    wanted = made(root)
    present = {path.relative_to(root).as_posix(): path.read_bytes() for path in files(root)}
    return {path: wanted.get(path) for path in sorted({*wanted, *present}) if wanted.get(path) != present.get(path)}


def main() -> int:
    """Returns the exit code: 1 where `--check` finds something that is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, name what is not current")
    only_check = parser.parse_args().check
    root = Path(__file__).resolve().parents[1]
    changes = stale(root)
    for path, content in changes.items():
        if only_check:
            print(f"{path} is not what the notebooks make; run `make export`")
        elif content is None:
            (root / path).unlink()
            print(f"removed {path}")
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
            print(f"wrote {path}")
    for compiled in (root / "kallos").rglob("*.nb[ic]") if changes and not only_check else []:
        compiled.unlink()  # numba notices a change only in a function's own file
    return int(only_check and bool(changes))


if __name__ == "__main__":
    sys.exit(main())
