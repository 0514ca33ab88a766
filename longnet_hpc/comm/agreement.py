"""Small exchanges of Python objects: who am I, has anybody failed, what did the others say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.life import life
from longnet_hpc.trace import span

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "NodePlace",
    "agree",
    "agree_on",
    "agreed",
    "allgather_objects",
    "barrier",
    "broadcast_object",
    "collect_objects",
    "node_place",
    "rank_and_size",
]

T = TypeVar("T")


def rank_and_size(comm: MPI.Comm | None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; ``(0, 1)`` without a communicator."""
    return (0, 1) if comm is None else (comm.rank, comm.size)


class NodePlace(NamedTuple):
    """Where a process is among those that share memory with it, whatever their hosts are called."""

    rank: int
    """Rank among those on its node, 0 to below size."""
    size: int
    """Number of ranks on its node."""
    first_node: bool
    """Whether rank 0 of the communicator is on its node."""


def node_place(comm: MPI.Comm | None) -> NodePlace:
    """Return this process's place on its node. Collective."""
    if comm is None:
        return NodePlace(0, 1, first_node=True)
    from mpi4py import MPI

    with life.waiting_for("who is on a node"):
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        lowest: int = node.bcast(comm.rank)  # ranks of a node are in the order of the communicator
    place = NodePlace(node.rank, node.size, first_node=lowest == 0)
    node.Free()
    return place


def barrier(comm: MPI.Comm | None) -> None:
    """Wait for all ranks. Collective."""
    if comm is not None:
        with span("wait", "barrier"), life.waiting_for("barrier"):
            comm.Barrier()


def broadcast_object(comm: MPI.Comm | None, value: T, root: int = 0) -> T:
    """Return the value that ``root`` passed. Collective; the value must pickle."""
    if comm is None:
        return value
    with life.waiting_for("broadcast"):
        theirs: T = comm.bcast(value, root=root)
    return theirs


def allgather_objects(comm: MPI.Comm | None, value: T) -> list[T]:
    """Return the values of all ranks in rank order. Collective; the values must pickle."""
    if comm is None:
        return [value]
    with span("wait", "agreement"), life.waiting_for("agreement"):
        return comm.allgather(value)


def collect_objects(comm: MPI.Comm | None, value: T) -> Iterator[T]:
    """Yield the values of all ranks in rank order on rank 0, one at a time, and nothing on the others. Collective.

    All ranks must exhaust it; it holds no more than one value, which must pickle.
    """
    rank, size = rank_and_size(comm)
    if rank == 0:
        yield value
        for other in range(1, size):
            assert comm is not None
            with life.waiting_for(f"what rank {other} sends"):
                theirs = comm.recv(source=other)
            yield theirs
    elif comm is not None:
        with life.waiting_for("rank 0 to receive"):
            comm.send(value, dest=0)


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
    agree_on(comm, {}, None, error)


def agree_on(comm: MPI.Comm | None, facts: Mapping[str, object], own: T, error: BaseException | None = None) -> list[T]:
    """Make sure that no rank has failed and that all hold the same facts; return what each adds of its own.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must agree.
    facts : mapping
        Values that must be equal on all ranks, by the name that an error gives them.
    own : object
        A value of this rank's.
    error : BaseException, optional
        What went wrong on this rank, if anything did; its facts then do not count.

    Returns
    -------
    list
        The own values of all ranks in rank order. Collective; everything must pickle.

    Raises
    ------
    BaseException
        The error of the lowest rank that passed one, on every rank.
    ShapeError
        If a fact differs: the rank, the fact, and both values, on every rank.
    """
    answers = allgather_objects(comm, (error, dict(facts), own))
    failed = next((other for other, answer in enumerate(answers) if answer[0] is not None), None)
    if failed is not None:
        failure = error if failed == rank_and_size(comm)[0] else answers[failed][0]
        assert failure is not None
        raise failure  # this rank's own, where it is that: a pickled copy has lost its traceback
    expected = answers[0][1]
    for other, (_, theirs, _) in enumerate(answers):
        for name in (*expected, *(theirs.keys() - expected.keys())):
            value, wanted = theirs.get(name), expected.get(name)
            if value != wanted:
                raise ShapeError(f"rank {other} disagrees with rank 0: {name} {value} is not {wanted}")
    return [value for _, _, value in answers]


@contextmanager
def agreed(comm: MPI.Comm | None, *kinds: type[Exception], facts: Mapping[str, object] | None = None) -> Iterator[None]:
    """Run a body that may fail on one rank alone; at its end all ranks agree, and all raise or none does.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must agree.
    *kinds : type
        Errors to agree on; `LongNetError` and `OSError` if none are named. Any other exception is a defect and passes
        through, to abort the job.
    facts : mapping, optional
        Values that must be equal on all ranks at the end, by name, as for `agree_on`; the body may fill it.
    """
    error: BaseException | None = None
    expected = kinds or (LongNetError, OSError)
    try:
        yield
    except expected as caught:
        error = caught
    agree_on(comm, facts or {}, None, error)
