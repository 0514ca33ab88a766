"""Strided grids as jobs of one launch: which tiles of a tensor the copy engine fetches, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from longnet_hpc.attention.hopper.launch import tensor_map
from longnet_hpc.partition import Run
from longnet_hpc.pattern import Branch

__all__ = ["Rows", "maps"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of equal pieces of one branch, of all heads.

    Parameters
    ----------
    start, length, count : int
        First token, tokens in each piece, number of pieces.
    rate : int
        Tokens from one row to the next.
    shift : int
        Head h has its first row ``(h + shift) % rate`` tokens from the start of a piece.
    """

    start: int
    length: int
    count: int
    rate: int
    shift: int

    @classmethod
    def of(cls, branch: Branch, run: Run) -> Rows:
        """Return the rows of a run of pieces."""
        rate = branch.dilation_rate
        return cls(run.start, run.length, run.count, rate, -run.phase % rate)

    @property
    def rows(self) -> int:
        """Most rows that a head has in a piece."""
        return -(-self.length // self.rate)

    @property
    def longer(self) -> int:
        """Heads whose first row is below this have `rows` rows, the others one fewer."""
        return self.length % self.rate or self.rate


def maps(x: torch.Tensor, rows: Rows, tile_rows: int) -> bytes:
    """Return two maps of a tensor ``(batch, seq, heads, head_dim)``: for heads with most rows, and with one fewer.

    Pieces of all sequences are one dim, so either there is one sequence, or one piece, or pieces fill the sequences.
    """
    return _maps(x.dtype, x.data_ptr(), x.shape, x.stride(), rows, tile_rows)


@lru_cache(maxsize=1 << 12)
def _maps(
    dtype: torch.dtype, address: int, shape: torch.Size, strides: tuple[int, ...], rows: Rows, tile_rows: int
) -> bytes:
    """Return the maps of a tensor; the steps of a training repeat, memory and all, so most are known."""
    batch, _, heads, head_dim = shape
    its_batch, token, head, _ = (stride * dtype.itemsize for stride in strides)
    piece = rows.length * token if rows.count > 1 else its_batch
    result = b""
    for count in (rows.rows, max(1, rows.rows - 1)):
        its_shape = (head_dim, heads, rows.rate, count, batch * rows.count)
        its_strides = (head, token, rows.rate * token, piece)
        result += tensor_map(dtype, address + rows.start * token, its_shape, its_strides, tile_rows)
    return result
