"""Which rank owns which tokens, and what the ranks of a spanning segment owe each other, in integers.

Rank r of ``size`` owns the contiguous slice ``[bounds[r], bounds[r + 1])``. For a branch, a segment is *local* if one
slice holds it, else *spanning*. Documents that are packed into one sequence each have segments of their own. Nothing
here needs a process: ``(rank, size)`` are plain numbers, so every rank can be examined in one test.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

from longnet_hpc.errors import PartitionError
from longnet_hpc.pattern import Branch, Pattern

__all__ = ["Columns", "Partition", "Run", "Span", "SpanLayout", "communicator_rounds", "rank_groups"]


@dataclass(frozen=True, slots=True)
class Run:
    """Equal pieces of segments that lie back to back in one slice.

    Parameters
    ----------
    start : int
        Position of the first token within the slice, in tokens.
    length : int
        Tokens in each piece.
    count : int
        Number of pieces.
    phase : int
        Position of each piece's first token within its segment, in tokens; 0 where pieces are whole segments.
    """

    start: int
    length: int
    count: int
    phase: int

    def first_row(self, branch: Branch, offset: int) -> int:
        """Return the distance in tokens from the start of a piece to its first row on the grid of ``offset``."""
        return (offset - self.phase) % branch.dilation_rate

    def rows(self, branch: Branch, offset: int) -> int:
        """Return how many tokens of each piece lie on the grid of ``offset``."""
        return max(0, -(-(self.length - self.first_row(branch, offset)) // branch.dilation_rate))


@dataclass(frozen=True, slots=True)
class Span:
    """One spanning segment: the ranks that it touches and the piece that each of them owns.

    Parameters
    ----------
    ranks : tuple of int
        The ranks with at least one token of the segment, ascending.
    pieces : tuple of Run
        The piece of each of these ranks, within that rank's slice; ``count`` is 1.
    """

    ranks: tuple[int, ...]
    pieces: tuple[Run, ...]

    def piece_of(self, rank: int) -> Run:
        """Return the piece that ``rank`` owns."""
        return self.pieces[self.ranks.index(rank)]

    def sources(self, rank: int, *, causal: bool) -> tuple[int, ...]:
        """Return the ranks whose keys the queries of ``rank`` may see, ``rank`` itself left out."""
        return tuple(other for other in self.ranks if (other < rank if causal else other != rank))

    def destinations(self, rank: int, *, causal: bool) -> tuple[int, ...]:
        """Return the ranks whose queries may see the keys of ``rank``; the adjoint of `sources`."""
        return tuple(other for other in self.ranks if (other > rank if causal else other != rank))


@dataclass(frozen=True, slots=True)
class Partition:
    """Contiguous slices of one sequence, in rank order.

    Parameters
    ----------
    bounds : tuple of int
        ``size + 1`` positions in tokens, none below 0 and never falling; rank r owns
        ``[bounds[r], bounds[r + 1])``, which may be empty. Where the first is above 0, this is a chunk of a sequence,
        and what lies before it is not its business.
    documents : tuple of int
        Where packed documents begin, and where the last ends: from 0 to the end of the sequence, never falling. Each
        has segments of its own, from its first token on. Kept without the empty ones, and empty for a single document.

    Raises
    ------
    PartitionError
        If the bounds start below 0 or fall, or documents fall or are not all of the sequence.
    """

    bounds: tuple[int, ...]
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] < 0 or any(a > b for a, b in pairwise(self.bounds)):
            raise PartitionError(f"bounds must be at least 0 and never fall, got {self.bounds}")
        if not self.documents:
            return
        first, last = self.documents[0], self.documents[-1]
        if self.start:
            raise PartitionError(f"a chunk of a sequence cannot be of packed documents, got one from {self.start} on")
        if first or last != self.stop:
            raise PartitionError(
                f"documents must lie from 0 to {self.stop}, the tokens of the sequence, got {first} to {last}"
            )
        fall = next((pair for pair in pairwise(self.documents) if pair[0] > pair[1]), None)
        if fall is not None:
            raise PartitionError(f"documents must begin one after another, got {fall[1]} after {fall[0]}")
        distinct = tuple(dict.fromkeys(self.documents))
        object.__setattr__(self, "documents", distinct if len(distinct) > 2 else ())

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], start: int = 0, documents: Sequence[int] = ()) -> Partition:
        """Lay slices of the given lengths (tokens) end to end, the first at position ``start``.

        Raises
        ------
        PartitionError
            If a length is negative or not an integer, or the documents do not fit.
        """
        if any(not isinstance(length, int) or length < 0 for length in lengths):
            raise PartitionError(f"slice lengths must be integers of at least 0 tokens, got {tuple(lengths)}")
        return cls(tuple(accumulate(lengths, initial=start)), tuple(documents))

    @classmethod
    def even(cls, seq_len: int, size: int) -> Partition:
        """Cut ``seq_len`` tokens into ``size`` slices that differ by at most one token.

        Raises
        ------
        PartitionError
            If there are more ranks than tokens.
        """
        if size < 1 or seq_len < size:
            raise PartitionError(
                f"a sequence of {seq_len} tokens cannot be cut over {size} ranks: at least 1 token each"
            )
        return cls(tuple(seq_len * rank // size for rank in range(size + 1)))

    @property
    def start(self) -> int:
        """Position of the first token of all slices."""
        return self.bounds[0]

    @property
    def stop(self) -> int:
        """Position after the last token of all slices; the length of the sequence, unless this is a chunk of it."""
        return self.bounds[-1]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.bounds) - 1

    def slice_of(self, rank: int) -> range:
        """Return the positions that ``rank`` owns."""
        return range(self.bounds[rank], self.bounds[rank + 1])

    def runs(self, branch: Branch, rank: int) -> tuple[Run, ...]:
        """Return every piece of a segment in the slice of ``rank``, in order, equal neighbours that are whole as one.

        Of each document: the left edge of the slice, whole segments, and the right edge or a shorter last segment.
        """
        runs: list[Run] = []
        grows = False  # whether the last run may be joined by equal neighbours: an edge of the slice stands alone
        for run, whole in self._pieces(branch.segment_length, self.slice_of(rank)):
            last = runs[-1] if runs else None
            if grows and whole and last is not None and last.length == run.length:
                runs[-1] = replace(last, count=last.count + run.count)
            else:
                runs.append(run)
            grows = whole
        return tuple(runs)

    def _pieces(self, segment_length: int, slice_: range) -> Iterator[tuple[Run, bool]]:
        """Yield the pieces of a slice document by document, and whether they are whole segments."""
        position = slice_.start
        while position < slice_.stop:
            segment = self._segment(position, segment_length)
            document_stop = min(self._document(position).stop, slice_.stop)
            phase = position - segment.start
            if phase == 0 and (count := (document_stop - position) // segment_length):
                yield Run(position - slice_.start, segment_length, count, 0), True
                position += count * segment_length
            else:
                stop = min(segment.stop, slice_.stop)
                yield Run(position - slice_.start, stop - position, 1, phase), phase == 0 and stop == segment.stop
                position = stop

    def spans(self, branch: Branch, rank: int) -> tuple[Span, ...]:
        """Return the spanning segments that touch the slice of ``rank``, at most two, in sequence order."""
        start, stop = self.bounds[rank], self.bounds[rank + 1]
        return self._spans_at(branch, (start, stop - 1) if start < stop else ())

    def all_spans(self, branch: Branch) -> tuple[Span, ...]:
        """Return every spanning segment, in sequence order: those with a bound between ranks inside them."""
        return self._spans_at(branch, (bound for bound in self.bounds[1:-1] if self.start < bound < self.stop))

    def _spans_at(self, branch: Branch, positions: Iterable[int]) -> tuple[Span, ...]:
        """Return the spanning segments among those in which some positions lie."""
        segments = {self._segment(position, branch.segment_length) for position in positions}
        spans = (self._span(segment) for segment in sorted(segments, key=lambda segment: segment.start))
        return tuple(span for span in spans if len(span.ranks) > 1)

    def _document(self, position: int) -> range:
        """Return the positions of the document in which one lies: of the whole sequence where none are packed."""
        if not self.documents:
            return range(self.stop)
        following = bisect_right(self.documents, position)
        return range(self.documents[following - 1], self.documents[following])

    def _segment(self, position: int, segment_length: int) -> range:
        """Return the positions of the segment in which one lies."""
        document = self._document(position)
        start = position - (position - document.start) % segment_length
        return range(start, min(start + segment_length, document.stop))

    def _span(self, segment: range) -> Span:
        ranks, pieces = [], []
        first = max(0, bisect_right(self.bounds, segment.start) - 1)
        for rank in range(first, bisect_left(self.bounds, segment.stop)):
            low, high = max(segment.start, self.bounds[rank]), min(segment.stop, self.bounds[rank + 1])
            if low < high:
                ranks.append(rank)
                pieces.append(Run(low - self.bounds[rank], high - low, 1, low - segment.start))
        return Span(tuple(ranks), tuple(pieces))


def rank_groups(pattern: Pattern, partition: Partition) -> tuple[tuple[int, ...], ...]:
    """Return the distinct groups of ranks that share a spanning segment, ascending; the same on every rank."""
    return tuple(sorted({span.ranks for branch in pattern for span in partition.all_spans(branch)}))


def communicator_rounds(groups: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Sort groups of ranks into rounds whose groups share no rank, so that one split creates a whole round.

    Parameters
    ----------
    groups : iterable of tuple of int
        Groups of ranks, in the same order on every rank.

    Returns
    -------
    list of list of tuple of int
        Rounds, each a list of disjoint groups; every group is in exactly one round.
    """
    rounds: list[list[tuple[int, ...]]] = []
    taken: list[set[int]] = []
    for group in groups:
        for members, ranks in zip(rounds, taken, strict=True):
            if ranks.isdisjoint(group):
                members.append(group)
                ranks.update(group)
                break
        else:
            rounds.append([group])
            taken.append(set(group))
    return rounds


