"""Walk the grids of one branch: strided views of q, k, v for the backend, results merged in place, and the adjoint.

Accumulators are dense and wide: ``out`` ``(batch, seq, heads, head_dim)`` and ``lse`` ``(batch, seq, heads)`` forward,
``dq, dk, dv`` backward, in float32 or wider. A grid touches each of its rows once, so merging is by view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from longnet_hpc.attention.backend import Backend
from longnet_hpc.partition import Run
from longnet_hpc.pattern import Branch

__all__ = [
    "Gradients",
    "Inputs",
    "Merged",
    "Rows",
    "add_heads",
    "grid_view",
    "merge",
    "piece_backward",
    "piece_forward",
    "rows_backward",
    "rows_forward",
    "select_heads",
]


@dataclass(frozen=True)
class Inputs:
    """What attention is computed from."""

    q: torch.Tensor
    """Queries, ``(batch, seq, heads, head_dim)``."""
    k: torch.Tensor
    """Keys, ``(batch, seq, kv_heads, head_dim)``."""
    v: torch.Tensor
    """Values, shaped as the keys."""
    backend: Backend
    """Who computes."""
    causal: bool
    """Whether a query sees only keys at or before its own position."""
    scale: float
    """Factor on the scores."""

    def kv_head_index(self, branch: Branch, offset: int) -> tuple[int, ...]:
        """Return the key/value head of each query head at ``offset``."""
        return branch.kv_heads_at(offset, self.q.shape[2], self.k.shape[2])


@dataclass(frozen=True)
class Merged:
    """The softmax over all keys seen so far."""

    out: torch.Tensor
    """Normalised output, ``(batch, seq, heads, head_dim)``, float32 or wider."""
    lse: torch.Tensor
    """Log-sum-exp, ``(batch, seq, heads)``; minus infinity where no key was seen."""


@dataclass(frozen=True)
class Gradients:
    """Sums of gradients so far, and the merged statistics that they need."""

    dout: torch.Tensor
    """Gradient of the output, in the dtype of the queries."""
    out: torch.Tensor
    """Merged output, in the dtype of the queries."""
    lse: torch.Tensor
    """Merged log-sum-exp, ``(batch, seq, heads)``."""
    dq: torch.Tensor
    """Gradient of the queries, float32 or wider."""
    dk: torch.Tensor
    """Gradient of the keys, float32 or wider."""
    dv: torch.Tensor
    """Gradient of the values, float32 or wider."""


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, *, first: bool) -> None:
    """Merge a partial softmax into another in place (LongNet, Eq. 9-10).

    Parameters
    ----------
    out, lse : torch.Tensor
        ``(..., rows, head_dim)`` and ``(..., rows)``, written.
    part, part_lse : torch.Tensor
        The partial; its lse is finite, since a row on a grid sees at least one key.
    first : bool
        Whether nothing has been merged into these rows before.
    """
    if first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(part.to(out.dtype), (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


def piece_forward(
    x: Inputs, branch: Branch, run: Run, merged: Merged, *, first: bool, progress: Callable[[], object]
) -> None:
    """Attend the queries of equal pieces to the keys of the same pieces, and merge.

    Parameters
    ----------
    x : Inputs
        Queries, keys, values of this rank's slice.
    branch, run : Branch, Run
        The grids, and the pieces of segments.
    merged : Merged
        Updated in place.
    first : bool
        Whether this is the first branch, so that its rows are still untouched.
    progress : callable
        Called between kernels, so that an exchange in flight moves on.
    """
    for offset in branch.offsets(x.q.shape[2]):
        if not run.rows(branch, offset):
            continue
        heads = _as_slice(branch.heads_at(offset, x.q.shape[2]))
        kv_heads = x.kv_head_index(branch, offset)
        grids = (grid_view(t, branch, run, offset)[..., heads, :] for t in (x.q, merged.out, merged.lse.unsqueeze(-1)))
        kv_grids = (select_heads(grid_view(t, branch, run, offset), kv_heads) for t in (x.k, x.v))
        for q, out, lse, k, v in _batches(*grids, *kv_grids):
            part, part_lse = x.backend.forward(q, k, v, causal=x.causal, scale=x.scale)
            merge(out, lse.squeeze(-1), part, part_lse, first=first)
        progress()


def piece_backward(x: Inputs, branch: Branch, run: Run, grads: Gradients, *, progress: Callable[[], object]) -> None:
    """Add the gradients of `piece_forward`, with merged statistics (adjoint; parameters as there)."""
    for offset in branch.offsets(x.q.shape[2]):
        if not run.rows(branch, offset):
            continue
        heads = _as_slice(branch.heads_at(offset, x.q.shape[2]))
        kv_heads = x.kv_head_index(branch, offset)
        dense = (x.q, grads.dout, grads.out, grads.lse.unsqueeze(-1), grads.dq)
        grids = (grid_view(t, branch, run, offset)[..., heads, :] for t in dense)
        kv_grids = (select_heads(grid_view(t, branch, run, offset), kv_heads) for t in (x.k, x.v))
        kv_grads = (grid_view(t, branch, run, offset) for t in (grads.dk, grads.dv))
        for q, dout, out, lse, dq, k, v, dk, dv in _batches(*grids, *kv_grids, *kv_grads):
            dq_part, dk_part, dv_part = x.backend.backward(
                dout, q, k, v, out, lse.squeeze(-1), causal=x.causal, scale=x.scale
            )
            dq += dq_part
            add_heads(dk, kv_heads, dk_part, dim=1)
            add_heads(dv, kv_heads, dv_part, dim=1)
        progress()


Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Compact keys and values by head offset: ``(batch, rows, distinct kv heads, head_dim)`` each."""


