"""Records of a sweep as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["show"]

Row = dict[str, Any]
_Column = tuple[str, Callable[[Row, Row], str]]
"""A title, and what it says of a point and its results."""


def _number(key: str, scale: float, digits: int) -> Callable[[Row, Row], str]:
    def text(point: Row, results: Row) -> str:
        return f"{results[key] * scale:,.{digits}f}" if key in results else "-"

    return text


def _seconds(point: Row, results: Row) -> str:
    middle, low, high = (results[key] for key in ("seconds", "seconds_low", "seconds_high"))
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if middle * s >= 1), ("us", 1e6))
    return f"{middle * scale:.3f} [{low * scale:.3f}, {high * scale:.3f}] {unit}"


def _received(point: Row, results: Row) -> str:
    if not results.get("bytes_received"):
        return "-"
    return f"{results['bytes_received'] / 1e6:,.3f} / {results['bytes_received_minimum'] / 1e6:,.3f}"


_OF_RANKS: list[_Column] = [
    ("ranks", lambda point, _: f"{point['ranks']}"),
    ("tokens", lambda point, _: f"{point['tokens']:,}"),
    ("time of a round", _seconds),
    ("tokens/s", _number("tokens_per_second", 1, 0)),
    ("GFLOP/s", _number("model_flop_per_second", 1e-9, 1)),
]
_SHARES: list[_Column] = [
    ("compute s", _number("compute_seconds", 1, 3)),
    ("exchange s", _number("exchange_seconds", 1, 3)),
    ("wait s", _number("wait_seconds", 1, 3)),
    ("gradient s", _number("gradient_seconds", 1, 3)),
    ("hidden %", _number("hidden_fraction", 100, 1)),
    ("MB received / least", _received),
    ("slowest", _number("slowest_rank", 1, 0)),
]
_COLUMNS: dict[str, list[_Column]] = {
    "steps": [*_OF_RANKS, ("efficiency %", _number("efficiency", 100, 1)), *_SHARES],
    "attention": [*_OF_RANKS, *_SHARES],
    "exchange": [
        ("ranks", lambda point, _: f"{point['ranks']}"),
        ("operation", lambda point, _: f"{point['operation']}"),
        ("transport", lambda point, _: f"{point['transport']}"),
        ("bytes", lambda point, _: f"{point['bytes']:,}"),
        ("time", _seconds),
        ("MB received", _number("bytes_received", 1e-6, 3)),
        ("MB/s", _number("bytes_per_second", 1e-6, 1)),
    ],
}


def show(sweep: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """Print the records of a sweep, a line a point, and where they lie."""
    columns = _COLUMNS.get(sweep, _COLUMNS["steps"])
    if sweep == "step":
        columns = [column for column in columns if column[0] != "efficiency %"]
    lines = [[title for title, _ in columns] + ["check"]]
    for record in records:
        point, results = record["what"]["config"]["point"], record["results"]
        passed = "passed" if record["check"]["passed"] else "FAILED"
        lines.append([text(point, results) for _, text in columns] + [passed])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)))
    print(f"{len(records)} records in {path}", flush=True)
