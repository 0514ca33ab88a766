"""A causal sequence walked through in time, chunk by chunk, each cut over the ranks; results are those of one piece.

Forward, the attention of a layer sees its own chunk and the rows that its `Carry` keeps of segments still open.
Backward, the chunks come in reverse, each is computed again, and gradients of kept rows go to the chunks they belong
to. The kept rows of all chunks wait meanwhile in a `RowStore`, outside the memory of the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from longnet_hpc.attention.sums import wide_dtype
from longnet_hpc.carry import Carry, Crossing
from longnet_hpc.chunk import Chunk
from longnet_hpc.comm import agreed
from longnet_hpc.errors import PartitionError
from longnet_hpc.mixture import fake_backward, mix, mix_backward, refuse, register
from longnet_hpc.pattern import Pattern
from longnet_hpc.sequence_plan import LayerPlan, SequencePlan, check_shapes, scale_of

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.carry_store import RowStore

__all__ = ["ChunkPlan", "SequenceStream"]


class SequenceStream:
    """One causal sequence of ``layers`` attention layers on its way through time. Making it is collective.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    seq_len : int
        Length of the sequence in tokens, over all chunks and ranks.
    layers : int
        Attention layers; each carries its own rows.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share each chunk.
    backend : str
        Name of the attention backend.
    device : torch.device or str
        Where the tensors lie.

    Attributes
    ----------
    position : int
        Tokens done: where the next chunk starts.
    carries : list of Carry
        What each layer carries.
    """

    def __init__(
        self,
        pattern: Pattern,
        seq_len: int,
        *,
        layers: int,
        comm: MPI.Comm | None = None,
        backend: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.pattern = pattern
        self.seq_len = seq_len
        self.position = 0
        self.carries = [Carry(pattern, seq_len, comm) for _ in range(layers)]
        self._comm, self._backend, self._device = comm, backend, device
        self._handle = next(_handles)
        self._layers = [_Layer(torch.tensor([self._handle, index])) for index in range(layers)]
        self._plan: ChunkPlan | None = None
        self._received: dict[int, list[torch.Tensor]] = {}
        self._keeps = True
        self._received_within = 0
        _streams[self._handle] = self

    @property
    def bytes_received(self) -> int:
        """Bytes that this rank has received from others: of carried rows and within chunks, and of all gradients."""
        return self._received_within + sum(carry.bytes_received for carry in self.carries)

    @contextmanager
    def next_chunk(self, local_len: int) -> Iterator[ChunkPlan]:
        """Go on by a chunk, of which this rank has ``local_len`` tokens; yields its plan. Collective.

        Within, every layer calls attention once, in order. Its keys and values are then carried on.

        Raises
        ------
        PartitionError
            If the ranks' slices reach beyond the sequence.
        """
        plan = self._enter(self.position, local_len)
        self._keeps = True
        try:
            yield plan
        finally:
            self._leave()
        self.position = plan.chunk.partition.stop

    @contextmanager
    def chunk_again(self, start: int, local_len: int, store: RowStore | None) -> Iterator[ChunkPlan]:
        """Compute a chunk once more, for its gradient; yields its plan. Collective.

        Parameters
        ----------
        start : int
            Where the chunk begins; chunks come in reverse.
        local_len : int
            Tokens of this rank.
        store : RowStore or None
            Where rows of earlier chunks come from that are no longer carried.

        Raises
        ------
        OSError
            If the store cannot give them; the same on all ranks.
        """
        plan = self._enter(start, local_len)
        self._keeps = False
        try:
            if store is not None:
                with agreed(self._comm):
                    store.bring_back(self.carries, plan.chunk)
            yield plan
        finally:
            self._leave()
            self._received.clear()
        self.position = start

    def settle(self) -> None:
        """Wait for what layers have asked of other ranks; after it, the carries are whole. Collective."""
        for carry in self.carries:
            carry.settle()

    def _enter(self, start: int, local_len: int) -> ChunkPlan:
        plan = SequencePlan.build(
            self.pattern, local_len, start=start, comm=self._comm, backend=self._backend, device=self._device
        )
        if plan.partition.stop > self.seq_len:
            raise PartitionError(
                f"a chunk from {start} to {plan.partition.stop} reaches beyond the {self.seq_len} tokens in all"
            )
        self._plan = ChunkPlan(plan, Chunk(plan.partition, self.seq_len), self._layers)
        self._received_within -= plan.bytes_received  # of earlier chunks, where the plan is theirs, too
        return self._plan

    def _leave(self) -> None:
        assert self._plan is not None
        self._received_within += self._plan.plan.bytes_received
        self._plan = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the attention of one layer in the present chunk, and keep what later ones need."""
        assert self._plan is not None, "attention of a stream is computed within a chunk"
        plan, carry = self._plan.plan, self.carries[layer]
        crossing = self._plan.crossing(q.shape[2], k.shape[2])
        out, lse, received = mix(q, k, v, plan, True, scale, carry, crossing)
        if self._keeps:
            carry.keep(k, v, crossing, q.shape[2])
        else:
            self._received[layer] = received
        return out, lse

    def attend_backward(
        self,
        layer: int,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of `attend` with those that later chunks gave back (adjoint)."""
        assert self._plan is not None, "gradients of a stream are computed within a chunk"
        crossing = self._plan.crossing(q.shape[2], k.shape[2])
        received = self._received.pop(layer)
        plan, carry = self._plan.plan, self.carries[layer]
        return mix_backward(dout, q, k, v, out, lse, received, plan, True, scale, carry, crossing)


class ChunkPlan:
    """Who owns which tokens of a chunk; takes the place of a `SequencePlan` in a model.

    Parameters
    ----------
    plan : SequencePlan
        The chunk as a sequence by itself.
    chunk : Chunk
        The chunk within the sequence.
    layers : list
        What the attention of each layer is called through.
    """

    def __init__(self, plan: SequencePlan, chunk: Chunk, layers: Sequence[_Layer]) -> None:
        self.plan = plan
        self.chunk = chunk
        self.pattern = plan.pattern
        self.start = plan.start
        self.local_len = plan.local_len
        self.seq_len = chunk.seq_len
        self.agree = plan.agree
        for layer in layers:
            layer.start = plan.start
        self._layers = layers
        self._crossings: dict[tuple[int, int], Crossing] = {}

    def of_layer(self, index: int) -> LayerPlan:
        """Return what computes the attention of a layer."""
        return self._layers[index]

    def crossing(self, heads: int, kv_heads: int) -> Crossing:
        """Return who sees and who leaves rows."""
        key = heads, kv_heads
        if key not in self._crossings:
            self._crossings[key] = Crossing(self.pattern, self.chunk, self.plan.rank, heads, kv_heads)
        return self._crossings[key]


class _Layer:
    """The attention of one layer, of whatever chunk; a tensor says which layer, so that one graph serves them all."""

    def __init__(self, place: torch.Tensor) -> None:
        self.place = place
        self.start = 0

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Compute attention as `SequencePlan.attention` does; it has to be causal."""
        check_shapes(q, k, v)
        assert causal, "what comes later in time cannot be seen"
        out: torch.Tensor
        out, _ = torch.ops.longnet_hpc.stream_mixture.default(q, k, v, self.place, scale_of(softmax_scale, q.shape[3]))
        return out


_streams: weakref.WeakValueDictionary[int, SequenceStream] = weakref.WeakValueDictionary()
_handles = count()


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    handle, layer = place.tolist()
    return _streams[handle].attend(layer, q, k, v, scale)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    place: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    handle, layer = place.tolist()
    return _streams[handle].attend_backward(layer, dout, q, k, v, out, lse, scale)


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, place: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, place, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, place)


def _differentiate(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.longnet_hpc.stream_mixture_backward.default(dout, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None)


register("stream_mixture", _forward, _fake_forward)
register("stream_mixture_backward", _backward, fake_backward)
torch.library.register_autograd("longnet_hpc::stream_mixture", _differentiate, setup_context=_keep)
torch.library.register_autograd("longnet_hpc::stream_mixture_backward", refuse)
