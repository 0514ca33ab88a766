"""Attention over pairs of grids, and its adjoint: strided views for the backend, results into sums over branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from longnet_hpc.attention.backend import Backend, Joined, Output, Piece
from longnet_hpc.attention.sums import (
    FEW_PIECES,
    GradientCollector,
    GradientSum,
    SoftmaxCollector,
    SoftmaxSum,
    TakesGradients,
    gradient_sum,
    softmax_sum,
)
from longnet_hpc.attention.views import MAX_PIECES, batches, grid_view
from longnet_hpc.grids import Grid, limited, piece_grids

__all__ = ["attend", "attend_backward", "attend_pieces", "attend_pieces_backward"]

Pairs = Sequence[tuple[Grid, Grid]]
"""Query grids, each with the grid of the keys that they see."""


def attend(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: Pairs,
    total: SoftmaxCollector,
    *,
    causal: bool,
    scale: float,
    first: bool,
    progress: Callable[[], object],
) -> None:
    """Attend the queries of each grid to the keys of its partner, and merge.

    Parameters
    ----------
    backend : Backend
        Who computes.
    q : torch.Tensor
        Queries, ``(batch, seq, heads, head_dim)``.
    k, v : torch.Tensor
        Keys and values, ``(batch, keys, kv_heads, head_dim)``: the same tokens, or compact rows of others.
    pairs : sequence of pair of Grid
        Who sees whom.
    total : SoftmaxCollector
        Added to.
    causal : bool
        Whether row i sees keys up to i alone; else it sees all.
    scale : float
        Factor on the scores.
    first : bool
        Whether nothing has been merged into these rows before.
    progress : callable
        Called between kernels, so that an exchange in flight moves on.
    """
    for grid, kv_grid in limited(pairs, _most_pieces(q)):
        views = (grid_view(q, grid), grid_view(k, kv_grid), grid_view(v, kv_grid))
        for sequences, (queries, keys, values) in batches(*views):
            out, lse = backend.forward(queries, keys, values, causal=causal, scale=scale)
            total.add(sequences, grid, out, lse, first=first)
        progress()


def attend_backward(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pairs: Pairs,
    output: Output,
    dq: TakesGradients,
    dk: TakesGradients,
    dv: TakesGradients,
    *,
    causal: bool,
    scale: float,
    progress: Callable[[], object],
) -> None:
    """Add the gradients of `attend` onto three sums (adjoint; parameters as there, with merged statistics)."""
    lse = output.lse.unsqueeze(-1)
    for grid, kv_grid in limited(pairs, _most_pieces(q)):
        dense = [grid_view(x, grid) for x in (q, output.dout, output.out, lse)]
        for sequences, views in batches(*dense, grid_view(k, kv_grid), grid_view(v, kv_grid)):
            queries, dout, out, its_lse, keys, values = views
            parts = backend.backward(dout, queries, keys, values, out, its_lse.squeeze(-1), causal=causal, scale=scale)
            for total, its_grid, part in zip((dq, dk, dv), (grid, kv_grid, kv_grid), parts, strict=True):
                total.add(sequences, its_grid, part)
        progress()


def _most_pieces(q: torch.Tensor) -> int:
    return max(1, MAX_PIECES // max(1, q.shape[0]))


def attend_pieces(
    backend: Backend,
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
    """Attend the queries of every piece to the keys of the same piece.

    Parameters
    ----------
    backend, q, k, v, causal, scale, progress
        As for `attend`; keys are those of the same tokens.
    pieces : sequence of Piece
        All pieces of this slice.
    joined : set of tuple
        Branches and runs of those to whose softmax something is added afterwards.

    Returns
    -------
    SoftmaxCollector
        The softmax so far, to add to and then to take the result of.
    """
    if backend.pieces is not None and backend.pieces.takes(q, pieces, causal=causal, backward=False):
        return backend.pieces.forward(q, k, v, pieces, causal=causal, scale=scale, joined=joined, progress=progress)
    total = softmax_sum(q) if len(pieces) <= FEW_PIECES else SoftmaxSum(q)
    for index, branch, run in pieces:
        pairs = piece_grids(branch, run, q.shape[2], k.shape[2])
        attend(backend, q, k, v, pairs, total, causal=causal, scale=scale, first=index == 0, progress=progress)
    return total


def attend_pieces_backward(
    backend: Backend,
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
    """Return the gradients of `attend_pieces` so far (adjoint; parameters as there, with merged statistics).

    Returns
    -------
    dq, dk, dv : GradientCollector
        To add to, and then to take the results of.
    """
    if backend.pieces is not None and backend.pieces.takes(q, pieces, causal=causal, backward=True):
        return backend.pieces.backward(
            *(q, k, v, pieces, output), causal=causal, scale=scale, joined=joined, progress=progress
        )
    its_sum = gradient_sum if len(pieces) <= FEW_PIECES else GradientSum
    sums = its_sum(q), its_sum(k), its_sum(v)
    for _, branch, run in pieces:
        pairs = piece_grids(branch, run, q.shape[2], k.shape[2])
        attend_backward(*(backend, q, k, v, pairs, output, *sums), causal=causal, scale=scale, progress=progress)
    return sums
