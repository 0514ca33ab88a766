"""A sequence of one process as numbers alone, which graphs of `torch.compile` and `torch.export` hold in themselves.

A `SequencePlan` is an object that lives in the process that made it; a program that was exported outlives both. So the
operator here takes what a plan is made of, and the plan is made, or found, when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longnet_hpc.attention.sums import wide_dtype
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.mixture import fake_backward, mix, mix_backward, refuse, register
from longnet_hpc.pattern import Pattern
from longnet_hpc.sequence_plan import Plan, SequencePlan, check_shapes, scale_of

__all__ = ["OneProcessPlan"]


@dataclass(frozen=True)
class OneProcessPlan:
    """What a `SequencePlan` without a communicator is, for graphs.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    local_len : int
        Tokens of the sequence.
    documents : tuple of int
        Boundaries of packed documents, see `Partition`; none for a single one.
    backend : str
        Name of the attention backend.
    """

    pattern: Pattern
    local_len: int
    documents: tuple[int, ...] = ()
    backend: str = "auto"

    @property
    def start(self) -> int:
        """Position of the first token."""
        return 0

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence."""
        return self.local_len

    def of_layer(self, index: int) -> OneProcessPlan:
        """Return what computes the attention of a layer: this plan, for all."""
        return self

    def agree(self, facts: Mapping[str, object], error: LongNetError | None = None) -> None:
        """Raise the error, if there is one; there is nobody to agree with."""
        if error is not None:
            raise error

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute the attention of one layer; see `SequencePlan.attention`."""
        return self.attend(q, k, v, causal=causal, softmax_scale=softmax_scale)[0]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `attention`, and return the log-sum-exp as well; see `SequencePlan.attend`."""
        check_shapes(q, k, v)
        if q.shape[1] != self.local_len:
            raise ShapeError(f"this plan is of {self.local_len} tokens, got {q.shape[1]}")
        pattern = self.pattern
        out, lse = torch.ops.longnet_hpc.dilated_attention.default(
            *(q, k, v, list(pattern.segment_lengths), list(pattern.dilation_rates), list(self.documents)),
            *(self.backend, causal, scale_of(softmax_scale, q.shape[3])),
        )
        return out, lse.detach()


def plan_of_one(pattern: Pattern, seq_len: int, device: torch.device) -> Plan:
    """Return the plan of a sequence that one process has to itself: such as a graph can hold, while one is made.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    seq_len : int
        Tokens of the sequence.
    device : torch.device
        Where the tensors lie.
    """
    if torch.compiler.is_compiling():
        return OneProcessPlan(pattern, seq_len)
    return SequencePlan.build(pattern, seq_len, device=device)


def _plan(
    q: torch.Tensor, segment_lengths: list[int], dilation_rates: list[int], cu_seqlens: list[int], backend: str
) -> SequencePlan:
    return SequencePlan.build(
        Pattern.from_lists(segment_lengths, dilation_rates),
        q.shape[1],
        cu_seqlens=cu_seqlens or None,
        backend=backend,
        device=q.device,
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    cu_seqlens: list[int],
    backend: str,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, _ = mix(q, k, v, _plan(q, segment_lengths, dilation_rates, cu_seqlens, backend), causal, scale)
    return out, lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    cu_seqlens: list[int],
    backend: str,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = _plan(q, segment_lengths, dilation_rates, cu_seqlens, backend)
    return mix_backward(dout, q, k, v, out, lse, [], plan, causal, scale)


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.longnet_hpc.dilated_attention_backward.default(dout, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * len(ctx.numbers))


register("dilated_attention", _forward, _fake_forward)
register("dilated_attention_backward", _backward, fake_backward)
torch.library.register_autograd("longnet_hpc::dilated_attention", _differentiate, setup_context=_keep)
torch.library.register_autograd("longnet_hpc::dilated_attention_backward", refuse)
