"""How pictures of a report look, and how one becomes SVG, PNG and CSV.

Measured points are filled and solid, modelled ones hollow and dashed. A picture is drawn once: its SVG takes the
colours of the page (light, dark or on paper), its PNG is that of the light page.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from longnet_hpc.scaling.report_data import Row
from longnet_hpc.words import (
    bytes_in_words,
    flop_rate_in_words,
    number_in_words,
    percent,
    rate_in_words,
    seconds_in_words,
    tokens_in_words,
)

__all__ = ["PALETTE", "Line", "Picture", "axes_of", "new_figure", "say", "style", "to_csv", "to_png", "to_svg"]

INK, GREY, RULE, PAPER = "#1c2430", "#59636f", "#d7dce2", "#ffffff"
PALETTE = ("#0b62a4", "#c04a0a", "#0c7a5c", "#8746b8", "#977000", "#b8245f", "#2f7f95", "#6d5f52")
REST = "#8d98a5"
_LONG_LABEL = 58
"""Letters of an entry of a legend that needs a line for itself."""
MARKERS = "osD^vPX<"
DASH = (0, (4, 2.5))
_VARIABLES = {
    INK: "ink",
    GREY: "grey",
    RULE: "rule",
    PAPER: "paper",
    REST: "rest",
    **{color: f"c{number}" for number, color in enumerate(PALETTE, start=1)},
}
_STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign in the name of a host is a dollar sign
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}
_LONG_TIMES = {
    **{60.0: "1 min", 600.0: "10 min", 3600.0: "1 h", 36000.0: "10 h", 86400.0: "1 day", 864000.0: "10 days"},
    **{8.64e6: "100 days", 3.15576e7: "1 year", 3.15576e8: "10 years", 3.15576e9: "100 years"},
}
"""Where an axis of seconds has its marks above ten of them."""
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Line:
    """A line of the table of a picture, and the records it comes from."""

    rows: tuple[Row, ...]
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """measured, modelled, or both where they are compared."""
        return " and ".join(sorted({"modelled" if row.is_modelled else "measured" for row in self.rows}))


@dataclass
class Picture:
    """A picture, what it says, and its numbers."""

    name: str
    """Of its files, without the ending."""
    section: str
    title: str
    caption: str
    columns: Mapping[str, str]
    """Key, which is the heading in the CSV file and has the unit, and heading on the page."""
    lines: list[Line]
    figure: Figure | None = None
    """None where only a table makes sense."""
    sentences: list[str] = field(default_factory=list)
    """What belongs into the summary, most important first."""

    @property
    def rows(self) -> list[Row]:
        """Records it is made of."""
        return list({row.number: row for line in self.lines for row in line.rows}.values())


@contextmanager
def style() -> Iterator[None]:
    """Draw pictures of a report within it: sets matplotlib up, and back afterwards."""
    all_of_it: dict[Any, Any] = {**mpl.rcParamsDefault, "backend": "agg", **_STYLE}
    with mpl.rc_context(all_of_it), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a host may have a name in letters that the font lacks
        yield


def new_figure(height: float = 4.2, width: float = 9.4) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.06)  # type: ignore[union-attr,call-arg]
    return figure


def axes_of(figure: Figure, columns: int = 1) -> list[Axes]:
    """Return the axes of a figure, beside each other."""
    return [figure.add_subplot(1, columns, number + 1) for number in range(columns)]


def line_style(color: str, place: int, *, is_modelled: bool) -> dict[str, Any]:
    """Return how a line is drawn, so that measured and modelled ones cannot be taken for each other."""
    return {
        "color": color,
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASH if is_modelled else "-",
        "markerfacecolor": PAPER if is_modelled else color,
        "markeredgecolor": color,
        "markeredgewidth": 1.5,
        "zorder": 3 if is_modelled else 4,
    }


def kinds_of_lines(kinds: set[bool]) -> list[Line2D]:
    """Return entries of a legend that say how measured (False) and modelled (True) points look."""
    words = {False: "measured: filled, solid", True: "modelled: hollow, dashed"}
    return [
        Line2D([], [], **line_style(GREY, 0, is_modelled=kind), label=words[kind])
        for kind in (False, True)
        if kind in kinds
    ]


def place_legend(figure: Figure, handles: Sequence[Any], columns: int | None = None) -> None:
    """Put a legend below a figure, in as many columns as there is room for."""
    if columns is None:
        longest = max((len(its.get_label()) for its in handles), default=0)
        columns = 2 if len(handles) > 3 and longest < _LONG_LABEL else 1
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=3, columnspacing=2)


def log_axis(axes: Axes, which: str, values: Sequence[float], words: Callable[[float], str], base: int = 10) -> None:
    """Make an axis logarithmic, with marks that are said in words; over few decades at 1, 2 and 5."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log", base=base)
    marks = _powers_of_two(values) if base == 2 else _decades(min(values), max(values))
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: words(value))


