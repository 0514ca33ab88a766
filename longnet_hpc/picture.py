"""Pictures of a run: the loss over its steps, and the loss over how much context was available. One rank only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from longnet_hpc.files import replace_file
from longnet_hpc.words import tokens_in_words

__all__ = ["draw_context_curve", "draw_loss_curve"]

_BLUE, _PALE, _GREY = "#1f5fa8", "#a9c6e8", "#666666"
_OVER = {"context": "context available (tokens)", "position": "position in the sequence (tokens)"}
_NATS_TO_BITS = 1 / np.log(2)


def draw_loss_curve(metrics: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the loss of every step and its running mean, with bits a token on the right, as PNG.

    Parameters
    ----------
    metrics : sequence of mapping
        The step lines of a run, with ``step`` and ``loss`` (nats a token); at least one.
    title : str
        What ran.
    path : Path
        File to make or replace.
    """
    steps = np.array([line["step"] for line in metrics])
    losses = np.array([line["loss"] for line in metrics])
    axes = _axes(title, "step", "loss (nats per token)")
    axes.plot(steps, losses, color=_PALE, linewidth=1, label="each step")
    span = max(1, len(losses) // 10)
    if span > 1:
        smooth = _running_mean(losses, span)
        axes.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"mean of the last {span} steps")
        _point_out(axes, float(steps[-1]), float(smooth[-1]))
    axes.set_xlim(steps[0] - 1, steps[-1] + max(1, len(steps) * 0.08))
    axes.legend(frameon=False)
    _save(axes, path)


def draw_context_curve(
    bins: Sequence[Mapping[str, Any]], title: str, path: Path, *, what: Literal["context", "position"] = "context"
) -> None:
    """Draw the mean loss over the number of tokens of context, or over the position in the sequence, as PNG.

    Parameters
    ----------
    bins : sequence of mapping
        Bins with ``first_context`` and ``last_context`` (tokens; or of position), ``loss`` and its ``standard_error``
        (nats a token).
    title : str
        What was measured.
    path : Path
        File to make or replace.
    what : str
        Which of both.
    """
    axes = _axes(title, _OVER[what], "loss (nats per token)")
    middles = [float(np.sqrt(line[f"first_{what}"] * line[f"last_{what}"])) for line in bins]
    losses = [line["loss"] for line in bins]
    errors = [line["standard_error"] for line in bins]
    axes.errorbar(
        middles,
        losses,
        errors,
        color=_BLUE,
        ecolor=_PALE,
        linewidth=2,
        elinewidth=1,
        marker="o",
        markersize=5,
        capsize=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_xlim(right=middles[-1] * 2.5)
    axes.xaxis.set_major_formatter(lambda value, _: tokens_in_words(value))
    _point_out(axes, middles[-1], losses[-1])
    _save(axes, path)


def _axes(title: str, x_label: str, y_label: str) -> Axes:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats * _NATS_TO_BITS, lambda b: b / _NATS_TO_BITS))
    bits.set_ylabel("bits per token", color=_GREY)
    bits.tick_params(colors=_GREY)
    bits.spines["right"].set_visible(False)
    return axes


def _point_out(axes: Axes, x: float, y: float) -> None:
    axes.annotate(f"{y:.3f}", (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=_BLUE)


def _running_mean(values: NDArray[Any], span: int) -> NDArray[Any]:
    """Return the mean of the last ``span`` values at each place, of fewer at the start."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - span)
    means: NDArray[Any] = (sums[stops] - sums[starts]) / (stops - starts)
    return means


def _save(axes: Axes, path: Path) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    replace_file(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
