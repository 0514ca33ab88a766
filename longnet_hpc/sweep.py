"""Loss and gradient over one whole sequence, swept through in chunks; a sweep can stop and go on between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from longnet_hpc.carry_store import RowStore
from longnet_hpc.chunk import Chunk
from longnet_hpc.partition import Partition
from longnet_hpc.stream import SequenceStream
from longnet_hpc.trace import span

if TYPE_CHECKING:
    from longnet_hpc.model import LongNet

__all__ = ["GradientSweep", "slice_of_chunk"]

Read = Callable[[range], tuple[torch.Tensor, torch.Tensor]]
"""Returns tokens and targets of a slice of the sequence, ``(batch, len(slice))`` each, on the device."""


def slice_of_chunk(chunk: range, rank: int, size: int) -> range:
    """Return this rank's positions of a chunk: even slices, some empty where there are more ranks than tokens."""
    return range(chunk.start + len(chunk) * rank // size, chunk.start + len(chunk) * (rank + 1) // size)


class GradientSweep:
    """The exact gradient of the loss over a whole sequence, within the memory that one chunk needs.

    Forward, all chunks but the last are computed for the rows that they leave; backward, all are computed again in
    reverse, now with their gradient.

    Parameters
    ----------
    model : LongNet
        Its parameters collect the gradient of the mean loss, as of this rank.
    stream : SequenceStream
        The sequence; new, or as it was when a sweep stopped.
    store : RowStore
        Where rows wait for the backward sweep.
    bounds : sequence of int
        Where the sequence is cut into chunks, its ends included.
    rank, size : int
        Of the ranks that share each chunk.
    autocast : callable, optional
        Makes a context in which the model computes.
    dropout_seed : int
        Chooses the dropout masks.

    Attributes
    ----------
    order : list of range
        The chunks in the order in which they are done: forward but for the last, and all in reverse.
    done : int
        How many of these are done.
    loss : torch.Tensor
        Summed loss of this rank's tokens so far, in nats, float64; complete with the last chunk.
    """

    def __init__(
        self,
        model: LongNet,
        stream: SequenceStream,
        store: RowStore,
        bounds: Sequence[int],
        *,
        rank: int = 0,
        size: int = 1,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        dropout_seed: int = 0,
    ) -> None:
        self.model, self.stream, self.store = model, stream, store
        chunks = [range(*ends) for ends in pairwise(bounds)]
        self.order = [*chunks[:-1], *reversed(chunks)]
        self.done = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        self._rank, self._size = rank, size
        self._autocast, self._dropout_seed = autocast, dropout_seed

    @property
    def total(self) -> int:
        """Chunks to do: forward but for the last, and backward."""
        return len(self.order)

    @property
    def is_forward(self) -> bool:
        """Whether the next chunk is one of the forward sweep."""
        return self.done < len(self.order) // 2

    def slices_left(self) -> list[range]:
        """Return this rank's slices of the chunks to do, in order."""
        return [slice_of_chunk(chunk, self._rank, self._size) for chunk in self.order[self.done :]]

    def advance(self, read: Read) -> None:
        """Do the next chunk, with the tokens and targets of this rank's slice as ``read`` gives them. Collective."""
        if self.is_forward:
            self._forward(self.order[self.done], read)
        else:
            self._backward(self.order[self.done], read)
        self.done += 1

    def _forward(self, chunk: range, read: Read) -> None:
        its = slice_of_chunk(chunk, self._rank, self._size)
        tokens, _ = read(its)
        with torch.no_grad(), self.stream.next_chunk(len(its)) as plan, self._autocast(), span("compute", "forward"):
            self.model.hidden(tokens, plan, dropout_seed=self._dropout_seed)
        self.stream.settle()
        self.store.keep(self.stream.carries, plan.chunk)

    def _backward(self, chunk: range, read: Read) -> None:
        its = slice_of_chunk(chunk, self._rank, self._size)
        tokens, targets = read(its)
        with self.stream.chunk_again(chunk.start, len(its), self.store) as plan:
            if chunk.start:
                before = self.order[self.done + 1]
                its_partition = Partition((before.start, *[before.stop] * self._size))
                self.store.fetch(len(self.stream.carries), Chunk(its_partition, self.stream.seq_len))
            with self._autocast(), span("compute", "forward"):
                loss = self.model.loss(tokens, targets, plan, dropout_seed=self._dropout_seed)
            with span("compute", "backward"):
                (loss / (tokens.shape[0] * self.stream.seq_len)).backward()
        self.loss += loss.detach()
