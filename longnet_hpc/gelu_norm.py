"""LayerNorm of GELU, which on a GPU is one pass over memory forward and one backward.

Rows of thousands of features are too long for the code that `torch.compile` makes: it passes over each three times, and
most of the time of a step beside products and attention went there. The kernels of the library hold a row in registers.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional as F

from longnet_hpc.errors import ShapeError

__all__ = ["gelu_norm"]

_HAS_TRITON = find_spec("triton") is not None
_MOST_FEATURES = 16384
"""Features of a row that registers can hold."""
_WARP_FEATURES = 512
"""Features for each warp of a program, which has at most 16: more could not have 128 registers a thread."""
_FORWARD_WARPS = 192
"""Warps of all programs for each multiprocessor: more than are there at once, so that none is idle at the end."""
_BACKWARD_WARPS = 16
"""As many as are there at once, since each program leaves sums."""
_AHEAD_BYTES = 1 << 15
"""Rows that are loaded ahead, one or two of each tensor, take at most so much shared memory."""


def gelu_norm(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Return ``layer_norm(gelu(h)) * weight + bias`` over the last dim.

    On a GPU with Triton the result has the dtype of ``h``, also under autocast, since a product comes next: GELU,
    statistics and sums are float32, and only the result is rounded. Elsewhere, and for float64, torch's own functions
    compute it and autocast decides.

    Parameters
    ----------
    h : torch.Tensor
        ``(..., features)``, a floating dtype.
    weight, bias : torch.Tensor
        ``(features,)``.
    eps : float
        Added to the variance.

    Returns
    -------
    torch.Tensor
        Shaped as ``h``; by the kernels differentiable once.

    Raises
    ------
    ShapeError
        If weight or bias have other features, beyond which the kernels would read.
    """
    if not h.shape[-1:] == weight.shape == bias.shape:
        raise ShapeError(
            f"weight and bias must have the features of h, got h {tuple(h.shape)}, "
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
        )
    if not _by_kernels(h):
        return F.layer_norm(F.gelu(h), h.shape[-1:], weight, bias, eps)
    out: torch.Tensor = _forward(h, weight, bias, eps)[0]
    return out


def _by_kernels(h: torch.Tensor) -> bool:
    return _HAS_TRITON and h.is_cuda and h.dtype != torch.float64 and 0 < h.shape[-1] <= _MOST_FEATURES


@torch.library.custom_op("longnet_hpc::gelu_norm", mutates_args=())
def _forward(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result, and for each row the mean and the reciprocal standard deviation of its GELU."""
    from longnet_hpc.gelu_norm_kernels import gelu_norm_kernel

    h = h.contiguous()
    out, means, rstds = _results(h)
    rows, programs, sizes = _shares(h, _FORWARD_WARPS)
    with torch.cuda.device_of(h):
        gelu_norm_kernel[(programs,)](h, weight.contiguous(), bias.contiguous(), out, means, rstds, rows, eps, **sizes)
    return out, means, rstds


@torch.library.custom_op("longnet_hpc::gelu_norm_backward", mutates_args=())
def _backward(
    dout: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, means: torch.Tensor, rstds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of ``h``, and those of weight and bias, which are summed in a fixed order."""
    from longnet_hpc.gelu_norm_kernels import gelu_norm_backward_kernel

    h = h.contiguous()
    dh = torch.empty_like(h)
    rows, programs, sizes = _shares(h, _BACKWARD_WARPS)
    sums = torch.empty((2, programs, h.shape[-1]), dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        gelu_norm_backward_kernel[(programs,)](
            dout.contiguous(), h, weight.contiguous(), means, rstds, dh, *sums, rows, **sizes
        )
    dweight, dbias = sums.sum(1).to(weight.dtype).unbind()
    return dh, dweight.clone(), dbias.clone()  # results of an operator share no memory


def _results(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    means, rstds = (h.new_empty(h.shape[:-1], dtype=torch.float32) for _ in range(2))
    return h.new_empty(h.shape), means, rstds


def _shares(h: torch.Tensor, warps_per_multiprocessor: int) -> tuple[int, int, dict[str, int]]:
    """Return the rows, how many programs share them, and how a program holds one: see `gelu_norm_kernels`."""
    features = h.shape[-1]
    rows, width = h.numel() // features, 1 << (features - 1).bit_length()
    first = max(1, width // 2)
    second = 1 << max(0, features - first - 1).bit_length()
    warps = min(16, max(1, width // _WARP_FEATURES))
    multiprocessors = torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 1
    programs = min(rows, multiprocessors * warps_per_multiprocessor // warps)
    stages = 1 + min(2, _AHEAD_BYTES // (features * h.element_size()))
    return rows, programs, {
        "FEATURES": features, "FIRST": first, "SECOND": second, "STAGES": stages,
        "PRECISE": h.dtype == torch.float32, "num_warps": warps,
    }  # fmt: skip


@_forward.register_fake
def _(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(h)


@_backward.register_fake
def _(
    dout: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    h, weight, _, _ = inputs
    _, means, rstds = output
    ctx.save_for_backward(h, weight, means, rstds)


def _differentiate(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_keep)
