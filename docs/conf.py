"""Configuration of Sphinx: `make docs` builds the pages of this folder into docs/_build/html, without the network."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
REPORTS = ("forecast", "two_gpus")
LONGEST_VALUE = 100
HIDDEN_COLON = "\ue000"
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import longnet_hpc  # noqa: E402

project = "longnet_hpc"
author = "The longnet_hpc developers"
copyright = f"2026, {author}"
version = release = longnet_hpc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "example_pages",
    "mathml",
    "pattern_pictures",
]
exclude_patterns = ["_build", "examples"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
templates_path = ["_templates"]
default_role = "py:obj"  # single backticks in docstrings are names

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = True
napoleon_google_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # a list, beside the entries that autodoc makes
napoleon_use_param = False  # names that share a line of a docstring stay together
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False

copybutton_prompt_text = "$ "
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"longnet_hpc {release}"
html_static_path = ["_static"]
html_css_files = ["longnet_hpc.css"]
html_show_sourcelink = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out of a module's page what has its place on the page of the package: each name has one."""
    module = app.env.current_document.autodoc_module or app.env.ref_context.get("py:module")
    elsewhere = what == "module" and module != "longnet_hpc" and name in longnet_hpc.__all__ and name[0] != "_"
    return True if elsewhere else None


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Leave out the arguments of a dataclass: its fields follow, each with type, default and meaning."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(obj) else None


def _hide_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in an attribute's docstring for its type."""
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", HIDDEN_COLON) for line in lines]


def _show_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def _shorten(app: Sphinx, domain: str, kind: str, content: addnodes.desc_content) -> None:
    """Leave out values that are longer than what is said of them, and a base that all classes have."""
    for signature in content.parent.findall(addnodes.desc_signature):
        for part in list(signature.findall(addnodes.desc_annotation)):
            if part.astext().startswith(" = ") and len(part.astext()) > LONGEST_VALUE:
                signature.remove(part)
    first = next(iter(content.children), None)
    if isinstance(first, nodes.paragraph) and first.astext() == "Bases: object":
        content.remove(first)


def _link_to_report(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let a page lead to the report that is copied beside it, which would else be a download without its pictures."""
    if docname in {f"{folder}/README" for folder in REPORTS}:
        source[0] = source[0].replace("[index.html](index.html)", '<a href="index.html">index.html</a>')


def _copy_reports(app: Sphinx, error: Exception | None) -> None:
    """Put the reports that lie in folders of this one beside the pages, pictures and all."""
    if error is None and app.builder.format == "html":
        for folder in REPORTS:
            shutil.copytree(HERE / folder, Path(app.outdir) / folder, dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """Connect what this file adds."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _hide_colons, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _show_colons, priority=600)
    app.connect("object-description-transform", _shorten)
    app.connect("source-read", _link_to_report)
    app.connect("build-finished", _copy_reports)
