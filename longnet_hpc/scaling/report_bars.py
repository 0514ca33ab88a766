"""How bars of a report are drawn: lying, measured ones filled, modelled ones pale and dashed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from longnet_hpc.scaling.report_data import Row
from longnet_hpc.scaling.report_draw import GREY, INK, Line, Picture, axes_of, new_figure, place_legend
from longnet_hpc.words import plural, short

__all__ = ["Bar", "picture_of"]

_MOST_BARS = 20
_BROKEN_OFF = 2.5
"""Where bars end that are longer, in multiples of the largest limit."""


@dataclass
class Bar:
    """A bar, and what is written beside it."""

    label: str
    row: Row
    parts: dict[str, float]
    words: str
    tick: float | None = None
    """Where a limit or minimum is marked."""
    values: dict[str, Any] = field(default_factory=dict)
    spread: tuple[float, float] | None = None
    beside: Row | None = None
    """The record it is compared with."""


def picture_of(
    bars: list[Bar],
    name: str,
    section: str,
    heading: str,
    caption: str,
    columns: Mapping[str, str],
    colors: Mapping[str, str],
    words: Callable[[float], str],
    *,
    title: str,
    tick: str = "",
) -> Picture:
    """Draw bars that lie, measured ones filled, modelled ones pale and dashed; many only in the table."""
    shown = bars[:_MOST_BARS]
    if len(bars) > len(shown):
        caption += f" {plural(len(bars) - len(shown), 'further bar')} only in the table."
    figure = new_figure(1.5 + 0.31 * len(shown))
    (axes,) = axes_of(figure)
    most = max([*(sum(bar.parts.values()) for bar in shown), *(bar.tick or 0 for bar in shown)]) or 1.0
    # One large limit must not press all bars flat: beyond it the mark is left to the table.
    longest = max(sum(bar.parts.values()) for bar in shown) or 1.0
    most = min(most, 4 * longest)
    # Nor must bars far beyond all limits press the others flat: they are broken off.
    limits = [bar.tick for bar in shown if bar.tick]
    if limits and most > _BROKEN_OFF * max(limits):
        most = _BROKEN_OFF * max(limits)
        caption += " Bars with two strokes at the end are broken off."
    for place, bar in enumerate(shown):
        _draw_bar(axes, place, bar, colors, most)
    axes.set_yticks(range(len(shown)), [short(_of_kind(bar), 74) for bar in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, (1.15 + 0.024 * max(len(bar.words) for bar in shown)) * most)  # room for the words
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([value for value in axes.get_xticks() if value <= 1.02 * most])
    axes.xaxis.set_major_formatter(lambda value, _: words(value))
    axes.set_title(title)
    handles: list[Any] = []
    parts = [part for part in colors if any(bar.parts.get(part) for bar in bars)]
    if len(parts) > 1:
        handles += [Patch(color=colors[part], label=part) for part in parts]
    kinds = {bar.row.is_modelled for bar in shown}
    if False in kinds:
        handles.append(Patch(color=GREY, label="measured: filled"))
    if True in kinds:
        handles.append(
            Patch(facecolor=to_rgba(GREY, 0.16), edgecolor=GREY, linestyle="--", label="modelled: pale, dashed")
        )
    if tick and any(bar.tick for bar in shown):
        handles.append(
            Line2D([], [], color=INK, linestyle="none", marker="|", markersize=11, markeredgewidth=2, label=tick)
        )
    place_legend(figure, handles, columns=5)
    lines = [Line((bar.row, *([bar.beside] if bar.beside else [])), {"point": bar.label, **bar.values}) for bar in bars]
    return Picture(name, section, heading, caption, columns, lines, figure)


def _draw_bar(axes: Axes, place: int, bar: Bar, colors: Mapping[str, str], most: float) -> None:
    start = 0.0
    for part, color in colors.items():
        width = min(bar.parts.get(part, 0.0), most - start)
        if width <= 0:
            continue
        look: dict[str, Any] = {"facecolor": color}
        if bar.row.is_modelled:
            look = {"facecolor": to_rgba(color, 0.16), "edgecolor": color, "linestyle": "--", "linewidth": 1.1}
        axes.barh(place, width, 0.62, left=start, zorder=2, **look)
        start += width
    end = start
    if sum(bar.parts.values()) > most * (1 + 1e-9):
        for stroke in (0.985, 1.0):
            axes.plot(
                [(stroke - 0.006) * most, (stroke + 0.006) * most], [place + 0.42, place - 0.42],
                color=INK, linewidth=1.2, zorder=5,
            )  # fmt: skip
    if bar.spread is not None:
        axes.hlines(place, *bar.spread, color=INK, linewidth=1.2, zorder=4)
        end = max(end, bar.spread[1])
    if bar.tick is not None and bar.tick <= most:
        axes.vlines(bar.tick, place - 0.4, place + 0.4, color=INK, linewidth=2, zorder=5)
        end = max(end, bar.tick)
    axes.annotate(
        *(bar.words, (end, place)), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, color=GREY
    )


def _of_kind(bar: Bar) -> str:
    return f"{bar.label} · {'modelled' if bar.row.is_modelled else 'measured'}"
