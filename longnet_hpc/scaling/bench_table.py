"""Records of a sweep as a table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["efficiencies", "show"]

Row = dict[str, Any]
_Column = tuple[str, Callable[[Row, Row], str]]
"""A title, and what it says of a point and its results."""


def efficiencies(records: Sequence[dict[str, Any]]) -> list[float]:
    """Return the tokens a second and rank of each record over those of the one of the fewest ranks."""
    if not records:
        return []
    points = [record["what"]["config"]["point"] for record in records]
    rates = [
        record["results"]["tokens_per_second"] / point["ranks"] for record, point in zip(records, points, strict=True)
    ]
    _, first = min((point["ranks"], rate) for point, rate in zip(points, rates, strict=True))
    return [rate / first for rate in rates]


def show(sweep: str, records: Sequence[dict[str, Any]], path: Path) -> None:
    """Print the records of a sweep, a line a point, and where they lie."""
    columns = _COLUMNS.get(sweep, _ATTENTION)
    shares = efficiencies(records) if sweep in ("strong", "weak") else [0.0] * len(records)
    lines = [[title for title, _ in columns] + ["check"]]
    for record, share in zip(records, shares, strict=True):
        point, results = record["what"]["config"]["point"], {**record["results"], "efficiency": share}
        passed = "passed" if record["check"]["passed"] else "FAILED"
        lines.append([text(point, results) for _, text in columns] + [passed])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)))
    print(f"{len(records)} records in {path}", flush=True)


def _number(key: str, scale: float, digits: int) -> Callable[[Row, Row], str]:
    def text(point: Row, results: Row) -> str:
        return f"{results[key] * scale:,.{digits}f}" if key in results else "-"

    return text


def _seconds(point: Row, results: Row) -> str:
    middle, low, high = (results[key] for key in ("seconds", "seconds_low", "seconds_high"))
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if middle * s >= 1), ("us", 1e6))
    return f"{middle * scale:.3f} [{low * scale:.3f}, {high * scale:.3f}] {unit}"


def _exchange(point: Row, results: Row) -> str:
    if "hidden_fraction" not in results:
        return "-"
    told = (results.get(f"exchange_{what}_seconds") for what in ("alone", "late", "exposed"))  # not in old records
    return " / ".join("-" if seconds is None else f"{seconds * 1e3:,.2f}" for seconds in told)


def _received(point: Row, results: Row) -> str:
    if not results.get("bytes_received"):
        return "-"
    return f"{results['bytes_received'] / 1e6:,.3f} / {results['bytes_received_minimum'] / 1e6:,.3f}"


_RANKS: _Column = ("ranks", lambda point, _: f"{point['ranks']}")
_FIRST: list[_Column] = [
    _RANKS,
    ("tokens", lambda point, _: f"{point['tokens']:,}"),
    ("time of a round", _seconds),
    ("tokens/s", _number("tokens_per_second", 1, 0)),
]
_LAST: list[_Column] = [
    ("gradient s", _number("gradient_seconds", 1, 3)),
    ("exchange ms: alone / late / exposed", _exchange),
    ("hidden %", _number("hidden_fraction", 100, 0)),
    ("MB / least", _received),
]
_SCALING: list[_Column] = [*_FIRST, ("efficiency %", _number("efficiency", 100, 1)), *_LAST]
_ATTENTION: list[_Column] = [*_FIRST, ("GFLOP/s", _number("model_flop_per_second", 1e-9, 1)), *_LAST]
_COLUMNS: dict[str, list[_Column]] = {
    "strong": _SCALING,
    "weak": _SCALING,
    "exchange": [
        _RANKS,
        ("operation", lambda point, _: f"{point['operation']}"),
        ("transport", lambda point, _: f"{point['transport']}"),
        ("bytes", lambda point, _: f"{point['bytes']:,}"),
        ("time", _seconds),
        ("MB received", _number("bytes_received", 1e-6, 3)),
        ("MB/s", _number("bytes_per_second", 1e-6, 1)),
    ],
}
