"""Torch's own fused attention on strided views: no gathered copies, log-sum-exp returned, merged statistics accepted.

These are the operators below `scaled_dot_product_attention`, called directly because only they return the log-sum-exp
and take it back in their backward.
"""

from __future__ import annotations

from typing import Any

import torch

from longnet_hpc.attention.backend import Backend

__all__ = ["LIBRARY"]

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_FLASH_SINCE = (8, 0)
"""Compute capability from which torch's flash attention, which is all that takes half precision here, runs."""


def _supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if device.type == "cpu":
        return dtype in (torch.float64, torch.float32, *_HALF)
    if device.type == "cuda":
        if dtype in _HALF:
            return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= _FLASH_SINCE
        return dtype == torch.float32 and head_dim % 4 == 0
    return False


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype in _HALF:
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        q, k, v = (_short_strides(x) for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        lse = lse[..., : q.shape[-2]]  # this kernel pads its rows to a multiple of 32
    return out, lse


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
    grads: Any
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif q.dtype in _HALF:
        no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = _aten._scaled_dot_product_flash_attention_backward(
            *(dout, q, k, v, out, lse.contiguous(), None, None, q.shape[-2], k.shape[-2], 0.0, causal),
            *(no_seed, no_seed[:0]),
            scale=scale,
        )
    else:
        dout, q, k, v, out = (_short_strides(x) for x in (dout, q, k, v, out))
        padded = torch.nn.functional.pad(lse.contiguous(), (0, -lse.shape[-1] % 32), value=torch.inf)
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            *(dout, q, k, v, None, out, padded, no_seed, no_seed, 0.0, (True, True, True, False), causal), scale=scale
        )
    dq, dk, dv = grads[:3]
    return dq, dk, dv


def _short_strides(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, copied if this kernel's 32-bit strides cannot reach over it."""
    return x if max(x.stride()) < 2**31 else x.contiguous()


LIBRARY = Backend("library", _supports, _forward, _backward)
