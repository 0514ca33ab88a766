"""What a backend of attention offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Backend"]


class Supports(Protocol):
    """Whether a backend can compute on such tensors."""

    def __call__(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Answer for queries, keys and values of this device, dtype and head_dim."""


class Forward(Protocol):
    """Attention of the rows of one grid."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend ``q`` ``(batch, heads, rows, head_dim)`` to ``k, v`` ``(batch, heads, keys, head_dim)``.

        All may be strided views with a dense last dim; ``causal`` needs ``rows == keys`` and lets row i see keys up to
        i. Returns out, shaped as ``q``, and lse ``(batch, heads, rows)`` in float32 or wider.
        """


class Backward(Protocol):
    """Gradients of `Forward` inside a larger softmax."""

    def __call__(
        self,
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
        """Return dq, dk, dv for these keys alone.

        ``out`` and ``lse`` are those of the *merged* softmax, so ``P = exp(scale * q k - lse)`` are these keys' share
        of it and ``delta = rowsum(dout * out)`` is common to all shares.
        """


@dataclass(frozen=True)
class Backend:
    """A way to compute attention over the rows of one grid."""

    name: str
    """Its key in the table."""
    supports: Supports
    """Whether it can."""
    forward: Forward
    """Outputs and log-sum-exp."""
    backward: Backward
    """The adjoint, with merged statistics."""
