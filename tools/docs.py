"""Builds the documentation in build/docs from the notebooks. `--execute` runs the tutorials before."""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

NUMBERED = re.compile(r"\d+[a-z]?_(\w+)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| \[", re.M)
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}  # which knows what a cell of bash is
HOUSE = """# The map of the house

Folders are floors. A module imports only from lower floors and from the lower numbers of its own floor, so that the
numbers in front of the notebooks are an order in which they can be read. Each page below is the notebook that a module
is exported from: what is exported stands on a coloured edge, and the examples and tests around it are part of the page.

| floor | what it holds | rooms |
|---|---|---|
{rows}
"""
RUNS = """# The run notebooks

A run, such as a tuning study, is a notebook too. These are executed with the parameters you give and left, charts
included, beside what the run made. They define nothing; what they call is explained [in the house](map.md).
"""
TUTORIALS = """# Tutorials

Each is a notebook that runs from top to bottom on a market that it invents, in a temporary folder, without a network.
They lie in `nbs/tutorials`; `make lab` opens them.
"""


def notebooks(root: Path) -> list[Path]:
    """All notebooks below `nbs`, as paths from there."""
    found = (path.relative_to(root / "nbs") for path in (root / "nbs").rglob("*.ipynb"))
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def cells_of(path: Path) -> list[dict]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf8"))["cells"]


def source(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def heading(path: Path) -> tuple[str, str]:
    """The title of a notebook, and what the quoted line under it says, if there is one."""
    text = "\n".join(source(cell) for cell in cells_of(path) if cell["cell_type"] == "markdown")
    found = re.search(r"^# (.+)(?:\n+> (.+))?", text)
    if found is None:
        raise SystemExit(f"{path} does not begin with a heading of the first level")
    return found[1], found[2] or ""


# Pages that are notebooks


def linked(text: str, folder: Path, root: Path) -> str:
    """The text with its links as the site needs them: a folder's page for a folder, and none to what is no page.

    A link to a file that is not there at all stays, and fails the build.
    """

    def as_page(found: re.Match) -> str:
        picture, said, target, anchor = found.groups()
        path = Path(os.path.normpath(root / "nbs" / folder / target))
        inside = path.is_relative_to(root / "nbs")
        if inside and path.is_dir():
            return f"[{said}]({target.rstrip('/')}/index.md)"
        if picture or not path.exists() or (inside and path.suffix == ".ipynb"):
            return f"{picture}[{said}]({target}{anchor or ''})"
        return f"{said} (`{path.relative_to(root)}`)" if said != str(path.relative_to(root)) else f"`{said}`"

    return LINK.sub(as_page, text)


def page(path: Path, root: Path, *, executed: Path | None = None) -> dict:
    """The notebook as a page: what is for nbdev alone is left out, what is exported is marked."""
    notebook = json.loads((executed or root / "nbs" / path).read_text(encoding="utf8"))
    cells = []
    for cell in notebook["cells"]:
        text = source(cell)
        if cell["cell_type"] == "raw" or re.match(r"#\| *(hide|default_exp)\b", text):
            continue
        if cell["cell_type"] == "markdown":
            text = linked(text, path.parent, root)
        elif re.match(r"#\| *export", text):
            cell["metadata"] = {"tags": ["exported"]}
        cell["source"] = re.sub(r"\A(#\|.*\n)+", "", text)
        cells.append(tidied(cell))
    if name := NUMBERED.fullmatch(path.stem):
        cells.insert(1, note(path, root / "kallos" / path.parent / f"{name[1]}.py", root))
    return notebook | {"cells": cells, "metadata": notebook["metadata"] | {"language_info": LANGUAGE}}


def tidied(cell: dict) -> dict:
    """The cell with each stretch of its printed text in one piece, and without the progress that was written over."""
    outputs = []
    for output in cell.get("outputs", []):
        text = "".join(output.get("text", ""))
        if output["output_type"] != "stream":
            outputs.append(output)
        elif outputs and outputs[-1]["output_type"] == "stream":
            outputs[-1]["text"] += text
        elif "TqdmWarning" not in text:  # which is about a widget that nobody asked for
            outputs.append(output | {"name": "stdout", "text": text})
    for output in outputs:
        if output["output_type"] == "stream":
            output["text"] = re.sub(r"[^\n]*\r(?!\n)|^ *\d+%\|.*\n", "", output["text"], flags=re.M)
    return cell | ({"outputs": outputs} if "outputs" in cell else {})


def note(path: Path, module: Path, root: Path) -> dict:
    """A cell that says which module the page is of, and what is public in it."""
    dotted = ".".join(module.relative_to(root).with_suffix("").parts)
    found = re.search(r"^__all__ = (\[.*?\])", module.read_text(encoding="utf8"), re.M | re.S)
    names = ", ".join(f"`{name}`" for name in ast.literal_eval(found[1])) if found else "nothing"
    text = f"```{{admonition}} {dotted}\nMade from `nbs/{path}`, which is this page. Public: {names}.\n```"
    return {"cell_type": "markdown", "id": "the-module", "metadata": {}, "source": text}


# Pages that list others


def toctree(pages: Iterable[str], *, hidden: bool = True) -> str:
    """A table of contents."""
    return "\n```{toctree}\n" + ":hidden:\n" * hidden + "\n".join(["", *pages]) + "\n```\n"


def listing(title: str, text: str, paths: list[Path], root: Path) -> str:
    """A page of a folder: each of its notebooks with the line that says what it is."""
    rows = [(path.name, *heading(root / "nbs" / path)) for path in paths]
    table = ["| page | what it is |", "|---|---|", *(f"| [{name}]({file}) | {said} |" for file, name, said in rows)]
    return f"# {title}\n\n{text}\n\n" + "\n".join(table) + "\n" + toctree(path.name for path in paths)


def in_order(paths: list[Path], index: str) -> list[Path]:
    """The tutorials in the order in which the index names them; the others after those."""
    places = {path: index.find(f"({path.as_posix()})") for path in paths}
    return sorted(paths, key=lambda path: (places[path] < 0, places[path], path.name))


def layout(root: Path) -> dict[str, str]:
    """By path, the pages that are no notebooks: the map, a page a floor, the run notebooks, the tutorials."""
    index = "\n".join(map(source, cells_of(root / "nbs/index.ipynb")))
    holds, paths, pages = dict(ROW.findall(index)), notebooks(root), {}
    rooms = {floor: [path for path in paths if path.parent == Path(floor)] for floor in holds}
    rooms["."] = [path for path in paths if path.parent == Path() and NUMBERED.fullmatch(path.stem)]
    runs = [path for path in paths if path.parent == Path() and path not in rooms["."] and path.stem != "index"]
    rows = [f"| [{floor}]({floor}/index.md) | {holds[floor]} | {len(rooms[floor])} |" for floor in holds]
    rows.append(f"| [the command](commands.md) | `kallos-run` | {len(rooms['.'])} |")
    for floor in holds:
        pages[f"{floor}/index.md"] = listing(floor, f"Holds {holds[floor]}.", rooms[floor], root)
    pages["commands.md"] = listing("The command", "What `kallos-run` is made of.", rooms["."], root)
    pages["map.md"] = HOUSE.format(rows="\n".join(rows)) + toctree([*(f"{f}/index" for f in holds), "commands"])
    pages["runs.md"] = listing(*RUNS[2:].split("\n\n", 1), runs, root)
    tutorials = in_order([path for path in paths if path.parts[0] == "tutorials"], index)
    pages["tutorials/index.md"] = listing(*TUTORIALS[2:].split("\n\n", 1), tutorials, root)
    return pages


def lay_out(root: Path, folder: Path, executed: dict[Path, Path]) -> None:
    """Writes what Sphinx reads into the folder, and takes out of it what is no page any more."""
    pages = layout(root)
    for path in notebooks(root):
        made = page(path, root, executed=executed.get(path))
        if path == Path("index.ipynb"):
            names = toctree(["tutorials/index", "map", "runs"])
            made["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": names})
        pages[path.as_posix()] = json.dumps(made)
    for name, text in pages.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text(encoding="utf8") != text:  # Sphinx reads again what was written
            target.write_text(text, encoding="utf8")
    shutil.copytree(root / "nbs/images", folder / "images", dirs_exist_ok=True)
    for gone in {*folder.rglob("*.ipynb"), *folder.rglob("*.md")} - {folder / name for name in pages}:
        gone.unlink()


