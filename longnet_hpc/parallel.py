"""Sequence-parallel dilated attention: pattern + partition + attention + communication.

Forward: start the exchanges of spanning segments, compute every piece against the keys of its own slice meanwhile, then
let the queries of spanning pieces see the rows that arrived. Backward: the same in reverse, with the merged statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from longnet_hpc.attention import choose_backend
from longnet_hpc.attention.branch import (
    Gradients,
    Inputs,
    Merged,
    Rows,
    piece_backward,
    piece_forward,
    rows_backward,
    rows_forward,
)
from longnet_hpc.comm import allgather_objects, groups_of, rank_and_size
from longnet_hpc.comm.transport import transport_of
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.exchange import SpanExchange
from longnet_hpc.partition import Partition, Run, SpanLayout, rank_groups
from longnet_hpc.pattern import Branch, Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SequencePlan", "dilated_attention"]


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
        Factor on the scores; ``head_dim ** -0.5`` by default.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share the sequence. Collective over them, forward and backward.
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
    ShapeError
        If shapes, dtypes or devices do not fit together, on this rank or between ranks.
    BackendError
        If a forced backend cannot compute this.
    """
    error: LongNetError | None = None
    signature: tuple[Any, ...] = ()
    try:
        pattern = Pattern.from_lists(segment_lengths, dilation_rates)
        _check_shapes(q, k, v)
        choose_backend(backend, q.device, q.dtype, q.shape[-1])
        signature = (pattern, q.shape[0], q.shape[2:], k.shape[2], q.dtype, q.device.type, causal, softmax_scale)
    except LongNetError as caught:
        error = caught
    plan = SequencePlan.build(
        pattern if error is None else None,
        q.shape[1] if q.dim() == 4 else 0,
        comm=comm,
        backend=backend,
        error=error,
        signature=signature,
    )
    out, lse = plan.attend(q, k, v, causal=causal, softmax_scale=softmax_scale)
    return (out, lse) if return_lse else out


class SequencePlan:
    """Who owns which tokens of one sequence, and everything that its attention needs for that; made by `build`.

    Attributes
    ----------
    pattern : Pattern
        The branches.
    partition : Partition
        The slices of all ranks.
    rank : int
        This rank.
    backend : str
        Name of the attention backend, or ``auto``.
    bytes_received : int
        Bytes that this rank has received in exchanges of attention so far, forward and backward.
    seconds_waited : float
        Seconds that this rank has waited for exchanges that computing did not hide.
    """

    def __init__(self, pattern: Pattern, partition: Partition, comm: MPI.Comm | None, backend: str) -> None:
        self.pattern = pattern
        self.partition = partition
        self.rank = rank_and_size(comm)[0]
        self.backend = backend
        self.bytes_received = 0
        self.seconds_waited = 0.0
        self._groups = None
        if comm is not None and comm.size > 1:
            self._groups = groups_of(comm)
            self._groups.ensure(rank_groups(pattern, partition))
        self._exchanges = cache(self._make_exchanges)

    @classmethod
    def build(
        cls,
        pattern: Pattern | None,
        local_len: int,
        *,
        comm: MPI.Comm | None = None,
        backend: str = "auto",
        error: LongNetError | None = None,
        signature: tuple[Any, ...] = (),
    ) -> SequencePlan:
        """Agree with the other ranks on the slices of a sequence, and return the plan for them.

        Parameters
        ----------
        pattern : Pattern or None
            The branches, the same on all ranks; None only beside an ``error``.
        local_len : int
            Tokens of this rank's slice.
        comm : mpi4py.MPI.Comm, optional
            Ranks that share the sequence.
        backend : str
            Name of the attention backend.
        error : LongNetError, optional
            What is wrong on this rank, if anything; all ranks then raise it.
        signature : tuple
            Whatever else must be equal on all ranks.

        Returns
        -------
        SequencePlan
            The same object for the same arguments. Collective.

        Raises
        ------
        ShapeError
            If the ranks disagree.
        """
        answers = allgather_objects(comm, (error, local_len, (pattern, backend, *signature)))
        for other_error, _, _ in answers:
            if other_error is not None:
                raise other_error
        for other, answer in enumerate(answers):
            if answer[2] != answers[0][2]:
                raise ShapeError(f"rank {other} disagrees with rank 0: {_difference(answer[2], answers[0][2])}")
        assert pattern is not None
        partition = Partition.from_lengths([answer[1] for answer in answers])
        if torch.cuda.is_available() and comm is not None:
            transport_of(comm)
        key = (pattern, partition, backend)
        plans = _PLANS if comm is None else groups_of(comm).plans
        if len(plans) >= MAX_PLANS:
            plans.clear()
        if key not in plans:
            plans[key] = cls(pattern, partition, comm, backend)
        plan: SequencePlan = plans[key]
        return plan

    @property
    def start(self) -> int:
        """Global position of this rank's first token."""
        return self.partition.bounds[self.rank]

    @property
    def local_len(self) -> int:
        """Tokens of this rank's slice."""
        return len(self.partition.slice_of(self.rank))

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.partition.seq_len

    @cached_property
    def pieces(self) -> tuple[tuple[Branch, Run], ...]:
        """Every piece of a segment in this rank's slice, branch by branch."""
        return tuple((branch, run) for branch in self.pattern for run in self.partition.runs(branch, self.rank))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute `dilated_attention` over the sequence of this plan. Collective, forward and backward.

        Parameters
        ----------
        q, k, v : torch.Tensor
            This rank's slice, ``(batch, local_len, heads or kv_heads, head_dim)``.
        causal : bool
            Whether a query sees only keys at or before its own position.
        softmax_scale : float, optional
            Factor on the scores; ``head_dim ** -0.5`` by default.

        Raises
        ------
        ShapeError
            If the shapes do not fit the plan or each other.
        """
        return self.attend(q, k, v, causal=causal, softmax_scale=softmax_scale)[0]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do as `attention`, and return the log-sum-exp ``(batch, local_len, heads)`` as well."""
        _check_shapes(q, k, v)
        if q.shape[1] != self.local_len:
            raise ShapeError(f"rank {self.rank} owns {self.local_len} tokens of this plan, got {q.shape[1]}")
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        # Autocast would lower the reference's products: statistics and sums are float32 at least, whoever calls.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _DilatedAttention.apply(q, k, v, self, causal, scale)
        return out, lse

    def exchanges(self, heads: int, kv_heads: int, *, causal: bool) -> tuple[tuple[Branch, SpanExchange], ...]:
        """Return this rank's exchanges, in the order in which all ranks start them."""
        return self._exchanges(heads, kv_heads, causal)

    def _make_exchanges(self, heads: int, kv_heads: int, causal: bool) -> tuple[tuple[Branch, SpanExchange], ...]:
        return tuple(
            (
                branch,
                SpanExchange(
                    SpanLayout(branch, span, self.rank, heads, kv_heads, causal=causal), self._groups[span.ranks]
                ),
            )
            for branch in self.pattern
            for span in self.partition.spans(branch, self.rank)
            if self._groups is not None
        )


