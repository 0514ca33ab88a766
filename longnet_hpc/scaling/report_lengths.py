"""Pictures over lengths: time over the length of sequences, loss over position, and the size of messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.lines import Line2D

from longnet_hpc.scaling.report_data import Row, as_number
from longnet_hpc.scaling.report_draw import (
    PALETTE,
    Line,
    Picture,
    axes_of,
    kinds_of_lines,
    line_style,
    log_axis,
    new_figure,
    place_legend,
    time_axis,
)
from longnet_hpc.scaling.report_points import fixed_in_words, gather, labels_of, points_of
from longnet_hpc.words import (
    bytes_in_words,
    plural,
    seconds_in_words,
    short,
    tokens_in_words,
)

__all__ = ["draw_exchange", "draw_lengths", "draw_loss"]

_MOST_LINES = 8
_TITLES = {
    "time_of_steps": "Steps over the length of a sequence",
    "time_of_attention": "Attention alone over the length of a sequence",
    "time_of_a_billion": "Up to a billion tokens in one sequence",
}


@dataclass
class _Curve:
    """Time of a token over the length of a sequence."""

    picture: str
    label: str
    color: str
    """Curves with one word share a colour."""
    is_modelled: bool
    points: dict[float, tuple[Row, float, float, float]] = field(default_factory=dict)
    """By tokens: the record, seconds a token, and its bounds."""


def draw_lengths(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield pictures of the time over the length of sequences: steps, attention, and up to a billion tokens."""
    curves: dict[tuple[str, str, bool], _Curve] = {}
    for curve in (*_step_curves(rows), *_own_curves(rows)):
        known = curves.setdefault((curve.picture, curve.label, curve.is_modelled), curve)
        known.points.update(curve.points)
    for name, title in _TITLES.items():
        its = [curve for curve in curves.values() if curve.picture == name]
        lengths = {x for curve in its for x in curve.points}
        # A curve of one point is drawn only where others of the same picture give it a meaning.
        its = [curve for curve in its if len(curve.points) > 1 or curve.is_modelled or name == "time_of_a_billion"]
        if len(lengths) > 1 and its:
            yield _draw_curves(name, title, its)


def _draw_curves(name: str, title: str, curves: list[_Curve]) -> Picture:
    curves.sort(key=lambda curve: curve.is_modelled)
    shown = curves[:_MOST_LINES]
    figure = new_figure(4.5 + 0.1 * len(shown))
    left, right = axes_of(figure, 2)
    handles = kinds_of_lines({curve.is_modelled for curve in shown})
    colors: dict[str, str] = {}
    for curve in shown:
        color = colors.setdefault(curve.color, PALETTE[len(colors) % len(PALETTE)])
        look = line_style(color, list(colors).index(curve.color), is_modelled=curve.is_modelled)
        x = sorted(curve.points)
        each = [curve.points[its][1] for its in x]
        spread = [
            [curve.points[its][1] - curve.points[its][2] for its in x],
            [curve.points[its][3] - curve.points[its][1] for its in x],
        ]
        for axes, factors in ((left, x), (right, [1.0] * len(x))):
            y = [a * b for a, b in zip(each, factors, strict=True)]
            if not curve.is_modelled:
                bars = [[a * b for a, b in zip(its, factors, strict=True)] for its in spread]
                axes.errorbar(x, y, bars, fmt="none", ecolor=color, elinewidth=1.2, capsize=3, zorder=3)
            axes.plot(x, y, **look)
        handles.append(Line2D([], [], **look, label=curve.label))
    lengths = [x for curve in shown for x in curve.points]
    time_axis(left, "y", [its[1] * x for curve in shown for x, its in curve.points.items()])
    all_times = [its[1] for curve in shown for its in curve.points.values()]
    if max(all_times) > 20 * min(all_times):
        time_axis(right, "y", all_times)
    else:
        right.set_ylim(0, 1.15 * max(all_times))
        right.yaxis.set_major_formatter(lambda value, _: seconds_in_words(value))
    for axes in (left, right):
        log_axis(axes, "x", lengths, tokens_in_words, base=2)
        axes.set_xlabel("tokens in a sequence")
    left.set_title("Time of one sequence")
    right.set_title("Time of a token")
    place_legend(
        figure,
        handles,
    )
    lines = [
        Line(
            (row,),
            {
                "curve": curve.label,
                "tokens": int(x),
                "seconds": seconds * x,
                "seconds_per_token": seconds,
                "tokens_per_second": 1 / seconds,
            },
        )
        for curve in curves
        for x, (row, seconds, _, _) in sorted(curve.points.items())
    ]
    caption = {
        "time_of_steps": "Whole steps of training, or forward passes, of a model.",
        "time_of_attention": "The operator of attention alone, without the rest of the model.",
        "time_of_a_billion": "The same number of tokens cut into sequences of growing length; here, the time of one of "
        "them. Dense attention is extrapolated where it would take too long.",
    }[name]
    if len(curves) > len(shown):
        caption += f" {plural(len(curves) - len(shown), 'further line')} only in the table."
    return Picture(
        name,
        "lengths",
        title,
        caption + " Flat lines on the right: time grows as the length does.",
        {
            "curve": "line",
            "tokens": "tokens",
            "seconds": "time of one sequence",
            "seconds_per_token": "time of a token",
            "tokens_per_second": "tokens/s",
        },
        lines,
        figure,
        _in_words(name, curves),
    )


