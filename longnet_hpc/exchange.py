"""The keys and values of one spanning segment on their way between ranks: packed, gathered, unpacked, and the adjoint.

A row of the exchange is one token and key/value head on the grid of one head offset; it carries keys and values of all
sequences of the batch: ``(2, batch, head_dim)``.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from longnet_hpc.attention.branch import Rows, add_heads, grid_view, select_heads
from longnet_hpc.comm import RowGather
from longnet_hpc.partition import SpanLayout

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.comm.buffers import Pending

__all__ = ["SpanExchange"]


class SpanExchange:
    """Owns what the exchange of one spanning segment needs: its layout and its transfer.

    Parameters
    ----------
    layout : SpanLayout
        Who sends what, in rows.
    comm : mpi4py.MPI.Comm
        The ranks of the segment, in order.
    """

    def __init__(self, layout: SpanLayout, comm: MPI.Comm) -> None:
        self.layout = layout
        self._gather = RowGather(comm, layout.send_counts, layout.send_starts, layout.recv_counts)

    def start(self, k: torch.Tensor, v: torch.Tensor) -> Pending:
        """Start gathering the rows that this rank needs. Collective over the segment's ranks.

        Parameters
        ----------
        k, v : torch.Tensor
            This rank's slice, ``(batch, local_len, kv_heads, head_dim)``.
        """
        layout = self.layout
        blocks = []
        for offset in chain.from_iterable(layout.offered):
            grids = (grid_view(t, layout.branch, layout.piece, offset).squeeze(1) for t in (k, v))
            blocks.append(_pack(*(select_heads(grid, layout.kv_heads_at[offset]) for grid in grids)))
        return self._gather.start(torch.cat(blocks) if blocks else k.new_empty((0, _width(k))))

    def finish(self, pending: Pending, k: torch.Tensor) -> Rows:
        """Wait for `start`; return the rows of all sources in rank order, by head offset, as views."""
        layout = self.layout
        parts: dict[int, list[torch.Tensor]] = {offset: [] for offset in layout.needed}
        received = pending.finish()
        position = 0
        for source in layout.sources:
            for offset in layout.needed:
                tokens, kv_heads = layout.rows(source, offset), len(layout.kv_heads_at[offset])
                if tokens:
                    block = received[position : position + tokens * kv_heads]
                    parts[offset].append(block.view(tokens, kv_heads, 2, k.shape[0], k.shape[3]))
                    position += tokens * kv_heads
        return {offset: _unpack(torch.cat(blocks)) for offset, blocks in parts.items() if blocks}

    def start_adjoint(self, row_grads: Rows, k: torch.Tensor) -> Pending:
        """Start sending the gradients of received rows, shaped as `finish` gave them, back to their owners. Collective.

        They travel in the dtype of ``k``: each is the result of one kernel, and their sum is made in float32 or wider.
        """
        layout = self.layout
        position = dict.fromkeys(row_grads, 0)
        blocks = []
        for source in layout.sources:
            for offset in layout.needed:
                if tokens := layout.rows(source, offset):
                    rows = slice(position[offset], position[offset] + tokens)
                    blocks.append(_pack(*(grad[:, rows] for grad in row_grads[offset])))
                    position[offset] = rows.stop
        return self._gather.start_adjoint(torch.cat(blocks) if blocks else k.new_empty((0, _width(k))))

    def finish_adjoint(self, pending: Pending, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Wait for `start_adjoint`; add what came back onto ``dk, dv``, shaped as k and v, in rank order."""
        layout, rank = self.layout, self._gather.comm.rank
        count = sum(layout.block_rows(layout.span.ranks[rank], offsets) for offsets in layout.offered)
        total = dk.new_zeros((count, _width(dk)))
        self._gather.finish_adjoint(pending, total)
        position = 0
        for offset in chain.from_iterable(layout.offered):
            grids = [grid_view(t, layout.branch, layout.piece, offset).squeeze(1) for t in (dk, dv)]
            kv_heads = layout.kv_heads_at[offset]
            rows = grids[0].shape[1] * len(kv_heads)
            block = total[position : position + rows].view(-1, len(kv_heads), 2, dk.shape[0], dk.shape[3])
            for grid, part in zip(grids, _unpack(block), strict=True):
                add_heads(grid, kv_heads, part, dim=2)
            position += rows


def _width(k: torch.Tensor) -> int:
    """Return the numbers in one row of the exchange: key and value of every sequence of the batch."""
    return 2 * k.shape[0] * k.shape[3]


def _pack(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Turn two ``(batch, tokens, kv_heads, head_dim)`` into rows ``(tokens * kv_heads, 2 * batch * head_dim)``."""
    both = torch.stack((keys, values))
    return both.permute(2, 3, 0, 1, 4).reshape(-1, both.shape[0] * both.shape[1] * both.shape[4])


def _unpack(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``(batch, tokens, kv_heads, dim)`` as views of ``(tokens, kv_heads, 2, batch, dim)``."""
    keys, values = block.permute(2, 3, 0, 1, 4)
    return keys, values
