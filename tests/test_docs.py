"""The pages build without a warning, lack nothing public, lead nowhere that is not there, and their code runs."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from launching import ROOT, environment

import longnet_hpc
from longnet_hpc.command_line import parse

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "LOG.md")
WITH_COMMANDS = [ROOT / "README.md", *PAGES, DOCS / "forecast" / "README.md"]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\w+=\S+ |mpirun |srun |\$ )*.*?python -m longnet_hpc(?:\.run)? (.*)$")
pytestmark = pytest.mark.timeout(330)
BUILD_SECONDS = 300  # about 15 on an idle machine


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(path, language):
    """Return the code of all blocks of a language in a page, without their indentation."""
    found = [(len(indent), code) for indent, its, code in BLOCK.findall(path.read_text()) if its == language]
    return ["\n".join(line[indent:] for line in code.splitlines()) for indent, code in found]


def commands(path):
    """Return the words after the program's name of every command that a page shows in a block or indented."""
    found = []
    for line in path.read_text().replace("\\\n", " ").splitlines():
        stripped = line.strip()
        match = COMMAND.match(stripped.split(";")[0])
        if match and re.match(r"python |mpirun |srun |\w+=", stripped):
            found.append(shlex.split(match[1], comments=True))
    return found


def public_names():
    """Return the full names that modules of the reference are to explain, by the list in api.rst."""
    modules = re.findall(r"^   (longnet_hpc[\w.]*)$", (DOCS / "api.rst").read_text(), re.MULTILINE)
    assert modules[0] == "longnet_hpc"
    found = {f"longnet_hpc.{name}" for name in longnet_hpc.__all__}
    for module in modules[1:]:
        public = importlib.import_module(module).__all__
        found |= {f"{module}.{name}" for name in public if name not in longnet_hpc.__all__}
    return found


def names_that_users_import():
    """Return the full names that examples, pages and the README import from the library."""
    programs = [path.read_text() for path in (DOCS / "examples").glob("*.py")]
    programs += [code for page in [ROOT / "README.md", *PAGES] for code in blocks(page, "python")]
    found = set()
    for node in (node for program in programs for node in ast.walk(ast.parse(program))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longnet_hpc"):
            names = {alias.name for alias in node.names}
            found |= {f"{'longnet_hpc' if name in longnet_hpc.__all__ else node.module}.{name}" for name in names}
    return found


class Page(HTMLParser):
    """What a page has to offer, and what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        its = dict(attributes)
        self.anchors |= {its[key] for key in ("id", "name") if its.get(key)}
        target = its.get("src") or its.get("href") or ""
        if tag == "a":
            self.links.add(target)
        elif tag in ("img", "script") or (tag == "link" and its.get("rel") in ("stylesheet", "icon", "preload")):
            self.loaded.add(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages, built by the command of `make docs` from a copy, so that nothing old takes part and nothing is left."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("_build", "generated", "__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench", "longnet_hpc"):
        (folder / name).symlink_to(ROOT / name)
    words = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line).split()[1:]
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment(), capture_output=True, text=True, check=False,
        timeout=BUILD_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "-W" in words
    return folder / "docs" / "_build" / "html"


@pytest.fixture(scope="module")
def pages(site):
    """Every page of ours, parsed."""
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda *parts: parts[-1])
    explained = {name for kind in inventory for name in inventory[kind]}
    assert public_names() - explained == set()
    assert names_that_users_import() - explained == set(), "a line in docs/api.rst is missing"


def test_links_within_the_pages_lead_somewhere(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.is_file() and target.is_relative_to(site)
            if there and parts.fragment and target.suffix == ".html":
                there = unquote(parts.fragment) in (pages[target] if target in pages else Page(target)).anchors
            if not there:
                dead.append((str(path.relative_to(site)), link))
    assert dead == []
    assert len(pages) > 30


def test_pages_load_nothing_from_elsewhere(pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert {link for link in loaded if urlsplit(link).netloc} == set()


def test_equations_are_drawn_by_the_browser(site):
    text = (site / "mathematics.html").read_text()
    assert text.count("<math") > 40
    assert text.count('class="eqno"') == len(re.findall(r"^\$\$ \(\w+\)$", (DOCS / "mathematics.md").read_text(), re.M))


def test_every_example_has_a_page(site):
    examples = {path.stem for path in (DOCS / "examples").iterdir() if path.suffix in (".py", ".sh")}
    assert {path.stem for path in (site / "generated" / "examples").glob("*.html")} == examples


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_pages_have_python():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 6


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if commands(page)], ids=name_of)
def test_commands_of_a_page_have_options_that_exist(page):
    for words in commands(page):
        if "--resume" in words:  # its folder is not there
            at = words.index("--resume")
            del words[at : at + 2]
        parse(words, console=False)


def test_pages_have_commands():
    assert len(commands(ROOT / "README.md")) > 10
    assert sum(len(commands(page)) for page in PAGES) > 10


@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if blocks(page, "toml")], ids=name_of)
def test_config_of_a_page_is_read(page, tmp_path):
    for code in blocks(page, "toml"):
        (tmp_path / "config.toml").write_text(code)
        _, config = parse(["train", "--config", str(tmp_path / "config.toml")], console=False)
        assert config.model.heads == 8


def test_paths_that_pages_name_are_there():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for path in re.findall(r"`((?:jobs|bench|tests|docs|longnet_hpc)/[\w./*-]+)`", page.read_text()):
            if "_build" not in path:
                assert list(ROOT.glob(path)), f"{page.name}: {path} does not exist"


def test_citation_is_complete_and_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # those that the format requires
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "longnet_hpc"
    assert citation["type"] in ("software", "dataset")
    assert citation["version"] == longnet_hpc.__version__
    for authors in (citation["authors"], *(reference["authors"] for reference in citation["references"])):
        assert authors
        assert all("name" in author or "family-names" in author for author in authors)
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    assert citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == longnet_hpc.__version__
