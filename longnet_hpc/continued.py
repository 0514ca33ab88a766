"""Attention of the last tokens of a causal sequence whose keys are all at hand, as in a cache of keys and values.

The new tokens are a chunk, see `longnet_hpc.chunk`: they attend to each other as a sequence that starts late, and those
of segments that began before them also to the earlier keys on their grids, by strided views of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from longnet_hpc.attention import choose_backend
from longnet_hpc.attention.backend import Backend
from longnet_hpc.attention.branch import attend, attend_pieces
from longnet_hpc.attention.sums import softmax_sum
from longnet_hpc.chunk import Chunk
from longnet_hpc.comm import agree_on
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.grids import past_grids, token_grids
from longnet_hpc.pattern import Pattern
from longnet_hpc.sequence_plan import LayerPlan, SequencePlan, check_shapes, scale_of

__all__ = ["ContinuedPlan", "continued_attention"]

Update = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Adds keys and values of new tokens to those of a layer, and returns all, ``(batch, kv_heads, tokens, head_dim)``."""


def continued_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute the last rows of causal `dilated_attention`, on one rank and without a gradient.

    Parameters
    ----------
    q : torch.Tensor
        Queries of the last ``new`` tokens, ``(batch, new, heads, head_dim)``.
    k, v : torch.Tensor
        Keys and values of the whole sequence, ``(batch, seq, kv_heads, head_dim)``. Only those that the queries see are
        read: for one token and branch at most ``w / r`` rows.
    pattern : Pattern
        The branches.
    softmax_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` by default.
    backend : str
        Name of the attention backend.

    Returns
    -------
    torch.Tensor
        Shaped as ``q``.

    Raises
    ------
    ShapeError
        If shapes do not fit together, or a gradient is wanted.
    BackendError
        If a forced backend cannot compute this.
    """
    start = k.shape[1] - q.shape[1]
    if start < 0:
        raise ShapeError(f"there must be at least as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ShapeError(
            "attention to earlier keys has no gradient: compute the whole sequence at once, "
            "or decode under torch.no_grad()"
        )
    own_k, own_v = k[:, start:], v[:, start:]
    check_shapes(q, own_k, own_v)
    its_backend, scale = choose_backend(backend, q.device, q.dtype, q.shape[3]), scale_of(softmax_scale, q.shape[3])
    # Autocast would lower the reference's products: statistics and sums are float32 at least, whoever calls.
    with torch.no_grad(), torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        if q.shape[1] == 1:
            return _of_one_token(its_backend, q, k, v, pattern, scale)
        plan = SequencePlan.build(pattern, q.shape[1], start=start, backend=backend, device=q.device)
        chunk = Chunk(plan.partition, plan.seq_len)
        seeing = [(branch, run) for branch in pattern if (run := chunk.seeing_piece(branch, 0)) is not None]
        total = attend_pieces(
            *(its_backend, q, own_k, own_v, plan.pieces),
            causal=True, scale=scale, joined=set(seeing), progress=_nothing,
        )  # fmt: skip
        for branch, run in seeing:
            before = slice(start - run.phase, start)
            pairs = past_grids(branch, run, run.phase, q.shape[2], k.shape[2])
            attend(
                *(its_backend, q, k[:, before], v[:, before], pairs, total),
                causal=False, scale=scale, first=False, progress=_nothing,
            )  # fmt: skip
        return total.result()[0]


def _of_one_token(
    backend: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, scale: float
) -> torch.Tensor:
    """Compute the last row alone, by as few kernels as can be: a token is decoded in the time of its launches."""
    (batch, _, heads, head_dim), kv_heads = q.shape, k.shape[2]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim).transpose(1, 2)
    total = softmax_sum(queries)
    for index, branch in enumerate(pattern):
        pairs = token_grids(branch, k.shape[1] - 1, heads, kv_heads)
        attend(
            *(backend, queries, k, v, pairs, total),
            causal=False, scale=scale, first=index == 0, progress=_nothing,
        )  # fmt: skip
    return total.result()[0].transpose(1, 2).reshape(q.shape)


def _nothing() -> None:
    """Drive no exchange: there is one rank."""


class ContinuedPlan:
    """The last tokens of a sequence whose keys and values a cache holds; takes the place of a plan in a model.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    start, local_len : int
        Tokens in the cache, and tokens that follow them.
    update : callable
        Adds keys and values of the latter to the cache of a layer, and returns all.
    seq_len : int
        What position encodings take for the length of the sequence; the same in all calls.
    backend : str
        Name of the attention backend.
    """

    def __init__(
        self, pattern: Pattern, start: int, local_len: int, update: Update, *, seq_len: int, backend: str = "auto"
    ) -> None:
        self.pattern = pattern
        self.start = start
        self.local_len = local_len
        self.seq_len = seq_len
        self.update = update
        self.backend = backend

    def agree(self, facts: Mapping[str, object], error: LongNetError | None = None) -> None:
        """Raise an error, if there is one; there is one rank."""
        agree_on(None, facts, None, error)

    def of_layer(self, index: int) -> LayerPlan:
        """Return what computes the attention of a layer."""
        return _Layer(self, index)


class _Layer:
    def __init__(self, plan: ContinuedPlan, index: int) -> None:
        self.plan = plan
        self.index = index
        self.start = plan.start

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute attention as `SequencePlan.attention` does; it has to be causal."""
        assert causal, "what comes later in time cannot be seen"
        pattern, backend = self.plan.pattern, self.plan.backend
        all_k, all_v = (x.transpose(1, 2) for x in self.plan.update(k.transpose(1, 2), v.transpose(1, 2), self.index))
        if self.start == 0:  # which can be differentiated
            plan = SequencePlan.build(pattern, self.plan.local_len, backend=backend, device=q.device)
            return plan.attention(q, k, v, causal=True, softmax_scale=softmax_scale)
        return continued_attention(q, all_k, all_v, pattern, softmax_scale=softmax_scale, backend=backend)
