"""A grid of a tensor as a strided view, without a copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longnet_hpc.grids import Grid

__all__ = ["MAX_PIECES", "batches", "grid_view"]

MAX_PIECES = 65535
"""Most pieces of all sequences together in one kernel call: CUDA's limit for all but the first dim of a launch."""


def grid_view(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the view ``(batch, count, heads, rows, width)`` of a grid of ``x`` ``(batch, seq, heads, width)``."""
    batch, token, head, feature = x.stride()
    return x.as_strided(
        (x.shape[0], grid.count, grid.heads, grid.rows, x.shape[3]),
        (batch, grid.length * token, grid.row_step * token + grid.head_step * head, grid.rate * token, feature),
        x.storage_offset() + (grid.start + grid.first_row) * token + grid.first_head * head,
    )


def batches(*views: torch.Tensor) -> Iterator[tuple[slice, tuple[torch.Tensor, ...]]]:
    """Yield grids as ``(batch * count, heads, rows, width)``: all sequences at once where strides allow, else each.

    Never more than `MAX_PIECES` of them, if the grids have few enough pieces for that.

    Parameters
    ----------
    *views : torch.Tensor
        Grids as `grid_view` gives them, of the same batch and count.

    Yields
    ------
    slice, tuple of torch.Tensor
        Which sequences, and their grids.
    """
    batch, count = views[0].shape[:2]
    if count == 1:
        for first in range(0, batch, MAX_PIECES):
            sequences = slice(first, min(batch, first + MAX_PIECES))
            yield sequences, tuple(view[sequences].squeeze(1) for view in views)
    elif batch == 1 or all(view.stride(0) == count * view.stride(1) for view in views):
        yield slice(0, batch), tuple(view.flatten(0, 1) for view in views)
    else:
        for sequence in range(batch):
            yield slice(sequence, sequence + 1), tuple(view[sequence] for view in views)
