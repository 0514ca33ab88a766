"""All pictures of a report, and a table of the records that are in none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from longnet_hpc.scaling.report_data import Row, as_number
from longnet_hpc.scaling.report_draw import Line, Picture, say
from longnet_hpc.scaling.report_gpu import draw_kernels, draw_rates
from longnet_hpc.scaling.report_lengths import draw_exchange, draw_lengths, draw_loss
from longnet_hpc.scaling.report_parts import draw_bytes, draw_memory, draw_shares, draw_slowest
from longnet_hpc.scaling.report_scaling import draw_accuracy, draw_scaling, draw_simulated
from longnet_hpc.words import short

__all__ = ["SECTIONS", "draw_all"]

SECTIONS = {
    "scaling": "Scaling over ranks",
    "lengths": "Over the length of a sequence",
    "shares": "Where the time goes",
    "exchange": "Exchanges",
    "bytes": "Bytes received",
    "memory": "Memory",
    "loss": "Loss over long sequences",
    "simulated": "Simulated against analytic",
    "slowest": "The slowest rank",
    "other": "Other records",
}
"""Headings of the sections, in order."""
_DRAW: tuple[Callable[[Sequence[Row]], Iterable[Picture]], ...] = (
    lambda rows: draw_scaling(rows, "strong"),
    lambda rows: draw_scaling(rows, "weak"),
    draw_accuracy,
    draw_lengths,
    draw_rates,
    draw_shares,
    draw_kernels,
    draw_exchange,
    draw_bytes,
    draw_memory,
    draw_loss,
    draw_simulated,
    draw_slowest,
)
_MOST_FIGURES = 8


def draw_all(rows: Sequence[Row]) -> list[Picture]:
    """Return all pictures that records speak of, in the order of the page; call it within `style`."""
    pictures = [picture for draw in _DRAW for picture in draw(rows)]
    shown = {row.number for picture in pictures for row in picture.rows}
    others = [row for row in rows if row.number not in shown]
    if others:
        pictures.append(_table_of(others))
    order = list(SECTIONS)
    return sorted(pictures, key=lambda picture: order.index(picture.section))


def _table_of(rows: Sequence[Row]) -> Picture:
    lines = []
    for row in rows:
        figures = {key: value for key, value in row.results.items() if as_number(value) is not None}
        words = [f"{_spaced(key)} {say(key, value)}" for key, value in list(figures.items())[:_MOST_FIGURES]]
        lines.append(Line((row,), {"what": short(row.name, 40), "figures": "; ".join(words)}))
    return Picture(
        "other_records",
        "other",
        "Other records",
        "Records that belong to no picture above: runs of training, evaluations, single timings, repeats, and points "
        "of which a newer record exists.",
        {"what": "what ran", "figures": "figures"},
        lines,
    )


def _spaced(key: str) -> str:
    return short(key.replace("_", " "), 40)
