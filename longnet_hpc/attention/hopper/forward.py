"""Forward attention of many grids in one launch of `forward.cu`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longnet_hpc.attention.hopper.jobs import Rows, maps
from longnet_hpc.attention.hopper.launch import compiled, launch, most_programs, source_of

__all__ = ["ForwardJob", "can_merge", "compact_job", "dense_job", "run_forward"]

MAX_JOBS = 8
_MAX_PARTS = 8
BLOCK_M, BLOCK_N = 64, 128
_SHARED_BYTES = 232448
"""Shared memory of a program on Hopper."""
_CACHE_BYTES = 8 << 20
"""Keys and values of the heads that are worked on together, in the causal schedule."""


@dataclass(frozen=True, slots=True)
class ForwardJob:
    """A grid, and where its results go.

    Parameters
    ----------
    rows : Rows
        The grid.
    out : torch.Tensor
        ``(batch, seq, heads, head_dim)`` of which ``out_rows`` are the rows.
    out_rows : Rows
        Where the rows of the result lie in ``out``.
    lse : torch.Tensor
        Where the log-sum-exp goes.
    lse_stride : tuple of int
        Elements from piece to piece, head to head and row to row.
    """

    rows: Rows
    out: torch.Tensor
    out_rows: Rows
    lse: torch.Tensor
    lse_stride: tuple[int, int, int]


def compact_job(q: torch.Tensor, rows: Rows) -> ForwardJob:
    """Return a job with compact results.

    They are ``out``, ``(pieces, rows, heads, head_dim)``, and ``lse``, ``(pieces, heads, rows)``.
    """
    batch, _, heads, head_dim = q.shape
    pieces = batch * rows.count
    out = q.new_empty(pieces, heads, rows.rows, head_dim).transpose(1, 2)
    lse = torch.empty(pieces, heads, rows.rows, dtype=torch.float32, device=q.device)
    return ForwardJob(rows, out, Rows(0, rows.rows, 1, 1, 0), lse, (heads * rows.rows, rows.rows, 1))


def dense_job(rows: Rows, out: torch.Tensor, lse: torch.Tensor) -> ForwardJob:
    """Return the job of a dense grid.

    Its results go to ``out``, shaped as the queries, and ``lse``, ``(batch, seq, heads)``.
    """
    assert rows.rate == 1
    heads = out.shape[2]
    piece = rows.length if rows.count > 1 else out.shape[1]
    return ForwardJob(rows, out, rows, lse[:, rows.start :], (piece * heads, 1, heads))


def can_merge(parts: Sequence[Rows], dense: Sequence[Rows], head_dim: int) -> bool:
    """Return whether dense grids can start from the compact results of others.

    Each window of 64 queries has to lie inside one piece of a part or outside all, and their rows have to fit.
    """
    starts = [rows.start for rows in (*parts, *dense)]
    ends = [rows.start + rows.length * rows.count for rows in (*parts, *dense)]
    aligned = all(
        (start - min(starts)) % BLOCK_M == 0 and (rows.length % BLOCK_M == 0 or (rows.count == 1 and end == max(ends)))
        for rows, start, end in zip((*parts, *dense), starts, ends, strict=True)
    )
    held = sum(_held(rows) for rows in parts)
    return bool(dense) and len(parts) <= _MAX_PARTS and aligned and _shared_bytes(head_dim, held) <= _SHARED_BYTES


def _held(rows: Rows) -> int:
    """Return the most rows of a grid in a window of queries."""
    return -(-BLOCK_M // rows.rate)


def _groups_and_stages(head_dim: int) -> tuple[int, int]:
    return (3, 3) if head_dim == 64 else (2, 2)


def _shared_bytes(head_dim: int, held: int) -> int:
    groups, stages = _groups_and_stages(head_dim)
    rows = 2 * groups * BLOCK_M + 2 * stages * BLOCK_N + groups * (held or 8)
    return rows * head_dim * 2 + 1024


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    jobs: Sequence[ForwardJob],
    parts: Sequence[ForwardJob] = (),
    *,
    causal: bool,
    scale: float,
) -> None:
    """Attend the queries of each job's grid to its keys; with compact ``parts``, results are merged with theirs."""
    assert 0 < len(jobs) <= MAX_JOBS
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    groups, stages = _groups_and_stages(head_dim)
    packed, tiles = b"", 0
    for job in jobs:
        rows, pieces = job.rows, batch * job.rows.count
        row_tiles = -(-rows.rows // (BLOCK_M * groups))
        chunk = max(1, min(heads * pieces, _CACHE_BYTES // (rows.rows * head_dim * 4))) if causal else 1
        packed += maps(q, rows, BLOCK_M) + maps(k, rows, BLOCK_N) + maps(v, rows, BLOCK_N)
        packed += maps(job.out, job.out_rows, BLOCK_M)
        packed += struct.pack(
            "<4q13i44x",
            *(job.lse.data_ptr(), *job.lse_stride, tiles, row_tiles, pieces, heads, rows.rows),
            *(rows.rate, rows.shift, rows.longer, heads // kv_heads, chunk, rows.start, rows.length, rows.count),
        )
        tiles += row_tiles * pieces * heads
    packed += bytes((MAX_JOBS - len(jobs)) * 1152)
    first = 0
    for part in parts:
        rows = part.rows
        held = _held(rows)
        packed += maps(part.out, part.out_rows, held)
        packed += struct.pack(
            "<q10i16x",
            *(part.lse.data_ptr(), rows.start, rows.length, rows.count, heads, rows.rows),
            *(rows.rate, rows.shift, rows.longer, first, held),
        )
        first += held
    packed += bytes(320 * (not parts))
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)
    packed += struct.pack("<Q2if44x", taken.data_ptr(), len(jobs), tiles, scale * math.log2(math.e))
    settings = {
        **{"HEAD_DIM": head_dim, "GROUPS": groups, "CAUSAL": int(causal), "STAGES": stages, "MAX_JOBS": MAX_JOBS},
        **{"PARTS": len(parts), "PARTS_ROWS": first, "NARROW": int(not parts and (causal or head_dim == 64))},
    }
    shared_bytes = _shared_bytes(head_dim, first)
    function = compiled(
        source_of("forward.cu", q.dtype, tuple(settings.items())), "forward", shared_bytes, q.device.index
    )
    programs = min(tiles, most_programs(q.device))
    launch(function, programs, (groups + 1) * 128, shared_bytes, packed)
