"""Time-independent traces of a step, as SimGrid replays them: what every rank computes, sends and waits for, in order.

A layer does what `mixture` does. Forward: the exchanges of all spanning segments start, attention within the slice is
computed, then one exchange after the other is waited for and its rows are attended to. Backward: the gradients of
received rows are computed and sent back, exchange by exchange, then those within the slice, then all are waited for.
Exchanges among some of the ranks are written as the messages that a non-blocking MPI_Alltoallv of them sends, since a
replay knows no communicator but that of all ranks; the sum of the gradients is among all, and written as a collective.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from longnet_hpc.partition import Partition, SpanLayout
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import Machine
from longnet_hpc.scaling.model import NEXT_MESSAGE, head_seconds, layer_seconds
from longnet_hpc.scaling.platforms import HOST_FLOP_PER_SECOND
from longnet_hpc.scaling.work import attention_work

__all__ = ["Exchange", "count_messages", "exchanges_of", "rank_trace"]

MAX_MESSAGE_BYTES = 1 << 30
"""Longest message of a trace, in bytes; SMPI counts with 32 bits, and what is more wraps around without a word."""
_BUCKET_BYTES = 1 << 26
"""Largest part of a sum over ranks that is exchanged at once; see `comm.collectives`."""
_ELEMENT_BYTES = 4
"""Of a gradient."""


@dataclass(frozen=True)
class Exchange:
    """What one rank receives and sends for one spanning segment, forward; backward it is the other way round."""

    tag: int
    """Number that it has in messages, the same on all ranks."""
    sources: tuple[tuple[int, int], ...]
    """Ranks from which rows come, with the bytes of a sequence's keys and values."""
    targets: tuple[tuple[int, int], ...]
    """Ranks that rows go to, likewise."""
    pairs: int
    """Queries of this rank times the received keys that they see, over all heads."""


def exchanges_of(config: PlanConfig, machine: Machine, partition: Partition, rank: int) -> list[Exchange]:
    """Return the exchanges of one layer, all sequences of the batch together, in the order in which they start."""
    model = config.model
    kv_heads = model.kv_heads or model.heads
    row_bytes = 2 * model.head_dim * machine.itemsize * config.batch_size
    found = []
    for tag, branch in enumerate(model.pattern):  # two ranks share one spanning segment of a branch at most
        for span in partition.spans(branch, rank):
            layout = SpanLayout(branch, span, rank, model.heads, kv_heads, causal=True)
            sources, targets = (
                tuple((other, rows * row_bytes) for other, rows in zip(span.ranks, counts, strict=True) if rows)
                for counts in (layout.recv_counts, layout.send_counts)
            )
            pairs = sum(
                len(branch.heads_at(offset, model.heads))
                * layout.rows(rank, offset)
                * sum(layout.rows(source, offset) for source in layout.sources)
                for offset in layout.needed
            )
            if sources or targets:
                found.append(Exchange(tag, sources, targets, pairs))
    return found


def count_messages(config: PlanConfig, ranks: int) -> int:
    """Return how many messages a step sends, of all ranks, the sum of the gradients included."""
    model, partition = config.model, Partition.even(config.seq_len, ranks)
    heads = model.heads, model.kv_heads or model.heads
    of_a_layer = sum(attention_work(model.pattern, partition, rank, *heads).messages for rank in range(ranks))
    buckets = len(_buckets(model.parameter_count)) if config.task == "train" else 0
    return of_a_layer * model.layers * _passes(config) + 2 * buckets * ranks * (ranks - 1)


def rank_trace(
    config: PlanConfig, machine: Machine, partition: Partition, rank: int, ranks_per_node: int
) -> Iterator[str]:
    """Yield the trace of one rank, some lines at a time.

    Parameters
    ----------
    config : PlanConfig
        Model and step; no stream.
    machine : Machine
        Where it runs; gives the time that computing takes.
    partition : Partition
        The slices of all ranks.
    rank : int
        The rank.
    ranks_per_node : int
        Neighbouring ranks that share a node.
    """
    model, training = config.model, config.task == "train"
    heads = model.heads, model.kv_heads or model.heads
    share = max(1.0, ranks_per_node / machine.devices_per_node)
    work = attention_work(model.pattern, partition, rank, *heads, ranks_per_node=ranks_per_node)
    tokens = float(len(partition.slice_of(rank)))
    layer = layer_seconds(config, machine, work, tokens, share)
    exchanges = exchanges_of(config, machine, partition, rank)
    lines = _Lines(rank, len(model.pattern), machine, ranks_per_node)

    keys = work.pairs + machine.attention.wasted_keys * work.queries
    shares = [exchange.pairs / keys if keys else 0.0 for exchange in exchanges]
    # What does not go on beside computing takes the time of the device, whether or not anybody waits for it.
    driven = (1 - machine.overlap) * min(layer.exchange, layer.attention)
    driven_backward = (1 - machine.overlap) * min(layer.exchange, layer.attention_backward)
    local = 1 - sum(shares)

    attention = [
        *(line for one in exchanges for line in lines.start(one.tag, one.sources, one.targets)),
        lines.compute(layer.attention * local + driven),
    ]
    for one, part in zip(exchanges, shares, strict=True):
        attention += [*lines.finish(one.tag, one.sources, one.targets), lines.compute(layer.attention * part)]
    forward = [lines.compute(layer.blocks), *attention]
    again = training and config.activation_checkpointing
    backward = [lines.compute(layer.blocks)] if again else []
    backward += attention if again and not config.keep_attention else []
    backward.append(lines.compute(layer.blocks_backward))
    for one, part in zip(exchanges, shares, strict=True):
        backward.append(lines.compute(layer.attention_backward * part))
        backward += lines.start(one.tag, one.targets, one.sources)
    backward.append(lines.compute(layer.attention_backward * local + driven_backward))
    backward += [line for one in exchanges for line in lines.finish(one.tag, one.targets, one.sources)]

    yield f"{rank} init\n"
    yield "".join(forward) * model.layers
    yield lines.compute(head_seconds(config, machine, tokens, share))
    if training:
        yield "".join(backward) * model.layers
        for elements in _buckets(model.parameter_count) if partition.size > 1 else ():
            yield "".join(lines.sum(elements, partition.size))
    update = machine.parameter_seconds * model.parameter_count * share if training else 0.0
    yield lines.compute(machine.step_seconds + update)
    yield f"{rank} finalize\n"


