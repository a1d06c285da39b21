"""The documentation: built without a network, a page for every notebook, and nothing on it that leads nowhere."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tools import docs

TAKEN = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\ssrc=\"([^\"]+)\"|<link\b[^>]*\shref=\"([^\"]+)\"")
IN_CSS = re.compile(r"(?:url\(|@import\s+)[\"']?(https?:)?//")
HOSTS = re.compile(
    r"cdnjs|jsdelivr|unpkg|cdn\.plot\.ly|fonts\.g(oogleapis|static)", re.I
)  # that scripts are fetched from
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    return docs.build(root, tmp_path_factory.mktemp("docs")).parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_notebook_is_a_page_that_the_map_leads_to(site: Path, root: Path):
    pages = {path.with_suffix(".html") for path in docs.notebooks(root)}
    assert not [page for page in pages if not (site / page).is_file()]
    seen, ahead = set(), {Path("index.html")}
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = re.findall(r'href="([^"#:]+\.html)', (site / page).read_text(encoding="utf8"))
        found = {(site / page.parent / link).resolve().relative_to(site.resolve()) for link in links}
        assert not [link for link in found if not (site / link).is_file()], page
        ahead |= found - seen
    assert pages <= seen


@pytest.mark.slow
def test_no_page_takes_anything_from_a_network(site: Path):
    taken = {name for page in site.rglob("*.html") for pair in TAKEN.findall(page.read_text()) for name in pair if name}
    assert taken and not [name for name in taken if re.match(r"(\w+:)?//", name)]
    assert not [sheet.name for sheet in site.rglob("*.css") if IN_CSS.search(sheet.read_text(encoding="utf8"))]
    texts = {path.name: path.read_text(encoding="utf8") for end in ("html", "js") for path in site.rglob(f"*.{end}")}
    assert not [name for name, text in texts.items() if HOSTS.search(text)]


@pytest.mark.slow
def test_a_page_shows_its_module_code_and_formulas(site: Path):
    text = (site / "data/11a_sample.html").read_text(encoding="utf8")
    assert "kallos.data.sample" in text and ">sample_bars</span>" in text and "<math" in text and "tag_exported" in text
    assert "#| export" not in text and "default_exp" not in text


# A house of three rooms


def write(path: Path, *texts: str) -> None:
    """A notebook of these cells: what begins with a heading is prose."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [(v4.new_markdown_cell if text.startswith("# ") else v4.new_code_cell)(text) for text in texts]
    nbformat.write(v4.new_notebook(cells=cells, metadata=KERNEL), path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small checkout whose documentation is sound."""
    root = tmp_path / "checkout"
    write(root / "nbs/index.ipynb", "# Small\n\n[errors](core/00_errors.ipynb)\n\n| floor | holds | notebooks |\n"
          "|---|---|---|\n| `core` | errors | [nbs/core](core/) |")  # fmt: skip
    write(root / "nbs/tune.ipynb", "# Tune")
    write(root / "nbs/core/00_errors.ipynb", "# Errors\n\n> What can go wrong: $x^2$.", "#| export\na = 1")
    write(root / "nbs/tutorials/first.ipynb", "# First\n\n> The first.")
    (root / "nbs/images").mkdir()
    (root / "kallos/core").mkdir(parents=True)
    for module in ("errors", "faults", *(f"fault_{number}" for number in range(10, 15))):
        (root / f"kallos/core/{module}.py").write_text("__all__ = ['a']\n")
    return root


@pytest.mark.slow
def test_a_new_notebook_appears_by_itself_and_one_that_is_gone_disappears(small: Path, tmp_path: Path):
    site = docs.build(small, tmp_path / "docs").parent
    assert "What can go wrong" in (site / "core/index.html").read_text()
    (small / "nbs/core/00_errors.ipynb").rename(small / "nbs/core/01_faults.ipynb")
    write(small / "nbs/index.ipynb", "# Small\n\n| `core` | errors | [nbs/core](core/) |")
    docs.build(small, tmp_path / "docs")
    assert "01_faults" in (site / "core/index.html").read_text()
    assert "00_errors" not in (site / "core/index.html").read_text()
    assert not (tmp_path / "docs/source/core/00_errors.ipynb").exists()


FAULTS = {
    "a link to a notebook that is not there": ("# Errors\n\n[x](01_faults.ipynb)", "01_faults.ipynb"),
    "a link to a file that is not there": ("# Errors\n\n[x](../../none.md)", "none.md"),
    "a link to a heading that is not there": ("# Errors\n\n[x](#nowhere)", "nowhere"),
    "a picture that is not there": ("# Errors\n\n![x](../images/none.png)", "none.png"),
    "a formula that is none": ("# Errors\n\n$\\nonsense{x}$", "cannot be drawn"),
}


@pytest.mark.slow
def test_what_leads_nowhere_fails_the_build(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    for number, (text, _) in enumerate(FAULTS.values(), 10):
        write(small / f"nbs/core/{number}_fault_{number}.ipynb", text)
    with pytest.raises(SystemExit, match="not sound"):
        docs.build(small, tmp_path / "docs")
    lines = capfd.readouterr().err.splitlines()
    for number, (fault, (_, said)) in enumerate(FAULTS.items(), 10):
        assert [line for line in lines if f"{number}_fault" in line and said in line], fault


@pytest.mark.slow
def test_a_tutorial_that_does_not_run_fails_the_build(small: Path, tmp_path: Path):
    write(small / "nbs/tutorials/first.ipynb", "# First\n\n> The first.", "print(6 * 7)")
    site = docs.build(small, tmp_path / "docs", run_tutorials=True).parent
    assert "42" in (site / "tutorials/first.html").read_text()
    write(small / "nbs/tutorials/first.ipynb", "# First\n\n> The first.", "1 / 0")
    with pytest.raises(SystemExit, match="does not run from top to bottom"):
        docs.build(small, tmp_path / "docs", run_tutorials=True)
