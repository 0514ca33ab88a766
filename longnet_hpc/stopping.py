"""Ending a long job in good order: after a time, or when the scheduler says that its time is nearly over."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from longnet_hpc.comm import allgather_objects

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they kill: ``--signal=USR1@120`` of Slurm, for example."""


class StopRequest:
    """Within its context SIGTERM and SIGUSR1 do not end the process, but are kept until the job asks.

    Parameters
    ----------
    seconds : float, optional
        Time after which the job should stop by itself.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._signalled = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, comm: MPI.Comm | None) -> bool:
        """Return whether any rank has to stop; the same on all of them. Collective."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return any(allgather_objects(comm, self._signalled or late))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
