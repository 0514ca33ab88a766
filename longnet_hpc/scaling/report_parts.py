"""Pictures of what a step takes: shares of its time, bytes received, memory, and the slowest rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from longnet_hpc.scaling.memory import IN_HOST_MEMORY
from longnet_hpc.scaling.report_bars import Bar, picture_of
from longnet_hpc.scaling.report_data import Row, as_number
from longnet_hpc.scaling.report_draw import GREY, PALETTE, REST, Picture
from longnet_hpc.scaling.report_points import MEASURED, MODELLED, Point, labels_of, matched, points_of
from longnet_hpc.words import bytes_in_words, percent, plural, seconds_in_words, short, tokens_in_words

__all__ = ["draw_bytes", "draw_memory", "draw_shares", "draw_slowest"]

_PARTS = {"compute": PALETTE[0], "exchange": PALETTE[1], "gradients": PALETTE[3], "input": PALETTE[4], "rest": REST}
"""Of a step: computing, waiting for the exchange of attention, sum of gradients, waiting for input, all else."""


def draw_shares(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield what a step's time is made of."""
    points = _in_order(points_of(rows))
    labels = labels_of(points)
    bars = [bar for point in points if (bar := _share_bar(point, labels)) is not None]
    if not bars:
        return
    picture = picture_of(
        bars,
        "shares_of_a_step",
        "shares",
        "What a step's time is made of",
        "Of the slowest rank. Exchange is the time spent waiting for it; what computing hides is not in it, but in the "
        "table. Gradients: their sum over ranks.",
        {
            "point": "point",
            "seconds": "step",
            **{f"{name}_share": name for name in _PARTS},
            "hidden_share": "of the exchange, hidden",
        },
        _PARTS,
        lambda value: f"{100 * value:.0f}%",
        title="Share of a step's time",
    )
    measured = [bar for bar in bars if not bar.row.is_modelled] or bars
    most = max(measured, key=lambda bar: bar.parts.get("exchange", 0.0))
    kind = "modelled" if most.row.is_modelled else "measured"
    picture.sentences = [
        f"Waiting for the exchange takes at most {percent(most.parts.get('exchange', 0.0))} of a step "
        f"({kind}: {most.label})."
    ]
    yield picture


def _share_bar(point: Point, labels: Mapping[str, str]) -> Bar | None:
    row = point.row
    names = {"compute": "compute_seconds", "gradients": "gradient_seconds", "input": "input_seconds"}
    parts = {name: row.number_of(key, least=0) for name, key in names.items()}
    waits, exchange = row.number_of("wait_seconds", least=0), row.number_of("exchange_seconds", least=0)
    if parts["compute"] is None:
        return None
    known = {name: value or 0.0 for name, value in parts.items()}
    known["exchange"] = waits if waits is not None else exchange or 0.0
    # Input is read beside computing: of it, only what the step is longer for can be a part of it.
    left = point.seconds - known["compute"] - known["exchange"] - known["gradients"]
    known["input"] = min(known["input"], max(0.0, left))
    known["rest"] = max(0.0, left - known["input"])
    total = sum(known.values())
    shares = {name: known[name] / total for name in _PARTS}
    values: dict[str, Any] = {"seconds": point.seconds, **{f"{name}_share": share for name, share in shares.items()}}
    if exchange and waits is not None:
        values["hidden_share"] = max(0.0, 1 - waits / exchange)
    return Bar(_label(point, labels), row, shares, seconds_in_words(point.seconds), values=values)


