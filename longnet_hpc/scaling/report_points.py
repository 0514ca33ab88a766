"""Points of scaling runs and of forecasts, gathered into series and matched with each other.

A *case* is what is computed: a model, its task, and what changes memory or time of a step. A *device* is where: a
GPU, or the processor. Measured and modelled points of one case and device share a colour, and are compared where
ranks and tokens agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from longnet_hpc.scaling.report_data import Row, as_number
from longnet_hpc.words import short, tokens_in_words

__all__ = ["Point", "Series", "colors_of", "gather", "labels_of", "matched", "newest", "points_of"]

MEASURED = ("bench strong", "bench weak", "bench step")
MODELLED = ("plan", "simulate")
_ALSO_OF_A_CASE = {
    "batch_size": 1,
    "activation_checkpointing": False,
    "keep_attention": True,
    "half_residual": False,
    "deterministic": False,
    "stream": False,
    "chunk_len": None,
    "geometric": None,
}
"""What changes a step besides its model and task, and what it is where nothing is said."""
_ACCELERATOR = re.compile(r"(?<![a-z0-9])((?:gh|gb|[abhlv])\d{2,3}[a-z]?|mi\d{3}[a-z]?)(?![a-z])", re.IGNORECASE)
"""Names such as H100, GH200 and MI250X, in those of GPUs and of machine files."""


@dataclass(frozen=True)
class Point:
    """A step that was measured or forecast."""

    row: Row
    case: str
    device: str
    """Accelerator in a word, cpu, or the name of a machine file that says neither."""
    ranks: int
    tokens: int
    """Over all ranks."""
    seconds: float
    """Of a step."""

    @property
    def is_modelled(self) -> bool:
        """Whether it is a forecast."""
        return self.row.is_modelled

    @property
    def source(self) -> str:
        """In words, where it was measured, or what forecast it for which machine."""
        if not self.is_modelled:
            return self.row.hardware
        by = {"plan": "analytic", "simulate": "simulated"}.get(self.row.name, self.row.name)
        return f"{by}, {PurePath(str(self.row.config.get('machine', '?'))).stem}"

    @property
    def low(self) -> float:
        """Lower end of the confidence interval, in seconds."""
        return min(self.row.positive("seconds_low") or self.seconds, self.seconds)

    @property
    def high(self) -> float:
        """Upper end of it."""
        return max(self.row.positive("seconds_high") or self.seconds, self.seconds)

    @property
    def color(self) -> tuple[str, str]:
        """What it shares a colour with."""
        return self.case, self.device


@dataclass(frozen=True)
class Series:
    """Points that make a line, by ranks or tokens."""

    points: tuple[Point, ...]
    fixed: float
    """What they have in common, in tokens; or ranks."""

    @property
    def first(self) -> Point:
        """The point that others are compared with."""
        return self.points[0]

    def efficiency(self, point: Point, seconds: float | None = None) -> float:
        """Return tokens a second and rank of a point (at another time) over those of the first."""
        first = self.first.tokens / self.first.ranks / self.first.seconds
        return point.tokens / point.ranks / (seconds or point.seconds) / first


def points_of(rows: Iterable[Row], names: Sequence[str] = (*MEASURED, *MODELLED)) -> list[Point]:
    """Return the points of records with some names; of several of one point the newest."""
    points: dict[tuple[Any, ...], Point] = {}
    for row in rows:
        ranks, tokens = (as_number(row.point.get(key), 1) for key in ("ranks", "tokens"))
        seconds = row.positive("seconds")
        if row.name not in names or ranks is None or tokens is None or seconds is None:
            continue
        point = Point(row, _case(row), _device(row), int(ranks), int(tokens), seconds)
        per_node = row.config.get("ranks_per_node") if row.is_modelled else row.where.get("ranks_per_node")
        key = (row.name, row.is_modelled, point.case, point.source, str(per_node), point.ranks, point.tokens)
        points[key if row.is_modelled else (*key, str(row.config.get("dtype")))] = point
    return list(points.values())


def gather(points: Iterable[Point], by: str) -> list[Series]:
    """Return lines of two points or more, measured ones first.

    Parameters
    ----------
    points : iterable of Point
        Points of any kind.
    by : str
        What the points of a line have in common: ``tokens`` (strong scaling), ``tokens_per_rank`` (weak scaling), or
        ``ranks`` (growing sequences).
    """
    lines: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        fixed = {"tokens": point.tokens, "ranks": point.ranks, "tokens_per_rank": point.tokens / point.ranks}[by]
        key = (point.is_modelled, point.row.name, point.case, point.source, str(point.row.config.get("dtype")), fixed)
        lines.setdefault(key, []).append(point)
    place = "tokens" if by == "ranks" else "ranks"
    series = []
    for key, its in lines.items():
        by_place = {getattr(point, place): point for point in its}  # ranks may sit on nodes in several ways: the newest
        if len(by_place) > 1:
            series.append(Series(tuple(by_place[x] for x in sorted(by_place)), key[-1]))
    return sorted(series, key=lambda one: one.first.is_modelled)


def matched(points: Iterable[Point]) -> list[tuple[Point, Point]]:
    """Return pairs of a measured and a modelled point of one case, ranks and tokens, on one device as far as known."""
    its = list(points)
    forecasts: dict[tuple[Any, ...], list[Point]] = {}
    for point in its:
        if point.is_modelled:
            forecasts.setdefault((point.case, point.ranks, point.tokens), []).append(point)
    return [
        (point, other)
        for point in its
        if not point.is_modelled
        for other in forecasts.get((point.case, point.ranks, point.tokens), ())
        if other.device == point.device or not _is_known(other.device)
    ]


def labels_of(points: Iterable[Point]) -> dict[str, str]:
    """Return each case in a few words, no two alike."""
    labels: dict[str, str] = {}
    for point in points:
        if point.case in labels:
            continue
        config, model = point.row.config, point.row.config.get("model")
        size = ""
        if isinstance(model, dict):
            size = f"{model.get('layers', '?')} layers of {model.get('embed_dim', '?')}"
        name = short(str(config.get("preset") or size or "model"), 24)
        task = {"train": "training", "eval": "forward"}.get(str(config.get("task")), short(str(config.get("task")), 16))
        also = [
            words
            for key, words in (("activation_checkpointing", "checkpointed"), ("stream", "streamed"))
            if config.get(key)
        ]
        if config.get("activation_checkpointing") and config.get("keep_attention") is False:
            also[0] += " with attention"
        if (batch := config.get("batch_size", 1)) != 1:
            also.append(f"batch {short(str(batch), 8)}")
        label = ", ".join([f"{name} {task}", *also])
        if label in labels.values() and size:
            label += f", {short(size, 30)}"
        number = 2
        first = label
        while label in labels.values():
            label, number = f"{first} ({number})", number + 1
        labels[point.case] = label
    return labels


def colors_of(points: Iterable[Point], palette: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return a colour for each case and device; a machine file of unknown device takes that of the measured ones."""
    its = list(points)
    measured: dict[str, set[str]] = {}
    for point in its:
        if not point.is_modelled:
            measured.setdefault(point.case, set()).add(point.device)
    colors: dict[tuple[str, str], str] = {}
    names: dict[tuple[str, str], str] = {}
    for point in sorted(its, key=lambda one: one.is_modelled):
        alike = measured.get(point.case, set())
        device = point.device
        if point.is_modelled and not _is_known(device) and len(alike) == 1:
            device = next(iter(alike))
        color = names.setdefault((point.case, device), palette[len(names) % len(palette)])
        colors[point.color] = color
    return colors


