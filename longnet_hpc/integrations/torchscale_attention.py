"""Attention as torchscale's LongNet computes it, deviations from the paper included: its weights give its outputs.

What `TorchscalePlan` reproduces, and `longnet_hpc.dilated_attention` does not have:

* Head h looks at offset ``h // ceil(heads / r)`` of each segment, where the paper has ``h mod r`` (Eq. 13).
* A segment is cut to the sequence, then ragged ones are padded with zeros, behind the projections. Unless attention is
  causal, such keys enter the softmax with score 0 and value 0.
* Where r does not divide w, padded segments are put together without being cut again: with more than one segment of a
  branch, its outputs slip towards the end of the sequence, by ``-w mod r`` tokens a segment.
* The weights that merge the branches, a softmax of their log-sum-exps, are constants to the gradient.
* A log-sum-exp that is exactly 0 counts as absent.

Not reproduced: its sequence parallelism and its incremental decoding, which compute something else again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from longnet_hpc.attention import Backend, choose_backend
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.pattern import Branch, Pattern
from longnet_hpc.sequence_plan import check_shapes, scale_of

__all__ = ["TorchscalePlan", "torchscale_attention"]

_ABSENT = -1e8
"""Log-sum-exp of a branch at a position that it does not look at."""


def torchscale_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend as torchscale's ``DilatedAttention`` does between its projections, on one rank.

    Every branch gathers copies of queries, keys and values, and its output and their gradients are as large as the
    sequence, so this takes more memory than `longnet_hpc.dilated_attention`; both grow linearly with the sequence.

    Parameters
    ----------
    q, k, v : torch.Tensor
        ``(batch, seq, heads, head_dim)``, all of the same number of heads, at least 1 token.
    pattern : Pattern
        The branches.
    causal : bool
        Whether a query sees only keys at or before its own position.
    softmax_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` by default.
    backend : str
        What computes the attention of a segment, see `longnet_hpc.dilated_attention`.

    Returns
    -------
    torch.Tensor
        Shaped as ``q``; 0 where no branch looks.

    Raises
    ------
    ShapeError
        If shapes, dtypes or devices do not fit together.
    BackendError
        If a forced backend cannot compute this.
    """
    check_shapes(q, k, v)
    if q.shape != k.shape or q.shape[1] < 1:
        raise ShapeError(f"q and k must be shaped alike, with at least 1 token, got {tuple(q.shape)}, {tuple(k.shape)}")
    chosen, scale = choose_backend(backend, q.device, q.dtype, q.shape[-1]), scale_of(softmax_scale, q.shape[-1])
    seq = q.shape[1]
    outs, lses = [], []
    for branch in pattern:
        rows = (_gather(x, branch).transpose(1, 2) for x in (q, k, v))
        out, lse = _Attention.apply(*rows, chosen, causal, scale)
        outs.append(_scatter(out.transpose(1, 2), branch, seq))
        lses.append(_scatter(lse.transpose(1, 2).unsqueeze(-1), branch, seq))
    merged = torch.stack(lses)
    # That is 0 where a branch does not look, and rarely where it does.
    weights = merged.masked_fill(merged == 0, _ABSENT).softmax(0)
    result = torch.zeros_like(q)
    for out, weight in zip(outs, weights, strict=True):
        result = result + out * weight.to(out.dtype)
    return result


def _offsets(heads: int, branch: Branch) -> tuple[list[int], list[int]]:
    """Return the offset of each head, and its number."""
    block = -(-heads // branch.dilation_rate)
    return [head // block for head in range(heads)], list(range(heads))


def _gather(x: torch.Tensor, branch: Branch) -> torch.Tensor:
    """Return the rows that each head looks at, ``(batch * segments, rows, heads, width)``, padded with zeros."""
    seq, heads = x.shape[1:3]
    length, rate = min(branch.segment_length, seq), branch.dilation_rate
    x = F.pad(x, (0, 0, 0, 0, 0, -seq % length)).unflatten(1, (-1, length)).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, 0, 0, -length % rate)).unflatten(1, (-1, rate))
    offsets, numbers = _offsets(heads, branch)
    return x[:, :, offsets, numbers]


def _scatter(rows: torch.Tensor, branch: Branch, seq: int) -> torch.Tensor:
    """Return rows at the places where torchscale puts them, ``(batch, seq, heads, width)``, and 0 elsewhere.

    The adjoint of `_gather` where r divides w, or there is one segment.
    """
    pieces, count, heads, width = rows.shape
    segments = -(-seq // min(branch.segment_length, seq))
    dense = rows.new_zeros(pieces, count, branch.dilation_rate, heads, width)
    offsets, numbers = _offsets(heads, branch)
    dense[:, :, offsets, numbers] = rows
    together: torch.Tensor = dense.flatten(1, 2).unflatten(0, (-1, segments)).flatten(1, 2)
    return together[:, :seq]


class _Attention(torch.autograd.Function):
    """Plain attention by a backend, ``(batch, heads, rows, head_dim)``; its log-sum-exp has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Backend, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = backend.forward(q, k, v, causal=causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.how = backend, {"causal": causal, "scale": scale}
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.backend.backward(dout, *ctx.saved_tensors, **ctx.how), None, None, None


class TorchscalePlan:
    """Takes the place of a `SequencePlan` in a model, which then attends by `torchscale_attention`; one rank.

    Parameters
    ----------
    pattern : Pattern
        The branches of the model, ``model.config.pattern``.
    seq_len : int
        Tokens of the sequence.
    backend : str
        As for `torchscale_attention`.
    """

    def __init__(self, pattern: Pattern, seq_len: int, *, backend: str = "auto") -> None:
        self.pattern = pattern
        self.start = 0
        self.local_len = seq_len
        self.seq_len = seq_len
        self._backend = backend

    def of_layer(self, index: int) -> TorchscalePlan:
        """Return what computes the attention of a layer: this plan, for all."""
        return self

    def agree(self, facts: Mapping[str, object], error: LongNetError | None = None) -> None:
        """Raise the error, if any: there are no other ranks."""
        if error is not None:
            raise error

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute `torchscale_attention`; parameters and errors as there."""
        return torchscale_attention(
            q, k, v, self.pattern, causal=causal, softmax_scale=softmax_scale, backend=self._backend
        )
