"""The keys and values of one spanning segment on their way between ranks: packed, gathered, unpacked, and the adjoint.

A row of the exchange is one token and key/value head on the grid of one head offset; it carries keys and values of all
sequences of the batch: ``(2, batch, head_dim)``. Offsets with equally many tokens travel and are computed together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch

from longnet_hpc.attention.sums import GradientCollector, wide_dtype
from longnet_hpc.attention.views import grid_view
from longnet_hpc.comm import RowGather
from longnet_hpc.grids import Grid, column_grids
from longnet_hpc.partition import Columns, SpanLayout

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.comm.buffers import Pending

__all__ = ["Rows", "SpanExchange"]

Rows = dict[Columns, tuple[torch.Tensor, torch.Tensor]]
"""Compact keys and values by columns: ``(batch, tokens, columns, head_dim)`` each."""


class SpanExchange:
    """Owns what the exchange of one spanning segment needs: its layout and its transfer.

    Parameters
    ----------
    layout : SpanLayout
        Who sends what, in rows.
    comm : mpi4py.MPI.Comm
        The ranks of the segment, in order; for exchanges alone.

    Attributes
    ----------
    gather : RowGather
        The transfer, of rows that are packed.
    """

    def __init__(self, layout: SpanLayout, comm: MPI.Comm) -> None:
        self.layout = layout
        self.gather = RowGather(comm, layout.send_counts, layout.send_starts, layout.recv_counts)

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        """Start gathering the rows that this rank needs, once its own are packed. Collective over the segment's ranks.

        Parameters
        ----------
        k, v : torch.Tensor
            This rank's slice, ``(batch, local_len, kv_heads, head_dim)``.
        """
        send = k.new_empty(self.offered_shape(k))
        for grid, block in self._offered(send):
            for part, x in enumerate((k, v)):
                block[:, :, part].copy_(grid_view(x, grid).squeeze(1).permute(2, 1, 0, 3))
        return self.gather.start(send.flatten(1), when_ready=True)

    def offered_shape(self, k: torch.Tensor) -> tuple[int, int, int, int]:
        """Return the shape of what `start` sends parts of: ``(rows, 2, batch, head_dim)``."""
        layout, rank = self.layout, self.gather.comm.rank
        rows = sum(layout.block_rows(layout.span.ranks[rank], offsets) for offsets in layout.offered)
        return rows, 2, k.shape[0], k.shape[3]

    def received_shape(self, k: torch.Tensor) -> tuple[int, int, int, int]:
        """Return the shape of what `finish` returns: ``(rows, 2, batch, head_dim)``."""
        return sum(self.layout.recv_counts), 2, k.shape[0], k.shape[3]

    def finish(self, pending: Pending, k: torch.Tensor) -> torch.Tensor:
        """Wait for `start`; return what was received, source by source."""
        return pending.finish().view(self.received_shape(k))

    def unpack(self, received: torch.Tensor) -> Rows:
        """Return the rows of all sources in rank order, by columns."""
        parts: dict[Columns, list[torch.Tensor]] = {}
        for columns, block in self._received(received):
            parts.setdefault(columns, []).append(block)
        rows = {columns: blocks[0] if len(blocks) == 1 else torch.cat(blocks) for columns, blocks in parts.items()}
        return {
            columns: (both[:, :, 0].permute(2, 0, 1, 3), both[:, :, 1].permute(2, 0, 1, 3))
            for columns, both in rows.items()
        }

    def start_adjoint(self, row_grads: Rows, k: torch.Tensor) -> Pending:
        """Start sending the gradients of received rows, shaped as `unpack` gave them, back to their owners. Collective.

        They travel in the dtype of ``k``: each is the result of one kernel, and their sum is made in float32 or wider.
        """
        send = k.new_empty(self.received_shape(k))
        position = dict.fromkeys(row_grads, 0)
        for columns, block in self._received(send):
            rows = slice(position[columns], position[columns] + len(block))
            for part, grad in enumerate(row_grads[columns]):
                block[:, :, part].copy_(grad[:, rows].permute(1, 2, 0, 3))
            position[columns] = rows.stop
        return self.gather.start_adjoint(send.flatten(1), when_ready=True)

    def finish_adjoint(self, pending: Pending, k: torch.Tensor, dk: GradientCollector, dv: GradientCollector) -> None:
        """Wait for `start_adjoint`; add what came back, in rank order, onto the gradients of k and v."""
        total = k.new_zeros(self.offered_shape(k), dtype=wide_dtype(k.dtype))
        self.gather.finish_adjoint(pending, total.flatten(1))
        for grid, block in self._offered(total):
            for part, gradient in enumerate((dk, dv)):
                gradient.add(slice(0, k.shape[0]), grid, block[:, :, part].permute(2, 1, 0, 3))

    def _offered(self, rows: torch.Tensor) -> Iterator[tuple[Grid, torch.Tensor]]:
        """Yield each grid that this rank offers, with its part ``(tokens, heads, 2, batch, head_dim)`` of the rows."""
        layout, rank = self.layout, self.layout.span.ranks[self.gather.comm.rank]
        blocks = chain.from_iterable(layout.blocks(rank, offsets) for offsets in layout.offered)
        for columns, block in _cut(rows, blocks):
            grids = column_grids(layout.branch, layout.piece, columns)
            yield from zip(grids, block.split([grid.heads for grid in grids], dim=1), strict=True)

    def _received(self, rows: torch.Tensor) -> Iterator[tuple[Columns, torch.Tensor]]:
        """Yield the columns that this rank needs, source by source, with their part ``(tokens, columns, ...)``."""
        layout = self.layout
        yield from _cut(rows, chain.from_iterable(layout.blocks(source, layout.needed) for source in layout.sources))


def _cut(rows: torch.Tensor, blocks: Iterable[tuple[int, Columns]]) -> Iterator[tuple[Columns, torch.Tensor]]:
    """Yield the columns of blocks that lie one after another, each with its rows as ``(tokens, columns, ...)``."""
    position = 0
    for tokens, columns in blocks:
        count = tokens * len(columns)
        yield columns, rows[position : position + count].unflatten(0, (tokens, len(columns)))
        position += count