# Tutorials


def execute(path: Path, root: Path, folder: Path) -> Path:
    """The executed notebook; it is run again only if it, or kallos, has changed."""
    code = [root / "nbs" / path, *sorted((root / "kallos").rglob("*.py"))]
    digest = sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:16]
    target = folder / f"{path.stem}_{digest}.ipynb"
    if not target.exists():
        print(f"running {path}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{path.stem}_*.ipynb"):
            old.unlink()
        draft = folder / f"draft_{path.name}"
        line = [sys.executable, "-m", "papermill", str(root / "nbs" / path), str(draft), "-k", "python3"]
        if subprocess.run([*line, "--no-progress-bar", "--log-level", "ERROR"]).returncode:
            raise SystemExit(f"{path} does not run from top to bottom; see {draft}")
        draft.rename(target)
    return target


# The site


def build(root: Path, folder: Path, *, run_tutorials: bool = False) -> Path:
    """The first page of the site; SystemExit if anything is wrong with it, such as a link that leads nowhere."""
    ours = [path for path in notebooks(root) if path.parts[0] == "tutorials" and run_tutorials]
    executed = {path: execute(path, root, folder / "executed") for path in ours}
    lay_out(root, folder / "source", executed)
    conf = Path(__file__).resolve().parents[1] / "docs"
    line = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(conf)]
    line += ["-d", str(folder / "doctrees"), str(folder / "source"), str(folder / "html")]
    if subprocess.run(line).returncode:
        raise SystemExit("the documentation is not sound: see above")
    return folder / "html" / "index.html"


def main() -> None:
    """Builds the site of this checkout, and says where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--execute", action="store_true", help="run the tutorials first, so that they show results")
    given = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    print(build(root, root / "build" / "docs", run_tutorials=given.execute).as_uri())


if __name__ == "__main__":
    main()
