"""Strided grids of (token, head) pairs, in integers: what one attention kernel takes as it lies in memory.

Heads whose rows have equal strides go into one call. Two ways to bundle them are open: the heads of one offset, which
share their rows (h, h + r, h + 2 r, ...), or neighbouring heads, whose rows move on by one token from head to head,
which makes few calls where r is large. Shared key/value heads need no copies: where the next query head has the same
key/value head, the stride between heads is 0, or one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from longnet_hpc.partition import Run
from longnet_hpc.pattern import Branch

__all__ = [
    "Grid",
    "column_grids",
    "earlier_grids",
    "kept_grids",
    "limited",
    "past_grids",
    "piece_grids",
    "row_grids",
    "token_grids",
]


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows and heads of a ``(seq, heads)`` array that lie evenly spaced in memory.

    Row i of piece c of its head number j is token ``start + c * length + first_row + j * row_step + i * rate`` of head
    ``first_head + j * head_step``.

    Parameters
    ----------
    start : int
        First token of the first piece.
    length : int
        Tokens from one piece to the next.
    count : int
        Number of pieces.
    rows : int
        Rows in each piece.
    rate : int
        Tokens from one row to the next.
    first_row : int
        Tokens from the start of a piece to the first row of the first head.
    row_step : int
        By how many tokens the rows of the next head lie further on.
    first_head : int
        The first head.
    head_step : int
        Heads from one to the next; 0 where all of them are one shared head.
    heads : int
        Number of heads.
    """

    start: int
    length: int
    count: int
    rows: int
    rate: int
    first_row: int
    row_step: int
    first_head: int
    head_step: int
    heads: int

    def pieces(self, first: int, count: int) -> Grid:
        """Return the grid of ``count`` of its pieces from number ``first`` on."""
        return replace(self, start=self.start + first * self.length, count=count)

    @property
    def one_head(self) -> bool:
        """Whether its heads are one and the same rows."""
        return self.heads > 1 and self.head_step == 0 and self.row_step == 0


@dataclass(frozen=True, slots=True)
class _Pair:
    """One query head with its key/value head; a bundle is a run of them with equal steps."""

    first_row: int
    rows: int
    head: int
    kv_head: int

    def step_to(self, other: _Pair) -> tuple[int, int, int] | None:
        if self.rows != other.rows or other.first_row < self.first_row or other.kv_head < self.kv_head:
            return None
        return other.first_row - self.first_row, other.head - self.head, other.kv_head - self.kv_head


_Bundle = tuple[list[_Pair], tuple[int, int, int]]
"""Pairs with equal steps, and the steps: of rows, of heads, of key/value heads."""


@lru_cache(maxsize=4096)
def piece_grids(branch: Branch, run: Run, heads: int, kv_heads: int) -> tuple[tuple[Grid, Grid], ...]:
    """Return the query grids of equal pieces of one branch, each with the grid of its keys, in as few as possible.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each head, and the pieces.
    heads, kv_heads : int
        Query heads and key/value heads.

    Returns
    -------
    tuple of pair of Grid
        Every query head that has rows there is in exactly one pair; row i of both grids is the same token.
    """
    return tuple(
        (_grid(branch, run, bundle, step), _kv_grid(branch, run, bundle, step))
        for bundle, step in _fewest_bundles(branch, _pairs(branch, run, heads, kv_heads))
    )


@lru_cache(maxsize=4096)
def row_grids(
    branch: Branch, run: Run, columns: tuple[tuple[int, int], ...], heads: int, kv_heads: int, tokens: int
) -> tuple[tuple[Grid, Grid], ...]:
    """Return the query grids of one piece, each with the grid of compact rows that it sees.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each head, and the one piece, which has equally many rows at all offsets of the columns.
    columns : tuple of pair of int
        Head offset and key/value head of each column of the compact rows, offset by offset.
    heads, kv_heads : int
        Query heads and key/value heads.
    tokens : int
        Tokens in the compact rows, ``(tokens, columns)``.
    """
    place = {column: position for position, column in enumerate(columns)}
    pairs = [
        _Pair(run.first_row(branch, offset), run.rows(branch, offset), head, place[offset, kv_head])
        for offset in dict.fromkeys(offset for offset, _ in columns)
        for head, kv_head in zip(
            branch.heads_at(offset, heads), branch.kv_heads_at(offset, heads, kv_heads), strict=True
        )
    ]
    return tuple(
        (_grid(branch, run, bundle, step), _kept_grid(0, tokens, bundle[0].kv_head, len(bundle), step[2]))
        for bundle, step in _fewest_bundles(branch, pairs)
    )


