"""Waiting for exchanges, told apart: for a rank that was late, and for rows on their way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longnet_hpc.pattern import Branch

if TYPE_CHECKING:
    from longnet_hpc.comm.buffers import Pending
    from longnet_hpc.exchange import SpanExchange

__all__ = ["Flight", "FlightLog", "FlightsOfRound", "Wait", "Waits", "hidden_fraction", "on_first_clock", "waits_of"]


@dataclass(frozen=True)
class Flight:
    """One finished exchange as one rank saw it; times in seconds of one clock, infinity for what did not happen."""

    key: tuple[int, Branch, tuple[int, ...], bool, int]
    """Number of the pass, branch, ranks of the segment, whether gradients went back, and how many flights of all that
    there were before, should a pattern have a branch twice: the same on all ranks."""
    sources: tuple[int, ...]
    """Ranks from which something came."""
    started: float
    """When this rank gave its part to MPI."""
    idle_since: float
    """When its device had nothing more to do."""
    finished: float
    """When all that it was to receive was there."""


@dataclass(frozen=True)
class FlightsOfRound:
    """What one rank saw in one round, in times of one clock."""

    flights: list[Flight]
    computed: float
    """When this rank had computed its part and came to where all meet, at the end."""


@dataclass(frozen=True)
class Wait:
    """What a rank waited for, in seconds."""

    late: float
    """For ranks that had not given their rows to MPI yet."""
    under_way: float
    """For rows that were on their way."""


@dataclass(frozen=True)
class Waits:
    """What waits were in a round."""

    of_rank: list[Wait]
    exposed: float
    """How much sooner, in seconds, all ranks had come to the end, had rows taken no time: what computing did not hide.
    Less than what ranks waited for rows under way, where that only made them wait less for another rank later."""


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
        before: Counter[tuple[Branch, tuple[int, ...]]] = Counter()
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            layout = exchange.layout
            ranks, counts = layout.span.ranks, layout.send_counts if back else layout.recv_counts
            sources = tuple(rank for rank, count in zip(ranks, counts, strict=True) if count and rank != self._rank)
            key = self._passes, branch, ranks, back, before[branch, ranks]
            before[branch, ranks] += 1
            self.flights.append(Flight(key, sources, flight.started, flight.idle_since, flight.finished))


def on_first_clock(seen: FlightsOfRound, began: tuple[int, int], ended: tuple[int, int]) -> FlightsOfRound:
    """Return a round in times of the clock of the first rank.

    Parameters
    ----------
    seen : FlightsOfRound
        In times of this rank's clock.
    began, ended : tuple of int
        This rank's clock and that of the first rank, in nanoseconds, when they met before and after all flights, as
        `longnet_hpc.trace_file.meet` tells. Clocks of different nodes run apart, so what lies between is stretched.
    """
    rate = (ended[1] - began[1]) / max(1, ended[0] - began[0])

    def shared(seconds: float) -> float:
        return (began[1] + (seconds * 1e9 - began[0]) * rate) / 1e9

    flights = [
        replace(its, started=shared(its.started), idle_since=shared(its.idle_since), finished=shared(its.finished))
        for its in seen.flights
    ]
    return FlightsOfRound(flights, shared(seen.computed))


def hidden_fraction(exposed: float, driven: float, alone: float, *, on_gpu: bool) -> float:
    """Return what computing spared of the time that exchanges take alone.

    Parameters
    ----------
    exposed : float
        How much longer a round took for them, in seconds.
    driven : float
        Most time that a rank spent in MPI between kernels, in seconds. It counts where MPI copies on the core that
        computes; a GPU goes on computing.
    alone : float
        Time that the exchanges take with nothing to compute, in seconds.
    on_gpu : bool
        Whether a GPU computes.
    """
    return 1 - (exposed + (0.0 if on_gpu else driven)) / alone


def waits_of(seen: Sequence[FlightsOfRound]) -> Waits:
    """Return what waits were in a round, from what each rank saw, in times of one clock.

    What is exposed comes from going through the flights again as if rows took no time: each rank gains what it waited
    for rows under way, but must then wait for ranks that are late, which have gained as well. Where a device was busy
    until its rows were there, how long it was idle without them is not known; nothing is taken from the gain then, so
    that it is an upper bound.
    """
    ranks = range(len(seen))
    started = {(flight.key, rank): flight.started for rank in ranks for flight in seen[rank].flights}
    late, under_way, gain = ([0.0 for _ in ranks] for _ in range(3))
    gain_at_start: dict[tuple[object, int], float] = {}
    events = [(flight.finished, False, rank, flight) for rank in ranks for flight in seen[rank].flights]
    events += [(flight.started, True, rank, flight) for rank in ranks for flight in seen[rank].flights]
    for _, is_start, rank, flight in sorted(events, key=lambda event: event[:3]):
        if is_start:
            gain_at_start[flight.key, rank] = gain[rank]
            continue
        idle_since, finished = flight.idle_since, flight.finished
        if idle_since >= finished:  # infinity, if the device had something to do all along
            continue
        there = max((started[flight.key, source] for source in flight.sources), default=-math.inf)
        for_late = min(max(there, idle_since), finished) - idle_since
        late[rank] += for_late
        under_way[rank] += finished - idle_since - for_late
        # Clocks may disagree by more than rows take: a source has not started after its rows were there.
        sooner = (
            min(finished, started[flight.key, source]) - gain_at_start.get((flight.key, source), gain[source])
            for source in flight.sources
        )
        gain[rank] = max(0.0, finished - max(idle_since - gain[rank], max(sooner, default=-math.inf)))
    end = max(seen[rank].computed for rank in ranks)
    exposed = end - max(seen[rank].computed - gain[rank] for rank in ranks)
    return Waits([Wait(*its) for its in zip(late, under_way, strict=True)], exposed)
