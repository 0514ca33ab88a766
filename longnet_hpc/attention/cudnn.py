"""cuDNN's fused attention on strided views: the fastest of torch's on Hopper, where pieces have many rows.

Its plans are made once a shape, which costs about a tenth of a second, so pieces of few rows go to flash attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from longnet_hpc.attention.backend import Backend
from longnet_hpc.attention.library import LIBRARY
from longnet_hpc.compiler_mark import assume_constant_result

__all__ = ["CUDNN"]

_aten = torch.ops.aten
_FEWEST_ROWS = 256
"""Fewest queries, and keys, that are worth a plan."""


def _supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and _can_run(device)
    )


@cache
@assume_constant_result  # torch.compile does not look inside
def _can_run(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available()


def _takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a piece is worth a plan; a key/value head that several query heads share is none of its layouts."""
    return min(q.shape[2], k.shape[2]) >= _FEWEST_ROWS and not any(0 in x.stride() for x in (q, k, v))


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _takes(q, k, v):
        return LIBRARY.forward(q, k, v, causal=causal, scale=scale)
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out, lse.squeeze(-1)


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
    if not _takes(q, k, v) or torch.are_deterministic_algorithms_enabled():  # flash attention has a fixed order, too
        return LIBRARY.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)
    # Torch looks its plans up by the layouts of q, k and v alone; those of the others must follow from q's.
    if not q.stride() == dout.stride() == out.stride():
        q, dout, out = q.contiguous(), dout.contiguous(), out.contiguous()
    no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads: Any = _aten._scaled_dot_product_cudnn_attention_backward(
        *(dout, q, k, v, out, lse.contiguous().unsqueeze(-1), no_seed, no_seed, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )
    dq, dk, dv = grads
    return dq, dk, dv


CUDNN = Backend("cudnn", _supports, _forward, _backward, most_packed_pieces=0)  # a plan for every length
