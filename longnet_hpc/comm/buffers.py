"""The one way a tensor reaches MPI: detached, contiguous, its stream synchronised, as bytes, direct or staged.

mpi4py takes a torch tensor without synchronising its stream, sends a transposed one in memory order without a word, and
knows no bfloat16. So tensors pass through here and nowhere else: they are sent as bytes in units of whole rows, which
makes every dtype alike and keeps counts far below 2**31.
"""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections import deque
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from longnet_hpc.comm.transport import Transport, device_transport
from longnet_hpc.errors import ShapeError
from longnet_hpc.life import life
from longnet_hpc.trace import span, transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from longnet_hpc.trace import Transfer

__all__ = ["MAX_COUNT", "Pending", "start_alltoallv"]

MAX_COUNT = 2**31 - 1
"""Largest count or displacement that every MPI takes, in rows."""
MAX_LEFT, MAX_LEFT_BYTES = 16, 1 << 28
"""How many exchanges, and of how many bytes, a rank goes on without that gets nothing from them; one in any case."""

_PATIENCE_BYTES_PER_SECOND = 1e9
"""A rank that gets nothing stays with what it sends from host memory as long as this rate takes, then leaves it."""


class Pending:
    """An exchange in flight, or about to be; owns its buffers until it is finished.

    Parameters
    ----------
    begin : callable
        Hands the buffers to MPI and returns the request of a non-blocking collective.
    sendbuf, recvbuf : torch.Tensor
        What MPI reads and writes: the tensors themselves, or their copies in pinned host memory.
    device : torch.device
        Where the result belongs.
    ready : torch.cuda.Event, optional
        When a GPU has made what is to be sent, and nothing uses the memory of what is to be received any more.
    what : str
        What is sent, for traces.
    bytes_sent : int
        To all other ranks together.

    Attributes
    ----------
    bytes_received : int
        Bytes that arrive from all ranks.
    seconds_tested : float
        Seconds that the start and `test` spent in MPI, driving the exchange between kernels.
    seconds_waited : float
        Seconds that the device had nothing to do while `finish` waited.
    started, idle_since, finished : float
        When MPI was given the exchange, when the device had nothing more to do, and when what was received was there,
        in seconds of `time.perf_counter`; infinity for what has not happened, or not before the end.
    """

    _in_flight: ClassVar[set[Pending]] = set()
    """Keeps the buffers of an exchange that nobody finished, since MPI still writes to them."""
    _to_start: ClassVar[deque[Pending]] = deque()
    """Exchanges that are not ready, in the order in which all ranks made them: in that order they are started."""
    _left: ClassVar[deque[Pending]] = deque()
    """Exchanges that this rank got nothing from, and went on without; they are complete when all others have theirs."""

    def __init__(
        self,
        begin: Callable[[], MPI.Request],
        sendbuf: torch.Tensor,
        recvbuf: torch.Tensor,
        device: torch.device,
        ready: torch.cuda.Event | None,
        what: str,
        bytes_sent: int,
    ) -> None:
        self._begin: Callable[[], MPI.Request] | None = begin
        self._request: MPI.Request | None = None
        self._complete = False
        self._transfer: Transfer | None = None
        self._what = what
        self._bytes_sent = bytes_sent
        self._sendbuf: torch.Tensor | None = sendbuf
        self._recvbuf = recvbuf
        self._device = device
        self._ready = ready
        self.seconds_tested = 0.0
        self.seconds_waited = 0.0
        self.started = self.idle_since = self.finished = math.inf
        self.bytes_received = recvbuf.numel() * recvbuf.element_size()
        self._in_flight.add(self)
        self._to_start.append(self)

    def test(self) -> bool:
        """Start what is ready, let MPI make progress; return whether the exchange is complete."""
        life.progress += 1
        self.start_ready()
        return self._request_is_complete()

    def finish(self) -> torch.Tensor:
        """Wait for the exchange and return what was received, ``(rows, width)``, on the sender's device.

        All exchanges that were made before are started first: other ranks may need them to come this far. A rank that
        gets nothing does not wait until others, who may be behind, have taken what it sends. From host memory, where
        MPI may need its core to send, it first drives that, for no longer than 1 GB/s would take.
        """
        idle = _Idle(_reached(self._device))
        while self._to_start:
            idle.look()
            if self._to_start[0]._is_ready():
                self._to_start.popleft()._start()
            elif self._request is not None:
                self._request.Test()
        if self.bytes_received:
            self._wait(idle)
        else:
            self._left.append(self)
            while len(self._left) > MAX_LEFT or (len(self._left) > 1 and self._bytes_left() > MAX_LEFT_BYTES):
                self._left.popleft()._wait(idle)
        self.finished = time.perf_counter()
        self.idle_since = idle.since
        self.seconds_waited = max(0.0, self.finished - idle.since)
        self._send_some()
        return self._recvbuf.to(self._device, non_blocking=True)

    @classmethod
    def start_ready(cls) -> None:
        """Start the exchanges that are ready, up to the first that is not."""
        while cls._left and cls._left[0]._request_is_complete():
            cls._left.popleft()._release()
        while cls._to_start and cls._to_start[0]._is_ready():
            cls._to_start.popleft()._start()

    @classmethod
    def start_all(cls) -> None:
        """Start all exchanges that were made."""
        while cls._to_start:
            first = cls._to_start.popleft()
            if first._ready is not None:
                first._ready.synchronize()
            first._start()

    @classmethod
    def in_flight(cls) -> list[str]:
        """Return what the exchanges send that are not finished; any thread may ask."""
        return [its._what for its in list(cls._in_flight)]

    @classmethod
    def complete_all(cls) -> None:
        """Start and complete all exchanges of this process: MPI must not end, nor their buffers go, before that."""
        cls.start_all()
        cls._left.clear()
        with life.waiting_for("ranks that are still to take what was sent to them"):
            for its in list(cls._in_flight):
                assert its._request is not None
                its._request.Wait()
                its._release()

    @classmethod
    def _bytes_left(cls) -> int:
        buffers = (its._sendbuf for its in cls._left)
        return sum(0 if buffer is None else buffer.nbytes for buffer in buffers)

    def _request_is_complete(self) -> bool:
        if self._request is not None and not self._complete:  # the call, out of cache after a kernel, takes 10 us
            started = time.perf_counter()
            self._complete = bool(self._request.Test())
            self.seconds_tested += time.perf_counter() - started
            if self._complete and self._transfer is not None:
                self._transfer.end()
                self._transfer = None
        return self._complete

    def _send_some(self) -> None:
        """Drive for a while what others are still to take from host memory."""
        if self._sendbuf is None or self._sendbuf.is_cuda:
            return
        until = time.perf_counter() + self._bytes_sent / _PATIENCE_BYTES_PER_SECOND
        while not self._request_is_complete() and time.perf_counter() < until:
            pass
        self.start_ready()  # which gives up what is complete

    def _wait(self, idle: _Idle) -> None:
        """Wait for the request of an exchange that was started."""
        assert self._request is not None
        traced = nullcontext() if self._transfer is None else span("wait", self._what)
        with traced, life.waiting_for(f"exchange of {self._what}"):
            idle.wait(self._request)
        self._release()

    def _release(self) -> None:
        """Give up what a complete exchange held."""
        if self._transfer is not None:
            self._transfer.end()
            self._transfer = None
        self._sendbuf = None
        self._in_flight.discard(self)

    def _is_ready(self) -> bool:
        return self._ready is None or self._ready.query()

    def _start(self) -> None:
        assert self._begin is not None
        self._transfer = transfer(self._what)
        self.started = time.perf_counter()
        self._request = self._begin()
        self._begin = None  # it holds the buffers
        self.seconds_tested += time.perf_counter() - self.started


