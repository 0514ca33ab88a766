"""Sequence-parallel dilated attention: pattern + partition + attention + communication."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch

from longnet_hpc.attention import choose_backend
from longnet_hpc.comm import agree_on, groups_of, rank_and_size
from longnet_hpc.comm.transport import decide_transport, is_decided
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.exchange import SpanExchange
from longnet_hpc.mixture import mixture
from longnet_hpc.partition import Partition, Run, SpanLayout, rank_groups
from longnet_hpc.pattern import Branch, Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.comm.buffers import Pending

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
        If shapes, dtypes or devices do not fit together, on this rank or between ranks, or the ranks disagree about
        anything else that must be alike (whether a gradient is wanted, too). All ranks raise it.
    BackendError
        If a forced backend cannot compute this.
    """
    error: LongNetError | None = None
    pattern: Pattern | None = None
    facts: dict[str, object] = {}
    try:
        pattern = Pattern.from_lists(segment_lengths, dilation_rates)
        _check_shapes(q, k, v)
        choose_backend(backend, q.device, q.dtype, q.shape[-1])
        facts = {
            "batch": q.shape[0],
            "heads": q.shape[2],
            "kv_heads": k.shape[2],
            "head_dim": q.shape[3],
            "dtype": q.dtype,
            "causal": causal,
            "softmax_scale": _scale(softmax_scale, q.shape[3]),
            "gradient wanted": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        }
    except LongNetError as caught:
        error = caught
    local_len = q.shape[1] if error is None else 0
    plan = SequencePlan.build(pattern, local_len, comm=comm, backend=backend, device=q.device, error=error, facts=facts)
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
    seconds_tested : float
        Seconds that this rank has spent in MPI between kernels, to drive exchanges.
    seconds_waited : float
        Seconds that this rank has waited for exchanges that computing did not hide.
    """

    def __init__(self, pattern: Pattern, partition: Partition, comm: MPI.Comm | None, backend: str) -> None:
        self.pattern = pattern
        self.partition = partition
        self.rank = rank_and_size(comm)[0]
        self.backend = backend
        self.bytes_received = 0
        self.seconds_tested = 0.0
        self.seconds_waited = 0.0
        self._comm = comm
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
        device: torch.device | str = "cpu",
        error: LongNetError | None = None,
        facts: Mapping[str, object] | None = None,
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
        device : torch.device or str
            Where the tensors will lie.
        error : LongNetError, optional
            What is wrong on this rank, if anything; all ranks then raise it.
        facts : mapping, optional
            Whatever else must be equal on all ranks, by name.

        Returns
        -------
        SequencePlan
            The same object for the same arguments, while it is among the last `MAX_PLANS`. Collective.

        Raises
        ------
        ShapeError
            If the ranks disagree.
        """
        device_type = torch.device(device).type
        alike = {"pattern": pattern, "backend": backend, "device": device_type, **(facts or {})}
        answers = agree_on(comm, alike, (local_len, is_decided()), error)
        assert pattern is not None
        partition = Partition.from_lengths([length for length, _ in answers])
        if device_type == "cuda" and comm is not None and not all(decided for _, decided in answers):
            decide_transport(comm)
        key = (pattern, partition, backend)
        plans = _PLANS if comm is None else groups_of(comm).plans
        if len(plans) >= MAX_PLANS:
            plans.clear()
        if key not in plans:
            plans[key] = cls(pattern, partition, comm, backend)
        plan: SequencePlan = plans[key]
        return plan

    def agree(self, facts: Mapping[str, object], error: LongNetError | None = None) -> None:
        """Make sure that no rank has failed and that all are about to do the same.

        Parameters
        ----------
        facts : mapping
            Values that must be equal on all ranks, by name.
        error : LongNetError, optional
            What is wrong on this rank, if anything; all ranks then raise it.

        Raises
        ------
        ShapeError
            If the ranks disagree. Collective.
        """
        agree_on(self._comm, facts, None, error)

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
    def pieces(self) -> tuple[tuple[int, Branch, Run], ...]:
        """Every piece of a segment in this rank's slice, branch by branch, with the number of its branch."""
        return tuple(
            (index, branch, run)
            for index, branch in enumerate(self.pattern)
            for run in self.partition.runs(branch, self.rank)
        )

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute `dilated_attention` over the sequence of this plan. Collective, forward and backward.

        Unlike there, ranks do not ask each other first whether they are about to do the same: that is the caller's to
        know, once for many calls (`agree`), and an error is raised on this rank alone.

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
        """Do as `attention`, and return the log-sum-exp as well.

        Parameters
        ----------
        q, k, v, causal, softmax_scale
            As for `attention`.

        Returns
        -------
        out, lse : torch.Tensor
            ``(batch, local_len, heads, head_dim)`` and ``(batch, local_len, heads)``.

        Raises
        ------
        ShapeError
            If the shapes do not fit the plan or each other, on this rank alone.
        """
        _check_shapes(q, k, v)
        if q.shape[1] != self.local_len:
            raise ShapeError(f"rank {self.rank} owns {self.local_len} tokens of this plan, got {q.shape[1]}")
        return mixture(q, k, v, self, causal=causal, scale=_scale(softmax_scale, q.shape[3]))

    def exchanges(self, heads: int, kv_heads: int, *, causal: bool) -> tuple[tuple[Branch, SpanExchange], ...]:
        """Return this rank's exchanges, in the order in which all ranks start them."""
        return self._exchanges(heads, kv_heads, causal)

    def count_seconds(self, flights: Sequence[Pending]) -> None:
        """Add what finished exchanges took of this rank's time."""
        self.seconds_tested += sum(flight.seconds_tested for flight in flights)
        self.seconds_waited += sum(flight.seconds_waited for flight in flights)

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


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLANS: dict[Any, SequencePlan] = {}
MAX_PLANS = 256


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q, k and v must be (batch, seq, heads, head_dim), got {shapes}")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"k and v must be shaped alike and agree with q in batch, seq and head_dim, got {shapes}")
    if q.shape[2] < 1 or q.shape[3] < 1 or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ShapeError(f"the key/value heads must divide the query heads, at least 1 of each, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise ShapeError(
            f"q, k and v must share one of float64, float32, bfloat16 and float16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return float(head_dim**-0.5)
    if not isinstance(softmax_scale, (int, float)) or not math.isfinite(softmax_scale):
        raise ShapeError(f"softmax_scale must be a finite number, got {softmax_scale!r}")
    return float(softmax_scale)
