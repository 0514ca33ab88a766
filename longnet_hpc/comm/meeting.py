"""Where the ranks meet before the job ends, so that none leaves before the others know why."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Meeting"]


class Meeting:
    """A place apart from all other exchanges, which ranks can enter without knowing whether the others will.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        The ranks; made collectively, at the start of the job.
    """

    def __init__(self, comm: MPI.Comm | None) -> None:
        self._comm = None if comm is None else comm.Dup()

    def all_arrive(self, seconds: float) -> bool:
        """Wait until every rank has called this; return False if some have not within ``seconds``."""
        if self._comm is None:
            return True
        request = self._comm.Ibarrier()
        deadline = time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
