"""Two dimensions of ranks: those that share a sequence, and those that do the same part of different sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from longnet_hpc.comm.agreement import agree_on, rank_and_size
from longnet_hpc.errors import LaunchError, LongNetError
from longnet_hpc.life import life

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Mesh", "split"]


class Mesh(NamedTuple):
    """The communicators of one rank; whoever made them frees them, with ``Free``."""

    sequence: MPI.Comm | None
    """Ranks that share this rank's sequence, neighbours in the communicator that was split: close to each other."""
    data: MPI.Comm | None
    """Ranks that own the same slice of other sequences."""


def split(comm: MPI.Comm | None, *, sequence: int) -> Mesh:
    """Cut ranks into groups that share a sequence each.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        All ranks.
    sequence : int
        Ranks that share a sequence; it divides the number of ranks. Rank r works on sequence ``r // sequence``.

    Returns
    -------
    Mesh
        ``(sequence, data)``, None for both without a communicator. Collective.

    Raises
    ------
    LaunchError
        If the number does not divide that of the ranks. All ranks raise it.
    ShapeError
        If ranks pass different numbers.
    """
    rank, size = rank_and_size(comm)
    error: LongNetError | None = None
    if isinstance(sequence, bool) or not isinstance(sequence, int) or sequence < 1 or size % sequence:
        error = LaunchError(f"ranks that share a sequence must divide the {size} ranks there are, got {sequence!r}")
    agree_on(comm, {"ranks that share a sequence": sequence}, None, error)
    if comm is None:
        return Mesh(None, None)
    with life.waiting_for("groups of ranks"):
        return Mesh(comm.Split(rank // sequence, rank), comm.Split(rank % sequence, rank))