def _in_words(name: str, curves: list[_Curve]) -> list[str]:
    what = {"time_of_steps": "A step", "time_of_attention": "Attention"}.get(name, "Attention")
    sentences = []
    measured = [curve for curve in curves if not curve.is_modelled]
    if measured:
        longest = max(measured, key=lambda curve: max(curve.points))
        x, first = max(longest.points), min(longest.points)
        ratio = longest.points[x][1] / longest.points[first][1]
        sentences.append(
            f"{what} over one sequence of {tokens_in_words(x)} tokens was measured at "
            f"{seconds_in_words(longest.points[x][1] * x)} ({longest.label}); a token takes {ratio:.2f} times "
            f"as long as in one of {tokens_in_words(first)}."
        )
    dense = [curve for curve in curves if curve.color.startswith("dense") and curve.is_modelled]
    if measured and dense:
        x = max(set(measured[0].points) & set(dense[0].points), default=0)
        if x:
            times = dense[0].points[x][1] / measured[0].points[x][1]
            sentences.append(
                f"Dense attention would take {times:,.0f} times as long at {tokens_in_words(x)} (extrapolated)."
            )
    return sentences


def _step_curves(rows: Sequence[Row]) -> Iterator[_Curve]:
    """Yield curves of bench step, and those of forecasts over lengths."""
    names = {row.name for row in rows}
    points = points_of(rows, ("bench step", "plan" if "plan" in names else "simulate"))
    labels = labels_of(points)
    for one in gather(points, "ranks"):
        first = one.first
        label = f"{labels[first.case]}, {fixed_in_words(one, 'ranks')} · {short(first.source, 40)}"
        curve = _Curve("time_of_steps", label, f"{first.case} {first.device} {one.fixed}", first.is_modelled)
        for point in one.points:
            its = (point.seconds / point.tokens, point.low / point.tokens, point.high / point.tokens)
            curve.points[point.tokens] = point.row, *its
        yield curve