@lru_cache(maxsize=4096)
def earlier_grids(branch: Branch, run: Run, tokens: int, heads: int) -> tuple[tuple[Grid, Grid], ...]:
    """Return the query grids of one piece, each with the grid of the rows of its segment that came before.

    These rows are kept as an array ``(rows, heads)``, from the start of the segment on, with a column for each query
    head; `kept_grids` says how they get there.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each head, and the one piece.
    tokens : int
        Tokens of the segment whose rows are seen, from its start.
    heads : int
        Query heads.
    """
    pairs = _pairs(branch, run, heads, heads)
    return tuple(
        (_grid(branch, run, bundle, step), _kept_grid(0, rows, bundle[0].head, len(bundle), step[1]))
        for rows, same in _by_rows_before(branch, tokens, pairs)
        if rows
        for bundle, step in _fewest_bundles(branch, same)
    )


@lru_cache(maxsize=4096)
def past_grids(branch: Branch, run: Run, tokens: int, heads: int, kv_heads: int) -> tuple[tuple[Grid, Grid], ...]:
    """Return the query grids of one piece, each with the grid of the earlier keys of its segment, as they lie.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each head, and the one piece.
    tokens : int
        Tokens of the segment before the piece: the keys are those of an array that begins and ends with them.
    heads, kv_heads : int
        Query heads and key/value heads.
    """
    before = Run(0, tokens, 1, 0)
    return tuple(
        (_grid(branch, run, bundle, step), replace(_kv_grid(branch, before, bundle, step), rows=rows, first_row=offset))
        for offset in branch.offsets(heads)
        if (rows := before.rows(branch, offset))
        for bundle, step in _bundles(_pairs_at(branch, run, offset, heads, kv_heads))
    )


