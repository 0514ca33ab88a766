"""What one rank does in the attention of one layer, counted from geometry: arithmetic, rows received and sent."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import add, attrgetter, sub

from longnet_hpc.partition import Partition
from longnet_hpc.pattern import Branch, Pattern

__all__ = ["AttentionWork", "attention_work", "ranks_to_look_at"]

_ALL_RANKS_UP_TO = 64
"""Numbers of ranks of which each is looked at; of more, some: geometry repeats from node to node."""


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Causal attention of one layer and one sequence on one rank. Rows are keys and values of head_dim each."""

    pairs: int
    """Queries times the keys that they see, over all heads; ``4 * head_dim`` FLOP each, forward."""
    queries: int
    """Queries over all heads and branches, those that see nothing but themselves included."""
    received: int
    """Rows that come from other ranks in the forward pass, and whose gradients go back in the backward pass."""
    received_within: int
    """Of these, rows from ranks of the same node."""
    sent: int
    """Rows that go to other ranks in the forward pass, and whose gradients come back, one for each receiver."""
    messages: int
    """Ranks from which rows come, counted once an exchange."""
    messages_within: int
    """Of these, ranks of the same node."""
    carried: int
    """Rows of other ranks that a stream keeps for later chunks."""
    left: int
    """Rows of this rank that others keep so, one for each of them; their gradients come back."""

    def __add__(self, other: AttentionWork) -> AttentionWork:
        return AttentionWork(*map(add, _counts(self), _counts(other)))

    def times(self, numerator: int, denominator: int) -> AttentionWork:
        """Return a multiple, rounded down."""
        return AttentionWork(*(count * numerator // denominator for count in _counts(self)))


_counts: attrgetter[tuple[int, ...]] = attrgetter(*(field.name for field in fields(AttentionWork)))
"""Returns all counts, in the order of the fields."""


def attention_work(
    pattern: Pattern,
    partition: Partition,
    rank: int,
    heads: int,
    kv_heads: int,
    *,
    ranks_per_node: int = 1,
    seq_len: int | None = None,
) -> AttentionWork:
    """Count what a rank does.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    partition : Partition
        The slices of all ranks; of a chunk, if it does not hold the whole sequence.
    rank : int
        The rank.
    heads, kv_heads : int
        Query heads, and key/value heads.
    ranks_per_node : int
        Neighbouring ranks that share a node.
    seq_len : int, optional
        Length of the sequence that a chunk belongs to, in tokens; that of the partition by default.
    """
    total = AttentionWork(0, 0, 0, 0, 0, 0, 0, 0, 0)
    goes_on = seq_len is not None and partition.stop < seq_len
    for branch in pattern:
        # Whole segments before a chunk change nothing, so chunks are alike; a chunk is never of packed documents.
        segments = partition.start // branch.segment_length
        moved = _moved(partition, segments * branch.segment_length)
        total += _of_branch(branch, moved, rank, heads, kv_heads, ranks_per_node, goes_on)
    if total.left or total.carried:  # rows that are kept for later chunks go from all to all, of all branches at once
        node = range(partition.size)[rank - rank % ranks_per_node :][:ranks_per_node]
        total += AttentionWork(0, 0, 0, 0, 0, partition.size - 1, len(node) - 1, 0, 0)
    return total


@lru_cache(1 << 10)
def _moved(partition: Partition, tokens: int) -> Partition:
    """Return the slices, a number of tokens nearer to the start of the sequence."""
    return Partition(tuple(bound - tokens for bound in partition.bounds)) if tokens else partition


@lru_cache(1 << 10)
def _extremes(partition: Partition) -> tuple[int, int]:
    """Return the lengths of the shortest and the longest slice, in tokens."""
    lengths = list(map(sub, partition.bounds[1:], partition.bounds))
    return min(lengths), max(lengths)


@lru_cache(1 << 14)
def _of_branch(
    branch: Branch, partition: Partition, rank: int, heads: int, kv_heads: int, ranks_per_node: int, goes_on: bool
) -> AttentionWork:
    w, start, stop = branch.segment_length, partition.bounds[rank], partition.bounds[rank + 1]
    node_start = partition.bounds[rank - rank % ranks_per_node]
    pairs = queries = received = within = sent = messages = messages_within = carried = left = 0
    for run in partition.runs(branch, rank):
        position = start + run.start
        segment = position - run.phase
        first_here = max(segment, partition.start)  # of the segment's tokens, the first that this chunk has
        for offset in branch.offsets(heads):
            rows = run.rows(branch, offset)
            if rows == 0:
                continue
            at_offset, kv = _heads(branch.dilation_rate, offset, heads, kv_heads)
            queries += run.count * at_offset * rows
            rows_before = _rows_before(branch, offset, run.phase)
            pairs += run.count * at_offset * (rows * (rows + 1) // 2 + rows * rows_before)
            if position > first_here:
                came = rows_before - _rows_before(branch, offset, first_here - segment)
                received += kv * came
                if first_here >= node_start:
                    within += kv * came
                elif position > node_start:
                    within += kv * (rows_before - _rows_before(branch, offset, node_start - segment))
        if position > first_here:
            sources = rank + 1 - bisect_right(partition.bounds, first_here)
            messages += sources
            messages_within += min(sources, rank % ranks_per_node)
    last = stop - 1 - (stop - 1) % w  # start of the segment that the slice ends in
    end = min(last + w, partition.stop)
    if stop > start and end > stop:
        begin = max(last, start)
        for offset in branch.offsets(heads):
            own = _rows_between(branch, offset, last, begin, stop)
            if own:
                _, kv = _heads(branch.dilation_rate, offset, heads, kv_heads)
                sent += own * kv * _receivers(branch, offset, last, end, partition, rank)
    if goes_on and partition.stop % w:
        carried, own = _carried(branch, partition, rank, heads)
        left = own * (partition.size - 1)
    return AttentionWork(pairs, queries, received, within, sent, messages, messages_within, carried, left)


@lru_cache(1 << 10)
def _heads(rate: int, offset: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Return how many query heads have an offset, and how many key/value heads belong to these."""
    branch = Branch(rate, rate)
    return len(branch.heads_at(offset, heads)), len(set(branch.kv_heads_at(offset, heads, kv_heads)))


def _rows_before(branch: Branch, offset: int, tokens: int) -> int:
    """Return the rows of a grid in the first ``tokens`` tokens of a segment."""
    rate = branch.dilation_rate
    return (tokens - offset + rate - 1) // rate if tokens > offset else 0


def _rows_between(branch: Branch, offset: int, segment: int, start: int, stop: int) -> int:
    """Return the rows of a grid of the segment that starts at ``segment``, among positions of the sequence."""
    start = max(segment, start)
    return (
        _rows_before(branch, offset, stop - segment) - _rows_before(branch, offset, start - segment)
        if stop > start
        else 0
    )


def _receivers(branch: Branch, offset: int, segment: int, end: int, partition: Partition, rank: int) -> int:
    """Return how many later ranks have queries on a grid of a segment, and so need its keys."""
    bounds, rate = partition.bounds, branch.dilation_rate
    shortest, longest = _extremes(partition)
    if longest <= rate:  # no rank has two rows
        return _rows_between(branch, offset, segment, bounds[rank + 1], end)
    if shortest >= rate:  # every grid has a row on every rank, but perhaps on the last
        last = bisect_left(bounds, end) - 1
        return last - rank - (_rows_between(branch, offset, segment, bounds[last], end) == 0)
    row = -(-(bounds[rank + 1] - segment - offset) // rate)  # the first row after the slice
    count = 0
    while (position := segment + offset + row * rate) < end:
        other = bisect_right(bounds, position) - 1
        count += 1
        row = -(-(bounds[other + 1] - segment - offset) // rate)
    return count


def _carried(branch: Branch, partition: Partition, rank: int, heads: int) -> tuple[int, int]:
    """Return the rows that other ranks, and this one, leave of the segment open at the end of a chunk.

    They have a column for each query head.
    """
    segment = partition.stop - partition.stop % branch.segment_length
    start, stop = partition.bounds[rank], partition.bounds[rank + 1]
    others = own = 0
    for offset in branch.offsets(heads):
        all_of_chunk = _rows_between(branch, offset, segment, partition.start, partition.stop)
        its = _rows_between(branch, offset, segment, start, stop)
        at_offset, _ = _heads(branch.dilation_rate, offset, heads, heads)
        others += (all_of_chunk - its) * at_offset
        own += its * at_offset
    return others, own


def ranks_to_look_at(size: int, ranks_per_node: int) -> list[int]:
    """Return the ranks among which the slowest is looked for: all, or of many, some at the ends of nodes."""
    if size <= _ALL_RANKS_UP_TO:
        return list(range(size))
    nodes = -(-size // ranks_per_node)
    some: Iterable[int] = {0, 1, nodes // 4, nodes // 2, 3 * nodes // 4, nodes - 2, nodes - 1}
    ends = {rank for node in some for rank in (node * ranks_per_node, (node + 1) * ranks_per_node - 1)}
    return sorted(rank for rank in {*ends, size - 1} if 0 <= rank < size)
