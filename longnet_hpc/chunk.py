"""One chunk of a sequence that is walked through in time, and the segments that are open at its ends, in integers.

Time is to a chunk what other ranks are to a slice: a segment that began in an earlier chunk is seen by the chunk's
first pieces, and one that goes on in a later chunk leaves rows for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longnet_hpc.partition import Partition, Run
from longnet_hpc.pattern import Branch, Pattern

__all__ = ["Chunk", "carried_bytes", "chunk_bounds", "kept_rows", "wide_branches"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a causal sequence, cut over ranks.

    Parameters
    ----------
    partition : Partition
        The slices of all ranks, by their positions in the sequence.
    seq_len : int
        Length of the whole sequence in tokens.
    """

    partition: Partition
    seq_len: int

    def tokens_before(self, branch: Branch) -> int:
        """Return how many tokens of a segment that is open at the start of the chunk lie before it; 0 if none is."""
        return self.partition.start % branch.segment_length

    def is_left_open(self, branch: Branch) -> bool:
        """Return whether a segment goes on after the chunk."""
        return self.partition.stop < self.seq_len and self.partition.stop % branch.segment_length > 0

    def is_inside(self, branch: Branch) -> bool:
        """Return whether one segment is open at the start of the chunk and goes on after it."""
        w = branch.segment_length
        same = self.partition.start // w == self.partition.stop // w
        return same and self.tokens_before(branch) > 0 and self.is_left_open(branch)

    def seeing_piece(self, branch: Branch, rank: int) -> Run | None:
        """Return the piece of a rank that belongs to the segment open at the start of the chunk."""
        runs = self.partition.runs(branch, rank)
        begun = self.partition.bounds[rank] - self.partition.start  # tokens of the chunk before the slice
        return runs[0] if runs and runs[0].phase > begun else None

    def leaving_piece(self, branch: Branch, rank: int) -> Run | None:
        """Return the piece of a rank that belongs to the segment that goes on after the chunk."""
        runs = self.partition.runs(branch, rank)
        if not runs or not self.is_left_open(branch):
            return None
        last = runs[-1]
        segment = self.partition.stop - self.partition.stop % branch.segment_length
        starts_at = self.partition.bounds[rank] + last.start + (last.count - 1) * last.length - last.phase
        return last if starts_at == segment else None

    def open_segments(self, pattern: Pattern) -> Iterator[tuple[int, int]]:
        """Yield the number of each branch with a segment open at the start of the chunk, and that of the segment."""
        for index, branch in enumerate(pattern):
            if self.tokens_before(branch):
                yield index, self.partition.start // branch.segment_length


def chunk_bounds(seq_len: int, chunk_len: int) -> list[int]:
    """Return the positions at which a sequence is cut into chunks of ``chunk_len`` tokens, its ends included.

    A rest of more than half a chunk is cut in two, at a half or a quarter: graphs are made for whole chunks only, and
    computed without them a token needs nearly twice the memory.
    """
    bounds = [*range(0, seq_len, chunk_len), seq_len]
    rest = seq_len - bounds[-2]
    if len(bounds) > 2 and chunk_len < 2 * rest < 2 * chunk_len:
        first = chunk_len // 2 if 4 * rest > 3 * chunk_len else max(1, chunk_len // 4)
        bounds.insert(-1, bounds[-2] + first)
    return bounds


def kept_rows(branch: Branch, seq_len: int) -> int:
    """Return the most rows that a head has on its grid in one segment of a sequence."""
    return -(-min(branch.segment_length, seq_len) // branch.dilation_rate)


def wide_branches(pattern: Pattern, chunk_len: int, seq_len: int) -> tuple[int, ...]:
    """Return the numbers of the branches that have a segment open at the end of some chunk of ``chunk_len`` tokens."""
    return tuple(
        index
        for index, branch in enumerate(pattern)
        if chunk_len < seq_len and any(stop % branch.segment_length for stop in chunk_bounds(seq_len, chunk_len)[1:-1])
    )


def carried_bytes(
    pattern: Pattern, chunk_len: int, seq_len: int, *, layers: int, batch: int, heads: int, head_dim: int, itemsize: int
) -> int:
    """Return the bytes of keys and values that a gradient over a whole sequence keeps until its backward sweep.

    Parameters
    ----------
    pattern : Pattern
        The branches; only those count that have a segment open at the end of a chunk.
    chunk_len, seq_len : int
        Tokens of a chunk over all ranks, and of the whole sequence.
    layers, batch, heads, head_dim, itemsize : int
        Of the model, and bytes of a number.

    Returns
    -------
    int
        About ``layers * 2 * width * itemsize * seq_len * sum(1 / r)`` bytes.
    """
    rows = 0
    for index in wide_branches(pattern, chunk_len, seq_len):
        branch = pattern.branches[index]
        rows += -(-seq_len // branch.segment_length) * kept_rows(branch, seq_len)
    return rows * layers * 2 * batch * heads * head_dim * itemsize