Columns = tuple[tuple[int, int], ...]
"""Head offsets, each with a key/value head that is looked at from there."""


class SpanLayout:
    """How the keys (or values) that the ranks of one spanning segment exchange lie in memory, in rows of head_dim.

    A block holds, group by group of offsets with equal numbers of tokens, ``tokens x columns`` rows
    (see `Columns`), so that few kernels take them all. A rank needs only the offsets on whose grid
    it has a query, so it offers one block for each distinct set of offsets that others need: nearly always one.

    Parameters
    ----------
    branch : Branch
        The branch.
    span : Span
        One of its spanning segments.
    rank : int
        The rank whose view this is, one of ``span.ranks``.
    heads, kv_heads : int
        Query heads, and key/value heads, which may be fewer.
    causal : bool
        Whether a rank sees only the keys of earlier ranks.
    """

    def __init__(self, branch: Branch, span: Span, rank: int, heads: int, kv_heads: int, *, causal: bool) -> None:
        self.branch = branch
        self.span = span
        self._blocks: dict[tuple[int, tuple[int, ...]], tuple[tuple[int, Columns], ...]] = {}
        self.piece = span.piece_of(rank)
        self.kv_heads_at = {
            offset: tuple(dict.fromkeys(branch.kv_heads_at(offset, heads, kv_heads)))
            for offset in branch.offsets(heads)
        }
        self.sources = span.sources(rank, causal=causal)
        self.destinations = span.destinations(rank, causal=causal)
        self.needed = self._offsets_of(rank)
        self.needed_by = {other: self._offsets_of(other) for other in self.destinations}
        self.offered = tuple(dict.fromkeys(self.needed_by.values()))

        offered_rows = [self.block_rows(rank, offsets) for offsets in self.offered]
        starts = dict(zip(self.offered, accumulate(offered_rows, initial=0), strict=False))
        self.send_counts = tuple(
            self.block_rows(rank, self.needed_by[other]) if other in self.needed_by else 0 for other in span.ranks
        )
        self.send_starts = tuple(
            starts[self.needed_by[other]] if other in self.needed_by else 0 for other in span.ranks
        )
        self.recv_counts = tuple(
            self.block_rows(other, self.needed) if other in self.sources else 0 for other in span.ranks
        )

    def blocks(self, rank: int, offsets: tuple[int, ...]) -> tuple[tuple[int, Columns], ...]:
        """Return the tokens and the columns of each group of ``offsets`` that the piece of ``rank`` has tokens of."""
        key = rank, offsets
        if key not in self._blocks:
            groups = (tuple(same) for _, same in groupby(offsets, key=self._tokens_at))
            self._blocks[key] = tuple(
                (self.rows(rank, group[0]), tuple((its, head) for its in group for head in self.kv_heads_at[its]))
                for group in groups
                if self.rows(rank, group[0])
            )
        return self._blocks[key]

    def rows(self, rank: int, offset: int) -> int:
        """Return how many tokens of the piece of ``rank`` lie on the grid of ``offset``."""
        return self.span.piece_of(rank).rows(self.branch, offset)

    def block_rows(self, rank: int, offsets: tuple[int, ...]) -> int:
        """Return the rows of head_dim in a block of ``rank`` that holds ``offsets``."""
        return sum(self.rows(rank, offset) * len(self.kv_heads_at[offset]) for offset in offsets)

    def _tokens_at(self, offset: int) -> tuple[int, ...]:
        """Return how many tokens each rank of the segment has on the grid of ``offset``."""
        return tuple(piece.rows(self.branch, offset) for piece in self.span.pieces)

    def _offsets_of(self, rank: int) -> tuple[int, ...]:
        return tuple(offset for offset in self.kv_heads_at if self.rows(rank, offset))
