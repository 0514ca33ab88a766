"""What the backward kernel needs to know of each row of each grid, in one pass over output and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from longnet_hpc.attention.hopper.backward import BackwardJob, query_block
from longnet_hpc.attention.part_kernels import statistics_kernel
from longnet_hpc.attention.parts import COLUMNS, LONGEST

__all__ = ["find_statistics"]

_TOKENS = 32
"""Tokens that one program visits."""
_WARPS = 4


def find_statistics(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, jobs: Sequence[BackwardJob]) -> None:
    """Write the statistics of jobs.

    Parameters
    ----------
    out, dout : torch.Tensor
        Merged output and its gradient, ``(batch, seq, heads, head_dim)``, contiguous.
    lse : torch.Tensor
        Merged log-sum-exp, ``(batch, seq, heads)``, contiguous, float32.
    jobs : sequence of BackwardJob
        Their ``statistics`` are written.
    """
    batch, seq, heads, head_dim = out.shape
    table = []
    for head in range(heads):
        for job in jobs:
            rows = job.rows
            first_row = (head + rows.shift) % rows.rate
            table += [
                *(rows.start + first_row, min(rows.length, LONGEST), rows.count),
                *(max(0, -(-(rows.length - first_row) // rows.rate)), min(rows.rate, LONGEST), 0, batch),
                *(job.statistics[:, head].data_ptr(), job.statistics.stride(0), *[0] * (COLUMNS - 9)),
            ]
    width = triton.next_power_of_2(head_dim)
    statistics_kernel[(triton.cdiv(seq, _TOKENS) * batch, heads)](
        *(torch.tensor(table, dtype=torch.int64).to(out.device, non_blocking=True), out, dout, lse, seq, heads),
        K=len(jobs),
        D=head_dim,
        WIDTH=width,
        TOKENS=_TOKENS,
        COLUMNS=COLUMNS,
        BLOCK=query_block(head_dim),
        num_warps=_WARPS,
    )
