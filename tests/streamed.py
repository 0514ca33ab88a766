"""Attention of one layer over a sequence in chunks, forward and backward."""

import itertools

import torch

from longnet_hpc import Pattern
from longnet_hpc.carry_store import RowStore
from longnet_hpc.stream import SequenceStream


def streamed_attention(q, k, v, dout, pattern, bounds, *, backend="auto", scratch=None):
    """Return out, dq, dk, dv of causal attention, computed chunk by chunk."""
    pattern, seq = Pattern.from_lists(*pattern), q.shape[1]
    stream = SequenceStream(pattern, seq, layers=1, backend=backend, device=q.device)
    store = RowStore(pattern, seq, device=q.device, scratch=scratch)
    chunks = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    outs, grads = [], []
    for its in chunks:
        with torch.no_grad(), stream.next_chunk(its.stop - its.start) as plan:
            outs.append(plan.of_layer(0).attention(q[:, its], k[:, its], v[:, its], causal=True))
        store.keep(stream.carries, plan.chunk)
    for its in reversed(chunks):
        leaves = [x[:, its].clone().requires_grad_() for x in (q, k, v)]
        with stream.chunk_again(its.start, its.stop - its.start, store) as plan:
            out = plan.of_layer(0).attention(*leaves, causal=True)
            grads.append(torch.autograd.grad(out, leaves, dout[:, its]))
    store.close()
    return torch.cat(outs, 1), *(torch.cat(parts, 1) for parts in zip(*reversed(grads), strict=True))


STREAMED_CASES = {
    "wide branches folded": (1, 1024, 3, 3, (128, 512, 1024, 4096), (1, 4, 64, 128), (0, 256, 640, 1024)),
    "shared key/value heads": (2, 512, 4, 2, (64, 512), (1, 64), (0, 128, 320, 512)),
    "dense segments cut": (1, 512, 2, 2, (128, 512), (1, 2), (0, 192, 448, 512)),
    "equal rates, unequal phases": (1, 1024, 3, 3, (128, 700, 4096), (1, 64, 64), (0, 768, 1024)),
    "chunks of any length": (1, 545, 3, 3, (150, 300, 545), (1, 2, 4), (0, 100, 333, 545)),
}
"""Batch, tokens, heads, key/value heads, pattern and chunks that take different ways through kernels for Hopper."""
