"""The rules of the house as functions: each takes a checkout and returns what breaks its rule, one line a finding."""

import ast
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

FLOORS = ("core", "data", "models", "evaluation", "inference", "workflow", "")
NUMBERED = re.compile(r"(\d+)([a-z]?)_(\w+)")
NOT_A_MODULE = {"__init__.py", "_modidx.py"}
MOST_CELLS, MOST_EXPORTED_LINES, MOST_CELL_LINES, MOST_FUNCTION_LINES = 69, 299, 24, 40


def notebooks(root: Path) -> list[Path]:
    return sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def numbered(root: Path) -> list[Path]:
    return [path for path in notebooks(root) if NUMBERED.fullmatch(path.stem)]


def run_notebooks(root: Path) -> list[Path]:
    others = [path for path in notebooks(root) if not NUMBERED.fullmatch(path.stem) and path.stem != "index"]
    return [path for path in others if path.parent.name != "tutorials"]


def modules(root: Path) -> list[Path]:
    return sorted(path for path in (root / "kallos").rglob("*.py") if path.name not in NOT_A_MODULE)


def module_of(notebook: Path, root: Path) -> Path:
    name = NUMBERED.fullmatch(notebook.stem)[3]
    return root / "kallos" / notebook.relative_to(root / "nbs").parent / f"{name}.py"


def cells(notebook: Path, kind: str | None = None) -> list[dict]:
    found = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and source(cell).lstrip().startswith("#| export")


# Layers


def rank(floor: str, number: str = "999", letter: str = "~") -> tuple:
    """The place of a room in the import order; a floor as a whole comes after all its rooms."""
    return FLOORS.index(floor), int(number), letter


def ranks(root: Path) -> dict[str, tuple]:
    found = {f"kallos.{floor}": rank(floor) for floor in FLOORS if floor}
    for notebook in numbered(root):
        number, letter, name = NUMBERED.fullmatch(notebook.stem).groups()
        floor = notebook.relative_to(root / "nbs").parent.as_posix().removeprefix(".")
        found[".".join(filter(None, ("kallos", floor, name)))] = rank(floor, number, letter)
    return found


def imported(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """The dotted names that a module of `package` imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def room(name: str, places: dict[str, tuple]) -> str | None:
    """The room or floor that a dotted name lies in, or None where it is none of kallos'."""
    parts = name.split(".")
    heads = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((head for head in heads if head in places), None)


def upward_imports(root: Path) -> list[str]:
    places = ranks(root)
    found = []
    for module in modules(root):
        name = ".".join(module.relative_to(root).with_suffix("").parts)
        tree = ast.parse(module.read_text(encoding="utf8"))
        for target in sorted({room(dotted, places) for dotted in imported(tree, name.split(".")[:-1])} - {None}):
            if name in places and places[target] >= places[name]:
                found.append(f"{name} imports {target}, which is not below it")
    return found


# Notebooks and their modules


def orphans(root: Path) -> list[str]:
    expected = {module_of(notebook, root): notebook for notebook in numbered(root)}
    without_module = [f"{notebook.name} has no module" for path, notebook in expected.items() if not path.exists()]
    return without_module + [
        f"{path.relative_to(root)} has no notebook" for path in modules(root) if path not in expected
    ]


def lazy_names(root: Path) -> list[str]:
    """Differences between what a folder's `__init__` names and what the folder's modules make public."""
    found = []
    for init in sorted((root / "kallos").rglob("__init__.py")):
        calls = [node for node in ast.walk(ast.parse(init.read_text(encoding="utf8"))) if isinstance(node, ast.Call)]
        tables = [ast.literal_eval(call.args[1]) for call in calls if ast.unparse(call.func) == "lazy"]
        named = {(module, name) for table in tables for module, names in table.items() for name in ("", *names)}
        there = {(path.name, "") for path in init.parent.iterdir() if (path / "__init__.py").exists()}
        for path in modules(root):
            if path.parent == init.parent:
                there |= {(path.stem, name) for name in ("", *public_names(path))}
        faults = [(pair, "names {}, which is not there") for pair in named - there]
        faults += [(pair, "does not name {}") for pair in there - named]
        found += [f"{init.relative_to(root)} {fault.format('.'.join(pair).strip('.'))}" for pair, fault in faults]
    return sorted(found)


def public_names(module: Path) -> set[str]:
    body = ast.parse(module.read_text(encoding="utf8")).body
    lists = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return {*ast.literal_eval(lists[0])} if lists else set()


# Every notebook


def stored_outputs(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} has stored outputs"
        for path in [*notebooks(root), *(root / "tests").rglob("*.ipynb")]
        if any(cell["outputs"] or cell["execution_count"] for cell in cells(path, "code"))
    ]


