"""Sequence-parallel dilated attention: pattern + partition + attention + communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from longnet_hpc.attention import choose_backend
from longnet_hpc.errors import LongNetError
from longnet_hpc.one_process import OneProcessPlan
from longnet_hpc.packed import Integers, documents_of
from longnet_hpc.pattern import Pattern
from longnet_hpc.sequence_plan import SequencePlan, check_shapes, scale_of

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["agreed_attention", "dilated_attention"]


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    comm: MPI.Comm | None = None,
    cu_seqlens: Integers | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute LongNet's dilated attention (arXiv 2307.02486, Eq. 6-15), exactly, on one rank or many.

    Head h looks at the grid of offset ``h mod r`` of each segment of each branch, and one softmax runs over the keys of
    all branches, a key that two branches offer counting twice (Eq. 9-10: the mixture by softmax denominators).

    Parameters
    ----------
    q : torch.Tensor
        Queries, ``(batch, seq, heads, head_dim)``, float64, float32, bfloat16 or float16, on CPU or CUDA. With a
        communicator, ``seq`` is this rank's slice; slices may be uneven or empty, and rank order is sequence order.
    k, v : torch.Tensor
        Keys and values, ``(batch, seq, kv_heads, head_dim)``; kv_heads must divide heads (grouped-query attention).
        The offset is the *query* head's: a key/value head shared by several query heads is looked at on the grid of
        each of them, so with enough sharing every position of a shared head is seen by one of its query heads.
    segment_lengths, dilation_rates : sequence of int
        One w and one r per branch, in tokens; any values of at least 1.
    causal : bool
        Whether a query sees only keys at or before its own global position.
    softmax_scale : float, optional
        Factor on the scores, above 0; ``head_dim ** -0.5`` by default.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share the sequence. Collective over them, forward and backward.
    cu_seqlens : sequence of int or torch.Tensor, optional
        Boundaries of documents that are packed into the sequence of all ranks: 0, where each next one begins, and the
        number of tokens. Each is attended to as if it were alone: segments and grids begin anew with it. They are the
        same in every sequence of the batch. A list is best, since a tensor on a GPU is waited for. Neighbours of equal
        length are computed together.
    backend : str
        ``auto`` or a name in `longnet_hpc.attention.BACKENDS`.
    return_lse : bool
        Also return the log-sum-exp of the merged softmax.

    Returns
    -------
    out : torch.Tensor
        Shaped as ``q``. A query that lies on no grid gets 0.
    lse : torch.Tensor
        Only with ``return_lse``: ``(batch, seq, heads)``, float32 (float64 for float64), minus infinity where a query
        lies on no grid. Not differentiable.

    Raises
    ------
    PatternError
        If w or r is below 1 or the lists differ in length.
    PartitionError
        If ``cu_seqlens`` does not go from 0 to the number of tokens, or falls.
    ShapeError
        If shapes, dtypes or devices do not fit together, on this rank or between ranks, or the ranks disagree about
        anything else that must be alike (whether a gradient is wanted, too). All ranks raise it.
    BackendError
        If a forced backend cannot compute this.

    Notes
    -----
    `torch.compile` and `torch.export` take attention into a graph as one operator, but not the agreement with other
    ranks: there, and wherever the ranks are known to agree, make a `SequencePlan` once and call its `attention`.
    """
    error: LongNetError | None = None
    pattern: Pattern | None = None
    try:
        pattern = Pattern.from_lists(segment_lengths, dilation_rates)
    except LongNetError as caught:
        error = caught
    out, lse = agreed_attention(
        *(q, k, v, pattern),
        causal=causal,
        softmax_scale=softmax_scale,
        comm=comm,
        cu_seqlens=cu_seqlens,
        backend=backend,
        error=error,
    )
    return (out, lse) if return_lse else out


def agreed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | None,
    *,
    causal: bool,
    softmax_scale: float | None,
    comm: MPI.Comm | None,
    backend: str,
    error: LongNetError | None,
    cu_seqlens: Integers | None = None,
    facts: Mapping[str, object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `dilated_attention`, for a caller that may have found an error on this rank alone.

    Parameters
    ----------
    q, k, v, causal, softmax_scale, comm, backend, cu_seqlens
        As for `dilated_attention`; beside an ``error`` they are not looked at.
    pattern : Pattern or None
        The branches; None only beside an ``error``.
    error : LongNetError or None
        What the caller found; all ranks then raise it. Collective.
    facts : mapping, optional
        Whatever else must be equal on all ranks, by name.

    Returns
    -------
    out, lse : torch.Tensor
        As for `dilated_attention`.
    """
    facts = dict(facts or {})
    local_len, device = 0, torch.device("cpu")
    if error is None:
        try:
            check_shapes(q, k, v)
            choose_backend(backend, q.device, q.dtype, q.shape[-1])
            local_len, device = q.shape[1], q.device
            facts |= {
                "batch": q.shape[0],
                "heads": q.shape[2],
                "kv_heads": k.shape[2],
                "head_dim": q.shape[3],
                "dtype": q.dtype,
                "causal": causal,
                "softmax_scale": scale_of(softmax_scale, q.shape[3]),
                "gradient wanted": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
            }
        except LongNetError as caught:
            error = caught
    if comm is None and torch.compiler.is_compiling():
        if error is not None:
            raise error
        assert pattern is not None
        plan_of_graph = OneProcessPlan(pattern, local_len, documents_of(cu_seqlens), backend)
        return plan_of_graph.attend(q, k, v, causal=causal, softmax_scale=softmax_scale)
    plan = SequencePlan.build(
        *(pattern, local_len),
        cu_seqlens=cu_seqlens,
        comm=comm,
        backend=backend,
        device=device,
        error=error,
        facts=facts,
    )
    return plan.attend(q, k, v, causal=causal, softmax_scale=softmax_scale)
