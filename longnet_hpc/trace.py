"""What this rank spends its time on: spans by category, and their sums; off, and then free, unless a trace is in use.

On a CPU a span lasts from its beginning to its end on the host's clock. On a GPU, which works off what the host has
queued, it lasts from when the GPU had done all that was queued before it to when it had done all that was queued
within it. A wait then is the time in which the GPU had nothing to do, and none if it was still computing. Transfers
between ranks are on the host's clock everywhere.

The spans of a rank lie within each other like calls. Each counts for its category without what lies within it, so that
no second counts twice; transfers lie beside them and count by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from longnet_hpc.life import life

__all__ = ["CATEGORIES", "IDLE", "Category", "Event", "Trace", "Transfer", "current", "span", "transfer", "use"]

Category = Literal["compute", "exchange", "wait", "input", "gradient", "checkpoint"]
"""One of `CATEGORIES`."""
CATEGORIES: tuple[Category, ...] = ("compute", "exchange", "wait", "input", "gradient", "checkpoint")
"""What time is spent on: exchange from start to end of transfers of keys, values and their gradients, wait where
nothing but waiting was done meanwhile, gradient all of summing over ranks, with its own transfers and waits."""
IDLE = "idle"
"""Sum of all waits, those within `gradient` too."""

_SETTLED_AT_ONCE = 4096
"""Spans that may be closed before their times are looked at; on a GPU that waits for it."""


class Event(NamedTuple):
    """A span whose times are known, in nanoseconds of this rank's clock."""

    category: Category
    name: str
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class _Span:
    """A span that is open, or whose times have not been looked at."""

    category: Category
    name: str
    counts_as: Category
    parent: _Span | None
    start: Any
    stop: Any = None
    inner: int = 0
    """Nanoseconds of the spans that lie within."""


class Trace:
    """Spans of one rank and the seconds of each category; not collective.

    Parameters
    ----------
    on_gpu : bool
        Whether spans are those of the current GPU.
    most_events : int
        Spans that are kept one by one, the first ones; sums are of all.

    Attributes
    ----------
    events : list of Event
        Spans kept, in the order in which they ended.
    dropped : int
        Spans that were not kept.
    """

    def __init__(self, *, on_gpu: bool = False, most_events: int = 0) -> None:
        self.events: list[Event] = []
        self.dropped = 0
        self._most_events = most_events
        self._on_gpu = on_gpu
        self._nanoseconds: dict[str, int] = dict.fromkeys((*CATEGORIES, IDLE), 0)
        self._top: _Span | None = None
        self._closed: list[_Span] = []
        self._in_flight = 0
        self._in_flight_since = 0
        if on_gpu:
            self._set_base()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each category, and of all waits as `IDLE`, of spans that have ended."""
        self._settle()
        return {name: nanoseconds / 1e9 for name, nanoseconds in self._nanoseconds.items()}

    def open(self, category: Category, name: str) -> None:
        """Begin a span within the one that is open."""
        top = self._top
        counts_as: Category = "gradient" if top is not None and top.counts_as == "gradient" else category
        self._top = _Span(category, name, counts_as, top, self._stamp())

    def close(self) -> None:
        """End the span that was begun last."""
        top = self._top
        assert top is not None
        top.stop = self._stamp()
        self._top = top.parent
        self._closed.append(top)
        if len(self._closed) >= _SETTLED_AT_ONCE:
            self._settle()

    def start_transfer(self, name: str) -> Transfer:
        """Note that a transfer begins; those that sum gradients do not count as `exchange`."""
        counts = self._top is None or self._top.counts_as != "gradient"
        now = time.perf_counter_ns()
        if counts:
            if self._in_flight == 0:
                self._in_flight_since = now
            self._in_flight += 1
        return Transfer(self, name, now, counts)

    def end_transfer(self, name: str, start: int, *, counts: bool) -> None:
        """Note that one has ended. Time in which several are under way counts once."""
        now = time.perf_counter_ns()
        if counts:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._nanoseconds["exchange"] += now - self._in_flight_since
        self._keep(Event("exchange", name, start, now))

    def _stamp(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter_ns()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _set_base(self) -> None:
        """Let a moment of the GPU's clock be one of the host's."""
        import torch

        torch.cuda.synchronize()
        self._base = self._stamp()
        torch.cuda.synchronize()
        self._base_time = time.perf_counter_ns()

    def _settle(self) -> None:
        """Look at the times of spans that were closed, inner ones first."""
        if self._on_gpu and self._closed:
            self._closed[-1].stop.synchronize()
        for its in self._closed:
            if self._on_gpu:
                start = self._base_time + round(self._base.elapsed_time(its.start) * 1e6)
                length = round(its.start.elapsed_time(its.stop) * 1e6)
            else:
                start, length = its.start, its.stop - its.start
            own = max(0, length - its.inner)
            if its.parent is not None:
                its.parent.inner += length
            self._nanoseconds[its.counts_as] += own
            if its.category == "wait":
                self._nanoseconds[IDLE] += own
            self._keep(Event(its.category, its.name, start, start + length))
        self._closed.clear()
        if self._on_gpu and self._top is None:
            self._set_base()  # its clock drifts, and times since the base are but float32

    def _keep(self, event: Event) -> None:
        if len(self.events) < self._most_events:
            self.events.append(event)
        else:
            self.dropped += 1


class Transfer:
    """A transfer under way.

    Parameters
    ----------
    trace : Trace
        Where it belongs.
    name : str
        What is sent.
    start : int
        When it began, in nanoseconds.
    counts : bool
        Whether it counts as `exchange`.
    """

    __slots__ = ("_counts", "_name", "_start", "_trace")

    def __init__(self, trace: Trace, name: str, start: int, counts: bool) -> None:
        self._trace: Trace | None = trace
        self._name, self._start, self._counts = name, start, counts

    def end(self) -> None:
        """Note the end; harmless when called twice."""
        if self._trace is not None:
            self._trace.end_transfer(self._name, self._start, counts=self._counts)
            self._trace = None


class _Scope:
    """A span as a context."""

    __slots__ = ("_category", "_name", "_trace")

    def __init__(self, trace: Trace, category: Category, name: str) -> None:
        self._trace, self._category, self._name = trace, category, name

    def __enter__(self) -> None:
        self._trace.open(self._category, self._name)

    def __exit__(self, *error: object) -> None:
        self._trace.close()


_current: Trace | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def span(category: Category, name: str) -> AbstractContextManager[None]:
    """Return a context that is a span of the trace in use, if any; for one thread at a time. A sign of life."""
    life.progress += 1
    return _NOTHING if _current is None else _Scope(_current, category, name)


def transfer(name: str) -> Transfer | None:
    """Return a transfer that begins now, None if no trace is in use."""
    return None if _current is None else _current.start_transfer(name)


def current() -> Trace | None:
    """Return the trace in use."""
    return _current


@contextmanager
def use(trace: Trace) -> Iterator[Trace]:
    """Let a trace take what happens within this context."""
    global _current
    before, _current = _current, trace
    try:
        yield trace
    finally:
        _current = before