@lru_cache(maxsize=4096)
def token_grids(branch: Branch, position: int, heads: int, kv_heads: int) -> tuple[tuple[Grid, Grid], ...]:
    """Return the query grids of the last token, each with the grid of all keys that it sees, itself among them.

    The queries are an array ``(heads / kv_heads, kv_heads)``: those that share a key/value head are rows of one head.
    All heads that see something see the same tokens, those of the token's own offset.

    Parameters
    ----------
    branch : Branch
        The grid of each head.
    position : int
        Of the token; the keys are those of an array that begins with the sequence.
    heads, kv_heads : int
        Query heads and key/value heads.
    """
    rate, group = branch.dilation_rate, heads // kv_heads
    start = position // branch.segment_length * branch.segment_length
    offset, rows = (position - start) % rate, (position - start) // rate + 1
    pairs = []
    for kv_head, members in groupby(branch.heads_at(offset, heads), key=lambda head: head // group):
        first, *others = (head % group for head in members)
        pairs.append(_Pair(first, 1 + len(others), kv_head, kv_head))
    same = [pair for _, its in groupby(sorted(pairs, key=_rows), key=_rows) for pair in _bundles(its)]
    return tuple(
        (
            Grid(0, group, 1, bundle[0].rows, rate, bundle[0].first_row, step[0], bundle[0].head, step[1], len(bundle)),
            Grid(start, rows * rate, 1, rows, rate, offset, 0, bundle[0].head, step[1], len(bundle)),
        )
        for bundle, step in same
    )


def _rows(pair: _Pair) -> tuple[int, int]:
    return pair.rows, pair.first_row


@lru_cache(maxsize=4096)
def kept_grids(branch: Branch, run: Run, heads: int, kv_heads: int) -> tuple[tuple[Grid, Grid], ...]:
    """Return the grids of the keys of one piece, each with its place among the kept rows of the segment.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each head, and the one piece.
    heads, kv_heads : int
        Query heads and key/value heads.
    """
    pairs = _pairs(branch, run, heads, kv_heads)
    return tuple(
        (_kv_grid(branch, run, bundle, step), _kept_grid(rows, bundle[0].rows, bundle[0].head, len(bundle), step[1]))
        for rows, same in _by_rows_before(branch, run.phase, pairs)
        for bundle, step in _fewest_bundles(branch, same)
    )


@lru_cache(maxsize=4096)
def column_grids(branch: Branch, run: Run, columns: tuple[tuple[int, int], ...]) -> tuple[Grid, ...]:
    """Return the grids of some columns of equal pieces, in the order of the columns.

    Parameters
    ----------
    branch, run : Branch, Run
        The grid of each offset, and the pieces, which have equally many rows at all offsets of the columns.
    columns : tuple of pair of int
        Head offset of each column and its head in the array, that of keys for instance.
    """
    pairs = [_Pair(run.first_row(branch, offset), run.rows(branch, offset), head, head) for offset, head in columns]
    return tuple(_grid(branch, run, bundle, step) for bundle, step in _bundles(pairs))


def limited(pairs: Iterable[tuple[Grid, Grid]], count: int) -> Iterator[tuple[Grid, Grid]]:
    """Yield pairs of grids, those of more than ``count`` pieces in several parts."""
    for grid, kv_grid in pairs:
        if grid.count <= count:
            yield grid, kv_grid
            continue
        for first in range(0, grid.count, count):
            pieces = min(count, grid.count - first)
            yield grid.pieces(first, pieces), kv_grid.pieces(first, pieces)


def _pairs(branch: Branch, run: Run, heads: int, kv_heads: int) -> list[_Pair]:
    """Return the query heads that have rows in a piece, offset by offset."""
    return [pair for offset in branch.offsets(heads) for pair in _pairs_at(branch, run, offset, heads, kv_heads)]


def _pairs_at(branch: Branch, run: Run, offset: int, heads: int, kv_heads: int) -> list[_Pair]:
    first_row, rows = run.first_row(branch, offset), run.rows(branch, offset)
    heads_there = zip(branch.heads_at(offset, heads), branch.kv_heads_at(offset, heads, kv_heads), strict=True)
    return [_Pair(first_row, rows, head, kv_head) for head, kv_head in heads_there] if rows else []


def _by_rows_before(branch: Branch, tokens: int, pairs: Iterable[_Pair]) -> list[tuple[int, list[_Pair]]]:
    """Sort pairs by how many rows of their grid lie in the first ``tokens`` tokens of the segment."""
    before = Run(0, tokens, 1, 0)

    def rows_of(pair: _Pair) -> int:
        return before.rows(branch, pair.head % branch.dilation_rate)

    return [(rows, list(same)) for rows, same in groupby(sorted(pairs, key=rows_of), key=rows_of)]


def _fewest_bundles(branch: Branch, pairs: list[_Pair]) -> list[_Bundle]:
    """Bundle pairs, which come offset by offset, either so or by neighbouring heads."""
    by_offset = [list(same) for _, same in groupby(pairs, key=lambda pair: pair.head % branch.dilation_rate)]
    bundles = [bundle for same in by_offset for bundle in _bundles(same)]
    neighbours = _bundles(sorted(pairs, key=lambda pair: pair.head))
    return neighbours if len(neighbours) < len(bundles) else bundles


def _bundles(pairs: Iterable[_Pair]) -> list[_Bundle]:
    """Cut a list of pairs into runs of equal steps, greedily."""
    bundles: list[_Bundle] = []
    for pair in pairs:
        if bundles:
            members, step = bundles[-1]
            next_step = members[-1].step_to(pair)
            if next_step is not None and (len(members) == 1 or next_step == step):
                bundles[-1] = ([*members, pair], next_step)
                continue
        bundles.append(([pair], (0, 1, 1)))
    return bundles


def _grid(branch: Branch, run: Run, bundle: list[_Pair], step: tuple[int, int, int]) -> Grid:
    first = bundle[0]
    return Grid(
        start=run.start,
        length=run.length,
        count=run.count,
        rows=first.rows,
        rate=branch.dilation_rate,
        first_row=first.first_row,
        row_step=step[0],
        first_head=first.head,
        head_step=step[1],
        heads=len(bundle),
    )


def _kv_grid(branch: Branch, run: Run, bundle: list[_Pair], step: tuple[int, int, int]) -> Grid:
    return replace(_grid(branch, run, bundle, step), first_head=bundle[0].kv_head, head_step=step[2])


def _kept_grid(first: int, rows: int, first_head: int, heads: int, head_step: int) -> Grid:
    return Grid(first, rows, 1, rows, 1, 0, 0, first_head, head_step, heads)
