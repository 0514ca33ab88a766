"""Timing of what a device does."""

import statistics
import time
from typing import NamedTuple

import torch

__all__ = ["WARMUP", "Ratio", "interleaved_seconds", "ratio"]

WARMUP = 2
"""Fewest runs of anything before it is timed."""
SETTLE_SECONDS = 0.4
"""Least time of warm-up on a GPU: a card that is limited by its power lowers its clocks only after a while."""


class Ratio(NamedTuple):
    """How two timings compare, round by round."""

    median: float
    low: float
    high: float


def ratio(above, below):
    """Return the median of the ratios of each round, and the lowest and highest of them."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def interleaved_seconds(functions, repeats, device, *, queued=True):
    """Time functions in turn, round after round, so that all of them meet the same clocks and the same heat.

    Parameters
    ----------
    functions : sequence of callable
        What a round runs, in this order.
    repeats : int
        Timed rounds, after a warm-up.
    device : torch.device
        Where they compute; on a GPU by events, so that the time is that of the GPU.
    queued : bool
        Whether rounds are queued without waiting for the GPU, as training does, which hides what the host takes to
        launch behind what was queued before. Else the GPU is idle at each start, and launching counts.

    Returns
    -------
    list of list of float
        For each function its seconds, round by round.
    """
    on_gpu = device.type == "cuda"
    started, rounds = time.perf_counter(), 0
    while rounds < WARMUP or (on_gpu and time.perf_counter() - started < SETTLE_SECONDS):
        for function in functions:
            function()
        _wait(device)
        rounds += 1
    stamps = []
    for _ in range(repeats):
        for function in functions:
            if not queued:
                _wait(device)
            start = _stamp(on_gpu)
            function()
            stamps.append((start, _stamp(on_gpu)))
    _wait(device)
    seconds = [start.elapsed_time(stop) / 1e3 if on_gpu else stop - start for start, stop in stamps]
    return [seconds[first :: len(functions)] for first in range(len(functions))]


def _stamp(on_gpu):
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
