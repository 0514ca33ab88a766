"""Pictures of dilated attention for the pages, from the library's own geometry; light and dark, as SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sphinx.application import Sphinx

from longnet_hpc import Partition, Pattern

__all__ = ["setup", "weights_of"]

_COLORS = {"light": ("#24292f", "#e4e7eb", "#1f5fa8", "#d2761f"), "dark": ("#cfd0d0", "#2b3036", "#6ea8ea", "#e8a15c")}
"""Of each look: text, cells that are not seen, cells that are, and cells that are seen twice."""


def weights_of(pattern: Pattern, seq_len: int, head: int, *, causal: bool) -> NDArray[np.int64]:
    """Return how often a query (row) sees a key (column), for one head."""
    query, key = np.indices((seq_len, seq_len))
    seen = np.zeros((seq_len, seq_len), dtype=np.int64)
    for branch in pattern:
        w, r = branch.segment_length, branch.dilation_rate
        both = ((query % w) % r == head % r) & ((key % w) % r == head % r) & (query // w == key // w)
        seen += both & (key <= query) if causal else both
    return seen


def _draw_pattern(look: str) -> Figure:
    """Draw who sees whom: branches one by one and together, for two heads."""
    text, empty, once, twice = _COLORS[look]
    pattern = Pattern.from_lists([4, 8, 16], [1, 2, 4])
    figure = Figure(figsize=(9, 4.7), layout="constrained")
    axes = figure.subplots(2, 4)
    for row, head in zip(axes, (0, 1), strict=True):
        single = [Pattern((branch,)) for branch in pattern]
        for place, shown in zip(row, [*single, pattern], strict=True):
            seen = weights_of(shown, 16, head, causal=True)
            _draw_cells(place, np.minimum(seen, 2), ListedColormap([empty, once, twice]))
            if head == 0:
                branch = shown.branches[0]
                one = f"w = {branch.segment_length}, r = {branch.dilation_rate}"
                place.set_title(one if len(shown) == 1 else "all branches", fontsize=10, color=text)
        row[0].set_ylabel(f"head {head}\nqueries", color=text, fontsize=9)
    for place in axes[1]:
        place.set_xlabel("keys", color=text, fontsize=9)
    return figure


def _draw_cells(axes: Axes, cells: NDArray[np.int64], colors: ListedColormap) -> None:
    edge = colors.colors[0]  # type: ignore[index]
    axes.pcolormesh(cells[::-1], cmap=colors, vmin=0, vmax=2, edgecolors=edge, linewidth=0.4)
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_ranks(look: str) -> Figure:
    """Draw the slices of four ranks, the segments of a branch, and the rows that rank 2 receives."""
    text, empty, once, twice = _COLORS[look]
    partition, (branch,) = Partition.even(48, 4), Pattern.from_lists([32], [4])
    figure = Figure(figsize=(9, 2.1), layout="constrained")
    axes = figure.subplots()
    received = _received(partition, 2)
    for position in range(partition.stop):
        on_grid = (position % branch.segment_length) % branch.dilation_rate == 0
        color = empty if not on_grid else twice if position in received else once
        axes.add_patch(Rectangle((position, 0), 0.9, 0.9, color=color))
    for rank in range(partition.size):
        start, stop = partition.bounds[rank : rank + 2]
        axes.plot([start, stop - 0.6], [1.35, 1.35], color=text, linewidth=1.2)
        axes.text((start + stop) / 2, 1.6, f"rank {rank}", ha="center", color=text, fontsize=10)
    for start in range(0, partition.stop, branch.segment_length):
        stop = min(start + branch.segment_length, partition.stop)
        axes.plot([start, stop - 0.6], [-0.45, -0.45], color=text, linewidth=1.2)
        axes.text((start + stop) / 2, -1.35, f"segment, w = 32 (tokens {start} to {stop - 1})", ha="center", color=text)
    axes.set_xlim(-0.5, partition.stop + 0.5)
    axes.set_ylim(-1.6, 2.3)
    axes.axis("off")
    return figure


def _received(partition: Partition, rank: int) -> set[int]:
    """Return the positions whose keys and values a rank receives for head 0, as the library lays exchanges out."""
    (branch,) = Pattern.from_lists([32], [4])
    found = set()
    for span in partition.spans(branch, rank):
        for other in span.sources(rank, causal=True):
            piece, start = span.piece_of(other), partition.bounds[other]
            first = start + piece.start + piece.first_row(branch, 0)
            found |= {first + branch.dilation_rate * number for number in range(piece.rows(branch, 0))}
    return found


_PICTURES: dict[str, Callable[[str], Figure]] = {"pattern": _draw_pattern, "ranks": _draw_ranks}


def _write_pictures(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "generated" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in _PICTURES.items():
        for look, (text, *_) in _COLORS.items():
            with rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "text.color": text, "font.size": 9}):
                draw(look).savefig(folder / f"{name}_{look}.svg", transparent=True, metadata={"Date": None})


def setup(app: Sphinx) -> dict[str, bool]:
    """Draw before Sphinx looks for pictures."""
    app.connect("builder-inited", _write_pictures, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
