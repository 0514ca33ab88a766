"""One trace of all ranks, as Chrome and Perfetto read it (https://ui.perfetto.dev), and what it says of them."""

from __future__ import annotations

import json
import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longnet_hpc.comm import agreed, allgather_objects, barrier, collect_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.errors import StoppedError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.trace import CATEGORIES, IDLE, Category, Event, Trace, use

__all__ = ["MOST_EVENTS", "Summary", "meet", "summary_of", "traced"]

MOST_EVENTS = 1 << 20
"""Spans in a file, of all ranks together: about 100 MB, which is what browsers take."""

_MEETINGS = 9
"""Barriers whose median tells how the clocks of two ranks differ."""
_LANES = 16
"""Rows of one category, where its spans overlap."""


@dataclass(frozen=True)
class Summary:
    """What ranks spent their time on."""

    seconds: tuple[dict[str, float], ...]
    """By category, rank by rank."""
    slowest_rank: int
    """The rank with the most to do: that spent the most time neither waiting nor summing gradients."""
    slowest_rank_wait_seconds: float
    """How much longer than that rank the others waited, on average."""


def summary_of(seconds: Sequence[dict[str, float]]) -> Summary:
    """Tell which of some ranks was the slowest, from what `Trace.seconds` says of each."""
    busy = [sum(its[name] for name in ("compute", "input", "checkpoint")) for its in seconds]
    slowest = busy.index(max(busy))
    others = [max(0.0, its[IDLE] - seconds[slowest][IDLE]) for rank, its in enumerate(seconds) if rank != slowest]
    return Summary(tuple(seconds), slowest, statistics.fmean(others) if others else 0.0)


