"""The mixture of all branches as one differentiable function of this rank's queries, keys and values.

Forward: start the exchanges of spanning segments, compute every piece against the keys of its own slice meanwhile, then
let the queries of spanning pieces see the rows that arrived. Backward: the same in reverse, with the merged statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from longnet_hpc.attention import choose_backend
from longnet_hpc.attention.branch import (
    Gradients,
    Inputs,
    Merged,
    Rows,
    piece_backward,
    piece_forward,
    rows_backward,
    rows_forward,
)

if TYPE_CHECKING:
    from longnet_hpc.parallel import SequencePlan

__all__ = ["mixture"]


def mixture(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix all branches of a plan by their softmax denominators (LongNet, Eq. 9-10).

    Parameters
    ----------
    q, k, v : torch.Tensor
        This rank's slice, ``(batch, local_len, heads or kv_heads, head_dim)``, shapes checked by the caller.
    plan : SequencePlan
        Who owns which tokens.
    causal : bool
        Whether a query sees only keys at or before its own position.
    scale : float
        Factor on the scores.

    Returns
    -------
    out, lse : torch.Tensor
        ``(batch, local_len, heads, head_dim)``, differentiable once, and ``(batch, local_len, heads)``, which is not.
        Collective over the ranks of the plan, forward and backward.
    """
    out, lse = _Mixture.apply(q, k, v, plan, causal, scale)
    return out, lse


class _Mixture(torch.autograd.Function):
    """Forward and backward of the mixture; nothing per branch is saved but the rows that came from other ranks."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Autocast would lower the reference's products: statistics and sums are float32 at least, whoever calls.
        with torch.autocast(q.device.type, enabled=False):
            return _Mixture._forward(ctx, q, k, v, plan, causal, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(out_grads[0].device.type, enabled=False):
            return (*_Mixture._backward(ctx, out_grads[0]), None, None, None)

    @staticmethod
    def _forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = _inputs(q, k, v, plan, causal, scale)
        exchanges = plan.exchanges(q.shape[2], k.shape[2], causal=causal)
        flights = [exchange.start(k, v) for _, exchange in exchanges]
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        def progress() -> None:
            for flight in flights:
                flight.test()

        wide = _wide(q.dtype)
        merged = Merged(
            out=torch.zeros(q.shape, dtype=wide, device=q.device),
            lse=torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device),
        )
        for index, branch, run in plan.pieces:
            piece_forward(x, branch, run, merged, first=index == 0, progress=progress)
        arrived: list[Rows] = []
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            arrived.append(exchange.finish(flight, k))
            rows_forward(x, branch, exchange.layout.piece, arrived[-1], merged)
            progress()
        plan.count_seconds(flights)

        out = merged.out.to(q.dtype)
        ctx.plan, ctx.causal, ctx.scale = plan, causal, scale
        ctx.row_offsets = [tuple(rows) for rows in arrived]
        ctx.save_for_backward(
            q, k, v, out, merged.lse, *(t for rows in arrived for pair in rows.values() for t in pair)
        )
        ctx.mark_non_differentiable(merged.lse)
        return out, merged.lse

    @staticmethod
    def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse, *row_tensors = ctx.saved_tensors
        plan: SequencePlan = ctx.plan
        x = _inputs(q, k, v, plan, ctx.causal, ctx.scale)
        wide = _wide(q.dtype)
        grads = Gradients(
            dout=dout.contiguous(),
            out=out,
            lse=lse,
            dq=torch.zeros(q.shape, dtype=wide, device=q.device),
            dk=torch.zeros(k.shape, dtype=wide, device=q.device),
            dv=torch.zeros(v.shape, dtype=wide, device=q.device),
        )
        exchanges = plan.exchanges(q.shape[2], k.shape[2], causal=ctx.causal)
        flights = []
        tensors = iter(row_tensors)
        for (branch, exchange), offsets in zip(exchanges, ctx.row_offsets, strict=True):
            rows = {offset: (next(tensors), next(tensors)) for offset in offsets}
            row_grads = rows_backward(x, branch, exchange.layout.piece, rows, grads)
            flights.append(exchange.start_adjoint(row_grads, k))
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        def progress() -> None:
            for flight in flights:
                flight.test()

        for _, branch, run in plan.pieces:
            piece_backward(x, branch, run, grads, progress=progress)
        for (_, exchange), flight in zip(exchanges, flights, strict=True):
            exchange.finish_adjoint(flight, grads.dk, grads.dv)
        plan.count_seconds(flights)
        return grads.dq.to(q.dtype), grads.dk.to(k.dtype), grads.dv.to(v.dtype)


def _inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, causal: bool, scale: float
) -> Inputs:
    backend = choose_backend(plan.backend, q.device, q.dtype, q.shape[-1])
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return Inputs(q, k, v, backend=backend, causal=causal, scale=scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
