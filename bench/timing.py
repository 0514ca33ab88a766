"""Timing of what a GPU does."""

import statistics

import torch


def gpu_seconds(function, repeats):
    """Return the median time of a function that queues work on the GPU, after two warm-ups."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)
