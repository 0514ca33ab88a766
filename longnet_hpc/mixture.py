"""The mixture of all branches as one differentiable function of this rank's queries, keys and values.

Forward: start the exchanges of spanning segments, compute every piece against the keys of its own slice meanwhile, then
let the queries of spanning pieces see the rows that arrived. Backward: the same in reverse, with the merged statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from longnet_hpc.attention import choose_backend
from longnet_hpc.attention.branch import Output, attend, attend_backward
from longnet_hpc.attention.sums import gradient_sum, softmax_sum
from longnet_hpc.exchange import Rows
from longnet_hpc.grids import piece_grids, row_grids

if TYPE_CHECKING:
    from collections.abc import Callable

    from longnet_hpc.comm.buffers import Pending
    from longnet_hpc.sequence_plan import SequencePlan

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
        backend = choose_backend(plan.backend, q.device, q.dtype, q.shape[-1])
        q, k, v = (_laid_out(x) for x in (q, k, v))
        heads, kv_heads = q.shape[2], k.shape[2]
        exchanges = plan.exchanges(heads, kv_heads, causal=causal)
        flights = [exchange.start(k, v) for _, exchange in exchanges]
        plan.bytes_received += sum(flight.bytes_received for flight in flights)
        progress = _driving(flights)

        total = softmax_sum(q)
        for index, branch, run in plan.pieces:
            pairs = piece_grids(branch, run, heads, kv_heads)
            attend(backend, q, k, v, pairs, total, causal=causal, scale=scale, first=index == 0, progress=progress)
        arrived: list[Rows] = []
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            arrived.append(exchange.finish(flight, k))
            for offset, rows in arrived[-1].items():
                pairs = row_grids(branch, exchange.layout.piece, offset, heads, kv_heads, rows[0].shape[1])
                attend(backend, q, *rows, pairs, total, causal=False, scale=scale, first=False, progress=progress)
        plan.count_seconds(flights)

        out, lse = total.result()
        ctx.plan, ctx.backend, ctx.causal, ctx.scale = plan, backend, causal, scale
        ctx.row_offsets = [tuple(rows) for rows in arrived]
        ctx.save_for_backward(q, k, v, out, lse, *(t for rows in arrived for pair in rows.values() for t in pair))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse, *row_tensors = ctx.saved_tensors
        plan: SequencePlan = ctx.plan
        heads, kv_heads = q.shape[2], k.shape[2]
        output = Output(_laid_out(dout), out, lse)
        dq, dk, dv = gradient_sum(q), gradient_sum(k), gradient_sum(v)
        exchanges = plan.exchanges(heads, kv_heads, causal=ctx.causal)
        flights: list[Pending] = []
        progress = _driving(flights)
        tensors = iter(row_tensors)
        for (branch, exchange), offsets in zip(exchanges, ctx.row_offsets, strict=True):
            row_grads: Rows = {}
            for offset in offsets:
                rows = next(tensors), next(tensors)
                pairs = row_grids(branch, exchange.layout.piece, offset, heads, kv_heads, rows[0].shape[1])
                sums = gradient_sum(rows[0]), gradient_sum(rows[1])
                attend_backward(
                    *(ctx.backend, q, *rows, pairs, output, dq, *sums),
                    causal=False,
                    scale=ctx.scale,
                    progress=progress,
                )
                row_grads[offset] = sums[0].result(), sums[1].result()
            flights.append(exchange.start_adjoint(row_grads, k))
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        for _, branch, run in plan.pieces:
            pairs = piece_grids(branch, run, heads, kv_heads)
            attend_backward(
                *(ctx.backend, q, k, v, pairs, output, dq, dk, dv),
                causal=ctx.causal,
                scale=ctx.scale,
                progress=progress,
            )
        for (_, exchange), flight in zip(exchanges, flights, strict=True):
            exchange.finish_adjoint(flight, k, dk, dv)
        plan.count_seconds(flights)
        return dq.result(), dk.result(), dv.result()


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with a dense last dim and, on a GPU, aligned to the 16 bytes that kernels load at once."""
    elements = 16 // x.element_size()
    if not x.is_cuda or x.shape[-1] % elements:
        elements = 1  # no kernel loads so much at once
    aligned = x.data_ptr() % (elements * x.element_size()) == 0 and all(
        stride % elements == 0 for stride in x.stride()[:-1]
    )
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _driving(flights: list[Pending]) -> Callable[[], None]:
    """Return a function that moves exchanges on, those of a list that may still grow."""

    def progress() -> None:
        for flight in flights:
            flight.test()

    return progress
