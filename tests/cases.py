"""Random cases of dilated attention, shared by the tests on one rank and on many."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """Shapes and pattern of one problem; `tensors` makes its numbers."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    segment_lengths: tuple
    dilation_rates: tuple
    causal: bool
    seed: int

    def tensors(self, dtype):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(heads):
            shape = (self.batch, self.seq, heads, self.head_dim)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return normal(self.heads), normal(self.kv_heads), normal(self.kv_heads), normal(self.heads)

    @property
    def pattern(self):
        return self.segment_lengths, self.dilation_rates


@st.composite
def cases(draw, max_seq=72):
    branches = draw(st.lists(st.tuples(st.integers(1, 2 * max_seq), st.integers(1, 13)), min_size=1, max_size=3))
    kv_heads = draw(st.integers(1, 4))
    return Case(
        batch=draw(st.integers(1, 3)),
        seq=draw(st.integers(1, max_seq)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((1, 3, 8))),
        segment_lengths=tuple(w for w, _ in branches),
        dilation_rates=tuple(r for _, r in branches),
        causal=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


HOPPER_CASES = {
    "merged in the dense grid": (2, 512, 3, 3, (128, 256, 512), (1, 2, 3)),
    "shared key/value heads": (1, 512, 4, 2, (128, 512), (1, 4)),
    "last segment shorter": (1, 488, 2, 2, (128, 256), (1, 2)),
    "queries on no grid": (2, 384, 3, 3, (128, 384), (2, 5)),
    "segments of any length": (1, 545, 3, 3, (150, 300, 545), (1, 2, 4)),
    "one dense segment": (2, 350, 2, 2, (350,), (1,)),
    "pieces that do not fill the sequences": (2, 545, 2, 1, (150, 300, 545), (1, 2, 4)),
    "fewer rows than a tile, and none": (1, 320, 8, 8, (64, 4, 320), (1, 6, 7)),
    "two dense branches": (1, 256, 2, 2, (64, 256), (1, 1)),
}
"""Batch, tokens, heads, key/value heads and pattern of cases that take different ways through kernels for Hopper."""