def no_kernel(root: Path) -> list[str]:
    found = []
    for path in notebooks(root):
        kernel = json.loads(path.read_text(encoding="utf8"))["metadata"].get("kernelspec", {})
        if kernel.get("language") != "python" or not kernel.get("name"):
            found.append(f"{path.relative_to(root)} has no kernelspec with name and language")
    return found


# Run notebooks


def run_notebook_faults(root: Path) -> list[str]:
    found = []
    for path in run_notebooks(root):
        tags = [cell["metadata"].get("tags", []) for cell in cells(path)]
        count = sum("parameters" in tag for tag in tags)
        if count != 1:
            found.append(f"{path.name} has {count} parameters cells")
        if not any(re.search(r"^-?\s*skip_exec:\s*true", source(cell), re.M) for cell in cells(path)):
            found.append(f"{path.name} does not say skip_exec: true")
        code = "\n".join(re.sub(r"^\s*[%!].*", "", source(cell), flags=re.M) for cell in cells(path, "code"))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.append(f"{path.name} defines {node.name}")
    return found


# Sizes


def code_lines(cell: dict) -> int:
    return sum(not line.startswith("#|") for line in source(cell).splitlines())


def sizes(root: Path) -> list[str]:
    found = []
    for path in notebooks(root):
        exported = [cell for cell in cells(path) if is_exported(cell)]
        lines = sum(source(cell).count("\n") + 1 for cell in exported)
        prose = sum(len(source(cell).split()) for cell in cells(path, "markdown"))
        longest = max((code_lines(cell) for cell in exported), default=0)
        row = max((len([*run]) for key, run in groupby(cells(path), is_exported) if key), default=0)
        limits = {
            f"{len(cells(path))} cells": len(cells(path)) > MOST_CELLS,
            f"{lines} exported lines": lines > MOST_EXPORTED_LINES,
            f"an export cell of {longest} lines": longest > MOST_CELL_LINES,
            f"{row} export cells in a row": row > 2,
            f"{prose} words of prose for {lines} exported lines": prose < lines,
        }
        found += [f"{path.relative_to(root)} has {what}" for what, broken in limits.items() if broken]
    return found


def untested(root: Path) -> list[str]:
    shown = {path: [source(cell) for cell in cells(path, "code") if not is_exported(cell)] for path in numbered(root)}
    test = re.compile(r"^\s*(assert |test_\w+\()", re.M)
    return [f"{path.name} tests nothing" for path, codes in shown.items() if not any(map(test.search, codes))]


# Functions


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef, list[str]]]:
    """Every function of every module, with a name for it and the module's lines."""
    for module in modules(root):
        text = module.read_text(encoding="utf8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module.relative_to(root)}: {node.name}", node, text.splitlines()


def long_functions(root: Path) -> list[str]:
    lengths = ((name, node.end_lineno - node.lineno + 1) for name, node, _ in functions(root))
    return [f"{name} has {length} lines" for name, length in lengths if length > MOST_FUNCTION_LINES]


def undocumented(root: Path) -> list[str]:
    """Public functions of a module without a docstring of one line, or with a parameter that no comment explains."""
    found = []
    for name, node, lines in functions(root):
        if node.name.startswith("_") or node.col_offset:
            continue
        if len((ast.get_docstring(node) or "").splitlines()) != 1:
            found.append(f"{name} has no docstring of one line")
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if "  # " not in lines[argument.end_lineno - 1]:
                found.append(f"{name} does not say what {argument.arg} is")
    return found


# Links


def broken_links(root: Path) -> list[str]:
    """Relative links of README.md that lead nowhere."""
    links = re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", (root / "README.md").read_text(encoding="utf8"))
    return [f"README.md links to {link}, which is not there" for link in links if not (root / link).exists()]
