"""How the documentation looks. `tools/docs.py` lays its pages out and builds it; nothing is fetched from a network."""

import re
from configparser import ConfigParser
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_config = ConfigParser()
_config.read(Path(__file__).parents[1] / "settings.ini", encoding="utf8")
_settings = _config["DEFAULT"]

project, version = _settings["lib_name"], _settings["version"]
author, copyright = _settings["author"], _settings["copyright"]

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # it would be fetched
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["kallos.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "navigation_depth": 3,
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
}


def _as_mathml(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """The formula as browsers draw it themselves, so that no script has to be fetched."""
    formula = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", node.astext())  # browsers find the height of a bracket themselves
    try:
        return tex2mathml(formula, as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("this formula cannot be drawn (%s): %s", error, formula, location=node)
        return escape(formula)


def _visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_as_mathml(node, as_block=False))
    raise nodes.SkipNode


def _visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_as_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the drawing of formulas."""
    renderers = {"inline_renderers": (_visit_math, None), "block_renderers": (_visit_math_block, None)}
    app.add_html_math_renderer("mathml", **renderers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
