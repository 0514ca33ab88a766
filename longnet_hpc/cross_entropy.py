"""Cross-entropy in pieces of tokens, so that the logits of a whole slice never exist at once.

Loss and gradient of a piece are made together while its logits exist, so backward recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from longnet_hpc.errors import ShapeError

__all__ = ["check_targets", "cross_entropy", "token_losses"]

IGNORE_INDEX = -100
"""Target that does not count, as in torch.nn.functional.cross_entropy."""
PIECE_LOGITS = 1 << 25
"""Logits that exist at once by default."""
_HALF = (torch.float16, torch.bfloat16)


def check_targets(targets: torch.Tensor, vocab_size: int, *, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise unless every target is ``ignore_index`` or in ``[0, vocab_size)``; waits for the device.

    Parameters
    ----------
    targets : torch.Tensor
        Integers of any shape.
    vocab_size : int
        Number of tokens.
    ignore_index : int
        Target that adds nothing.

    Raises
    ------
    ShapeError
        If a target is outside, with its value; or if they are not integers.
    """
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ShapeError(f"targets must be integers, got {targets.dtype}")
    if targets.numel() == 0:
        return
    wide = targets.long()
    low, high = (int(extreme) for extreme in torch.aminmax(wide.masked_fill(wide == ignore_index, 0)))
    if low < 0 or high >= vocab_size:
        raise ShapeError(f"target {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    piece_tokens: int | None = None,
) -> torch.Tensor:
    """Sum the negative log-likelihood of the targets under ``softmax(hidden @ weight.T)``.

    Products take operands in the dtype of ``hidden``, or of autocast where that is on, and give float32 at least; the
    softmax, the sums and the gradient of ``weight`` are in float32 at least.

    Parameters
    ----------
    hidden : torch.Tensor
        ``(..., embed_dim)``, any floating dtype.
    weight : torch.Tensor
        ``(vocab_size, embed_dim)``.
    targets : torch.Tensor
        Integers of shape ``hidden.shape[:-1]``, each ``ignore_index`` or in ``[0, vocab_size)``: see `check_targets`,
        which this does not call, since it waits for the device.
    ignore_index : int
        Target that adds nothing.
    piece_tokens : int, optional
        Tokens whose logits exist at once; about 2**25 logits (128 MiB) by default.

    Returns
    -------
    torch.Tensor
        Scalar in nats, float64. Differentiable once in ``hidden`` and ``weight``.

    Raises
    ------
    ShapeError
        If ``targets`` are not shaped as ``hidden`` without its last dim.
    """
    loss: torch.Tensor = _SummedCrossEntropy.apply(
        hidden,
        weight,
        targets,
        ignore_index,
        piece_tokens,
        _grad(hidden, weight),
    )
    return loss


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    piece_tokens: int | None = None,
) -> torch.Tensor:
    """Return the negative log-likelihood of each target, in nats, shaped as ``targets``; 0 where ignored.

    The dtype is float32, or float64 for float64.

    Parameters are those of `cross_entropy`. Not differentiable.
    """
    losses = [
        F.cross_entropy(_product(rows, operand.T), its_targets.long(), reduction="none", ignore_index=ignore_index)
        for rows, operand, its_targets in _pieces(hidden, weight, targets, piece_tokens)
    ]
    return torch.cat(losses).view(targets.shape)


class _Piece:
    """Some tokens: their log-probabilities, and their losses."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> None:
        self.hidden = hidden
        targets = targets.long()  # a narrow dtype would wrap ignore_index
        self.ignored = targets == ignore_index
        self.targets = targets.masked_fill(self.ignored, 0).unsqueeze(1)
        logits = _product(hidden, weight.T)
        self.log_probabilities = logits.sub_(logits.logsumexp(-1, keepdim=True))
        self.losses = -self.log_probabilities.gather(1, self.targets).squeeze(1).masked_fill_(self.ignored, 0.0)

    def logits_gradient(self) -> torch.Tensor:
        """Return the gradient of the summed loss with respect to the logits; overwrites the log-probabilities."""
        grad = self.log_probabilities.exp_()
        grad.scatter_add_(1, self.targets, grad.new_full((), -1.0).expand_as(self.targets))
        return grad.masked_fill_(self.ignored.unsqueeze(1), 0.0)


def _pieces(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, piece_tokens: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield pieces of hidden states, the weight, both as operands of a product, and the targets of each piece."""
    if targets.shape != hidden.shape[:-1]:
        raise ShapeError(f"targets must be shaped {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    dtype, count = _operand_dtype(hidden), _piece(piece_tokens, weight)
    operand = weight.to(dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]).split(count)
    with torch.autocast(hidden.device.type, enabled=False):
        for piece, piece_targets in zip(rows, targets.reshape(-1).split(count), strict=True):
            yield piece.to(dtype), operand, piece_targets


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        piece_tokens: int | None,
        needs_grad: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_grad else None
        start = 0
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight_grad = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_grad else None
        for its_hidden, operand, its_targets in _pieces(hidden, weight, targets, piece_tokens):
            piece = _Piece(its_hidden, operand, its_targets, ignore_index)
            total += piece.losses.sum(dtype=torch.float64)
            if weight_grad is not None and hidden_grad is not None:
                grad = piece.logits_gradient().to(operand.dtype)
                rows = slice(start, start + len(grad))
                hidden_grad.view(-1, hidden.shape[-1])[rows] = _product(grad, operand)
                weight_grad += _product(grad.T, piece.hidden)
                start = rows.stop
        if weight_grad is not None and hidden_grad is not None:
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None, None, None, None


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply two matrices of one dtype; half precision gives float32 without a rounding in between."""
    if a.dtype not in _HALF:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _operand_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _piece(piece_tokens: int | None, weight: torch.Tensor) -> int:
    return max(1, PIECE_LOGITS // weight.shape[0] if piece_tokens is None else piece_tokens)
