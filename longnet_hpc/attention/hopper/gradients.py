"""Gradients of keys and values of some grids, added onto those that the dense grids left in their final place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longnet_hpc.attention.hopper.backward import BackwardJob
from longnet_hpc.attention.hopper.rows import RowsJob, run_rows

__all__ = ["add_rows"]


def add_rows(dk: torch.Tensor, dv: torch.Tensor, jobs: Sequence[BackwardJob]) -> None:
    """Add compact gradients in place: in float32, rounded once for each 8 jobs.

    Parameters
    ----------
    dk, dv : torch.Tensor
        ``(batch, seq, heads, head_dim)``, contiguous; what lies on no grid is neither read nor written.
    jobs : sequence of BackwardJob
        Jobs with compact results.
    """
    run_rows("add_rows", dk, dv, None, [RowsJob(job.rows, job.rows.rows, (job.dk, job.dv)) for job in jobs])
