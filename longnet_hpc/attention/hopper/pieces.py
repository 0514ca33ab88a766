"""Which launches compute the pieces of a slice, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from longnet_hpc.attention.backend import Joined, Output, Piece
from longnet_hpc.attention.hopper.backward import (
    MAX_JOBS,
    BackwardJob,
    backward_job,
    dense_backward_job,
    run_backward,
)
from longnet_hpc.attention.hopper.compact import CompactGradients, CompactSoftmax, heads_of, plan_folds
from longnet_hpc.attention.hopper.forward import ForwardJob, can_merge, compact_job, dense_job, run_forward
from longnet_hpc.attention.hopper.jobs import Rows
from longnet_hpc.attention.hopper.statistics import find_statistics
from longnet_hpc.attention.sums import (
    FEW_PIECES,
    GradientCollector,
    GradientSum,
    SoftmaxCollector,
    gradient_sum,
    softmax_sum,
)
from longnet_hpc.grids import Grid, piece_grids

__all__ = ["backward", "forward", "takes"]

_Job = TypeVar("_Job", ForwardJob, BackwardJob)

_MOST_ROWS = 2**31
"""Rows of all heads and sequences, which kernels count in 32 bits."""
_LARGEST_RATE = 2**20
"""The copy engine takes strides below 2**40 bytes, and a token may have 2**20."""


def takes(q: torch.Tensor, pieces: Sequence[Piece], *, causal: bool, backward: bool) -> bool:
    """Return whether the kernels compute such pieces.

    They have to be few, and the pieces of all sequences one dim of a strided view. Gradients of queries are added up in
    no fixed order, so where torch's deterministic algorithms are asked for, others compute them.
    """
    batch, seq, heads, _ = q.shape
    if len(pieces) > FEW_PIECES:
        return False
    if backward and torch.are_deterministic_algorithms_enabled():
        return False
    if not 0 < batch * seq * heads < _MOST_ROWS or any(branch.dilation_rate > _LARGEST_RATE for _, branch, _ in pieces):
        return False
    return all(batch == 1 or run.count == 1 or run.count * run.length == seq for _, _, run in pieces)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Sequence[Piece],
    *,
    causal: bool,
    scale: float,
    joined: Joined,
    progress: Callable[[], object],
) -> SoftmaxCollector:
    """Attend within all pieces; see `attention.branch.attend_pieces`."""
    q, k, v = (_fills(x) for x in (q, k, v))
    last = _dense_pieces(q, pieces, joined)
    others = [piece for piece in pieces if piece not in last]
    parts = [_rows(piece) for piece in others]
    kept, folds = plan_folds(parts)
    if not can_merge([parts[number] for number in kept], [_rows(piece) for piece in last], q.shape[3]):
        last, others = [], list(pieces)
    jobs = [compact_job(q, _rows(piece)) for piece in others]
    for some in _batched(jobs):
        run_forward(q, k, v, some, causal=causal, scale=scale)
        progress()
    if last:

        def finish(out: torch.Tensor, lse: torch.Tensor) -> None:
            for some in _batched([dense_job(_rows(piece), out, lse) for piece in last]):
                run_forward(q, k, v, some, [jobs[number] for number in kept], causal=causal, scale=scale)

        return CompactSoftmax(q, jobs, folds, finish)
    total = softmax_sum(q)
    for piece, job in zip(others, jobs, strict=True):
        for grid, _, heads in _bundles(piece, q, k):
            part = job.out.transpose(1, 2)[:, heads, : grid.rows]
            total.add(slice(0, q.shape[0]), grid, part, job.lse[:, heads, : grid.rows], first=piece[0] == 0)
    return total


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Sequence[Piece],
    output: Output,
    *,
    causal: bool,
    scale: float,
    joined: Joined,
    progress: Callable[[], object],
) -> tuple[GradientCollector, GradientCollector, GradientCollector]:
    """Return the gradients of `forward`; see `attention.branch.attend_pieces_backward`."""
    q, k, v = (_fills(x) for x in (q, k, v))
    dout = output.dout.contiguous()
    batch, _, heads, _ = q.shape
    dense = _dense_pieces(q, pieces, joined) if k.shape[2] == heads else []
    dense_dk, dense_dv = (q.new_empty(q.shape if dense else 0) for _ in range(2))
    jobs = [
        dense_backward_job(q, rows, dense_dk, dense_dv) if piece in dense else backward_job(q, rows)
        for piece, rows in zip(pieces, map(_rows, pieces), strict=True)
    ]
    find_statistics(output.out.contiguous(), dout, output.lse.contiguous(), jobs)
    dq = GradientSum(q)
    for some in _batched(jobs):
        run_backward(dout, q, k, v, dq.total, some, causal=causal, scale=scale)
        progress()
    if dense:
        compact = [job for piece, job in zip(pieces, jobs, strict=True) if piece not in dense]
        return dq, *CompactGradients(dense_dk, dense_dv, compact).collectors()
    dk, dv = gradient_sum(k), gradient_sum(v)
    for piece, job in zip(pieces, jobs, strict=True):
        for grid, kv_grid, its_heads in _bundles(piece, q, k):
            for sums, part in ((dk, job.dk), (dv, job.dv)):
                sums.add(slice(0, batch), kv_grid, part.transpose(1, 2)[:, its_heads, : grid.rows])
    return dq, dk, dv


def _rows(piece: Piece) -> Rows:
    return Rows.of(piece[1], piece[2])


def _fills(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, copied if its sequences do not follow one another evenly, or if some are one and the same."""
    batch, seq, _, _ = x.shape
    even = (batch == 1 or x.stride(0) == seq * x.stride(1)) and 0 not in x.stride()
    return x if even else x.clone(memory_format=torch.contiguous_format)


def _dense_pieces(q: torch.Tensor, pieces: Sequence[Piece], joined: Joined) -> list[Piece]:
    """Return the pieces of a branch on whose grids every query lies and to which nothing is added, or none."""
    for index in dict.fromkeys(piece[0] for piece in pieces):
        its = [piece for piece in pieces if piece[0] == index]
        whole = sum(run.count * run.length for _, _, run in its) == q.shape[1]
        if its[0][1].dilation_rate == 1 and whole and joined.isdisjoint((branch, run) for _, branch, run in its):
            return its
    return []


def _bundles(piece: Piece, q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[Grid, Grid, slice]]:
    """Yield the grids of a piece, those of their keys, and which heads of a compact result are theirs."""
    for grid, kv_grid in piece_grids(piece[1], piece[2], q.shape[2], k.shape[2]):
        yield grid, kv_grid, heads_of(grid)


def _batched(jobs: Sequence[_Job]) -> Iterator[Sequence[_Job]]:
    for first in range(0, len(jobs), MAX_JOBS):
        yield jobs[first : first + MAX_JOBS]
