"""Collectives with their adjoints, all made of one exchange of rows and a local sum in rank order.

MPI never reduces: a sum over ranks is an exchange of the parts and a local sum in float32 or wider, rank 0 first. That
is deterministic, works for half precision, and is much faster than a reduction of device memory inside MPI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from longnet_hpc.comm.agreement import rank_and_size
from longnet_hpc.comm.buffers import Pending, start_alltoallv
from longnet_hpc.errors import ShapeError
from longnet_hpc.trace import span

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["RowGather", "all_reduce_sum", "gather_parts", "reduce_scatter_sum"]

BUCKET_BYTES = 1 << 26
"""Largest part of a sum over ranks that is exchanged at once, in bytes."""


class RowGather:
    """An exchange in which each rank offers blocks of rows and receives blocks of others; and its adjoint.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Ranks that take part.
    send_counts, send_starts : sequence of int
        For each rank, how many of this rank's offered rows it gets and which is the first. Blocks may overlap.
    recv_counts : sequence of int
        How many rows come from each rank.
    """

    def __init__(
        self, comm: MPI.Comm, send_counts: Sequence[int], send_starts: Sequence[int], recv_counts: Sequence[int]
    ) -> None:
        self.comm = comm
        self.send_counts = tuple(send_counts)
        self.send_starts = tuple(send_starts)
        self.recv_counts = tuple(recv_counts)

    def start(self, offered: torch.Tensor, *, when_ready: bool = False) -> Pending:
        """Start the exchange of ``offered``, shape ``(rows, width)``, or soon, as `start_alltoallv` does. Collective.

        Finishing gives shape ``(sum(recv_counts), width)``, the received blocks in rank order.
        """
        return start_alltoallv(
            *(self.comm, offered, self.send_counts, self.send_starts, self.recv_counts),
            what="keys and values",
            when_ready=when_ready,
        )

    def start_adjoint(self, received_grad: torch.Tensor, *, when_ready: bool = False) -> Pending:
        """Start sending gradients of received rows, ``(sum(recv_counts), width)``, back to their owners. Collective."""
        starts = [0, *accumulate(self.recv_counts)][:-1]
        return start_alltoallv(
            *(self.comm, received_grad, self.recv_counts, starts, self.send_counts),
            what="gradients of keys and values",
            when_ready=when_ready,
        )

    def finish_adjoint(self, pending: Pending, offered_grad: torch.Tensor) -> torch.Tensor:
        """Add what came back onto ``offered_grad``, ``(rows, width)``, float32 or wider, in rank order; return it."""
        parts = pending.finish().split(self.send_counts)
        for part, start, count in zip(parts, self.send_starts, self.send_counts, strict=True):
            offered_grad[start : start + count] += part
        return offered_grad


def all_reduce_sum(comm: MPI.Comm | None, tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over ranks, in rank order.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks to sum over.
    tensor : torch.Tensor
        Any shape and floating dtype, the same on all ranks.

    Returns
    -------
    torch.Tensor
        A new tensor of the same shape and dtype; half precision is summed in float32 and rounded once. The same bits on
        all ranks and in every run. Collective.

    Raises
    ------
    ShapeError
        If the dtype is not floating.
    """
    _check_dtype(tensor)
    size = rank_and_size(comm)[1]
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if comm is None or size == 1:
        return total
    flat = total.view(-1)
    with span("gradient", "sum over ranks"):
        for bucket in flat.split(max(1, BUCKET_BYTES // flat.element_size())):
            counts = [stop - start for start, stop in pairwise(_even_bounds(bucket.numel(), comm.size))]
            bucket.copy_(_gather(comm, _sum_own(comm, bucket, counts), counts))
    return total


def reduce_scatter_sum(comm: MPI.Comm, tensor: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
    """Sum a tensor over ranks, in rank order, of which each rank gets a part.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Ranks to sum over.
    tensor : torch.Tensor
        One-dimensional, contiguous, of any floating dtype, the same on all ranks.
    bounds : sequence of int
        Rank r gets the sum of ``bounds[r]`` to ``bounds[r + 1]``; from 0 to the length, ascending.

    Returns
    -------
    torch.Tensor
        A new tensor, with the bits that `all_reduce_sum` has there. Collective.

    Raises
    ------
    ShapeError
        If the dtype is not floating.
    """
    _check_dtype(tensor)
    own = torch.empty(bounds[comm.rank + 1] - bounds[comm.rank], dtype=tensor.dtype, device=tensor.device)
    with span("gradient", "sum over ranks"):
        for parts in _buckets(bounds, tensor.element_size()):
            bucket = torch.cat([tensor.detach()[part.start : part.stop] for part in parts])
            mine = slice(parts[comm.rank].start - bounds[comm.rank], parts[comm.rank].stop - bounds[comm.rank])
            own[mine] = _sum_own(comm, bucket, [len(part) for part in parts])
    return own


def gather_parts(comm: MPI.Comm, own: torch.Tensor, bounds: Sequence[int]) -> Iterator[tuple[range, torch.Tensor]]:
    """Yield what the ranks hold each a part of, piece by piece: where a piece lies, and the piece.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Ranks that take part. Collective: all must exhaust it.
    own : torch.Tensor
        This rank's part, one-dimensional and contiguous.
    bounds : sequence of int
        Rank r holds ``bounds[r]`` to ``bounds[r + 1]`` of the whole.
    """
    for parts in _buckets(bounds, own.element_size()):
        first = bounds[comm.rank]
        mine = own.detach()[parts[comm.rank].start - first : parts[comm.rank].stop - first]
        counts = [len(part) for part in parts]
        with span("gradient", "weights of all ranks"):
            pieces = _gather(comm, mine, counts).split(counts)
        yield from zip(parts, pieces, strict=True)


def _buckets(bounds: Sequence[int], itemsize: int) -> Iterator[list[range]]:
    """Yield for each exchange the part of every rank, so that all of them together are about `BUCKET_BYTES`."""
    most = max(1, BUCKET_BYTES // itemsize // (len(bounds) - 1))
    for done in range(0, max(stop - start for start, stop in pairwise(bounds)), most):
        yield [range(min(start + done, stop), min(start + done + most, stop)) for start, stop in pairwise(bounds)]


def _even_bounds(length: int, size: int) -> list[int]:
    return [length * rank // size for rank in range(size + 1)]


def _check_dtype(tensor: torch.Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise ShapeError(f"a sum over ranks needs a floating dtype, got {tensor.dtype}")


def _sum_own(comm: MPI.Comm, bucket: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return this rank's part of the sum of a one-dimensional tensor over ranks, rank r having ``counts[r]`` of it."""
    own, starts = counts[comm.rank], [0, *accumulate(counts)][:-1]
    sent = start_alltoallv(comm, bucket.unsqueeze(1), counts, starts, [own] * comm.size, what="parts of a sum")
    parts = sent.finish().view(comm.size, own)
    wide = torch.float64 if bucket.dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)  # said, since torch does not promote formats of 8 bits
    return total.to(bucket.dtype)


def _gather(comm: MPI.Comm, own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the one-dimensional parts of all ranks, one after the other."""
    mine = own.unsqueeze(1).contiguous()
    sent = start_alltoallv(comm, mine, [len(own)] * comm.size, [0] * comm.size, counts, what="sums")
    return sent.finish().view(-1)
