"""``report``: one page, pictures and tables of records; no GPU, no MPI."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.scaling.config import ReportConfig
from longnet_hpc.scaling.report_data import Found, load, printable
from longnet_hpc.scaling.report_draw import style, to_csv, to_png
from longnet_hpc.scaling.report_page import page_of
from longnet_hpc.scaling.report_pictures import draw_all
from longnet_hpc.words import plural

__all__ = ["report"]


def report(config: ReportConfig) -> None:
    """Make ``index.html``, and PNG and CSV of each picture, of records; says what was found. Not collective.

    Parameters
    ----------
    config : ReportConfig
        Records, folder and title.

    Raises
    ------
    ConfigError
        If a source does not exist, or there is no record in any.
    OSError
        If the report cannot be written.
    """
    found = load(config.sources)
    folder = config.output
    made = f"Made on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC."
    with style(), naming_errors(f"cannot write the report to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw_all(found.sound)
        for picture in pictures:
            _write(folder / f"{picture.name}.csv", to_csv(picture).encode())
            if picture.figure is not None:
                _write(folder / f"{picture.name}.png", to_png(picture))
        _write(folder / "index.html", page_of(printable(config.title), found, pictures, made).encode())
    print("\n".join(_in_words(found)))
    drawn = sum(picture.figure is not None for picture in pictures)
    print(f"{folder / 'index.html'}: {plural(drawn, 'picture')}, {plural(len(pictures), 'table')}")


def _write(path: Path, content: bytes) -> None:
    replace_file(path, lambda partial: partial.write_bytes(content))


def _in_words(found: Found) -> list[str]:
    modelled = sum(row.is_modelled for row in found.rows)
    lines = [
        f"{plural(len(found.rows), 'record')} in {plural(len(found.files), 'file')}: "
        f"{len(found.rows) - modelled:,} measured, {modelled:,} modelled"
    ]
    lines += [f"passed over: {note}" for note in found.notes]
    return lines + [f"failed: {failure.place}: {failure.reason}" for failure in found.failures[:20]]
