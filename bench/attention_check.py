"""How far attention and its gradients are from float64: all of one sequence, or rows of a long one."""

import math
import random

import torch
from attention_ways import dense, ours

from longnet_hpc import Pattern

__all__ = ["TENSORS", "errors_of_dense", "errors_of_ours"]

TENSORS = ("out", "dq", "dk", "dv")
LARGEST = 1 << 26
"""Elements of the largest tensor whose sequence is computed in float64 as a whole."""
NOT_FINITE = 1e9
"""The error of a result that is not finite, for which records have no word."""
SAMPLES = 48
"""Rows of each tensor that are computed of a longer one, in turn from the grids of all branches."""


def errors_of_ours(pattern, causal, backend, leaves, dout):
    """Return relative errors of output and gradients (`TENSORS`), Euclidean, of the last sequence of a batch.

    Parameters
    ----------
    pattern, causal, backend
        What was timed.
    leaves : list of torch.Tensor
        The queries, keys and values that were timed.
    dout : torch.Tensor
        Gradient of the output.
    """
    out, lse = ours(pattern, causal, backend, return_lse=True)(*leaves)
    results = [x[-1:].detach() for x in (out, *torch.autograd.grad(out, leaves, dout))]
    inputs = [x[-1:].detach() for x in (*leaves, dout)]
    if inputs[0].numel() <= LARGEST:
        return _relative(results, _exact(pattern, causal, *inputs))
    rows = _rows(pattern, *inputs[0].shape[1:3])
    sampled = [torch.stack([x[0, position, head] for position, head in rows]) for x in results]
    inputs, out, lse = [x[0] for x in inputs], out[-1].detach(), lse[-1]
    exact = [_exact_row(pattern, causal, *row, *inputs, out, lse) for row in rows]
    return _relative(sampled, [torch.stack(column) for column in zip(*exact, strict=True)])


def errors_of_dense(way, causal, leaves, dout):
    """Return the same of one of torch's ways of dense attention."""
    out = dense(way, causal)(*leaves)
    results = [x.detach() for x in (out, *torch.autograd.grad(out, leaves, dout))]
    return _relative(results, _exact(Pattern.from_lists([out.shape[1]], [1]), causal, *leaves, dout))


def _relative(results, exact):
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]
    return [error if math.isfinite(error) else NOT_FINITE for error in errors]


def _exact(pattern, causal, q, k, v, dout):
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = ours(pattern, causal, "reference")(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def _rows(pattern, seq, heads):
    """Return pairs of position and head on the grids of all branches in turn, the same each time."""
    choose, rows = random.Random(0), []
    branches = list(pattern)
    while len(rows) < SAMPLES:
        branch, head = branches[len(rows) % len(branches)], choose.randrange(heads)
        w, r = branch.segment_length, branch.dilation_rate
        position = choose.randrange(-(-seq // w)) * w + head % r + choose.randrange(-(-w // r)) * r
        if position < seq and (position % w) % r == head % r:
            rows.append((position, head))
    return rows


def _exact_row(pattern, causal, position, head, q, k, v, dout, out, lse):
    """Return rows of output and gradients in float64, from tensors (seq, heads, head_dim).

    Gradients of a key and value take the statistics of the queries that see them from ``out`` and ``lse``, which are
    ours: other rows of this check are what tells that those are right.
    """
    scale = q.shape[-1] ** -0.5
    its_q, its_k, its_v, its_dout = (x[position, head].double() for x in (q, k, v, dout))
    seen = _partners(pattern, position, head, len(q), q.device)
    keys, values = (x[seen[seen <= position] if causal else seen, head].double() for x in (k, v))
    p = torch.softmax(keys @ its_q * scale, dim=0)
    its_out = p @ values
    dq = (p * (values @ its_dout - its_dout @ its_out)) @ keys * scale
    seeing = seen[seen >= position] if causal else seen
    queries, douts, outs, lses = (x[seeing, head].double() for x in (q, dout, out, lse))
    p = torch.exp(queries @ its_k * scale - lses)
    dk = (p * (douts @ its_v - (douts * outs).sum(-1))) @ queries * scale
    return its_out, dq, dk, p @ douts


def _partners(pattern, position, head, seq, device):
    """Return the positions on the grids that a position lies on, once for each branch that offers them."""
    positions = []
    for branch in pattern:
        w, r = branch.segment_length, branch.dilation_rate
        if (position % w) % r == head % r:
            start = position - position % w
            positions.append(torch.arange(start + head % r, min(start + w, seq), r, device=device))
    return torch.cat(positions)