class _Lines:
    """Writes the lines of one rank."""

    def __init__(self, rank: int, tags: int, machine: Machine, ranks_per_node: int) -> None:
        self.rank = rank
        self._tags = tags
        self._machine = machine
        self._ranks_per_node = ranks_per_node

    def compute(self, seconds: float) -> str:
        """Return the line of some computing, to the nanosecond."""
        return f"{self.rank} compute {seconds * HOST_FLOP_PER_SECOND:.0f}\n"

    def start(self, tag: int, sources: Iterable[tuple[int, int]], targets: Iterable[tuple[int, int]]) -> Iterator[str]:
        """Yield the lines that start an exchange."""
        sources, targets = list(sources), list(targets)
        yield self._post(other for other, _ in targets)
        for action, others in (("irecv", sources), ("isend", targets)):
            for other, count in others:
                for part, size in self._parts(tag, count):
                    yield f"{self.rank} {action} {other} {part} {size}\n"

    def finish(self, tag: int, sources: Iterable[tuple[int, int]], targets: Iterable[tuple[int, int]]) -> Iterator[str]:
        """Yield the lines that wait for it."""
        for other, count in sources:
            for part, _ in self._parts(tag, count):
                yield f"{self.rank} wait {other} {self.rank} {part}\n"
        for other, count in targets:
            for part, _ in self._parts(tag, count):
                yield f"{self.rank} wait {self.rank} {other} {part}\n"

    def _parts(self, tag: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield tag and bytes of the messages that make up one of ``count`` bytes."""
        for start in range(0, count, MAX_MESSAGE_BYTES):
            yield tag, min(MAX_MESSAGE_BYTES, count - start)
            tag += self._tags

    def sum(self, elements: int, ranks: int) -> Iterator[str]:
        """Yield the lines of a sum over ranks: parts to their owners, and the sums back. Nobody sends to itself."""
        bounds = [elements * rank // ranks for rank in range(ranks + 1)]
        of_rank = [_ELEMENT_BYTES * (stop - start) for start, stop in pairwise(bounds)]
        own = of_rank[self.rank]
        parts = self._counts(of_rank)
        sums = self._counts([own] * ranks)
        for sent, received in ((parts, sums), (sums, parts)):
            yield self._post(rank for rank in range(ranks) if rank != self.rank)
            yield f"{self.rank} alltoallv {sent} {received}\n"

    def _post(self, others: Iterable[int]) -> str:
        """Return the line of posting messages to others, one after the other, before all of them leave.

        SMPI could let each leave when it is posted, but with no two at the same time a replay takes ten times as long.
        """
        node, machine = self.rank // self._ranks_per_node, self._machine
        links = [machine.within if other // self._ranks_per_node == node else machine.between for other in others]
        seconds = NEXT_MESSAGE * sum(link.latency_seconds for link in links)
        return f"{self.rank} sleep {seconds:.9f}\n" if seconds else ""

    def _counts(self, of_ranks: list[int]) -> str:
        others = [0 if rank == self.rank else count for rank, count in enumerate(of_ranks)]
        return f"{sum(others)} {' '.join(map(str, others))}"


def _buckets(elements: int) -> list[int]:
    """Return the elements of each part of a gradient that is summed over ranks at once."""
    most = _BUCKET_BYTES // _ELEMENT_BYTES
    return [min(most, elements - start) for start in range(0, elements, most)]


def _passes(config: PlanConfig) -> int:
    """Return how often a step exchanges the rows of a layer, there or back."""
    if config.task == "eval":
        return 1
    return 3 if config.activation_checkpointing and not config.keep_attention else 2
