"""Rounds of a point on some of the ranks of a launch, while the others rest, and what their times say."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longnet_hpc.comm import allgather_objects, barrier
from longnet_hpc.comm.launch import Launch
from longnet_hpc.life import life
from longnet_hpc.trace import CATEGORIES, IDLE, Trace, current
from longnet_hpc.trace_file import summary_of

__all__ = ["Round", "Rounds", "median_interval", "rest_until_all", "some_ranks"]

_NAP_SECONDS = 0.002
_CONFIDENCE = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its interval of 95% confidence, from order statistics alone.

    Whatever the distribution, the median of n values lies between the k-th lowest and the k-th highest with a
    probability that follows from n and k. Fewer than 6 values do not reach 95%: the interval then is all of them.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.5**n, 0  # probability that the true median lies below all values
    while True:
        more = outside + math.comb(n, k + 1) * 0.5**n
        if 1 - 2 * more < _CONFIDENCE:
            break
        outside, k = more, k + 1
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def rest_until_all(launch: Launch) -> None:
    """Wait until all ranks have called this, nearly always asleep: others may need the core. Collective."""
    if launch.comm is None:
        return
    request = launch.comm.Ibarrier()
    with life.waiting_for("rest"):
        while not request.Test():
            time.sleep(_NAP_SECONDS)


@contextmanager
def some_ranks(launch: Launch, counts: Sequence[int]) -> Iterator[Callable[[int], Launch | None]]:
    """Yield a function from a number of ranks to the launch of the first so many. Collective.

    It is None on the ranks beside these; one rank alone has no communicator.
    """
    made: dict[int, Launch | None] = {}
    owned = []
    for count in sorted(set(counts)):
        if count == launch.size:
            made[count] = launch
            continue
        assert launch.comm is not None
        from mpi4py import MPI

        taking_part = launch.rank < count
        comm = launch.comm.Split(0 if taking_part and count > 1 else MPI.UNDEFINED, key=launch.rank)
        if comm != MPI.COMM_NULL:
            owned.append(comm)
        its_comm = comm if count > 1 else None
        some = replace(launch, comm=its_comm, size=count, node_size=min(count, launch.node_size))
        made[count] = some if taking_part else None
    try:
        yield made.__getitem__
    finally:
        for comm in owned:
            comm.Free()


@dataclass(frozen=True)
class Round:
    """What one round was on one rank."""

    seconds: float
    """From the moment when all ranks had come to its end on this rank."""
    by_category: dict[str, float]
    """Seconds of each category of `trace`."""
    peak_memory_bytes: int | None
    """Most memory held in it; None where the system does not tell."""


class Rounds:
    """The rounds of one point on one of its ranks.

    Parameters
    ----------
    launch : Launch
        The ranks of the point.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.timed: list[Round] = []
        trace = current()
        assert trace is not None, "rounds are taken under a trace"
        self._trace: Trace = trace

    def take(self, work: Callable[[], object], *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""
        device = self.launch.device
        _forget_peak(device)
        self._trace.seconds()  # looks at what went before, so that asking again takes no time
        barrier(self.launch.comm)
        before = self._trace.seconds()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        after = self._trace.seconds()
        by_category = {name: after[name] - before[name] for name in after}
        if timed:
            self.timed.append(Round(seconds, by_category, _peak(device)))

    def seconds(self) -> list[float]:
        """Return the maximum over ranks of each round. Collective over the ranks of the point."""
        answers = allgather_objects(self.launch.comm, [its.seconds for its in self.timed])
        return [max(of_round) for of_round in zip(*answers, strict=True)]

    def results(self) -> dict[str, Any]:
        """Return what records say of all rounds, the same on all ranks. Collective over the ranks of the point."""
        middle, low, high = median_interval(self.seconds())
        names = (*CATEGORIES, IDLE)
        own = {name: statistics.median(its.by_category[name] for its in self.timed) for name in names}
        told = ("compute", "wait", "gradient", "input", "checkpoint")
        rest = statistics.median(its.seconds - sum(its.by_category[name] for name in told) for its in self.timed)
        peaks = [its.peak_memory_bytes for its in self.timed if its.peak_memory_bytes is not None]
        answers = allgather_objects(self.launch.comm, (own, rest, max(peaks, default=None)))
        summary = summary_of([its for its, _, _ in answers])
        slowest, computing = summary.seconds[summary.slowest_rank], [its["compute"] for its in summary.seconds]
        results: dict[str, Any] = {
            "seconds": middle,
            "seconds_low": low,
            "seconds_high": high,
            "compute_seconds": slowest["compute"],
            "exchange_seconds": slowest["exchange"],
            "wait_seconds": slowest["wait"],
            "gradient_seconds": slowest["gradient"],
            "rest_seconds": max(0.0, answers[summary.slowest_rank][1]),
            "slowest_rank": summary.slowest_rank,
            "slowest_rank_wait_seconds": summary.slowest_rank_wait_seconds,
            "compute_over_mean": max(computing) / (statistics.fmean(computing) or 1.0),
        }
        memory = [peak for _, _, peak in answers if peak is not None]
        if memory:
            results["peak_memory_bytes"] = max(memory)
        return results


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # a system that does not let us keeps the peak of the process
        _CLEAR.write_text("5")


def _peak(device: torch.device) -> int | None:
    """Return the most memory since `_forget_peak`, in bytes: of a GPU by tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return sizes[0] if sizes else None
