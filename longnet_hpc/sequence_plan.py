"""Who owns which tokens of a sequence, and everything that its attention needs for that, made once and kept."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash

from longnet_hpc.comm import agree_on, allgather_objects, groups_of, rank_and_size
from longnet_hpc.comm.transport import decide_transport, is_decided
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.exchange import SpanExchange
from longnet_hpc.mixture import handle_of, mixture
from longnet_hpc.packed import Integers, documents_of
from longnet_hpc.partition import Partition, Run, SpanLayout, rank_groups
from longnet_hpc.pattern import Branch, Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.comm.buffers import Pending

__all__ = ["LayerPlan", "Plan", "SequencePlan", "check_shapes", "scale_of"]


class LayerPlan(Protocol):
    """What a block knows of the sequence that it computes on."""

    @property
    def start(self) -> int:
        """Global position of this rank's first token."""

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute the attention of one layer; see `SequencePlan.attention`."""


class Plan(Protocol):
    """What a model knows of the sequence that it computes on: a `SequencePlan`, or what takes its place."""

    @property
    def pattern(self) -> Pattern:
        """The branches."""

    @property
    def start(self) -> int:
        """Global position of this rank's first token."""

    @property
    def local_len(self) -> int:
        """Tokens of this rank's slice."""

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""

    def of_layer(self, index: int) -> LayerPlan:
        """Return what computes the attention of a layer."""

    def agree(self, facts: Mapping[str, object], error: LongNetError | None = None) -> None:
        """Raise the error, if any, or one that tells how ranks differ; see `SequencePlan.agree`."""


Observer = Callable[[Sequence[tuple[Branch, SpanExchange]], Sequence["Pending"], bool], object]


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
    start : int
        Global position of this rank's first token.
    backend : str
        Name of the attention backend, or ``auto``.
    handle : int
        Number of this plan, by which operators know it.
    rank_groups : tuple of tuple of int
        The groups of ranks that share a spanning segment.
    bytes_received : int
        Bytes that this rank has received in exchanges of attention so far, forward and backward.
    seconds_tested : float
        Seconds that this rank has spent in MPI to start exchanges and, between kernels, to drive them.
    seconds_waited : float
        Seconds that this rank has waited for exchanges that computing did not hide.
    observer : callable or None
        Told of the finished exchanges of each pass, and whether gradients went back by them.
    """

    def __init__(self, pattern: Pattern, partition: Partition, comm: MPI.Comm | None, backend: str) -> None:
        self.pattern = pattern
        self.partition = partition
        self.rank = rank_and_size(comm)[0]
        self.start = partition.bounds[self.rank]
        self.backend = backend
        self.bytes_received = 0
        self.seconds_tested = 0.0
        self.seconds_waited = 0.0
        self.observer: Observer | None = None
        self.handle = handle_of(self)
        self._comm = comm
        self._exchanges: dict[tuple[int, int, bool], tuple[tuple[Branch, SpanExchange], ...]] = {}
        self.rank_groups: tuple[tuple[int, ...], ...] = ()
        if comm is not None and comm.size > 1:
            self.rank_groups = rank_groups(pattern, partition)
            groups_of(comm).ensure(self.rank_groups)

    @classmethod
    def build(
        cls,
        pattern: Pattern | None,
        local_len: int,
        *,
        start: int = 0,
        cu_seqlens: Integers | None = None,
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
        start : int
            Position of the first token of all ranks: above 0 for a chunk, see `stream.SequenceStream`.
        cu_seqlens : sequence of int or torch.Tensor, optional
            Where packed documents begin in the sequence of all ranks, and its length; see `dilated_attention`.
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
            The same object for the same arguments, while it is among the `MAX_PLANS` made last. Collective.

        Raises
        ------
        ShapeError
            If the ranks disagree, or ``cu_seqlens`` are no integers.
        PartitionError
            If documents fall or are not all of the sequence.
        """
        device_type = torch.device(device).type
        documents: tuple[int, ...] = ()
        try:
            documents = documents_of(cu_seqlens)
        except LongNetError as caught:
            error = error or caught
        alike = {"pattern": pattern, "start": start, "backend": backend, "device": device_type, **(facts or {})}
        if comm is not None:
            alike |= {"documents": len(documents), "digest of cu_seqlens": _digest(documents)}
        answers = agree_on(comm, alike, (local_len, is_decided()), error)
        assert pattern is not None
        partition = Partition.from_lengths([length for length, _ in answers], start, documents)
        if device_type == "cuda" and comm is not None and not all(decided for _, decided in answers):
            decide_transport(comm)
        key = (pattern, partition, backend)
        plans = _PLANS if comm is None else groups_of(comm).plans
        if key not in plans:
            if len(plans) >= MAX_PLANS:
                _retire(plans, comm)
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
    def local_len(self) -> int:
        """Tokens of this rank's slice."""
        return len(self.partition.slice_of(self.rank))

    @property
    def seq_len(self) -> int:
        """Tokens of the whole sequence."""
        return self.partition.stop

    def of_layer(self, index: int) -> SequencePlan:
        """Return what computes the attention of a layer: this plan, for all."""
        return self

    @cached_property
    def pieces(self) -> tuple[tuple[int, Branch, Run], ...]:
        """Every piece of a segment in this rank's slice, branch by branch, with the number of its branch."""
        return tuple(
            (index, branch, run)
            for index, branch in enumerate(self.pattern)
            for run in self.partition.runs(branch, self.rank)
        )

    @property
    def packed_pieces(self) -> int:
        """Number of pieces in this rank's slice where documents are packed, else 0."""
        return len(self.pieces) if self.partition.documents else 0

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
        check_shapes(q, k, v)
        if q.shape[1] != self.local_len:
            raise ShapeError(f"rank {self.rank} owns {self.local_len} tokens of this plan, got {q.shape[1]}")
        return mixture(q, k, v, self, causal=causal, scale=scale_of(softmax_scale, q.shape[3]))

    def exchanges(self, heads: int, kv_heads: int, *, causal: bool) -> tuple[tuple[Branch, SpanExchange], ...]:
        """Return this rank's exchanges, in the order in which all ranks start them."""
        key = heads, kv_heads, causal
        if key not in self._exchanges:
            self._exchanges[key] = self._make_exchanges(*key)
        return self._exchanges[key]

    def count_seconds(
        self, exchanges: Sequence[tuple[Branch, SpanExchange]], flights: Sequence[Pending], *, back: bool
    ) -> None:
        """Add what finished exchanges took of this rank's time; ``back`` if gradients went back by them."""
        self.seconds_tested += sum(flight.seconds_tested for flight in flights)
        self.seconds_waited += sum(flight.seconds_waited for flight in flights)
        if self.observer is not None:
            self.observer(exchanges, flights, back)

    def _make_exchanges(self, heads: int, kv_heads: int, causal: bool) -> tuple[tuple[Branch, SpanExchange], ...]:
        if self._comm is None:
            return ()
        groups = groups_of(self._comm)
        return tuple(
            (
                branch,
                SpanExchange(SpanLayout(branch, span, self.rank, heads, kv_heads, causal=causal), groups[span.ranks]),
            )
            for branch in self.pattern
            for span in self.partition.spans(branch, self.rank)
        )


