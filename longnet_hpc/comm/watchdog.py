"""The watchdog: a rank that is silent for too long ends the job, which says why, instead of hanging.

A thread of each rank tells rank 0 by UDP what its rank does, and rank 0 answers. It never calls MPI, which may be what
hangs. Rank 0 judges all ranks, the others judge rank 0. Ranks that wait for others are victims, not culprits: the one
that is blamed either does not answer (stopped, killed, its host gone) or does not advance without waiting for anybody.

Silence is counted in beats of the thread that listens, not by the clock: a job that was suspended as a whole would find
all its ranks silent otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from longnet_hpc.comm.agreement import agree_on, barrier
from longnet_hpc.comm.buffers import Pending
from longnet_hpc.comm.process import Process
from longnet_hpc.life import life, main_place, stacks

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["beat_interval", "watched"]

_BEATS_WITHIN_LIMIT = 4
"""So that one lost datagram is no silence."""
_BEATS_A_SECOND = 32
"""Most that rank 0 takes from all ranks and answers, 10 us each, less than 0.1% of its time with what it does itself;
from more ranks they come less often."""
_SECONDS_TO_BE_HEARD = 0.5
"""From the last words to the end: launchers end their pipes at once, with what they have not read yet."""
_MOST_NAMED = 8
"""Ranks that are named one by one where all are stuck."""
_LARGEST_DATAGRAM = 1 << 16


@dataclass
class _Sign:
    """What a rank last said of itself."""

    address: Any
    waits: bool
    stalled: float
    """Seconds since it last advanced."""
    where: str
    silent: float = 0.0
    """Seconds since it said so."""


class _Verdict(NamedTuple):
    """Why the job ends."""

    culprit: int | None
    """The rank whose fault it is; None if all are stuck."""
    silent: bool
    """Whether it does not answer, so that it will not end itself."""
    text: str


@contextmanager
def watched(comm: MPI.Comm | None, seconds: float) -> Iterator[None]:
    """End the job, with exit code 1, if a rank is silent within this context. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        All ranks; alone, none is watched.
    seconds : float
        Silence after which the job is ended; 0 means never.

    Raises
    ------
    OSError
        If this rank cannot open a socket.
    ShapeError
        If ranks are told different seconds.
    """
    if comm is None or comm.size == 1:
        yield
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("", 0))
        own = (Process.of(os.getpid()), udp.getsockname()[1], secrets.token_bytes(8))
        answers = agree_on(comm, {"watchdog_seconds": seconds}, own)
        if not seconds:
            yield
            return
        watchdog = _Watchdog(comm.rank, seconds, udp, answers)
        try:
            yield
            barrier(comm)  # so that a rank that is stuck before it comes here is still seen
        finally:
            watchdog.stop()


def beat_interval(limit: float, size: int) -> float:
    """Return the time between two beats of a rank, in seconds.

    Parameters
    ----------
    limit : float
        Silence after which the job is ended, in seconds.
    size : int
        Number of ranks.
    """
    return min(limit / _BEATS_WITHIN_LIMIT, max(1.0, size / _BEATS_A_SECOND))


class _Watchdog:
    """The thread of one rank, which begins at once and may end the process.

    Parameters
    ----------
    rank : int
        This rank.
    limit : float
        Silence after which the job is ended, in seconds.
    udp : socket.socket
        Where it listens.
    answers : list of tuple
        Of each rank: its process, its port, and a token. That of rank 0 marks the datagrams of this job.
    """

    def __init__(self, rank: int, limit: float, udp: socket.socket, answers: list[tuple[Process, int, bytes]]) -> None:
        self._rank, self._size = rank, len(answers)
        self._limit, self._udp = limit, udp
        self._processes = [process for process, _, _ in answers]
        self._interval = beat_interval(limit, self._size)
        first, port, self._token = answers[0]
        # Only rank 0 must be found by name: it answers to where a datagram came from.
        host = "127.0.0.1"
        if first.host != self._processes[rank].host:
            with suppress(OSError):  # then it never hears of this rank, and says so
                host = socket.gethostbyname(first.host)
        self._first = (host, port)
        self._heard: dict[int, _Sign] = {}
        self._beats, self._progress, self._stalled = 0, -1, 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._stopped = True
        with suppress(OSError):
            self._udp.sendto(b"", ("127.0.0.1", self._udp.getsockname()[1]))  # wakes the thread
        self._thread.join(self._interval)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped:
            left = due - time.monotonic()
            if left <= 0:
                self._beat()
                due = time.monotonic() + self._interval
                continue
            self._udp.settimeout(left)
            with suppress(OSError):  # a timeout is one
                self._hear(*self._udp.recvfrom(_LARGEST_DATAGRAM))

    def _beat(self) -> None:
        """Note that time has passed, judge, and tell the others how this rank is."""
        self._beats += 1
        self._stalled = 0.0 if life.progress != self._progress else self._stalled + self._interval
        self._progress = life.progress
        for sign in self._heard.values():
            sign.silent += self._interval
        own = _Sign(None, life.waits_for is not None, self._stalled, _where())
        if self._rank == 0:
            self._heard[0] = own
            self._judge_all()
        elif 0 in self._heard and self._heard[0].silent > self._limit:
            self._end_job(self._verdict(0))
        self._send(self._listeners(), own)

    def _listeners(self) -> list[Any]:
        """Return the addresses of those who want to know how this rank is."""
        return [sign.address for rank, sign in self._heard.items() if rank] if self._rank == 0 else [self._first]

    def _send(self, addresses: Iterable[Any], own: _Sign, verdict: _Verdict | None = None) -> None:
        words = json.dumps((self._rank, own.waits, own.stalled, own.where, verdict))
        datagram = self._token + words.encode()
        for address in addresses:
            with suppress(OSError):  # whom it does not reach will notice the silence
                self._udp.sendto(datagram, address)

    def _hear(self, datagram: bytes, address: Any) -> None:
        if not datagram.startswith(self._token):
            return
        rank, waits, stalled, where, verdict = json.loads(datagram.removeprefix(self._token))
        is_new = rank not in self._heard
        self._heard[rank] = _Sign(address, waits, stalled, where)
        if is_new and self._rank == 0:  # at once, so that it watches rank 0 from now on
            self._send([address], self._heard[0])
        if verdict is not None:
            self._end_job(_Verdict(*verdict))

    def _judge_all(self) -> None:
        """End the job if a rank is silent, or does not advance and waits for nobody, or if all wait."""
        heard, limit = self._heard, self._limit
        # One that waits may do so for as long as it says that it does.
        silences = {rank: sign.silent if sign.waits else max(sign.silent, sign.stalled) for rank, sign in heard.items()}
        if max(silences.values()) > limit:
            culprit = max(silences, key=lambda rank: (self._is_silent(rank), silences[rank]))
            self._end_job(self._verdict(culprit))
        if len(heard) == self._size and all(sign.waits and sign.stalled > limit for sign in heard.values()):
            places = "; ".join(f"rank {rank}: {heard[rank].where}" for rank in range(min(self._size, _MOST_NAMED)))
            text = f"all {self._size} ranks have waited for each other for {limit:.0f} s; {places}"
            self._end_job(_Verdict(None, False, text))
        missing = [rank for rank in range(self._size) if rank not in heard]
        if missing and self._beats * self._interval >= limit > (self._beats - 1) * self._interval:
            logging.getLogger("longnet_hpc").warning(
                "rank %s and %s others cannot be watched: no UDP from their hosts to that of rank 0",
                *(missing[0], len(missing) - 1),
            )

    def _is_silent(self, rank: int) -> bool:
        """Whether a rank does not even answer; one beat may be late, or lost."""
        return self._heard[rank].silent > 2 * self._interval

    def _verdict(self, rank: int) -> _Verdict:
        """Say that it is this rank's fault, and where it was."""
        process, sign, silent = self._processes[rank], self._heard[rank], self._is_silent(rank)
        what = f"has been silent for {sign.silent:.0f} s" if silent else f"has not advanced for {sign.stalled:.0f} s"
        place = f"({process.host}, pid {process.pid})"
        return _Verdict(rank, silent, f"rank {rank} of {self._size} {place} {what}, last seen: {sign.where}")

    def _end_job(self, verdict: _Verdict) -> NoReturn:
        """Tell all ranks and the user, and end this process; MPI is not asked, since that may hang."""
        own, culprit = _Sign(None, False, 0.0, _where()), verdict.culprit
        addresses = self._listeners() if self._rank == 0 else []
        self._send(addresses, own, verdict)
        words = f"{verdict.text}; the job ends (said by rank {self._rank}: {own.where})\n"
        if culprit == self._rank or (culprit is None and self._rank < _MOST_NAMED):
            words += f"rank {self._rank} is at\n{stacks()}"
        # Whoever reads standard error may have stopped, too: it is not waited for.
        speaker = threading.Thread(target=os.write, args=(2, words.encode()), daemon=True)
        speaker.start()
        time.sleep(_SECONDS_TO_BE_HEARD)
        self._send(addresses, own, verdict)  # in case that the first were lost
        if culprit is not None and verdict.silent:
            self._processes[culprit].kill()
        os._exit(1)


def _where() -> str:
    """Say how far the main thread is, what it waits for or computes, and which exchanges are under way."""
    parts = [life.at] if life.at else []
    if (awaited := life.waits_for) is not None:
        parts.append(f"waiting in {awaited}")
    else:
        parts.append(f"computing in {main_place()}")
        parts += [f"exchange of {what} under way" for what in sorted(set(Pending.in_flight()))]
    return ", ".join(parts)
