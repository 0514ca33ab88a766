"""Numbers as a person would say them: seconds, bytes, tokens, rates, and lists of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = [
    "bytes_in_words",
    "flop_rate_in_words",
    "joined",
    "number_in_words",
    "one_line",
    "percent",
    "plural",
    "rate_in_words",
    "runs_of",
    "seconds_in_words",
    "short",
    "tokens_in_words",
]

_TIMES = ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days"))
_MOST_OF_A_UNIT = {"s": 600.0, "min": 120 * 60.0, "h": 72 * 3600.0, "days": 2 * 365.25 * 86400}
"""Up to how many seconds a unit is used; below a second, up to the next unit."""
_YEAR = 365.25 * 86400


def seconds_in_words(seconds: float) -> str:
    """Return a time, in seconds, with three digits and its unit, from nanoseconds to years."""
    if seconds == 0:
        return "0 s"
    if math.isnan(seconds):
        return "-"
    for (size, unit), (larger, _) in zip(_TIMES, (*_TIMES[1:], (_YEAR, "")), strict=True):
        if abs(seconds) < _MOST_OF_A_UNIT.get(unit, 0.9995 * larger):
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds / _YEAR)} years"


def bytes_in_words(count: float) -> str:
    """Return a number of bytes in decimal units: kB, MB, GB, TB."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def rate_in_words(per_second: float, unit: str = "tokens/s") -> str:
    """Return a rate with three digits, thousands separated."""
    return f"{_three_digits(per_second)} {unit}"


def flop_rate_in_words(per_second: float) -> str:
    """Return a rate of arithmetic in FLOP a second."""
    return _scaled(per_second, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s", "EFLOP/s"))


def tokens_in_words(count: float) -> str:
    """Return a number of tokens: 8K, 1M, 1B where it is a round number of them in powers of two, else its digits."""
    for unit, word in ((1 << 30, "B"), (1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and (count / unit * 4).is_integer():
            return f"{count / unit:g}{word}"
    return f"{count:,.0f}"


def number_in_words(value: object) -> str:
    """Return any value of a record in a few letters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.3g}"
    if isinstance(value, float):
        return _three_digits(value)
    return short(str(value), 60)


def percent(share: float) -> str:
    """Return a share of one as percent, with a digit behind the point below ten."""
    value = 100 * share
    return f"{value:.1f}%" if abs(value) < 9.95 and value else f"{value:,.0f}%"


def plural(count: int, word: str) -> str:
    """Return a count and its word, with an s unless it is one."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def joined(words: Iterable[str], most: int = 6) -> str:
    """Return words as a list in a sentence; of many only the first."""
    its = list(words)
    if len(its) > most:
        its = [*its[: most - 1], f"{len(its) - most + 1} more"]
    return its[0] if len(its) == 1 else f"{', '.join(its[:-1])} and {its[-1]}" if its else ""


def short(text: str, most: int) -> str:
    """Return text, cut to a number of letters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def one_line(text: str, most: int = 300) -> str:
    """Return text that comes from a file, cut to a number of letters, so that a terminal shows it in one line."""
    letters = short(" ".join(text.split()), most)
    return "".join(its if its.isprintable() else ascii(its)[1:-1] for its in letters)


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of consecutive numbers, in order."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _scaled(count: float, units: Sequence[str]) -> str:
    place = 0
    while abs(count) >= 999.5 and place < len(units) - 1:
        count, place = count / 1000, place + 1
    return f"{_three_digits(count)} {units[place]}"


def _three_digits(value: float) -> str:
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1e15 or abs(value) < 1e-4:
        return f"{value:.3g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
