"""Where the ranks meet before the job ends, so that none leaves before the others know why."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Meeting"]

_SECONDS = 5.0
"""How long a rank with an error waits for the others to have it too."""


class Meeting:
    """A place apart from all other exchanges, which ranks can enter without knowing whether the others will.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        The ranks; made collectively, before anything can go wrong.
    """

    def __init__(self, comm: MPI.Comm | None) -> None:
        self._comm = None if comm is None else comm.Dup()

    def all_arrive(self) -> bool:
        """Wait until every rank has called this; return False if some have not within a few seconds."""
        if self._comm is None:
            return True
        request = self._comm.Ibarrier()
        deadline = time.monotonic() + _SECONDS
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Give the place up, where no rank waits in it. Collective."""
        if self._comm is not None:
            self._comm.Free()