def _own_curves(rows: Sequence[Row]) -> Iterator[_Curve]:
    """Yield one curve of a point or more for each record of attention or of a step on its own."""
    for row in rows:
        config, where = row.config, short(row.hardware, 30)
        if row.name == "step":
            tokens, rate = as_number(config.get("tokens"), 1), row.positive("tokens_per_second")
            if tokens and rate:
                label = f"{_text(config, 'preset')} training, {_text(config, 'dtype')} · {where}"
                yield _curve("time_of_steps", label, row, tokens, 1 / rate)
        elif row.name == "attention" and config.get("sweep") in ("linear", "seq"):
            tokens, batch = (as_number(config.get(key), 1) for key in ("seq_len", "batch"))
            both = row.positive("both_seconds")
            seconds = both or row.positive("forward_seconds")
            if tokens and batch and seconds:
                label = f"{_shape(row)}, {'forward and backward' if both else 'forward'} · {where}"
                yield _curve("time_of_attention", label, row, tokens, seconds / batch / tokens)
        elif row.name == "bench attention":
            tokens, seconds = as_number(row.point.get("tokens"), 1), row.positive("seconds")
            if tokens and seconds:
                ranks = as_number(row.point.get("ranks"), 1) or 1
                label = f"{short(str(config.get('preset', 'model')), 20)}, {plural(int(ranks), 'rank')} · {where}"
                low, high = (row.positive(key) or seconds for key in ("seconds_low", "seconds_high"))
                yield _curve("time_of_attention", label, row, tokens, *(its / tokens for its in (seconds, low, high)))
        elif row.name == "linear":
            for its in _tables(row.results.get("lengths")):
                tokens, seconds = as_number(its.get("tokens"), 1), as_number(its.get("seconds"))
                if tokens and seconds and seconds > 0:
                    yield _curve(
                        "time_of_attention", f"{_shape(row)}, forward · {where}", row, tokens, seconds / tokens
                    )
        elif row.name == "billion":
            tokens, seconds = as_number(config.get("seq_len"), 1), row.positive("seconds_per_token")
            if tokens and seconds:
                kind = _text(config, "attention")
                all_seconds = row.positive("seconds") or 1.0
                low, high = (
                    seconds * (row.positive(key) or all_seconds) / all_seconds
                    for key in ("lowest_seconds", "highest_seconds")
                )
                label = f"{kind} attention, {_shape(row)}, {_text(config, 'dtype')} · {where}"
                yield _curve("time_of_a_billion", label, row, tokens, seconds, low, high)


def _curve(
    picture: str,
    label: str,
    row: Row,
    tokens: float,
    seconds: float,
    low: float | None = None,
    high: float | None = None,
) -> _Curve:
    low, high = min(low or seconds, seconds), max(high or seconds, seconds)
    return _Curve(picture, label, label, row.is_modelled, {tokens: (row, seconds, low, high)})


