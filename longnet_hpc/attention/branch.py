"""Attention over pairs of grids, and its adjoint: strided views for the backend, results into sums over branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from longnet_hpc.attention.backend import Backend, Output, Piece
from longnet_hpc.attention.sums import GradientCollector, SoftmaxCollector
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
    dq: GradientCollector,
    dk: GradientCollector,
    dv: GradientCollector,
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
    total: SoftmaxCollector,
    *,
    causal: bool,
    scale: float,
    alone: bool,
    progress: Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attend the queries of every piece to the keys of the same piece, and merge.

    Parameters
    ----------
    backend, q, k, v, total, causal, scale, progress
        As for `attend`; keys are those of the same tokens.
    pieces : sequence of Piece
        All pieces of this slice.
    alone : bool
        Whether nothing else is added to ``total``.

    Returns
    -------
    tuple of torch.Tensor or None
        Output and log-sum-exp, if nothing was added to ``total`` since they could be made at once.
    """
    if backend.pieces is not None and backend.pieces.takes(q, pieces, causal=causal, backward=False):
        return backend.pieces.forward(
            *(q, k, v, pieces, total), causal=causal, scale=scale, alone=alone, progress=progress
        )
    for index, branch, run in pieces:
        pairs = piece_grids(branch, run, q.shape[2], k.shape[2])
        attend(backend, q, k, v, pairs, total, causal=causal, scale=scale, first=index == 0, progress=progress)
    return None


def attend_pieces_backward(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: Sequence[Piece],
    output: Output,
    dq: GradientCollector,
    dk: GradientCollector,
    dv: GradientCollector,
    *,
    causal: bool,
    scale: float,
    alone: bool,
    progress: Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Add the gradients of `attend_pieces` onto three sums (adjoint; parameters as there, with merged statistics).

    Returns
    -------
    tuple of torch.Tensor or None
        The gradients, if nothing was added to the sums since they could be made at once.
    """
    if backend.pieces is not None and backend.pieces.takes(q, pieces, causal=causal, backward=True):
        return backend.pieces.backward(
            *(q, k, v, pieces, output, dq, dk, dv), causal=causal, scale=scale, alone=alone, progress=progress
        )
    for _, branch, run in pieces:
        pairs = piece_grids(branch, run, q.shape[2], k.shape[2])
        attend_backward(*(backend, q, k, v, pairs, output, dq, dk, dv), causal=causal, scale=scale, progress=progress)
    return None
