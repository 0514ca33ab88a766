"""Dilated attention written from its definition, position by position, in float64: what the library is compared with.

It shares no code with the package: a dense matrix counts how often each key is offered to each query, and one softmax
runs over that multiset.
"""

import torch


def offered(seq, heads, segment_lengths, dilation_rates, causal):
    """Return how many branches offer key m to query n of head h: an integer tensor (heads, seq, seq)."""
    counts = torch.zeros(heads, seq, seq, dtype=torch.int64)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        for h in range(heads):
            on_grid = torch.tensor([(p % w) % r == h % r for p in range(seq)], dtype=torch.bool)
            segment = torch.tensor([p // w for p in range(seq)])
            counts[h] += (segment[:, None] == segment[None, :]) & on_grid[:, None] & on_grid[None, :]
    if causal:
        counts = counts.tril()
    return counts


def attention(q, k, v, segment_lengths, dilation_rates, causal, scale=None):
    """Return out (batch, seq, heads, head_dim) and lse (batch, seq, heads) in float64, differentiable."""
    _, seq, heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    counts = offered(seq, heads, segment_lengths, dilation_rates, causal)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) * scale
    scores = scores + counts.double().log()
    seen = (counts.sum(-1) > 0)[None]
    safe = scores.masked_fill(~seen[..., None], 0.0)
    weights = safe.softmax(-1) * seen[..., None]
    out = torch.einsum("bhnm,bmhd->bnhd", weights, v.double())
    lse = scores.logsumexp(-1).masked_fill(~seen, -torch.inf)
    return out, lse.transpose(1, 2)


def attention_with_gradients(q, k, v, dout, segment_lengths, dilation_rates, causal, scale=None):
    """Return out, lse, dq, dk, dv in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, segment_lengths, dilation_rates, causal, scale)
    grads = torch.autograd.grad(out, leaves, dout.double())
    return out.detach(), lse.detach(), *grads
