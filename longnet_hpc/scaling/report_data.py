"""Records of a report: found in files and folders, checked line by line, and numbered.

A line that is no record does not end a report; it is kept as a `Failure`, which the report lists. What strings hold is
made printable here, once, so that no control character reaches a page, a table or a picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from longnet_hpc.errors import ConfigError
from longnet_hpc.record import check_record, lines_of
from longnet_hpc.words import plural, short

__all__ = ["Failure", "Found", "Row", "as_number", "load", "printable"]

_LONGEST_STRING = 2000
_DEEPEST = 20
"""Deeper tables are cut off."""


@dataclass(frozen=True)
class Row:
    """A record, and where it was found."""

    number: int
    """From 1 on, in the order in which the records were made; R7 in the report."""
    place: str
    """File and line."""
    record: Mapping[str, Any]

    @property
    def mark(self) -> str:
        """How the report calls it."""
        return f"R{self.number}"

    @property
    def name(self) -> str:
        """What ran."""
        return str(self.record["what"]["name"])

    @property
    def is_modelled(self) -> bool:
        """Whether its figures are a forecast."""
        return bool(self.record["kind"] == "modelled")

    @property
    def passed(self) -> bool:
        """Whether its check did."""
        return bool(self.record["check"]["passed"])

    @property
    def time(self) -> str:
        """When it was made, as ISO 8601; empty if that is not said."""
        time = self.record.get("time")
        return time if isinstance(time, str) else ""

    @property
    def config(self) -> Mapping[str, Any]:
        """What was chosen."""
        return _mapping(self.record["what"]["config"])

    @property
    def results(self) -> Mapping[str, Any]:
        """What came out."""
        return _mapping(self.record["results"])

    @property
    def where(self) -> Mapping[str, Any]:
        """Machine and job."""
        return _mapping(self.record["where"])

    @cached_property
    def point(self) -> Mapping[str, Any]:
        """What changes from point to point of a sweep."""
        return _mapping(self.config.get("point"))

    @property
    def hardware(self) -> str:
        """The GPU, or the processor where there is none."""
        return str(self.where.get("gpu") or self.where.get("cpu") or "unknown")

    def number_of(self, key: str, *, least: float = -math.inf) -> float | None:
        """Return a result, or None unless it is a finite number, and at least some value."""
        return as_number(self.results.get(key), least)

    def positive(self, key: str) -> float | None:
        """Return a result, or None unless it is a number above zero."""
        value = as_number(self.results.get(key))
        return value if value is not None and value > 0 else None


@dataclass(frozen=True)
class Failure:
    """Something that a report cannot use, or that went wrong when a record was made."""

    place: str
    """File and lines."""
    reason: str
    row: Row | None = None
    """The record, if it is one."""


@dataclass
class Found:
    """All that was found."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was passed over, though nothing is wrong with it."""
    files: list[str] = field(default_factory=list)
    """Files that have records."""

    @property
    def sound(self) -> list[Row]:
        """Records whose check passed: those that pictures are made of."""
        return [row for row in self.rows if row.passed]


def as_number(value: object, least: float = -math.inf) -> float | None:
    """Return a value as a float, or None unless it is a finite number, and at least some value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number >= least else None


def load(sources: Sequence[str]) -> Found:
    """Read all records of files, and of folders and the folders in them. Not collective.

    Parameters
    ----------
    sources : sequence of str
        Files of any name, and folders, in which only files named ``*.jsonl`` are read. None means ``runs``.

    Raises
    ------
    ConfigError
        If a source does not exist, or there is not one record in all of them.
    """
    found, records = Found(), []
    names = list(sources) or ["runs"]
    for path in _files(names):
        records += _read(path, found)
    if not records:
        skipped = sum(failure.row is None for failure in found.failures)
        also = (
            f"; {plural(skipped, 'line or file')} could not be read, the first: {found.failures[0].place}: "
            if skipped
            else ""
        )
        raise ConfigError(
            f"there is no record in {short(', '.join(names), 200)}" + (also + found.failures[0].reason if also else "")
        )
    unique: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, record in records:
        unique.setdefault(json.dumps(record, sort_keys=True), (place, record))
    if len(unique) < len(records):
        found.notes.append(f"{plural(len(records) - len(unique), 'record')} found twice, word for word, counted once")
    in_order = sorted(unique.values(), key=lambda its: str(its[1].get("time", "")))
    found.rows = [Row(number, place, record) for number, (place, record) in enumerate(in_order, start=1)]
    found.failures += [
        Failure(row.place, f"check did not pass: {row.record['check']['name']}", row)
        for row in found.rows
        if not row.passed
    ]
    return found


def _files(sources: Sequence[str]) -> list[Path]:
    files: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"cannot read {short(source, 200)!r}: there is no such file or folder")
        inside = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for its in inside:
            if not its.is_dir():
                files.setdefault(its.resolve(), its)
    return list(files.values())


def _read(path: Path, found: Found) -> list[tuple[str, dict[str, Any]]]:
    """Return place and record of each line that is one; the others become failures, those alike in one."""
    records, wrong, steps = [], dict[str, list[int]](), 0
    name = printable(str(path))
    try:
        for number, line in lines_of(path):
            if not line.strip():
                continue
            try:
                value = json.loads(line, parse_constant=_no_number)
                if isinstance(value, dict) and "schema" not in value and type(value.get("step")) is int:
                    steps += 1
                    continue
                records.append((f"{name}:{number}", _record(value)))
            except (ValueError, RecursionError) as error:
                wrong.setdefault(_reason(error), []).append(number)
    except OSError as error:
        found.failures.append(Failure(name, f"cannot be read: {error.strerror or error}"))
    if steps:
        found.notes.append(f"{name}: {plural(steps, 'line')} of the steps of a run, which are no records")
    for reason, numbers in wrong.items():
        more = f" and {plural(len(numbers) - 1, 'other line')}" if len(numbers) > 1 else ""
        found.failures.append(Failure(f"{name}:{numbers[0]}{more}", reason))
    if records:
        found.files.append(name)
    return records


def _record(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"a {type(value).__name__} is no record")
    check_record(value)
    clean = _clean(value)
    assert isinstance(clean, dict)
    return clean


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line is cut off or not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "line is nested too deeply"
    return printable(short(str(error), 200))


def _no_number(word: str) -> float:
    raise ConfigError(f"{word} is no number of JSON")


def _clean(value: object, depth: int = 0) -> object:
    """Return a value of JSON with strings that can be printed, tables not too deep."""
    if isinstance(value, str):
        return printable(value)
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {printable(key): _clean(its, depth + 1) for key, its in value.items()}
    if isinstance(value, list):
        return [_clean(its, depth + 1) for its in value]
    return value


def printable(text: str) -> str:
    """Replace what is not to be seen, or turns the direction of writing, and cut what is long."""
    text = short(text, _LONGEST_STRING)
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
