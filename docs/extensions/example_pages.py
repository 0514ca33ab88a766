"""A page for every file of docs/examples: its title and text are those of its docstring, or of its first comment."""

from __future__ import annotations

import ast
from pathlib import Path

from sphinx.application import Sphinx

__all__ = ["example_page", "setup"]

_LANGUAGES = {".py": "python", ".sh": "bash"}


def example_page(path: Path) -> str:
    """Return the page of an example, in Markdown. What its docstring indents is shown as commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text), clean=False) or ""
    else:
        lines = text.splitlines()[1:]
        about = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[: _end_of_comment(lines)])
    first, _, rest = about.partition("\n\n")
    parts = [f"# {path.name}", f"{' '.join(first.split())}", *(_paragraph(part) for part in rest.split("\n\n") if part)]
    options = f":language: {_LANGUAGES[path.suffix]}\n:caption: docs/examples/{path.name}"
    parts.append(f"```{{literalinclude}} ../../examples/{path.name}\n{options}\n```")
    return "\n\n".join(parts) + "\n"


def _end_of_comment(lines: list[str]) -> int:
    return next(
        (number for number, line in enumerate(lines) if not line.startswith("#") or line.startswith("#SBATCH")),
        len(lines),
    )


def _paragraph(part: str) -> str:
    lines = part.strip("\n").splitlines()
    if all(line.startswith("    ") for line in lines):
        return "\n".join(["```bash", *(line[4:] for line in lines), "```"])
    return part


def _write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "generated" / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        folder / f"{path.stem}.md": example_page(path)
        for path in sorted((Path(app.srcdir) / "examples").iterdir())
        if path.suffix in _LANGUAGES
    }
    for old in set(folder.iterdir()) - pages.keys():
        old.unlink()
    for page, content in pages.items():
        if not page.exists() or page.read_text(encoding="utf-8") != content:
            page.write_text(content, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for any."""
    app.connect("builder-inited", _write_pages, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
