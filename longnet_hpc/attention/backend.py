"""What a backend of attention offers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from longnet_hpc.partition import Run
from longnet_hpc.pattern import Branch

if TYPE_CHECKING:
    from longnet_hpc.attention.sums import GradientCollector, SoftmaxCollector

__all__ = ["AllPieces", "Backend", "Joined", "Output", "Piece"]

Piece = tuple[int, Branch, Run]
"""Equal pieces of segments of one branch, with the number of the branch."""

Joined = Set[tuple[Branch, Run]]
"""Pieces whose queries see more than their own tokens, or whose keys are seen by more than their own queries."""


@dataclass(frozen=True)
class Output:
    """The merged softmax, and the gradient of its output."""

    dout: torch.Tensor
    """Gradient of the output, ``(batch, seq, heads, head_dim)``, in the dtype of the queries."""
    out: torch.Tensor
    """Merged output, shaped and typed alike."""
    lse: torch.Tensor
    """Merged log-sum-exp, ``(batch, seq, heads)``."""


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


class PiecesForward(Protocol):
    """Attention of all pieces of a slice at once."""

    def __call__(
        self,
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
        """Attend within every piece; parameters and result as for `branch.attend_pieces`."""


class PiecesBackward(Protocol):
    """Gradients of `PiecesForward` inside a larger softmax."""

    def __call__(
        self,
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
        """Return the gradients of every piece; parameters and result as for `branch.attend_pieces_backward`."""


class TakesPieces(Protocol):
    """Whether a backend computes some pieces at once."""

    def __call__(self, q: torch.Tensor, pieces: Sequence[Piece], *, causal: bool, backward: bool) -> bool:
        """Answer for queries of such a shape."""


@dataclass(frozen=True)
class AllPieces:
    """A way to compute all pieces of a slice at once."""

    takes: TakesPieces
    """Whether it can."""
    forward: PiecesForward
    """Outputs and log-sum-exp."""
    backward: PiecesBackward
    """The adjoint, with merged statistics."""


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
    pieces: AllPieces | None = None
    """A faster way to compute all pieces of a slice."""
    most_packed_pieces: float = math.inf
    """Pieces of packed documents, which are of many lengths, beyond which `choose_backend` takes another."""