def time_axis(axes: Axes, which: str, seconds: Sequence[float]) -> None:
    """Make an axis of seconds logarithmic, with marks at units of time that people use."""
    log_axis(axes, which, seconds, seconds_in_words)
    if max(seconds) > 300 and max(seconds) > 100 * min(seconds):
        short_ones = [10.0**exponent for exponent in range(math.floor(math.log10(min(seconds))), 2)]
        marks = [*short_ones, *_LONG_TIMES]
        within = [mark for mark in marks if min(seconds) / 2 < mark < 2 * max(seconds)]
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(FixedLocator(within[:: max(1, math.ceil(len(within) / 9))]))
        axis.set_major_formatter(lambda value, _: _LONG_TIMES.get(value) or seconds_in_words(value))


def say(key: str, value: object) -> str:
    """Return a figure in words, by the unit in its key."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number_in_words(value)
    for end, words in _WORDS:
        if key.endswith(end):
            return words(value)
    return number_in_words(value)


_WORDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("flop_per_second", flop_rate_in_words),
    ("bytes_per_second", lambda value: f"{bytes_in_words(value)}/s"),
    ("tokens_per_second", rate_in_words),
    ("_bytes_ratio", percent),
    ("seconds_per_token", seconds_in_words),
    ("nats_per_token", lambda value: f"{value:.4f}"),
    ("standard_error", lambda value: f"{value:.4f}"),
    ("seconds", seconds_in_words),
    ("bytes", bytes_in_words),
    ("tokens", tokens_in_words),
    ("position", tokens_in_words),
    ("efficiency", percent),
    ("share", percent),
    ("difference", lambda value: f"{100 * value:+.1f}%"),
)


def to_csv(picture: Picture) -> str:
    """Return the numbers of a picture as CSV: SI units, all digits, with the kind and number of each record."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "records", *picture.columns])
    for line in picture.lines:
        values = (line.values.get(key) for key in picture.columns)
        writer.writerow([line.kind, " ".join(row.mark for row in line.rows), *map(_cell, values)])
    return text.getvalue()


def to_png(picture: Picture) -> bytes:
    """Return a picture as PNG, in the colours of a light page."""
    assert picture.figure is not None
    stream = io.BytesIO()
    picture.figure.savefig(stream, format="png", dpi=150)
    picture.figure.set_layout_engine("none")  # everything has its place now, in an SVG, too
    return stream.getvalue()


def to_svg(picture: Picture) -> str:
    """Return a picture as SVG to put into a page: its colours and letters are those of the page's style."""
    assert picture.figure is not None
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": picture.name}):
        picture.figure.savefig(stream, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):
                parent.remove(child)
    for element in root.iter():
        _take_style_of_page(element, picture.name)
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", picture.title)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def _take_style_of_page(element: ElementTree.Element, name: str) -> None:
    if "id" in element.attrib:
        element.set("id", f"{name}-{element.get('id')}")
    if _LINK in element.attrib:
        element.set(_LINK, element.attrib[_LINK].replace("#", f"#{name}-"))
    for key in ("clip-path", "style", "fill", "stroke"):
        value = element.get(key)
        if value is not None:
            value = value.replace("url(#", f"url(#{name}-")
            if key != "clip-path":
                value = re.sub("#[0-9a-f]{6}", _variable, re.sub(r"'DejaVu Sans'[^;]*", "var(--sans)", value))
            element.set(key, value)


def _variable(color: re.Match[str]) -> str:
    name = _VARIABLES.get(color[0])
    return f"var(--{name})" if name else color[0]


def _cell(value: object) -> object:
    """Return a cell that a spreadsheet does not take for a formula."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"
    return "" if value is None else value


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 1.5, 2, 3, 4, 6) if high < 10 * low else (1, 2, 5) if last - first <= 2 else (1,)
    apart = max(1, math.ceil((last - first) / 8))
    return [step * 10.0**exponent for exponent in range(first - 1, last + 1) if exponent % apart == 0 for step in steps]


def _powers_of_two(values: Sequence[float]) -> list[float]:
    """Return the values, or of many only powers of two that are evenly apart."""
    its = sorted(set(values))
    closest = (its[-1] / its[0]) ** 0.1  # nearer marks would write into each other
    if len(its) <= 8 and all(b / a > max(1.4, closest) for a, b in itertools.pairwise(its)):
        return its
    first, last = math.floor(math.log2(its[0])), math.ceil(math.log2(its[-1]))
    apart = max(1, math.ceil((last - first) / 8))
    return [2.0**exponent for exponent in range(first, last + 1, apart)]