def newest(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], Row]:
    """Return the newest record of each combination of values of its config."""
    return {tuple(json.dumps(row.config.get(key)) for key in keys): row for row in rows}


def fixed_in_words(series: Series, by: str) -> str:
    """Return what the points of a line have in common."""
    if by == "ranks":
        return f"{series.fixed:,.0f} rank{'' if series.fixed == 1 else 's'}"
    return tokens_in_words(series.fixed) + (" tokens a rank" if by == "tokens_per_rank" else " tokens")


def _case(row: Row) -> str:
    config = row.config
    model = config.get("model")
    if isinstance(model, dict) and config.get("geometric") is not None:
        model = {key: value for key, value in model.items() if key not in ("segment_lengths", "dilation_rates")}
    also = {key: config.get(key, default) for key, default in _ALSO_OF_A_CASE.items()}
    return json.dumps([model, config.get("task"), also], sort_keys=True)


def _device(row: Row) -> str:
    text = str(row.config.get("machine", "")) if row.is_modelled else str(row.where.get("gpu") or "cpu")
    name = PurePath(text).stem if row.is_modelled else text
    word = _ACCELERATOR.search(name)
    if word is not None:
        return word[1].lower()
    if re.search(r"(?<![a-z])(cpu|cores?|epyc|xeon|ryzen)", name, re.IGNORECASE):
        return "cpu"
    return name


def _is_known(device: str) -> bool:
    return device == "cpu" or _ACCELERATOR.fullmatch(device) is not None