def draw_loss(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield the loss over the position in a sequence, of evaluations that were streamed; of context, of others."""
    for what, title in (
        ("position", "Loss over the position in a sequence"),
        ("context", "Loss over the context available"),
    ):
        curves: dict[str, tuple[Row, list[dict[str, Any]]]] = {}
        for row in rows:
            bins = [its for its in _tables(row.results.get(f"loss_by_{what}")) if _is_bin(its, what)]
            if row.name != "eval" or not bins or (what == "context" and row.results.get("loss_by_position")):
                continue
            length = as_number(row.results.get("seq_len"), 1) or bins[-1][f"last_{what}"]
            corpus = short(str(row.results.get("corpus", "")).rpartition("/")[2], 30)
            label = f"step {row.results.get('step', '?')}, sequences of {tokens_in_words(length)} · {corpus}"
            curves[short(label, 90)] = row, bins
        if curves:
            yield _draw_losses(what, title, curves)


def _draw_losses(what: str, title: str, curves: dict[str, tuple[Row, list[dict[str, Any]]]]) -> Picture:
    figure = new_figure(4.3)
    (axes,) = axes_of(figure)
    handles, lines, all_x = kinds_of_lines({row.is_modelled for row, _ in curves.values()}), [], []
    for place, (label, (row, bins)) in enumerate(curves.items()):
        x = [math.sqrt(its[f"first_{what}"] * its[f"last_{what}"]) for its in bins]
        y, errors = [its["loss"] for its in bins], [as_number(its.get("standard_error"), 0) or 0.0 for its in bins]
        lines += [
            Line(
                (row,),
                {
                    "evaluation": label,
                    f"first_{what}": its[f"first_{what}"],
                    f"last_{what}": its[f"last_{what}"],
                    "tokens": its.get("tokens"),
                    "loss_nats_per_token": its["loss"],
                    "standard_error": error,
                },
            )
            for its, error in zip(bins, errors, strict=True)
        ]
        if place < _MOST_LINES:
            color = PALETTE[place % len(PALETTE)]
            look = line_style(color, place, is_modelled=row.is_modelled)
            axes.errorbar(x, y, errors, fmt="none", ecolor=color, elinewidth=1, capsize=3, alpha=0.6)
            axes.plot(x, y, **look)
            handles.append(Line2D([], [], **look, label=label))
            all_x += x
    log_axis(axes, "x", all_x, tokens_in_words, base=2)
    axes.set_xlabel({"position": "position in the sequence (tokens)", "context": "context available (tokens)"}[what])
    axes.set_title("Loss (nats a token)")
    place_legend(figure, handles)
    label, (row, bins) = next(reversed(curves.items()))
    return Picture(
        f"loss_over_{what}",
        "loss",
        title,
        "Bins that grow by powers of two, drawn at their middle; whiskers are the standard error of the mean.",
        {
            "evaluation": "evaluation",
            f"first_{what}": "from",
            f"last_{what}": "to",
            "tokens": "tokens",
            "loss_nats_per_token": "loss (nats a token)",
            "standard_error": "standard error",
        },
        lines,
        figure,
        [
            f"The newest evaluation ({label}) has a loss of {bins[-1]['loss']:.3f} nats a token from {what} "
            f"{tokens_in_words(bins[-1][f'first_{what}'])} on."
        ],
    )


def draw_exchange(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield time and rate of exchanges over the size of messages."""
    curves: dict[str, dict[float, tuple[Row, float]]] = {}
    for row in rows:
        size, seconds = as_number(row.point.get("bytes"), 1), row.positive("seconds")
        if row.name == "bench exchange" and size and seconds:
            ranks = as_number(row.point.get("ranks"), 1) or as_number(row.where.get("ranks"), 1) or 1
            words = (short(str(row.point.get(key, "?")), 20) for key in ("operation", "transport"))
            label = f"{', '.join(words)}, {plural(int(ranks), 'rank')} · {short(row.hardware, 30)}"
            curves.setdefault(label, {})[size] = row, seconds
    curves = {label: its for label, its in curves.items() if len(its) > 1}
    if not curves:
        return
    figure = new_figure(4.5)
    left, right = axes_of(figure, 2)
    handles = kinds_of_lines({False})
    lines, best = [], (0.0, "", 0.0)
    for place, (label, its) in enumerate(curves.items()):
        x = sorted(its)
        rates = [its[size][0].positive("bytes_per_second") or size / its[size][1] for size in x]
        best = max(best, *((rate, label, size) for rate, size in zip(rates, x, strict=True)))
        lines += [
            Line(
                (its[size][0],),
                {"exchange": label, "bytes": int(size), "seconds": its[size][1], "bytes_per_second": rate},
            )
            for size, rate in zip(x, rates, strict=True)
        ]
        if place < _MOST_LINES:
            look = line_style(PALETTE[place % len(PALETTE)], place, is_modelled=False)
            left.plot(x, [its[size][1] for size in x], **look)
            right.plot(x, rates, **look)
            handles.append(Line2D([], [], **look, label=label))
    for axes in (left, right):
        log_axis(axes, "x", [line.values["bytes"] for line in lines], bytes_in_words)
        axes.set_xlabel("bytes a rank")
    time_axis(left, "y", [line.values["seconds"] for line in lines])
    log_axis(right, "y", [line.values["bytes_per_second"] for line in lines], lambda its: f"{bytes_in_words(its)}/s")
    left.set_title("Time of an exchange")
    right.set_title("Rate")
    place_legend(figure, handles)
    yield Picture(
        "exchanges",
        "exchange",
        "Exchanges over the size of messages",
        "Our own exchanges between ranks; time of the slowest rank, median of the repeats.",
        {"exchange": "exchange", "bytes": "size", "seconds": "time", "bytes_per_second": "rate"},
        lines,
        figure,
        [f"The fastest exchange measured is {bytes_in_words(best[0])}/s ({best[1]}, {bytes_in_words(best[2])})."],
    )


def _is_bin(its: dict[str, Any], what: str) -> bool:
    return all(
        as_number(its.get(key), least) is not None
        for key, least in ((f"first_{what}", 1), (f"last_{what}", 1), ("loss", -math.inf))
    )


def _tables(value: object) -> list[dict[str, Any]]:
    return [its for its in value if isinstance(its, dict)] if isinstance(value, list) else []


def _shape(row: Row) -> str:
    config = row.config
    shape = f"{_text(config, 'heads')} heads of {_text(config, 'head_dim')}"
    return f"{shape}, {'causal' if config.get('causal') else 'full'}"


def _text(config: Any, key: str) -> str:
    return short(str(config.get(key, "?")), 20)
