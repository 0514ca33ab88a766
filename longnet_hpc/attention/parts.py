"""Sums over branches made in one pass from compact parts: the fast way on a GPU, where `sums` passes over them often.

Each kernel call leaves its compact result as it is. At the end one Triton kernel visits every (token, head), finds by
integer arithmetic the row of each part that is its own, and adds them up in registers, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longnet_hpc.attention.part_kernels import gradient_kernel, softmax_kernel
from longnet_hpc.grids import Grid

__all__ = ["GradientParts", "SoftmaxParts"]

COLUMNS = 14
"""Numbers in an entry of the table, see `_entries`."""
LONGEST = 2**31 - 1
"""Tokens of a slice that kernels can count; a longer step means that there is but one piece, or row."""
_TOKENS = 32
"""Tokens that one program visits."""
_FEW = 16
"""Parts of a head, for each number of which there is a kernel of its own."""
_WARPS = 2
"""Warps of a program, where rows have up to 64 columns."""


class SoftmaxParts:
    """What `sums.SoftmaxSum` is, made in one pass at the end.

    Parameters
    ----------
    q : torch.Tensor
        The queries, ``(batch, seq, heads, head_dim)``, of any floating dtype but float64.
    """

    def __init__(self, q: torch.Tensor) -> None:
        self._q = q
        self._parts: list[tuple[slice, Grid, torch.Tensor, torch.Tensor]] = []

    def add(self, sequences: slice, grid: Grid, out: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
        """Keep the normalised output of some keys; parameters as for `sums.SoftmaxSum.add`."""
        self._parts.append((sequences, grid, _dense_rows(out), lse.float()))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output in the dtype of the queries, and the log-sum-exp ``(batch, seq, heads)``."""
        q = self._q
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        entries = [entry for part in self._parts for entry in _entries(*part)]
        _launch(softmax_kernel, entries, q, out, lse)
        return out, lse


class GradientParts:
    """What `sums.GradientSum` is, made in one pass at the end.

    Parameters
    ----------
    x : torch.Tensor
        What the gradient is of, ``(batch, seq, heads, head_dim)``, of any floating dtype but float64.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x
        self._parts: list[tuple[slice, Grid, torch.Tensor]] = []

    def add(self, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        """Keep ``part`` ``(sequences * count, heads, rows, head_dim)``, of this dtype or float32."""
        self._parts.append((sequences, grid, _dense_rows(part)))

    def result(self) -> torch.Tensor:
        """Return the sum in the dtype of the tensor."""
        x = self._x
        if len(self._parts) == 1 and self._parts[0][1].rows == x.shape[1] and self._parts[0][2].numel() == x.numel():
            return self._parts[0][2].transpose(1, 2).to(x.dtype).contiguous()  # one part of everything
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        entries = [entry for part in self._parts for entry in _entries(*part, None)]
        _launch(gradient_kernel, entries, x, out)
        return out


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _entries(sequences: slice, grid: Grid, part: torch.Tensor, lse: torch.Tensor | None) -> list[tuple[int, list[int]]]:
    """Return, head by head of a grid, the head of the sum that its rows belong to and the entry of the table.

    An entry: first row and length of the pieces (tokens), their number, rows in each, tokens from row to row; first and
    last sequence; address and strides (piece, row) of the part, and of its log-sum-exp; whether the part is float32.
    """
    entries = []
    for number in range(grid.heads):
        entry = [
            grid.start + grid.first_row + number * grid.row_step,
            *(min(grid.length, LONGEST), grid.count, grid.rows, min(grid.rate, LONGEST)),
            *(sequences.start, sequences.stop),
            part.data_ptr() + number * part.stride(1) * part.element_size(),
            *(part.stride(0), part.stride(2)),
        ]
        if lse is None:
            entry += [0, 0, 0]
        else:
            entry += [lse.data_ptr() + number * lse.stride(1) * lse.element_size(), lse.stride(0), lse.stride(2)]
        entries.append((grid.first_head + number * grid.head_step, [*entry, int(part.dtype == torch.float32)]))
    return entries


def _launch(kernel: object, entries: list[tuple[int, list[int]]], x: torch.Tensor, *results: torch.Tensor) -> None:
    """Launch a kernel over all tokens, heads and sequences of ``x``, with the table of what each head sums."""
    batch, seq, heads, head_dim = x.shape
    if not x.numel():
        return
    by_head: list[list[int]] = [[] for _ in range(heads)]
    for head, entry in entries:
        by_head[head] += entry
    most = max(len(row) for row in by_head) // COLUMNS
    if most > _FEW:  # a kernel is compiled for each number, and with packed documents each sequence may have another
        most = triton.next_power_of_2(most)
    nothing = [0, 1, 0, 0, 1, *[0] * (COLUMNS - 5)]  # no piece, so no row
    for row in by_head:
        row += nothing * (most - len(row) // COLUMNS)
    table = torch.tensor(by_head, dtype=torch.int64).to(x.device, non_blocking=True)
    width = triton.next_power_of_2(head_dim)
    kernel[(triton.cdiv(seq, _TOKENS) * batch, heads)](  # type: ignore[index]
        *(table, *results, seq, heads),
        K=most,
        part_type=_TYPES[x.dtype],
        D=head_dim,
        WIDTH=width,
        TOKENS=_TOKENS,
        COLUMNS=COLUMNS,
        num_warps=_WARPS if width <= 64 else 2 * _WARPS,
    )


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
