"""Plain attention in matrix products: any device, dtype and head_dim, float64 included. Blocks bound memory."""

from __future__ import annotations

import torch

from longnet_hpc.attention.backend import Backend

__all__ = ["REFERENCE"]

BLOCK_ROWS = 512
"""Query rows of one piece whose scores exist at once."""
BLOCK_SCORES = 1 << 24
"""Scores that exist at once, if those of one piece are not more."""


def _supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return dtype.is_floating_point


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pieces(q: torch.Tensor, k: torch.Tensor) -> int:
    """Return how many pieces (dim 0) are computed at once."""
    return max(1, BLOCK_SCORES // max(1, q.shape[1] * min(BLOCK_ROWS, q.shape[2]) * k.shape[2]))


def _scores(q: torch.Tensor, k: torch.Tensor, start: int, *, causal: bool, scale: float) -> torch.Tensor:
    """Return the scaled scores of query rows that begin at ``start``, minus infinity where causality forbids."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if causal:
        row = torch.arange(start, start + q.shape[-2], device=q.device)
        hidden = torch.arange(k.shape[-2], device=q.device) > row[:, None]
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.shape[0] > (pieces := _pieces(q, k)):
        parts = zip(*(x.split(pieces) for x in (q, k, v)), strict=True)
        results = [_forward(*part, causal=causal, scale=scale) for part in parts]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])
    wide_k, wide_v = _wide(k), _wide(v)
    outs, lses = [], []
    for start in range(0, q.shape[-2], BLOCK_ROWS):
        scores = _scores(_wide(q[..., start : start + BLOCK_ROWS, :]), wide_k, start, causal=causal, scale=scale)
        lse = torch.logsumexp(scores, dim=-1)
        outs.append(torch.matmul(torch.exp(scores - lse[..., None]), wide_v).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.shape[0] > (pieces := _pieces(q, k)):
        parts = zip(*(x.split(pieces) for x in (dout, q, k, v, out, lse)), strict=True)
        grads = zip(*(_backward(*part, causal=causal, scale=scale) for part in parts), strict=True)
        dq, dk, dv = (torch.cat(grad) for grad in grads)
        return dq, dk, dv
    wide_k, wide_v = _wide(k), _wide(v)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dqs = []
    for start in range(0, q.shape[-2], BLOCK_ROWS):
        rows = (..., slice(start, start + BLOCK_ROWS), slice(None))
        block_q, block_dout = _wide(q[rows]), _wide(dout[rows])
        scores = _scores(block_q, wide_k, start, causal=causal, scale=scale)
        p = torch.exp(scores - lse[..., start : start + BLOCK_ROWS, None])
        delta = (block_dout * _wide(out[rows])).sum(-1, keepdim=True)
        ds = p * (torch.matmul(block_dout, wide_v.transpose(-1, -2)) - delta) * scale
        dqs.append(torch.matmul(ds, wide_k).to(q.dtype))
        dk += torch.matmul(ds.transpose(-1, -2), block_q)
        dv += torch.matmul(p.transpose(-1, -2), block_dout)
    return torch.cat(dqs, dim=-2), dk.to(k.dtype), dv.to(v.dtype)


REFERENCE = Backend("reference", _supports, _forward, _backward)
