"""Launches of `rows.cu`: passes over all rows of two tensors and over those rows of jobs that belong to them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longnet_hpc.attention.hopper.backward import query_block
from longnet_hpc.attention.hopper.jobs import Rows
from longnet_hpc.attention.hopper.launch import compiled, launch, most_programs, source_of

__all__ = ["RowsJob", "divisor", "run_rows"]

MAX_JOBS = 8
"""Lanes of the narrowest row: each finds the rows of one job."""
_THREADS = 256
_PROGRAMS = 4
"""Programs that a multiprocessor holds."""


@dataclass(frozen=True, slots=True)
class RowsJob:
    """A grid, and two tensors of its rows.

    Parameters
    ----------
    rows : Rows
        The grid.
    stride : int
        Rows from head to head in the tensors.
    parts : tuple of torch.Tensor
        They begin with the first row of the first head of the first piece; further heads and pieces follow densely.
    """

    rows: Rows
    stride: int
    parts: tuple[torch.Tensor, torch.Tensor]


def run_rows(kernel: str, x: torch.Tensor, y: torch.Tensor, lse: torch.Tensor | None, jobs: Sequence[RowsJob]) -> None:
    """Launch a kernel of `rows.cu` for each few jobs.

    Parameters
    ----------
    kernel : str
        Its name.
    x, y : torch.Tensor
        ``(batch, seq, heads, head_dim)``, of half precision, contiguous.
    lse : torch.Tensor, optional
        ``(batch, seq, heads)``, float32, contiguous.
    jobs : sequence of RowsJob
        What belongs to the rows of these tensors.
    """
    batch, seq, heads, head_dim = x.shape
    rows = batch * seq * heads
    for first in range(0, len(jobs), MAX_JOBS):
        some = jobs[first : first + MAX_JOBS]
        packed = b"".join(_packed(job) for job in some)
        packed += struct.pack("<3q", x.data_ptr(), y.data_ptr(), 0 if lse is None else lse.data_ptr())
        packed += divisor(seq) + divisor(heads) + struct.pack("<I4x", rows)
        settings = {"HEAD_DIM": head_dim, "BLOCK_Q": query_block(head_dim), "JOBS": len(some)}
        settings |= {"THREADS": _THREADS, "PROGRAMS": _PROGRAMS}
        function = compiled(source_of("rows.cu", x.dtype, tuple(settings.items())), kernel, 0, x.device.index)
        programs = min(-(-rows * head_dim // (8 * _THREADS)), _PROGRAMS * most_programs(x.device))
        launch(function, programs, _THREADS, 0, packed)


def _packed(job: RowsJob) -> bytes:
    rows = job.rows
    return (
        struct.pack("<2q", *(part.data_ptr() for part in job.parts))
        + (divisor(rows.length) + divisor(rows.rate))
        + struct.pack("<4I", rows.start, rows.count, rows.shift, job.stride)
    )


def divisor(number: int) -> bytes:
    """Return a number with factor and shift: ``x // number == x * factor >> shift`` for all ``x`` below 2**31."""
    shift = 31 + (number - 1).bit_length()
    return struct.pack("<3I", number, -(-(1 << shift) // number), shift)