_PLANS: dict[Any, SequencePlan] = {}
MAX_PLANS = 256


class _DilatedAttention(torch.autograd.Function):
    """Forward and backward of the mixture; nothing per branch is saved but the rows that came from other ranks."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = _inputs(q, k, v, plan, causal, scale)
        exchanges = plan.exchanges(q.shape[2], k.shape[2], causal=causal)
        flights = [exchange.start(k, v) for _, exchange in exchanges]
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        def progress() -> None:
            for flight in flights:
                flight.test()

        wide = _wide(q.dtype)
        merged = Merged(
            out=torch.zeros(q.shape, dtype=wide, device=q.device),
            lse=torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device),
        )
        for branch, run in plan.pieces:
            piece_forward(x, branch, run, merged, first=branch is plan.pattern.branches[0], progress=progress)
        arrived: list[Rows] = []
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            arrived.append(exchange.finish(flight, k))
            rows_forward(x, branch, exchange.layout.piece, arrived[-1], merged)
            progress()
        plan.seconds_waited += sum(flight.seconds_waited for flight in flights)

        out = merged.out.to(q.dtype)
        ctx.plan, ctx.causal, ctx.scale = plan, causal, scale
        ctx.row_offsets = [tuple(rows) for rows in arrived]
        ctx.save_for_backward(
            q, k, v, out, merged.lse, *(t for rows in arrived for pair in rows.values() for t in pair)
        )
        ctx.mark_non_differentiable(merged.lse)
        return out, merged.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *out_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *row_tensors = ctx.saved_tensors
        plan: SequencePlan = ctx.plan
        x = _inputs(q, k, v, plan, ctx.causal, ctx.scale)
        wide = _wide(q.dtype)
        grads = Gradients(
            dout=out_grads[0].contiguous(),
            out=out,
            lse=lse,
            dq=torch.zeros(q.shape, dtype=wide, device=q.device),
            dk=torch.zeros(k.shape, dtype=wide, device=q.device),
            dv=torch.zeros(v.shape, dtype=wide, device=q.device),
        )
        exchanges = plan.exchanges(q.shape[2], k.shape[2], causal=ctx.causal)
        flights = []
        tensors = iter(row_tensors)
        for (branch, exchange), offsets in zip(exchanges, ctx.row_offsets, strict=True):
            rows = {offset: (next(tensors), next(tensors)) for offset in offsets}
            row_grads = rows_backward(x, branch, exchange.layout.piece, rows, grads)
            flights.append(exchange.start_adjoint(row_grads, k))
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        def progress() -> None:
            for flight in flights:
                flight.test()

        for branch, run in plan.pieces:
            piece_backward(x, branch, run, grads, progress=progress)
        for (_, exchange), flight in zip(exchanges, flights, strict=True):
            exchange.finish_adjoint(flight, grads.dk, grads.dv)
        plan.seconds_waited += sum(flight.seconds_waited for flight in flights)
        return grads.dq.to(q.dtype), grads.dk.to(k.dtype), grads.dv.to(v.dtype), None, None, None


def _inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, causal: bool, scale: float
) -> Inputs:
    backend = choose_backend(plan.backend, q.device, q.dtype, q.shape[-1])
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return Inputs(q, k, v, backend=backend, causal=causal, scale=scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q, k and v must be (batch, seq, heads, head_dim), got {shapes}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"k and v must be shaped alike and agree with q in batch, seq and head_dim, got {shapes}")
    if q.shape[2] < 1 or q.shape[3] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ShapeError(f"the key/value heads must divide the query heads, at least 1 of each, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ShapeError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _difference(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> str:
    """Return the first pair of values that differ, as words."""
    pairs = zip(mine, theirs, strict=False)
    return next((f"{a} is not {b}" for a, b in pairs if a != b), f"{len(mine)} values are not {len(theirs)}")
