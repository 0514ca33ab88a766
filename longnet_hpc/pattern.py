"""Branches of dilated attention and the grids they look at, in integers.

A *branch* is a pair (segment length w, dilation rate r). For head h the offset is ``o = h mod r`` (LongNet, Eq. 13-15)
and position p lies on the grid of that head when ``(p mod w) mod r == o``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index

from longnet_hpc.errors import PatternError

__all__ = ["Branch", "Pattern"]


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch: segments of ``segment_length`` tokens, every ``dilation_rate``-th of them looked at.

    Parameters
    ----------
    segment_length : int
        Segment length w in tokens, at least 1.
    dilation_rate : int
        Dilation rate r in tokens, at least 1. It need not divide w and may exceed it.

    Raises
    ------
    PatternError
        If either value is not an integer of at least 1.
    """

    segment_length: int
    dilation_rate: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_length", _integer("segment length", self.segment_length, 1))
        object.__setattr__(self, "dilation_rate", _integer("dilation rate", self.dilation_rate, 1))

    def offsets(self, heads: int) -> range:
        """Return the head offsets that occur among ``heads`` heads and have positions on their grid."""
        return range(min(self.dilation_rate, heads, self.segment_length))

    def heads_at(self, offset: int, heads: int) -> range:
        """Return the heads h with ``h mod r == offset`` (LongNet, Eq. 13)."""
        return range(offset, heads, self.dilation_rate)

    def kv_heads_at(self, offset: int, heads: int, kv_heads: int) -> tuple[int, ...]:
        """Return the key/value head of each query head at ``offset``, where ``heads / kv_heads`` of them share one."""
        return tuple(head * kv_heads // heads for head in self.heads_at(offset, heads))


@dataclass(frozen=True, slots=True)
class Pattern:
    """The branches whose keys one softmax runs over (LongNet, Eq. 9-10).

    Parameters
    ----------
    branches : tuple of Branch
        At least one; a key that two branches offer counts twice.

    Raises
    ------
    PatternError
        If there is no branch.
    """

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", tuple(self.branches))
        if not self.branches:
            raise PatternError("a pattern needs at least 1 branch, got 0")
        for branch in self.branches:
            if not isinstance(branch, Branch):
                raise PatternError(f"a pattern is made of branches, got {branch!r}")

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    @classmethod
    def from_lists(cls, segment_lengths: Sequence[int], dilation_rates: Sequence[int]) -> Pattern:
        """Pair up two lists of equal length.

        Parameters
        ----------
        segment_lengths, dilation_rates : sequence of int
            One entry a branch, in tokens.

        Raises
        ------
        PatternError
            If the lists differ in length, are empty, or hold anything but integers of at least 1.
        """
        for name, values in (("segment lengths", segment_lengths), ("dilation rates", dilation_rates)):
            if not hasattr(values, "__iter__") or not hasattr(values, "__len__"):
                raise PatternError(f"{name} must be a list of integers, one a branch, got {values!r}")
        if len(segment_lengths) != len(dilation_rates):
            raise PatternError(
                f"segment lengths and dilation rates must pair up, got {len(segment_lengths)} and {len(dilation_rates)}"
            )
        return cls(tuple(Branch(w, r) for w, r in zip(segment_lengths, dilation_rates, strict=True)))

    @classmethod
    def geometric(cls, seq_len: int, base: int = 2048, ratio: int = 4) -> Pattern:
        """Grow w and r by one ratio until a segment holds the whole sequence (LongNet, Section 3.2).

        Each branch then has ``base`` rows on its grid per segment, so the cost per token stays below
        ``ratio / (ratio - 1)`` times that of the first branch, whatever the length.

        Parameters
        ----------
        seq_len : int
            Sequence length in tokens that the last branch must reach.
        base : int
            Segment length of the first branch, in tokens, with dilation rate 1.
        ratio : int
            Factor from one branch to the next, at least 2.

        Raises
        ------
        PatternError
            If ``seq_len`` or ``base`` is below 1 or ``ratio`` below 2.
        """
        seq_len = _integer("seq_len of a geometric pattern", seq_len, 1)
        base = _integer("base of a geometric pattern", base, 1)
        ratio = _integer("ratio of a geometric pattern", ratio, 2)
        branches = [Branch(base, 1)]
        while branches[-1].segment_length < seq_len:
            branches.append(Branch(branches[-1].segment_length * ratio, branches[-1].dilation_rate * ratio))
        return cls(tuple(branches))

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Segment lengths in tokens, one a branch."""
        return tuple(branch.segment_length for branch in self.branches)

    @property
    def dilation_rates(self) -> tuple[int, ...]:
        """Dilation rates in tokens, one a branch."""
        return tuple(branch.dilation_rate for branch in self.branches)

    def flop(self, seq_len: int, heads: int, head_dim: int, *, causal: bool) -> int:
        """Count the arithmetic of one forward pass over one sequence.

        Parameters
        ----------
        seq_len, heads, head_dim : int
            Shape of the queries, per sequence of the batch.
        causal : bool
            Count only keys at or before the query, to leading order half.

        Returns
        -------
        int
            FLOP of the two matrix products; ``4 * seq_len * heads * head_dim * sum(w / r**2)`` (half if causal) where
            w divides seq_len and r divides w.
        """
        pairs = 0
        for branch in self.branches:
            w, r = branch.segment_length, branch.dilation_rate
            full, rest = divmod(seq_len, w)
            for offset in branch.offsets(heads):
                for segments, length in ((full, w), (1, rest)):
                    rows = max(0, -(-(length - offset) // r))
                    visible = rows * (rows + 1) // 2 if causal else rows * rows
                    pairs += segments * visible * len(branch.heads_at(offset, heads))
        return 4 * pairs * head_dim


def _integer(name: str, value: object, limit: int) -> int:
    """Return a value as Python's integer, which never wraps, unlike NumPy's and torch's."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise PatternError(f"{name} must be an integer, got {value!r}")
    if index(value) < limit:
        raise PatternError(f"{name} must be at least {limit}, got {value}")
    return index(value)
