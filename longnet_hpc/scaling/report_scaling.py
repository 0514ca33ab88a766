"""Pictures of scaling over ranks: strong, weak, forecast against measurement, simulated against analytic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from longnet_hpc.scaling.report_data import Row
from longnet_hpc.scaling.report_draw import (
    GREY,
    INK,
    PALETTE,
    PAPER,
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
from longnet_hpc.scaling.report_points import (
    MODELLED,
    Point,
    Series,
    colors_of,
    fixed_in_words,
    gather,
    labels_of,
    matched,
    points_of,
)
from longnet_hpc.words import percent, plural, seconds_in_words, short

__all__ = ["draw_accuracy", "draw_scaling", "draw_simulated"]

_MODEL_BAND = 0.15
"""The forecast of a step is held to this."""
_SIMULATED_BAND = 0.20
"""Simulation and forecast are held to this."""
_MOST_LINES = 8


def draw_scaling(rows: Sequence[Row], which: str) -> Iterable[Picture]:
    """Yield time and efficiency over the number of ranks, of ``strong`` or ``weak`` scaling, if there are any."""
    by = "tokens" if which == "strong" else "tokens_per_rank"
    points = points_of(rows, (f"bench {which}", *MODELLED))
    series = gather(points, by)
    if not series:
        return
    labels, colors, places = labels_of(points), colors_of(points, PALETTE), _places(series)
    figure = new_figure(4.6 + 0.19 * min(len(series), _MOST_LINES) / 2)
    left, right = axes_of(figure, 2)
    handles: list[Line2D] = kinds_of_lines({one.first.is_modelled for one in series})
    shown = series[:_MOST_LINES]
    for one in shown:
        color, first = colors[one.first.color], one.first
        x = [point.ranks for point in one.points]
        look = line_style(color, places[first.source], is_modelled=first.is_modelled)
        has_band = first.row.name == "plan" or not any(
            other.first.row.name == "plan" and other.first.color == first.color for other in shown
        )
        for axes, y, low, high in ((left, *_times(one)), (right, *_efficiencies(one))):
            if not first.is_modelled:
                bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
                axes.errorbar(x, y, bars, fmt="none", ecolor=color, elinewidth=1.2, capsize=3, zorder=3)
            elif axes is left and has_band:
                axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0, zorder=1)
            axes.plot(x, y, **look)
        ideal = [first.seconds * (first.ranks / ranks if which == "strong" else 1) for ranks in x]
        left.plot(x, ideal, color=color, linestyle=":", linewidth=1.1, zorder=2)
        words = f"{labels[first.case]}, {fixed_in_words(one, by)} · {short(first.source, 40)}"
        handles.append(Line2D([], [], **look, label=words))
    right.axhline(1, color=GREY, linestyle=":", linewidth=1.1, zorder=2)
    ideal_line = Line2D([], [], color=GREY, linestyle=":", linewidth=1.1, label="ideal, from the first point of a line")
    handles.insert(2 if len(handles) > len(shown) + 1 else 1, ideal_line)
    all_ranks = [point.ranks for one in shown for point in one.points]
    _over_ranks((left, right), all_ranks)
    times = [y for one in shown for its in _times(one) for y in its]
    if which == "weak" and max(times) < 4 * min(times):
        left.set_ylim(0, 1.1 * max(times))
        left.yaxis.set_major_formatter(lambda value, _: seconds_in_words(value))
    else:
        time_axis(left, "y", times)
    left.set_title(f"Time of a step, {'one sequence' if which == 'strong' else 'as many tokens on each rank'}")
    right.set_title("Efficiency")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    right.set_ylim(0, max(1.1, *(1.06 * y for one in shown for y in _efficiencies(one)[0])))
    place_legend(
        figure,
        handles,
    )
    left_out = (
        f" {plural(len(series) - len(shown), 'further line')} only in the table." if len(series) > _MOST_LINES else ""
    )
    yield Picture(
        f"{which}_scaling",
        "scaling",
        f"{which.capitalize()} scaling",
        (
            "One sequence over more and more ranks."
            if which == "strong"
            else "As many tokens on each rank, however many."
        )
        + " Time of the slowest rank; whiskers are the 95% confidence interval of the median. Efficiency is tokens a "
        "second and rank, over that of the first point of the line. Dotted: ideal. Bands of a model: "
        f"±{_MODEL_BAND:.0%}, to which the forecast is held, or its own bounds." + left_out,
        {
            "case": "case",
            "source": "where or by what",
            "ranks": "ranks",
            "tokens": "tokens",
            "seconds": "time of a step",
            "seconds_low": "from",
            "seconds_high": "to",
            "tokens_per_second": "tokens/s",
            "efficiency": "efficiency",
        },
        [_line(one, point, labels) for one in series for point in one.points],
        figure,
        [_in_words(one, which, by, labels) for one in _worth_words(series)],
    )


def draw_accuracy(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield how far the forecast of a step's time is off, where points are matched."""
    points = points_of(rows)
    pairs = matched(points)
    if not pairs:
        return
    labels, colors = labels_of(points), colors_of(points, PALETTE)
    figure = new_figure(3.9)
    (axes,) = axes_of(figure)
    axes.axhspan(-_MODEL_BAND, _MODEL_BAND, color=GREY, alpha=0.12, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1)
    looks: dict[tuple[str, str], Line2D] = {}
    for measured, forecast in pairs:
        by = forecast.source.partition(",")[0]
        color = colors[measured.color]
        marker = {"analytic": "o", "simulated": "s"}.get(by, "D")
        off = forecast.seconds / measured.seconds - 1
        low, high = (forecast.seconds / seconds - 1 for seconds in (measured.high, measured.low))
        if off > 1:  # one such point must not press the others flat
            axes.annotate(f"{100 * off:+,.0f}% ↑", (measured.seconds, 0.93), fontsize=8.5, ha="center", color=color)
            off = low = high = 0.88
        axes.vlines(measured.seconds, low, high, color=color, linewidth=1.2)
        its: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markerfacecolor": PAPER,
            "markeredgewidth": 1.5,
            "linestyle": "none",
        }
        axes.plot([measured.seconds], [off], **its)
        looks[labels[measured.case], by] = Line2D([], [], **its, label=f"{labels[measured.case]}, {by}")
    time_axis(axes, "x", [pair[0].seconds for pair in pairs])
    axes.margins(x=0.08)
    _differences(axes, pairs)
    axes.set_xlabel("measured time of a step")
    axes.set_title("Modelled time over measured time")
    place_legend(figure, list(looks.values())[:_MOST_LINES])
    off_by = statistics.median(abs(b.seconds / a.seconds - 1) for a, b in pairs)
    within = sum(abs(b.seconds / a.seconds - 1) <= _MODEL_BAND for a, b in pairs)
    yield Picture(
        "forecast_accuracy",
        "scaling",
        "Forecast against measurement",
        "Points of the same model, task, ranks and tokens. All points are hollow, as each is a forecast; whiskers are "
        f"the confidence interval of the measurement. Grey: ±{_MODEL_BAND:.0%}, to which the forecast is held.",
        {
            "case": "case",
            "source": "forecast",
            "ranks": "ranks",
            "tokens": "tokens",
            "measured_seconds": "measured",
            "modelled_seconds": "modelled",
            "difference": "modelled is off by",
        },
        [
            Line(
                (a.row, b.row),
                {
                    "case": labels[a.case],
                    "source": b.source,
                    "ranks": a.ranks,
                    "tokens": a.tokens,
                    "measured_seconds": a.seconds,
                    "modelled_seconds": b.seconds,
                    "difference": b.seconds / a.seconds - 1,
                },
            )
            for a, b in pairs
        ],
        figure,
        [
            f"The modelled time of a step is off by {percent(off_by)} in the median of "
            f"{plural(len(pairs), 'matched point')}; {within} of {len(pairs)} are within {_MODEL_BAND:.0%}."
        ],
    )


