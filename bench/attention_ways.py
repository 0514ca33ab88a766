"""The ways of attention that `attention.py` compares, as functions of `(batch, seq, heads, head_dim)` tensors."""

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from longnet_hpc import dilated_attention

__all__ = ["DENSE", "best_dense", "dense", "gather_attend_scatter", "ours"]

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""Torch's dense attention by name, what should be the fastest on Hopper first."""


def ours(pattern, causal, backend, **options):
    """Return dilated attention as a caller of the library gets it."""
    lists = pattern.segment_lengths, pattern.dilation_rates

    def attend(q, k, v):
        return dilated_attention(q, k, v, *lists, causal=causal, backend=backend, **options)

    return attend


def dense(way, causal):
    """Return dense attention by one of `DENSE`."""

    def attend(q, k, v):
        with sdpa_kernel(DENSE[way]):
            rows = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*rows, is_causal=causal).transpose(1, 2)

    return attend


def best_dense(q, k, v, causal):
    """Return which of `DENSE` is the yardstick for such tensors: cuDNN's, unless it does not take them."""
    if not q.is_cuda:
        return "flash"
    with sdpa_kernel(DENSE["cudnn"]):
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return "cudnn" if can_use_cudnn_attention(SDPAParams(*rows, None, 0.0, causal, False)) else "flash"


def gather_attend_scatter(pattern, causal):
    """Return the usual way: copies to compact tensors and back to a dense one, branch by branch, then the mixture.

    Segments must divide the sequence. As in the public implementations, the weights of the mixture count as constants
    in the backward pass, since the log-sum-exp of flash attention has no gradient: its gradients are not those of the
    mixture, and its time is less than exact ones would take.
    """

    def attend(q, k, v):
        batch, seq, heads, head_dim = q.shape
        outs, lses = [], []
        for branch in pattern:
            w, r = min(branch.segment_length, seq), branch.dilation_rate
            out = torch.zeros_like(q)
            lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
            for offset in range(min(r, heads, w)):
                grid = (slice(None), slice(None), slice(offset, None, r), slice(offset, None, r))
                rows = [x.view(batch, seq // w, w, heads, head_dim)[grid].flatten(0, 1) for x in (q, k, v)]
                part, part_lse = _flash(*(x.transpose(1, 2).contiguous() for x in rows), causal)
                shape = (batch, seq // w, *part.transpose(1, 2).shape[1:])
                out.view(batch, seq // w, w, heads, head_dim)[grid] = part.transpose(1, 2).reshape(shape)
                lse.view(batch, seq // w, w, heads)[grid] = part_lse.transpose(1, 2).reshape(shape[:-1])
            outs.append(out)
            lses.append(lse)
        weights = torch.softmax(torch.stack(lses), dim=0).nan_to_num(0.0)  # a query on no grid has no weights
        return sum(out * weight.unsqueeze(-1) for out, weight in zip(outs, weights.to(q.dtype), strict=True))

    return attend


def _flash(q, k, v, causal):
    """Return output and log-sum-exp, of which the latter is a constant to autograd."""
    if q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse.detach()