def rows_forward(x: Inputs, branch: Branch, run: Run, rows: Rows, merged: Merged) -> None:
    """Attend the queries of one piece to compact rows of the same segment, all of them visible, and merge.

    Parameters
    ----------
    x : Inputs
        Queries of this rank's slice.
    branch, run : Branch, Run
        The grids, and the one piece whose queries see the rows.
    rows : dict
        Compact keys and values by head offset.
    merged : Merged
        Updated in place; the piece itself has been merged before.
    """
    for offset, (k_rows, v_rows) in rows.items():
        heads = _as_slice(branch.heads_at(offset, x.q.shape[2]))
        index = _positions(x.kv_head_index(branch, offset))
        q, out, lse = (
            grid_view(t, branch, run, offset)[..., heads, :].squeeze(1).transpose(1, 2)
            for t in (x.q, merged.out, merged.lse.unsqueeze(-1))
        )
        k, v = (select_heads(t, index).transpose(1, 2) for t in (k_rows, v_rows))
        part, part_lse = x.backend.forward(q, k, v, causal=False, scale=x.scale)
        merge(out, lse.squeeze(-1), part, part_lse, first=False)


def rows_backward(x: Inputs, branch: Branch, run: Run, rows: Rows, grads: Gradients) -> Rows:
    """Add the query gradients of `rows_forward`; return those of the rows, shaped as the rows (adjoint)."""
    row_grads: Rows = {}
    for offset, (k_rows, v_rows) in rows.items():
        heads = _as_slice(branch.heads_at(offset, x.q.shape[2]))
        index = _positions(x.kv_head_index(branch, offset))
        q, dout, out, lse, dq = (
            grid_view(t, branch, run, offset)[..., heads, :].squeeze(1).transpose(1, 2)
            for t in (x.q, grads.dout, grads.out, grads.lse.unsqueeze(-1), grads.dq)
        )
        k, v = (select_heads(t, index).transpose(1, 2) for t in (k_rows, v_rows))
        dq_part, dk_part, dv_part = x.backend.backward(dout, q, k, v, out, lse.squeeze(-1), causal=False, scale=x.scale)
        dq += dq_part
        sums = []
        for part, like in ((dk_part, k_rows), (dv_part, v_rows)):
            total = torch.zeros(like.shape, dtype=grads.dk.dtype, device=like.device)
            add_heads(total, index, part.transpose(1, 2), dim=-2)
            sums.append(total.to(like.dtype))
        row_grads[offset] = (sums[0], sums[1])
    return row_grads


def select_heads(x: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Return heads (dim -2) of ``x``: a view where they are evenly spaced, else a copy (shared K/V heads)."""
    even = _as_slice(index)
    if even is not None:
        return x[..., even, :]
    return x.index_select(x.dim() - 2, torch.tensor(index, device=x.device))


def add_heads(target: torch.Tensor, index: Sequence[int], part: torch.Tensor, *, dim: int) -> None:
    """Add ``part`` onto heads ``index`` of ``target`` in place, repeated ones summed; the adjoint of `select_heads`."""
    even = _as_slice(index)
    if even is not None:
        target.movedim(dim, 0)[even] += part.movedim(dim, 0)
    else:
        target.index_add_(dim, torch.tensor(index, device=target.device), part.to(target.dtype))


def _as_slice(index: Sequence[int]) -> slice | None:
    """Return the slice that selects the same heads, or None if they are not evenly ascending."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step < 1 or any(b - a != step for a, b in pairwise(index)):
        return None
    return slice(index[0], index[-1] + 1, step)


def _positions(index: Sequence[int]) -> tuple[int, ...]:
    """Return where each head of ``index`` stands among the distinct ones."""
    place = {head: position for position, head in enumerate(dict.fromkeys(index))}
    return tuple(place[head] for head in index)


def grid_view(x: torch.Tensor, branch: Branch, run: Run, offset: int) -> torch.Tensor:
    """Return the view ``(batch, count, rows, heads, width)`` of the rows of ``x`` on the grid of ``offset``."""
    pieces: torch.Tensor = x[:, run.start : run.start + run.count * run.length].unflatten(1, (run.count, run.length))
    return pieces[:, :, run.first_row(branch, offset) :: branch.dilation_rate]


def _batches(*grids: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the grids as ``(batch, heads, rows, width)`` views: all at once where strides allow, else by sequence."""
    if all(g.shape[0] == 1 or g.shape[1] == 1 or g.stride(0) == g.shape[1] * g.stride(1) for g in grids):
        yield tuple(g.flatten(0, 1).transpose(1, 2) for g in grids)
    else:
        for sequence in range(grids[0].shape[0]):
            yield tuple(g[sequence].transpose(1, 2) for g in grids)