@atexit.register
def _complete_at_exit() -> None:
    # After an error, others may never come to take anything; and who ended MPI has completed everything.
    if Pending.in_flight() and getattr(sys, "last_value", None) is None:
        Pending.complete_all()


@cache
def _complete_before_mpi_ends() -> None:
    """Let `MPI.Finalize`, too, complete what is left: first of all it deletes the attributes of this communicator."""
    from mpi4py import MPI

    def delete(comm: Any, keyval: int, value: Any) -> None:
        Pending.complete_all()

    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=delete), True)


def _reached(device: torch.device) -> torch.cuda.Event | None:
    """Return when a GPU has done all that it was given so far; None for the CPU, which has."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class _Idle:
    """Since when a device has had nothing to do, as far as one has looked.

    Parameters
    ----------
    last_kernel : torch.cuda.Event or None
        When a GPU has done all that it was given; None for the CPU, which waits itself.

    Attributes
    ----------
    since : float
        Infinity while it has something to do.
    """

    def __init__(self, last_kernel: torch.cuda.Event | None) -> None:
        self._last_kernel = last_kernel
        self.since = math.inf
        self.look()

    def look(self) -> None:
        if self.since == math.inf and (self._last_kernel is None or self._last_kernel.query()):
            self.since = time.perf_counter()

    def wait(self, request: MPI.Request) -> None:
        """Wait for a request."""
        if self._last_kernel is None:
            request.Wait()
            return
        while not request.Test():
            self.look()


def start_alltoallv(
    comm: MPI.Comm,
    send: torch.Tensor,
    send_counts: Sequence[int],
    send_starts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    what: str = "rows",
    when_ready: bool = False,
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
    when_ready : bool
        Return before a GPU has made the rows, so that it can be given more to do meanwhile; `Pending.test` and
        `Pending.finish` start the exchange later. Between all such on one communicator, nothing else may use it.

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

    _complete_before_mpi_ends()
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
    ready = _reached(device)

    def begin() -> MPI.Request:
        row = MPI.BYTE.Create_contiguous(send.shape[1] * send.element_size()).Commit()
        recv_starts = [0, *accumulate(recv_counts)][:-1]
        request = comm.Ialltoallv(
            [_as_bytes(send), (list(send_counts), list(send_starts)), row],
            [_as_bytes(recv), (list(recv_counts), recv_starts), row],
        )
        row.Free()  # MPI keeps it until the exchange is complete
        return request

    sent = (sum(send_counts) - send_counts[comm.rank]) * send.shape[1] * send.element_size()
    pending = Pending(begin, send, recv, device, ready, what, sent)
    if when_ready:
        Pending.start_ready()
    else:
        Pending.start_all()
    return pending


def _as_bytes(tensor: torch.Tensor) -> Any:
    """Return the tensor's memory as mpi4py takes it; numpy on the host, since an empty DLPack capsule is refused."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat.numpy() if flat.device.type == "cpu" else flat
