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