def draw_bytes(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield bytes received, beside the least that any exchange could do with."""
    points = _in_order(points_of(rows))
    forecasts = {id(a): b for a, b in matched(points) if b.row.name == "plan"}
    labels = labels_of(points)
    bars = []
    for point in points:
        received, least = (point.row.number_of(key, least=0) for key in ("bytes_received", "bytes_received_minimum"))
        if received is None or (point.ranks == 1 and not received) or point.row.name == "simulate":
            continue
        forecast = forecasts.get(id(point))
        expected = forecast.row.number_of("bytes_received", least=0) if forecast else None
        words = bytes_in_words(received)
        if least:
            words += f", {percent(received / least)} of the minimum"
        values = {
            "received_bytes": int(received),
            "minimum_bytes": None if least is None else int(least),
            "over_the_minimum_bytes_ratio": received / least if least else None,
            "forecast_bytes": None if expected is None else int(expected),
        }
        bar = Bar(_label(point, labels), point.row, {"received": received}, words, least, values)
        bar.beside = forecast.row if forecast and expected is not None else None
        bars.append(bar)
    if not bars:
        return
    picture = picture_of(
        bars,
        "bytes_received",
        "bytes",
        "Bytes received, and the least that would do",
        "By the rank that receives most, in a step, for attention. Black marks: the minimum, each row needed once.",
        {
            "point": "point",
            "received_bytes": "received",
            "minimum_bytes": "minimum",
            "over_the_minimum_bytes_ratio": "of the minimum",
            "forecast_bytes": "forecast",
        },
        {"received": PALETTE[0]},
        bytes_in_words,
        title="Bytes received by a rank in a step",
        tick="minimum",
    )
    ratios = [bar.values["over_the_minimum_bytes_ratio"] for bar in bars if bar.values["over_the_minimum_bytes_ratio"]]
    if ratios:
        picture.sentences = [f"Ranks receive at most {percent(max(ratios))} of the least bytes that would do."]
    equal = [bar.values["forecast_bytes"] == bar.values["received_bytes"] for bar in bars if bar.beside]
    if equal:
        picture.sentences.append(
            f"The forecast of bytes received is exact in {sum(equal)} of {plural(len(equal), 'point')}."
        )
    yield picture


def draw_memory(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield memory of a rank, measured and forecast by kind, beside what it has."""
    points = _in_order(points_of(rows))
    forecasts = {id(a): b for a, b in matched(points) if b.row.name == "plan"}
    labels = labels_of(points)
    colors: dict[str, str] = {}
    bars = []
    for point in points:
        parts, total = _memory(point.row)
        if not total or point.row.name == "simulate":
            continue
        for part in parts:
            colors.setdefault(part, GREY if part == "peak" else (*PALETTE, REST)[len(colors) % (len(PALETTE) + 1)])
        capacity = point.row.positive("capacity_bytes")
        words = bytes_in_words(total)
        if capacity:
            words += f" of {bytes_in_words(capacity)}" + (", DOES NOT FIT" if total > capacity else "")
        values: dict[str, Any] = {"memory_bytes": int(total), "capacity_bytes": capacity}
        forecast = forecasts.get(id(point))
        bar = Bar(_label(point, labels), point.row, parts, words, capacity, values)
        if forecast is not None and (expected := _comparable_memory(forecast.row, point)):
            values |= {"forecast_bytes": int(expected), "difference": expected / total - 1}
            bar.beside = forecast.row
        bars.append(bar)
    in_order = sorted(
        (row for row in rows if row.name == "step"),
        key=lambda row: (str(row.config.get("preset")), as_number(row.config.get("tokens")) or 0.0),
    )
    for row in in_order:
        peak = row.positive("peak_memory_bytes")
        if peak:
            colors.setdefault("peak", GREY)
            tokens = as_number(row.config.get("tokens"), 1) or 0
            label = f"{short(str(row.config.get('preset', 'model')), 20)}, {tokens_in_words(tokens)} tokens"
            bars = [bar for bar in bars if (bar.label, bar.row.name) != (label, "step")]
            bars.append(Bar(label, row, {"peak": peak}, bytes_in_words(peak), values={"memory_bytes": int(peak)}))
    if not bars:
        return
    if "peak" in colors:
        colors = {"peak": PALETTE[0] if len(colors) == 1 else GREY, **{k: c for k, c in colors.items() if k != "peak"}}
    picture = picture_of(
        bars,
        "memory_of_a_rank",
        "memory",
        "Memory of a rank",
        "Peak of the rank that needs most; forecasts by what needs it. On a GPU tensors are measured, and compared "
        "without what a process takes besides. Black marks: what a rank has.",
        {
            "point": "point",
            "memory_bytes": "memory",
            "forecast_bytes": "forecast",
            "difference": "forecast is off by",
            "capacity_bytes": "of",
        },
        colors,
        bytes_in_words,
        title="Memory of a rank",
        tick="capacity",
    )
    off = [bar for bar in bars if "difference" in bar.values]
    if off:
        worst = max(off, key=lambda bar: abs(bar.values["difference"]))
        picture.sentences.append(
            f"The forecast of memory is off by {percent(abs(worst.values['difference']))} at most ({worst.label})."
        )
    too_much = [
        bar
        for bar in bars
        if bar.values.get("capacity_bytes") and bar.values["memory_bytes"] > bar.values["capacity_bytes"]
    ]
    if too_much:
        picture.sentences.append(f"{plural(len(too_much), 'forecast')} would not fit, the first: {too_much[0].label}.")
    yield picture


def _memory(row: Row) -> tuple[dict[str, float], float]:
    """Return parts of memory, and their sum, in bytes."""
    table = row.results.get("memory_bytes")
    if isinstance(table, Mapping):
        parts = {short(str(k), 20): its for k, v in table.items() if k != "total" and (its := as_number(v, 0))}
        for name in IN_HOST_MEMORY:  # of the node, not of the GPU
            parts.pop(name, None)
        return parts, as_number(table.get("total"), 0) or sum(parts.values())
    peak = row.positive("peak_memory_bytes")
    return ({"peak": peak}, peak) if peak else ({}, 0.0)


def _comparable_memory(forecast: Row, measured: Point) -> float:
    """Return what a forecast says of what was measured: without a checkpoint; of a GPU, without a process's own."""
    parts, total = _memory(forecast)
    return total - parts.get("checkpoint" if measured.device == "cpu" else "process", 0.0)


def draw_slowest(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield which rank was slowest, and how long the others waited for it."""
    points = _in_order(points_of(rows, MEASURED))
    labels = labels_of(points)
    bars = []
    for point in points:
        rank = as_number(point.row.results.get("slowest_rank"), 0)
        waits = point.row.number_of("slowest_rank_wait_seconds", least=0)
        if rank is None or waits is None or point.ranks < 2:
            continue
        share = waits / point.seconds
        words = f"rank {rank:.0f}: {seconds_in_words(waits)} of {seconds_in_words(point.seconds)}"
        values = {
            "slowest_rank": int(rank),
            "wait_seconds": waits,
            "step_seconds": point.seconds,
            "wait_share": share,
        }
        bars.append(Bar(_label(point, labels), point.row, {"waiting": share}, words, values=values))
    if not bars:
        return
    picture = picture_of(
        bars,
        "slowest_rank",
        "slowest",
        "The slowest rank, and the wait it causes",
        "How long other ranks wait for the one that is slowest, as a share of the step.",
        {
            "point": "point",
            "slowest_rank": "slowest rank",
            "wait_seconds": "wait it causes",
            "step_seconds": "step",
            "wait_share": "share of the step",
        },
        {"waiting": PALETTE[1]},
        lambda value: f"{100 * value:.3g}%",
        title="Wait that the slowest rank causes, share of a step",
    )
    worst = max(bars, key=lambda bar: bar.values["wait_share"])
    picture.sentences = [
        f"The longest wait for a slow rank is {percent(worst.values['wait_share'])} of a step, for rank "
        f"{worst.values['slowest_rank']} ({worst.label})."
    ]
    yield picture


def _label(point: Point, labels: Mapping[str, str]) -> str:
    where = short(point.source if point.is_modelled else point.device.upper(), 24)
    return f"{labels[point.case]}, {plural(point.ranks, 'rank')}, {tokens_in_words(point.tokens)} · {where}"


def _in_order(points: Iterable[Point]) -> list[Point]:
    """Return points with those that are compared beside each other, one of those with the same place and source."""
    its = {
        (point.case, point.tokens / point.ranks, point.ranks, point.is_modelled, point.source): point
        for point in points
    }
    matching = {point.case for point in its.values() if not point.is_modelled}
    return sorted(
        its.values(),
        key=lambda one: (
            one.case not in matching,
            one.case,
            one.device if one.case in matching else "",
            one.tokens,
            one.ranks,
            one.is_modelled,
            MODELLED.index(one.row.name) if one.row.name in MODELLED else 0,
        ),
    )
