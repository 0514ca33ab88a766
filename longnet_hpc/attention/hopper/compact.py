"""Compact results of grids that wait for the dense one, and what others add to them meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

from longnet_hpc.attention.hopper.backward import BackwardJob
from longnet_hpc.attention.hopper.forward import ForwardJob
from longnet_hpc.attention.hopper.gradients import add_rows
from longnet_hpc.attention.hopper.jobs import Rows
from longnet_hpc.attention.sums import GradientCollector
from longnet_hpc.grids import Grid

__all__ = ["CompactGradients", "CompactSoftmax", "heads_of", "plan_folds"]

_SPARSE = 64
"""Rate from which folding is worth it: a window of the dense kernel then holds one row of the part, if any."""


class CompactSoftmax:
    """A softmax (`sums.SoftmaxCollector`) whose dense part is computed at the end, merging the compact parts.

    Parameters
    ----------
    q : torch.Tensor
        The queries.
    jobs : sequence of ForwardJob
        The compact parts, computed.
    folds : sequence of pair of int
        Parts that are merged into another at the end, in this order.
    finish : callable
        Writes output and log-sum-exp, shaped as the queries.
    """

    def __init__(
        self,
        q: torch.Tensor,
        jobs: Sequence[ForwardJob],
        folds: Sequence[tuple[int, int]],
        finish: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        self._q = q
        self._jobs = jobs
        self._by_rows = {job.rows: job for job in jobs}
        self._folds = folds
        self._finish = finish

    def add(self, sequences: slice, grid: Grid, out: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
        """Merge the normalised output of some keys into the compact part of the same piece, as `sums.SoftmaxSum`."""
        job, heads = self._by_rows[_rows_of(grid)], heads_of(grid)
        _merge(
            *(job.out[sequences, : grid.rows, heads], job.lse[sequences, heads, : grid.rows]), out.transpose(1, 2), lse
        )

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp."""
        q = self._q
        for part, into in ((self._jobs[number], self._jobs[other]) for number, other in self._folds):
            for rows, place, heads in _shared_rows(part.rows, into.rows, q.shape[2]):
                _merge(
                    *(into.out[:, place, heads], into.lse[:, heads, place]),
                    *(part.out[:, :rows, heads], part.lse[:, heads, :rows]),
                )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        self._finish(out, lse)
        return out, lse


def plan_folds(parts: Sequence[Rows]) -> tuple[list[int], list[tuple[int, int]]]:
    """Decide which sparse parts are merged into others beforehand: those whose rows are all rows of another.

    Returns
    -------
    kept : list of int
        Which parts are left.
    folds : list of pair of int
        Each of the others with the part that it is merged into, the sparsest first.
    """
    by_rate = sorted(range(len(parts)), key=lambda number: parts[number].rate)
    folds = []
    for place, number in reversed([*enumerate(by_rate)]):
        finer = [other for other in by_rate[:place] if _is_within(parts[number], parts[other])]
        if finer:
            folds.append((number, finer[-1]))
    folded = [number for number, _ in folds]
    return [number for number in range(len(parts)) if number not in folded], folds


def _is_within(rows: Rows, other: Rows) -> bool:
    return (
        other.rate >= _SPARSE
        and (rows.start, rows.length, rows.count) == (other.start, other.length, other.count)
        and rows.rate % other.rate == 0
        and (rows.shift - other.shift) % other.rate == 0
    )


def _shared_rows(rows: Rows, other: Rows, heads: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield how many rows some heads have, and where these are among the rows of another grid that holds them."""
    step = rows.rate // other.rate

    def place(head: int) -> tuple[int, int]:
        first = (head + rows.shift) % rows.rate
        return max(0, -(-(rows.length - first) // rows.rate)), first // other.rate

    for (count, first), same in groupby(range(heads), key=place):
        if count:
            its = list(same)
            yield count, slice(first, first + (count - 1) * step + 1, step), slice(its[0], its[-1] + 1)


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Merge one softmax into another in place: ``(pieces, rows, heads, head_dim)`` and ``(pieces, heads, rows)``."""
    merged = torch.logaddexp(lse, other_lse)
    weights = ((part - merged).exp_().transpose(1, 2).unsqueeze(-1) for part in (lse, other_lse))
    out.copy_(out * next(weights) + other * next(weights))
    lse.copy_(merged)


class CompactGradients:
    """Gradients of keys and values whose compact parts are added onto the dense ones at the end.

    Parameters
    ----------
    dk, dv : torch.Tensor
        Those of the dense grid, in their final place.
    jobs : list of BackwardJob
        Those with compact results.
    """

    def __init__(self, dk: torch.Tensor, dv: torch.Tensor, jobs: list[BackwardJob]) -> None:
        self._dense = dk, dv
        self._jobs = jobs
        self._by_rows = {job.rows: (job.dk, job.dv) for job in jobs}

    def collectors(self) -> tuple[GradientCollector, GradientCollector]:
        """Return what collects the gradients of keys, and of values."""
        return _Collector(self, 0), _Collector(self, 1)

    def add(self, which: int, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        """Add a part onto the compact part of the same piece."""
        self._by_rows[_rows_of(grid)][which][sequences, : grid.rows, heads_of(grid)] += part.transpose(1, 2)

    def result(self, which: int) -> torch.Tensor:
        """Return the sum."""
        if self._jobs:
            add_rows(*self._dense, self._jobs)
            self._jobs, self._by_rows = [], {}  # their memory serves what comes next
        return self._dense[which]


class _Collector:
    def __init__(self, gradients: CompactGradients, which: int) -> None:
        self._gradients, self._which = gradients, which

    def add(self, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        self._gradients.add(self._which, sequences, grid, part)

    def result(self) -> torch.Tensor:
        return self._gradients.result(self._which)


def _rows_of(grid: Grid) -> Rows:
    """Return the rows of all heads whose part a grid is: branches of one rate may have rows at other tokens."""
    return Rows(grid.start, grid.length, grid.count, grid.rate, (grid.first_row - grid.first_head) % grid.rate)


def heads_of(grid: Grid) -> slice:
    """Return the heads of a grid."""
    step = max(1, grid.head_step)
    return slice(grid.first_head, grid.first_head + (grid.heads - 1) * step + 1, step)