@contextmanager
def traced(path: Path | None, launch: Launch) -> Iterator[None]:
    """Trace what all ranks do within this context, and write one file at its end. Collective.

    After an error the file is left with no spans, unless the error is that the job was told to stop.

    Parameters
    ----------
    path : Path or None
        The file, replaced if it exists; None for no trace.
    launch : Launch
        This rank.

    Raises
    ------
    OSError
        If the file cannot be written; before anything else is done, if that can be known.
    """
    if path is None:
        yield
        return
    failing = f"cannot write trace {path}"
    with agreed(launch.comm), naming_errors(failing):
        if launch.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda partial: partial.write_text("[]\n"))
    trace = Trace(on_gpu=launch.device.type == "cuda", most_events=max(1000, MOST_EVENTS // launch.size))
    began = meet(launch)
    try:
        with use(trace):
            yield
    except StoppedError:
        _write(path, launch, trace, began)
        raise
    _write(path, launch, trace, began)


def meet(launch: Launch) -> tuple[int, int]:
    """Return this rank's clock when all ranks met, and that of rank 0, in nanoseconds. Collective.

    The median over some barriers: ranks leave one within microseconds of each other, unless one is interrupted.
    """
    times = []
    for _ in range(_MEETINGS):
        barrier(launch.comm)
        times.append(time.perf_counter_ns())
    first = allgather_objects(launch.comm, times)[0]
    ahead = statistics.median(theirs - own for own, theirs in zip(times, first, strict=True))
    return times[-1], times[-1] + round(ahead)


def _write(path: Path, launch: Launch, trace: Trace, began: tuple[int, int]) -> None:
    """Write the events of all ranks on rank 0, rank by rank, and say in short what they tell. Collective."""
    seconds = trace.seconds()
    ended = meet(launch)
    start = allgather_objects(launch.comm, began[1])[0]
    # Clocks of different nodes run apart, so what lies between the two meetings is stretched to fit.
    rate = (ended[1] - began[1]) / max(1, ended[0] - began[0])

    def microseconds(own: int) -> float:
        return round((began[1] - start + (own - began[0]) * rate) / 1e3, 3)

    lines = "".join(f",\n{json.dumps(line)}" for line in _lines(launch, trace.events, microseconds))
    answers = allgather_objects(launch.comm, (seconds, trace.dropped))
    summary, dropped = summary_of([its for its, _ in answers]), sum(count for _, count in answers)
    texts = collect_objects(launch.comm, lines)
    with agreed(launch.comm), naming_errors(f"cannot write trace {path}"):
        if launch.rank == 0:
            try:
                replace_file(path, lambda partial: _write_texts(partial, texts, summary))
            finally:
                for _ in texts:  # the others wait until theirs is taken
                    pass
        else:
            list(texts)
    if launch.rank == 0:
        _tell(path, summary, dropped)


def _write_texts(path: Path, texts: Iterator[str], summary: Summary) -> None:
    with path.open("w", encoding="utf-8") as file:
        _write_head(file, summary)
        for text in texts:
            file.write(text)
        file.write("\n]}\n")


def _write_head(file: IO[str], summary: Summary) -> None:
    about = {
        "seconds": summary.seconds,
        "slowest_rank": summary.slowest_rank,
        "slowest_rank_wait_seconds": summary.slowest_rank_wait_seconds,
    }
    first = {"ph": "M", "name": "process_sort_index", "pid": 0, "args": {"sort_index": 0}}
    file.write('{"displayTimeUnit": "ms", "longnet_hpc": ' + json.dumps(about) + ',\n"traceEvents": [\n')
    file.write(json.dumps(first))


def _lines(launch: Launch, events: Sequence[Event], microseconds: Any) -> Iterator[dict[str, Any]]:
    """Yield what a trace file has of this rank: a process, a row a category, and the events."""
    place = {"pid": launch.rank}
    name = f"rank {launch.rank} ({socket.gethostname()}, {launch.device})"
    yield {"ph": "M", "name": "process_name", **place, "args": {"name": name}}
    if launch.rank:
        yield {"ph": "M", "name": "process_sort_index", **place, "args": {"sort_index": launch.rank}}
    rows: set[int] = set()
    for category in CATEGORIES:
        for event, lane in _in_lanes(category, events):
            row = _LANES * CATEGORIES.index(category) + lane
            if row not in rows:
                rows.add(row)
                title = category if lane == 0 else f"{category} {lane + 1}"
                yield {"ph": "M", "name": "thread_name", **place, "tid": row, "args": {"name": title}}
                yield {"ph": "M", "name": "thread_sort_index", **place, "tid": row, "args": {"sort_index": row}}
            begin, end = microseconds(event.start), microseconds(event.stop)
            yield {
                "ph": "X", "name": event.name, "cat": category, **place, "tid": row,
                "ts": begin, "dur": round(max(0.0, end - begin), 3),
            }  # fmt: skip


def _in_lanes(category: Category, events: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """Yield the events of a category with the row of each: those of a row lie within or after each other."""
    open_until: list[list[int]] = []
    its = (event for event in events if event.category == category)
    for event in sorted(its, key=lambda event: (event.start, -event.stop)):
        for stops in open_until:
            while stops and stops[-1] <= event.start:
                stops.pop()
        fits = (lane for lane, stops in enumerate(open_until) if not stops or event.stop <= stops[-1])
        lane = next(fits, len(open_until))
        if lane == len(open_until):
            open_until.append([])
        open_until[lane].append(event.stop)
        yield event, min(lane, _LANES - 1)


def _tell(path: Path, summary: Summary, dropped: int) -> None:
    log = logging.getLogger("longnet_hpc")
    mean = {name: statistics.fmean(its[name] for its in summary.seconds) for name in CATEGORIES}
    log.info(
        "trace in %s: seconds a rank of %s; slowest is rank %s, for which the others waited %.3f s",
        path,
        ", ".join(f"{name} {value:.3f}" for name, value in mean.items() if value),
        summary.slowest_rank,
        summary.slowest_rank_wait_seconds,
    )
    if dropped:
        log.info("trace: the last %s spans are left out of the file, but not of the seconds", f"{dropped:,}")