def draw_simulated(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield the simulated time of a step over the analytic one."""
    points = points_of(rows, MODELLED)
    analytic = {_place_of(point): point for point in points if point.row.name == "plan"}
    pairs = [
        (analytic[_place_of(point)], point)
        for point in points
        if point.row.name == "simulate" and _place_of(point) in analytic
    ]
    if not pairs:
        return
    pairs.sort(key=lambda pair: (pair[0].case, pair[0].tokens, pair[0].ranks))
    labels, colors = labels_of(points), colors_of(points, PALETTE)
    figure = new_figure(3.9)
    (axes,) = axes_of(figure)
    axes.axhspan(-_SIMULATED_BAND, _SIMULATED_BAND, color=GREY, alpha=0.12, linewidth=0)
    axes.axhline(0, color=INK, linewidth=1)
    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for plan, simulated in pairs:
        key = (plan.case, plan.source, plan.tokens)
        lines.setdefault(key, []).append((plan.ranks, simulated.seconds / plan.seconds - 1))
    handles = kinds_of_lines({True})
    for place, ((case, source, tokens), its) in enumerate(list(lines.items())[:_MOST_LINES]):
        point = next(a for a, _ in pairs if (a.case, a.source, a.tokens) == (case, source, tokens))
        look = line_style(colors[point.color], place, is_modelled=True)
        axes.plot(*zip(*its, strict=True), **look)
        machine = source.partition(", ")[2]
        words = f"{labels[case]}, {fixed_in_words(Series((point,), tokens), 'tokens')} · {short(machine, 30)}"
        handles.append(Line2D([], [], **look, label=words))
    _over_ranks((axes,), [a.ranks for a, _ in pairs])
    _differences(axes, pairs)
    axes.set_title("Simulated time of a step over the analytic one")
    place_legend(figure, handles)
    off = max(pairs, key=lambda pair: abs(pair[1].seconds / pair[0].seconds - 1))
    share = off[1].seconds / off[0].seconds - 1
    yield Picture(
        "simulated_against_analytic",
        "simulated",
        "Simulated against analytic",
        "The same step, by replaying its messages on a simulated network, and by the formulas of the model. Both are "
        f"modelled. Grey: ±{_SIMULATED_BAND:.0%}, within which both are held to agree.",
        {
            "case": "case",
            "ranks": "ranks",
            "tokens": "tokens",
            "analytic_seconds": "analytic",
            "simulated_seconds": "simulated",
            "difference": "simulated is off by",
        },
        [
            Line(
                (a.row, b.row),
                {
                    "case": labels[a.case],
                    "ranks": a.ranks,
                    "tokens": a.tokens,
                    "analytic_seconds": a.seconds,
                    "simulated_seconds": b.seconds,
                    "difference": b.seconds / a.seconds - 1,
                },
            )
            for a, b in pairs
        ],
        figure,
        [
            f"Simulated and analytic time of a step differ by {percent(abs(share))} at most, on "
            f"{plural(off[0].ranks, 'rank')}; they are held to {_SIMULATED_BAND:.0%}."
        ],
    )


def _times(one: Series) -> tuple[list[float], list[float], list[float]]:
    """Return times, and their lower and upper bounds."""
    bounds = [_bounds(point) for point in one.points]
    return [point.seconds for point in one.points], [low for low, _ in bounds], [high for _, high in bounds]


def _efficiencies(one: Series) -> tuple[list[float], list[float], list[float]]:
    bounds = [_bounds(point) for point in one.points]
    return (
        [one.efficiency(point) for point in one.points],
        [one.efficiency(point, high) for point, (_, high) in zip(one.points, bounds, strict=True)],
        [one.efficiency(point, low) for point, (low, _) in zip(one.points, bounds, strict=True)],
    )


def _bounds(point: Point) -> tuple[float, float]:
    if point.is_modelled and point.low == point.high:
        return point.seconds * (1 - _MODEL_BAND), point.seconds * (1 + _MODEL_BAND)
    return point.low, point.high


def _differences(axes: Axes, pairs: Sequence[tuple[Point, Point]]) -> None:
    reach = min(1.0, max(0.3, *(1.15 * abs(b.seconds / a.seconds - 1) for a, b in pairs)))
    axes.set_ylim(-reach, reach)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}%" if abs(value) > 1e-9 else "0%")


def _over_ranks(all_axes: Iterable[Axes], ranks: Sequence[int]) -> None:
    for axes in all_axes:
        log_axis(axes, "x", ranks, lambda value: f"{value:,.0f}", base=2)
        axes.set_xlabel("ranks")
        axes.margins(x=0.08)


def _places(series: Iterable[Series]) -> dict[str, int]:
    """Return a number for each machine or way to forecast, which decides its marker."""
    places: dict[str, int] = {}
    for one in series:
        places.setdefault(one.first.source, len(places))
    return places


def _place_of(point: Point) -> tuple[object, ...]:
    return point.case, str(point.row.config.get("machine")), point.ranks, point.tokens


def _line(one: Series, point: Point, labels: dict[str, str]) -> Line:
    return Line(
        (point.row,),
        {
            "case": labels[point.case],
            "source": point.source,
            "ranks": point.ranks,
            "tokens": point.tokens,
            "seconds": point.seconds,
            "seconds_low": point.row.positive("seconds_low"),
            "seconds_high": point.row.positive("seconds_high"),
            "tokens_per_second": point.tokens / point.seconds,
            "efficiency": one.efficiency(point),
        },
    )


def _worth_words(series: Sequence[Series]) -> list[Series]:
    """Return what the summary speaks of: at most two lines, measured ones rather than forecasts."""
    first = [one for one in series if not one.first.is_modelled] or [
        one for one in series if one.first.row.name == "plan"
    ]
    return sorted(first or series, key=lambda one: -one.points[-1].ranks)[:2]


def _in_words(one: Series, which: str, by: str, labels: dict[str, str]) -> str:
    last, first = one.points[-1], one.first
    return (
        f"{which.capitalize()} scaling, {'modelled' if first.is_modelled else 'measured'}: {labels[first.case]} over "
        f"{fixed_in_words(one, by)} runs at {percent(one.efficiency(last))} efficiency on "
        f"{plural(last.ranks, 'rank')}, compared with {first.ranks:,} ({short(first.source, 50)}): "
        f"{seconds_in_words(last.seconds)} a step, {last.tokens / last.seconds:,.0f} tokens/s."
    )
