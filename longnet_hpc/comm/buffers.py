"""The one way a tensor reaches MPI: detached, contiguous, its stream synchronised, as bytes, direct or staged.

mpi4py takes a torch tensor without synchronising its stream, sends a transposed one in memory order without a word, and
knows no bfloat16. So tensors pass through here and nowhere else: they are sent as bytes in units of whole rows, which
makes every dtype alike and keeps counts far below 2**31.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from longnet_hpc.comm.transport import Transport, device_transport
from longnet_hpc.errors import ShapeError
from longnet_hpc.trace import span, transfer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

__all__ = ["MAX_COUNT", "Pending", "start_alltoallv"]

MAX_COUNT = 2**31 - 1
"""Largest count or displacement that every MPI takes, in rows."""


class Pending:
    """An exchange in flight; owns its buffers until it is finished.

    Parameters
    ----------
    request : mpi4py.MPI.Request
        The non-blocking collective.
    sendbuf, recvbuf : torch.Tensor
        What MPI reads and writes: the tensors themselves, or their copies in pinned host memory.
    device : torch.device
        Where the result belongs.
    what : str
        What is sent, for traces.
    seconds : float
        What the start took.

    Attributes
    ----------
    bytes_received : int
        Bytes that arrive from all ranks.
    seconds_tested : float
        Seconds that the start and `test` spent in MPI, driving the exchange between kernels.
    seconds_waited : float
        Seconds that `finish` found nothing better to do than wait. On a GPU it may have been computing meanwhile, since
        the host runs ahead of it.
    """

    _in_flight: ClassVar[set[Pending]] = set()
    """Keeps the buffers of an exchange that nobody finished, since MPI still writes to them."""

    def __init__(
        self,
        request: MPI.Request,
        sendbuf: torch.Tensor,
        recvbuf: torch.Tensor,
        device: torch.device,
        what: str,
        seconds: float,
    ) -> None:
        self._request = request
        self._complete = False
        self._transfer = transfer(what)
        self._what = what
        self._sendbuf: torch.Tensor | None = sendbuf
        self._recvbuf = recvbuf
        self._device = device
        self.seconds_tested = seconds
        self.seconds_waited = 0.0
        self.bytes_received = recvbuf.numel() * recvbuf.element_size()
        self._in_flight.add(self)

    def test(self) -> bool:
        """Let MPI make progress; return whether the exchange is complete."""
        if not self._complete:  # else the call, out of cache after a kernel, would take 10 microseconds for nothing
            started = time.perf_counter()
            self._complete = bool(self._request.Test())
            self.seconds_tested += time.perf_counter() - started
            if self._complete and self._transfer is not None:
                self._transfer.end()
                self._transfer = None
        return self._complete

    def finish(self) -> torch.Tensor:
        """Wait for the exchange and return what was received, ``(rows, width)``, on the sender's device."""
        started = time.perf_counter()
        if self._transfer is None:
            self._request.Wait()
        else:
            with span("wait", self._what):
                self._request.Wait()
            self._transfer.end()
        self.seconds_waited = time.perf_counter() - started
        self._sendbuf = None
        self._in_flight.discard(self)
        return self._recvbuf.to(self._device, non_blocking=True)


def start_alltoallv(
    comm: MPI.Comm,
    send: torch.Tensor,
    send_counts: Sequence[int],
    send_starts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    what: str = "rows",
) -> Pending:
    """Start sending rows of one tensor to every rank and receiving theirs.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        Ranks that take part.
    send : torch.Tensor
        Shape ``(rows, width)``, any dtype, C-contiguous; must not change before the exchange is finished.
    send_counts, send_starts : sequence of int
        For each rank, how many rows it gets and which is the first; ranks may get the same rows.
    recv_counts : sequence of int
        How many rows come from each rank; they arrive in rank order.
    what : str
        What they are, for traces.

    Returns
    -------
    Pending
        Holds the received tensor ``(sum(recv_counts), width)`` once finished.

    Raises
    ------
    ShapeError
        If the tensor is not two-dimensional and contiguous, or has more rows than `MAX_COUNT`.

    Notes
    -----
    Collective over ``comm``; started in the same order on all its ranks.
    """
    from mpi4py import MPI

    send = send.detach()
    if send.dim() != 2 or not send.is_contiguous():
        raise ShapeError(f"an exchange needs contiguous (rows, width), got {tuple(send.shape)} strides {send.stride()}")
    total = sum(recv_counts)
    if max(total, send.shape[0]) > MAX_COUNT:
        raise ShapeError(f"an exchange takes at most {MAX_COUNT} rows, got {send.shape[0]} to send, {total} to receive")
    device = send.device
    staged = device.type == "cuda" and device_transport() is Transport.STAGED
    recv = torch.empty(
        (total, send.shape[1]), dtype=send.dtype, device="cpu" if staged else device, pin_memory=staged and total > 0
    )
    if staged:
        send = torch.empty(send.shape, dtype=send.dtype, pin_memory=True).copy_(send, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    row = MPI.BYTE.Create_contiguous(send.shape[1] * send.element_size()).Commit()
    recv_starts = [0, *accumulate(recv_counts)][:-1]
    started = time.perf_counter()
    request = comm.Ialltoallv(
        [_as_bytes(send), (list(send_counts), list(send_starts)), row],
        [_as_bytes(recv), (list(recv_counts), recv_starts), row],
    )
    seconds = time.perf_counter() - started
    row.Free()  # MPI keeps it until the exchange is complete
    return Pending(request, send, recv, device, what, seconds)


def _as_bytes(tensor: torch.Tensor) -> Any:
    """Return the tensor's memory as mpi4py takes it; numpy on the host, since an empty DLPack capsule is refused."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat.numpy() if flat.device.type == "cpu" else flat
