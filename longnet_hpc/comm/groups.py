"""The owner of sub-communicators: one a group of ranks, made once, freed with the communicator they came from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from longnet_hpc.life import life
from longnet_hpc.partition import communicator_rounds

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Groups", "groups_of"]


class Groups:
    """Sub-communicators of one communicator, keyed by the ranks in them.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The communicator whose ranks the groups name.

    Attributes
    ----------
    plans : dict
        What callers keep for as long as the communicator lives, by key.
    retired : list
        What callers keep no longer but may still be in use.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.plans: dict[Any, Any] = {}
        self.retired: list[Any] = []
        self._comm = comm
        self._known: set[tuple[int, ...]] = set()
        self._mine: dict[tuple[int, ...], MPI.Comm] = {}
        self._everyone: MPI.Comm | None = None

    def ensure(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Create the communicators that are missing. Collective; ``groups`` must be the same on all ranks."""
        missing = [group for group in groups if group not in self._known]
        for members in communicator_rounds(missing):
            own = [index for index, group in enumerate(members) if self._comm.rank in group]
            assert len(own) <= 1
            from mpi4py import MPI

            with life.waiting_for("groups of ranks"):
                made = self._comm.Split(own[0] if own else MPI.UNDEFINED, key=self._comm.rank)
            if own:
                self._mine[members[own[0]]] = made
        self._known.update(missing)

    def keep_only(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Free all other communicators. Collective; ``groups`` must be the same on all ranks."""
        unwanted = self._known.difference(groups)
        for group in sorted(unwanted & self._mine.keys()):
            self._mine.pop(group).Free()
        self._known -= unwanted

    def __getitem__(self, ranks: tuple[int, ...]) -> MPI.Comm:
        """Return the communicator of a group that this rank is in."""
        return self._mine[ranks]

    def everyone(self) -> MPI.Comm:
        """Return a communicator of all ranks, for exchanges alone. Collective when called for the first time."""
        if self._everyone is None:
            with life.waiting_for("groups of ranks"):
                self._everyone = self._comm.Dup()
        return self._everyone

    def free(self) -> None:
        """Free every communicator. Collective; harmless when called twice."""
        if self._everyone is not None:
            self._everyone.Free()
            self._everyone = None
        self.plans.clear()
        self.retired.clear()
        self.keep_only(())


def groups_of(comm: MPI.Comm) -> Groups:
    """Return the groups that belong to ``comm``; they live as long as it does."""
    keyval = _keyval()
    groups: Any = comm.Get_attr(keyval)
    if groups is None:
        groups = Groups(comm)
        comm.Set_attr(keyval, groups)
    assert isinstance(groups, Groups)
    return groups


@cache
def _keyval() -> int:
    from mpi4py import MPI

    def delete(comm: Any, keyval: int, groups: Groups) -> None:
        groups.free()

    return MPI.Comm.Create_keyval(delete_fn=delete)
