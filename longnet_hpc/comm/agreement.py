"""Small exchanges of Python objects: who am I, has anybody failed, what did the others say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from longnet_hpc.errors import LongNetError, ShapeError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["agree", "agree_on", "agreed", "allgather_objects", "barrier", "broadcast_object", "rank_and_size"]

T = TypeVar("T")


def rank_and_size(comm: MPI.Comm | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; ``(0, 1)`` without a communicator."""
    return (0, 1) if comm is None else (comm.rank, comm.size)


def barrier(comm: MPI.Comm | None) -> None:
    """Wait for all ranks. Collective."""
    if comm is not None:
        comm.Barrier()


def broadcast_object(comm: MPI.Comm | None, value: T, root: int = 0) -> T:
    """Return the value that ``root`` passed. Collective; the value must pickle."""
    return value if comm is None else comm.bcast(value, root=root)


def allgather_objects(comm: MPI.Comm | None, value: T) -> list[T]:
    """Return the values of all ranks in rank order. Collective; the values must pickle."""
    return [value] if comm is None else comm.allgather(value)


def agree(comm: MPI.Comm | None, error: BaseException | None) -> None:
    """Raise the same error on all ranks if any rank has one.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must agree.
    error : BaseException or None
        What went wrong on this rank, if anything did.

    Raises
    ------
    BaseException
        The error of the lowest rank that passed one, on every rank. Collective.
    """
    rank, size = rank_and_size(comm)
    if comm is not None:
        flags: list[bool] = comm.allgather(error is not None)
        first = flags.index(True) if True in flags else size
        if first < size:
            error = comm.bcast(error if rank == first else None, root=first)
    if error is not None:
        raise error


def agree_on(comm: MPI.Comm | None, facts: Mapping[str, object], own: T, error: LongNetError | None = None) -> list[T]:
    """Make sure that no rank has failed and that all hold the same facts; return what each adds of its own.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must agree.
    facts : mapping
        Values that must be equal on all ranks, by the name that an error gives them.
    own : object
        A value of this rank's.
    error : LongNetError, optional
        What went wrong on this rank, if anything did; its facts then do not count.

    Returns
    -------
    list
        The own values of all ranks in rank order. Collective; everything must pickle.

    Raises
    ------
    LongNetError
        The error of the lowest rank that passed one, on every rank.
    ShapeError
        If a fact differs: the rank, the fact, and both values, on every rank.
    """
    answers = allgather_objects(comm, (error, dict(facts), own))
    for other_error, _, _ in answers:
        if other_error is not None:
            raise other_error
    expected = answers[0][1]
    for other, (_, theirs, _) in enumerate(answers):
        for name, value in theirs.items():
            if value != expected[name]:
                raise ShapeError(f"rank {other} disagrees with rank 0: {name} {value} is not {expected[name]}")
    return [value for _, _, value in answers]


@contextmanager
def agreed(comm: MPI.Comm | None, *kinds: type[Exception]) -> Iterator[None]:
    """Run a body that may fail on one rank alone; at its end all ranks agree, and all raise or none does.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must agree.
    *kinds : type
        Errors to agree on; `LongNetError` and `OSError` if none are named. Any other exception is a defect and passes
        through, to abort the job.
    """
    error: BaseException | None = None
    expected = kinds or (LongNetError, OSError)
    try:
        yield
    except expected as caught:
        error = caught
    agree(comm, error)
