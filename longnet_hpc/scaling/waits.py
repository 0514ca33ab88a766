"""Waiting for exchanges, told apart: for a rank that was late, and for rows on their way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longnet_hpc.pattern import Branch

if TYPE_CHECKING:
    from longnet_hpc.comm.buffers import Pending
    from longnet_hpc.exchange import SpanExchange

__all__ = ["Flight", "FlightLog", "Wait", "waits_of"]


@dataclass(frozen=True)
class Flight:
    """One finished exchange as one rank saw it; times in seconds of one clock, infinity for what did not happen."""

    key: tuple[int, Branch, tuple[int, ...], bool]
    """Number of the pass, branch, ranks of the segment, and whether gradients went back: the same on all ranks."""
    sources: tuple[int, ...]
    """Ranks from which something came."""
    started: float
    """When this rank gave its part to MPI."""
    idle_since: float
    """When its device had nothing more to do."""
    finished: float
    """When all that it was to receive was there."""


@dataclass(frozen=True)
class Wait:
    """What a rank waited for, in seconds."""

    late: float
    """For ranks that had not given their rows to MPI yet."""
    under_way: float
    """For rows that were on their way: what computing did not hide."""


class FlightLog:
    """Takes down the exchanges of a plan, as its observer; passes are numbered alike on all ranks.

    Parameters
    ----------
    rank : int
        This rank.

    Attributes
    ----------
    flights : list of Flight
        Since the list was last replaced.
    """

    def __init__(self, rank: int) -> None:
        self.flights: list[Flight] = []
        self._rank = rank
        self._passes = 0

    def __call__(
        self, exchanges: Sequence[tuple[Branch, SpanExchange]], flights: Sequence[Pending], back: bool
    ) -> None:
        """Take down the exchanges of a pass."""
        self._passes += 1
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            layout = exchange.layout
            ranks, counts = layout.span.ranks, layout.send_counts if back else layout.recv_counts
            sources = tuple(rank for rank, count in zip(ranks, counts, strict=True) if count and rank != self._rank)
            key = self._passes, branch, ranks, back
            self.flights.append(Flight(key, sources, flight.started, flight.idle_since, flight.finished))


def waits_of(flights: Sequence[Iterable[Flight]], ahead: Sequence[float]) -> list[Wait]:
    """Return what each rank waited for.

    Parameters
    ----------
    flights : sequence of iterable of Flight
        Rank by rank, with times of that rank's clock.
    ahead : sequence of float
        By how much the clock of each rank is ahead of one that they share, in seconds.
    """
    started = {(flight.key, rank): flight.started - ahead[rank] for rank, its in enumerate(flights) for flight in its}
    waits = []
    for rank, its in enumerate(flights):
        late = under_way = 0.0
        for flight in its:
            idle_since, finished = flight.idle_since - ahead[rank], flight.finished - ahead[rank]
            if idle_since >= finished:  # infinity, if the device had something to do all along
                continue
            there = max((started[flight.key, source] for source in flight.sources), default=-math.inf)
            for_late = min(max(there, idle_since), finished) - idle_since
            late += for_late
            under_way += finished - idle_since - for_late
        waits.append(Wait(late, under_way))
    return waits
