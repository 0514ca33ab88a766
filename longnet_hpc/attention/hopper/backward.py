"""Gradients of the attention of many grids in one launch of `backward.cu`, inside a larger softmax."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longnet_hpc.attention.hopper.jobs import Rows, maps
from longnet_hpc.attention.hopper.launch import compiled, launch, most_programs, source_of

__all__ = ["BackwardJob", "backward_job", "dense_backward_job", "query_block", "run_backward"]

MAX_JOBS = 8
BLOCK_K = 128
_CACHE_BYTES = 16 << 20
"""Queries, output gradients and sums of the heads that are worked on together, in the causal schedule."""


def query_block(head_dim: int) -> int:
    """Return the queries that are worked on at once."""
    return 128 if head_dim == 64 else 64


@dataclass(frozen=True, slots=True)
class BackwardJob:
    """A grid, its statistics, and where gradients of keys and values go.

    Parameters
    ----------
    rows : Rows
        The grid.
    statistics : torch.Tensor
        ``(pieces, heads, blocks, 2, query_block)`` in float32: log-sum-exp in powers of two, and delta.
    dk, dv : torch.Tensor
        Tensors of query heads, of which ``place`` are the rows.
    place : Rows
        Where the rows of the gradients lie.
    """

    rows: Rows
    statistics: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    place: Rows


def backward_job(q: torch.Tensor, rows: Rows) -> BackwardJob:
    """Return a job with compact results, ``(pieces, rows, heads, head_dim)``."""
    batch, _, heads, head_dim = q.shape
    dk, dv = (q.new_empty(batch * rows.count, heads, rows.rows, head_dim).transpose(1, 2) for _ in range(2))
    return BackwardJob(rows, _statistics(q, rows), dk, dv, Rows(0, rows.rows, 1, 1, 0))


def dense_backward_job(q: torch.Tensor, rows: Rows, dk: torch.Tensor, dv: torch.Tensor) -> BackwardJob:
    """Return the job of a dense grid, whose results go to their final place, tensors shaped as the queries."""
    assert rows.rate == 1
    assert dk.shape == dv.shape == q.shape
    return BackwardJob(rows, _statistics(q, rows), dk, dv, rows)


def _statistics(q: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return memory for the statistics of a job."""
    batch, _, heads, head_dim = q.shape
    pieces, block = batch * rows.count, query_block(head_dim)
    statistics = torch.empty(pieces, heads, -(-rows.rows // block), 2, block, dtype=torch.float32, device=q.device)
    if rows.rows % block or rows.longer < rows.rate:  # a row that is not there weighs nothing
        statistics[:, :, -2:, 0] = torch.inf
        statistics[:, :, -2:, 1] = 0.0
    return statistics


def run_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dq: torch.Tensor,
    jobs: Sequence[BackwardJob],
    *,
    causal: bool,
    scale: float,
) -> None:
    """Add gradients of the queries onto ``dq``, float32, and write those of keys and values of each job."""
    assert 0 < len(jobs) <= MAX_JOBS
    batch, _, heads, head_dim = q.shape
    block = query_block(head_dim)
    packed, tiles = b"", 0
    for job in jobs:
        rows, pieces = job.rows, batch * job.rows.count
        row_tiles = -(-rows.rows // BLOCK_K)
        chunk = max(1, min(heads * pieces, _CACHE_BYTES // (rows.rows * head_dim * 8))) if causal else 1
        packed += maps(q, rows, block) + maps(dout, rows, block) + maps(k, rows, BLOCK_K) + maps(v, rows, BLOCK_K)
        packed += maps(dq, rows, 64) + maps(job.dk, job.place, 64) + maps(job.dv, job.place, 64)
        packed += struct.pack(
            "<q11i12x",
            *(
                job.statistics.data_ptr(),
                tiles,
                row_tiles,
                pieces,
                heads,
                rows.rows,
                rows.rate,
                rows.shift,
                rows.longer,
            ),
            *(heads // k.shape[2], chunk, job.statistics.shape[2]),
        )
        tiles += row_tiles * pieces * heads
    packed += bytes((MAX_JOBS - len(jobs)) * (len(packed) // len(jobs)))
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    packed += struct.pack("<Q2i2f40x", taken.data_ptr(), len(jobs), tiles, scale, scale * math.log2(math.e))
    settings = {"HEAD_DIM": head_dim, "CAUSAL": int(causal), "MAX_JOBS": MAX_JOBS}
    rows_bytes = head_dim * 2
    slots = 2 if head_dim == 64 else 1
    shared_bytes = (
        (2 * slots * BLOCK_K + 4 * block) * rows_bytes
        + 4 * BLOCK_K * block
        + (3 - slots) * 2 * 64 * 64 * 4
        + 16 * block
        + 512
    )
    function = compiled(
        source_of("backward.cu", q.dtype, tuple(settings.items())), "backward", shared_bytes, q.device.index
    )
    programs = min(tiles, most_programs(q.device))
    launch(function, programs, 3 * 128, shared_bytes, packed)
