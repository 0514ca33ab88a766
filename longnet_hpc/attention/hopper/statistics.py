"""What the backward kernel needs to know of each row of each grid, in one pass over output and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longnet_hpc.attention.hopper.backward import BackwardJob
from longnet_hpc.attention.hopper.rows import RowsJob, run_rows

__all__ = ["find_statistics"]


def find_statistics(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, jobs: Sequence[BackwardJob]) -> None:
    """Write the statistics of jobs; those of rows that are not there stay as they are.

    Parameters
    ----------
    out, dout : torch.Tensor
        Merged output and its gradient, ``(batch, seq, heads, head_dim)``, contiguous.
    lse : torch.Tensor
        Merged log-sum-exp, ``(batch, seq, heads)``, contiguous, float32.
    jobs : sequence of BackwardJob
        Their ``statistics`` are written.
    """
    run_rows("find_statistics", out, dout, lse, [_rows_job(job) for job in jobs])


def _rows_job(job: BackwardJob) -> RowsJob:
    _, _, blocks, _, block = job.statistics.shape
    lse, delta = job.statistics.unbind(3)
    return RowsJob(job.rows, blocks * block, (lse, delta))
