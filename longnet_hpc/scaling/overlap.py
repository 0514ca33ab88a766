"""What the exchanges of attention were in the rounds of a point: bytes, and how much of their time was hidden."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from longnet_hpc.comm import allgather_objects, barrier, broadcast_object, collect_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.partition import Partition
from longnet_hpc.scaling.rounds import Rounds
from longnet_hpc.scaling.waits import FlightLog, FlightsOfRound, hidden_fraction, on_first_clock, waits_of
from longnet_hpc.scaling.work import attention_work
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.trace_file import meet

__all__ = ["Overlap", "needed_bytes"]

_ALONE_REPEATS = 9
"""Repetitions of the exchanges of a layer by themselves, of which the median counts."""


def needed_bytes(
    model: LongNetConfig, partition: Partition, rank: int, row_bytes: int, *, layers: int, training: bool
) -> int:
    """Return the fewest bytes that a rank must receive in a round, counted from geometry.

    Keys and values of other ranks that its queries see, once a layer; in training, the gradients of its own as each of
    the ranks that saw them makes them.

    Parameters
    ----------
    model, partition, rank
        What is computed, and where.
    row_bytes : int
        Keys and values of one token and head, of all sequences of a batch.
    layers : int
        How many times attention is computed.
    training : bool
        Whether there is a backward pass.
    """
    work = attention_work(model.pattern, partition, rank, model.heads, model.kv_heads or model.heads)
    return layers * row_bytes * (work.received + (work.sent if training else 0))


class Overlap:
    """Rounds of a point whose attention exchanges rows, and what these exchanges take alone. Making it is collective.

    Parameters
    ----------
    rounds : Rounds
        The rounds.
    plan : SequencePlan
        Whose exchanges.
    """

    def __init__(self, rounds: Rounds, plan: SequencePlan) -> None:
        self._rounds, self._plan = rounds, plan
        self._counted: list[tuple[float, float, int]] = []
        self._seen: list[FlightsOfRound] = []
        self._computed: float | None = None
        self._log = FlightLog(plan.rank)
        self._began = meet(rounds.launch)

    def take(self, work: Callable[[], object], *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""
        plan, log = self._plan, self._log

        def whole() -> None:
            work()
            self.computed()

        self._computed = None
        driven, waited, received = plan.seconds_tested, plan.seconds_waited, plan.bytes_received
        plan.observer, log.flights = log, []
        try:
            self._rounds.take(whole, timed=timed)
        finally:
            plan.observer = None
        if timed:
            assert self._computed is not None
            self._seen.append(FlightsOfRound(log.flights, self._computed))
            self._counted.append(
                (plan.seconds_tested - driven, plan.seconds_waited - waited, plan.bytes_received - received)
            )

    def computed(self) -> None:
        """Take down that this rank is through with its part of a round; where all meet only at its end, `take` does."""
        if self._computed is None:
            device = self._rounds.launch.device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._computed = time.perf_counter()

    def results(
        self, model: LongNetConfig, x: torch.Tensor, *, layers: int, training: bool, slowest_rank: int
    ) -> dict[str, Any]:
        """Return what records say of exchanges, the same on all ranks. Collective over the ranks of the point.

        Time that the slowest rank spent in MPI to start and drive them, and had nothing to compute and waited for them:
        and for whichever rank it is most, waiting for ranks that were late, which no exchange can help, and for rows
        under way. What these cost is how much sooner all had come to the end, had rows taken no time; it is compared
        with what exchanges take alone, on whichever rank that is most, and what is spared is ``hidden_fraction``. On a
        CPU driving them counts as well; a GPU goes on computing meanwhile. What it costs to pack rows and to compute
        attention in more parts is not in it: efficiency has that.

        Parameters
        ----------
        model : LongNetConfig
            Numbers of heads.
        x : torch.Tensor
            Shaped and typed as the keys of this rank.
        layers : int
            How many times attention is computed in a round.
        training : bool
            Whether there is a backward pass.
        slowest_rank : int
            The rank with the most to do.
        """
        launch, plan = self._rounds.launch, self._plan
        row_bytes = 2 * x.shape[0] * x.shape[3] * x.element_size()
        least = needed_bytes(model, plan.partition, plan.rank, row_bytes, layers=layers, training=training)
        driven, waited, received = (statistics.median(column) for column in zip(*self._counted, strict=True))
        alone = layers * self._alone(launch, model.heads, x, training=training)
        ended = meet(launch)
        seen = [on_first_clock(its, self._began, ended) for its in self._seen]
        answers = allgather_objects(launch.comm, (received, least, alone, driven, waited))
        received, least, alone, *_ = (max(column) for column in zip(*(its[:3] for its in answers), strict=True))
        of_ranks = list(collect_objects(launch.comm, seen))  # on the first rank, which looks at them for all
        results = {"bytes_received": int(received), "bytes_received_minimum": least}
        if not received:
            return results
        rounds = broadcast_object(launch.comm, [waits_of(of_round) for of_round in zip(*of_ranks, strict=True)])
        exposed = statistics.median(its.exposed for its in rounds)
        waits = list(zip(*(its.of_rank for its in rounds), strict=True))
        return {
            **results,
            "exchange_alone_seconds": alone,
            "exchange_driven_seconds": answers[slowest_rank][3],
            "exchange_waited_seconds": answers[slowest_rank][4],
            "exchange_late_seconds": max(statistics.median(its.late for its in rank) for rank in waits),
            "exchange_under_way_seconds": max(statistics.median(its.under_way for its in rank) for rank in waits),
            "exchange_exposed_seconds": exposed,
            "hidden_fraction": hidden_fraction(exposed, max(its[3] for its in answers), alone, on_gpu=x.is_cuda),
        }

    @torch.no_grad()
    def _alone(self, launch: Launch, heads: int, x: torch.Tensor, *, training: bool) -> float:
        """Return the time in MPI of the exchanges of one layer, of packed rows, with nothing to compute. Collective."""
        exchanges = [exchange for _, exchange in self._plan.exchanges(heads, x.shape[2], causal=True)]
        offered = [x.new_zeros(exchange.offered_shape(x)).flatten(1) for exchange in exchanges]
        received = [x.new_zeros(exchange.received_shape(x)).flatten(1) for exchange in exchanges]
        times = []
        for _ in range(_ALONE_REPEATS if launch.comm is not None else 0):
            barrier(launch.comm)
            flights = [exchange.gather.start(rows) for exchange, rows in zip(exchanges, offered, strict=True)]
            for flight in flights:
                flight.finish()
            if training:
                barrier(launch.comm)
                back = [exchange.gather.start_adjoint(rows) for exchange, rows in zip(exchanges, received, strict=True)]
                for flight in back:
                    flight.finish()
                flights += back
            times.append(sum(flight.seconds_tested + flight.seconds_waited for flight in flights))
        return statistics.median(times) if times else 0.0