def _digest(documents: tuple[int, ...]) -> str:
    """Return a short text for what may be many numbers: a line of an error shows it."""
    return xxhash.xxh3_64_hexdigest(repr(documents).encode())


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLANS: dict[Any, SequencePlan] = {}
MAX_PLANS = 128
"""Plans kept for one communicator. Each may need two communicators a branch, of which some MPIs have but 2048."""


def _retire(plans: dict[Any, SequencePlan], comm: MPI.Comm | None) -> None:
    """Drop the oldest plan, and free communicators of dropped plans that no rank uses any more. Collective."""
    oldest = plans.pop(next(iter(plans)))
    if comm is None:
        return
    groups = groups_of(comm)
    groups.retired.append((oldest.rank_groups, weakref.ref(oldest)))
    del oldest
    # A plan can outlive its place: a backward pass to come holds it, on this rank or on another.
    in_use = allgather_objects(comm, [plan() is not None for _, plan in groups.retired])
    groups.retired = [entry for entry, *used in zip(groups.retired, *in_use, strict=True) if any(used)]
    kept = [plan.rank_groups for plan in plans.values()] + [its_groups for its_groups, _ in groups.retired]
    groups.keep_only(chain.from_iterable(kept))


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ShapeError unless q, k and v are tensors that fit together as `dilated_attention` takes them."""
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        raise ShapeError(f"q, k and v must be tensors, got {', '.join(type(x).__name__ for x in (q, k, v))}")
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


def scale_of(softmax_scale: float | None, head_dim: int) -> float:
    """Return the factor on the scores; raise ShapeError unless it is a finite number above 0."""
    if softmax_scale is None:
        return float(head_dim**-0.5)
    if not isinstance(softmax_scale, Real) or not 0 < softmax_scale < math.inf:
        raise ShapeError(f"softmax_scale must be a finite number above 0, got {softmax_scale!r}")
    return float(softmax_scale)
