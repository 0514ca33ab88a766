"""What one layer carries from chunk to chunk: the compact keys and values of segments still open, and its adjoint.

The rows of a segment lie in the order of their positions, a column for each query head. In a backward sweep the
gradients of the same rows travel the other way, until they reach the chunk whose tokens they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from longnet_hpc.attention.backend import Backend, Output
from longnet_hpc.attention.branch import attend, attend_backward
from longnet_hpc.attention.sums import GradientSum, SoftmaxCollector, TakesGradients
from longnet_hpc.attention.views import grid_view
from longnet_hpc.chunk import Chunk, kept_rows
from longnet_hpc.comm import RowGather, groups_of
from longnet_hpc.grids import Grid, earlier_grids, kept_grids
from longnet_hpc.pattern import Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.comm.buffers import Pending

__all__ = ["Carry", "Crossing"]

Pairs = tuple[tuple[Grid, Grid], ...]


class Crossing:
    """Who sees and who leaves rows in one chunk, for given numbers of heads.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    chunk : Chunk
        Where the chunk and its slices lie.
    rank : int
        This rank.
    heads, kv_heads : int
        Query heads and key/value heads.

    Attributes
    ----------
    seen : tuple
        For branches with a segment open at the start of the chunk: the number of the branch, and the query grids of
        this rank with the grids of kept rows that they see.
    left : tuple
        For each rank, the branches with a segment that goes on after the chunk: the number, and the grids of its keys
        with their places among the kept rows.
    left_open : tuple of int
        The numbers of these branches, on whatever rank.
    others : list of int
        All ranks but this one.
    pieces : frozenset
        This rank's pieces of all these segments, with their branches.
    """

    def __init__(self, pattern: Pattern, chunk: Chunk, rank: int, heads: int, kv_heads: int) -> None:
        self.chunk = chunk
        self.rank = rank
        self.seen: tuple[tuple[int, Pairs], ...] = ()
        left: list[tuple[tuple[int, Pairs], ...]] = [() for _ in range(chunk.partition.size)]
        pieces = []
        for index, branch in enumerate(pattern):
            run = chunk.seeing_piece(branch, rank)
            if run is not None:
                self.seen += ((index, earlier_grids(branch, run, chunk.tokens_before(branch), heads)),)
                pieces.append((branch, run))
            for other in range(chunk.partition.size):
                run = chunk.leaving_piece(branch, other)
                if run is not None:
                    left[other] += ((index, kept_grids(branch, run, heads, kv_heads)),)
                    if other == rank:
                        pieces.append((branch, run))
        self.left = tuple(left)
        self.left_open = tuple(dict.fromkeys(index for index, _ in chain.from_iterable(left)))
        self.others = [other for other in range(chunk.partition.size) if other != rank]
        self.pieces = frozenset(pieces)

    def rows_of(self, rank: int) -> int:
        """Return how many rows of head_dim a rank leaves."""
        return sum(place.rows * place.heads for _, pairs in self.left[rank] for _, place in pairs)

    def gather(self, comm: MPI.Comm) -> RowGather:
        """Return the exchange by which every rank gets what all others leave."""
        own = [0 if other == self.rank else self.rows_of(self.rank) for other in range(comm.size)]
        others = [0 if other == self.rank else self.rows_of(other) for other in range(comm.size)]
        return RowGather(comm, own, [0] * comm.size, others)


class Carry:
    """The kept rows of one layer.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    seq_len : int
        Length of the whole sequence in tokens.
    comm : mpi4py.MPI.Comm or None
        Ranks that share it; each keeps the rows of all.

    Attributes
    ----------
    bytes_received : int
        Bytes that this rank has received from others for it so far.
    """

    def __init__(self, pattern: Pattern, seq_len: int, comm: MPI.Comm | None) -> None:
        self.bytes_received = 0
        self.rows: dict[int, torch.Tensor] = {}
        """By number of the branch, ``(kept rows, 2, batch, heads, head_dim)``: keys and values."""
        self.gradients: dict[int, tuple[GradientSum, GradientSum]] = {}
        """Of the same keys and of the same values."""
        self._pattern = pattern
        self._seq_len = seq_len
        self._comm = groups_of(comm).everyone() if comm is not None and comm.size > 1 else None
        self._flight: tuple[Crossing, Pending] | None = None

    def attend(
        self,
        backend: Backend,
        q: torch.Tensor,
        crossing: Crossing,
        total: SoftmaxCollector,
        *,
        scale: float,
        progress: Callable[[], object],
    ) -> None:
        """Attend the queries of open segments to the kept rows, all of which they see, and merge.

        Parameters
        ----------
        backend : Backend
            Who computes.
        q : torch.Tensor
            Queries, ``(batch, local_len, heads, head_dim)``.
        crossing : Crossing
            Who sees what.
        total : SoftmaxCollector
            Added to.
        scale : float
            Factor on the scores.
        progress : callable
            Called between kernels.
        """
        self.settle()
        for index, pairs in crossing.seen:
            k, v = self._keys_and_values(index)
            attend(backend, q, k, v, pairs, total, causal=False, scale=scale, first=False, progress=progress)

    def attend_backward(
        self,
        backend: Backend,
        q: torch.Tensor,
        crossing: Crossing,
        output: Output,
        dq: TakesGradients,
        *,
        scale: float,
        progress: Callable[[], object],
    ) -> None:
        """Add the gradients of `attend` onto those of the queries and those that are carried (adjoint)."""
        for index, pairs in crossing.seen:
            k, v = self._keys_and_values(index)
            sums = self.sums_of(index)
            attend_backward(*(backend, q, k, v, pairs, output, dq, *sums), causal=False, scale=scale, progress=progress)

    def keep(self, k: torch.Tensor, v: torch.Tensor, crossing: Crossing, heads: int) -> None:
        """Keep what the segments that go on after the chunk need of its keys and values. Collective.

        Parameters
        ----------
        k, v : torch.Tensor
            This rank's slice, ``(batch, local_len, kv_heads, head_dim)``.
        crossing : Crossing
            Which rows that are.
        heads : int
            Query heads.
        """
        for index in crossing.left_open:
            if index not in self.rows:
                count = kept_rows(self._pattern.branches[index], self._seq_len)
                self.rows[index] = k.new_zeros(count, 2, k.shape[0], heads, k.shape[3])
        for index, pairs in crossing.left[crossing.rank]:
            for x, kept in zip((k, v), self._keys_and_values(index), strict=True):
                for grid, place in pairs:
                    grid_view(kept, place).copy_(grid_view(x, grid))
        if self._comm is None or not crossing.left_open:
            return
        send = k.new_empty(crossing.rows_of(crossing.rank), 2, k.shape[0], k.shape[3])
        for index, _, place, block in _blocks(crossing, [crossing.rank], send):
            for part, kept in enumerate(self._keys_and_values(index)):
                block[:, :, part].copy_(_by_rows(kept, place))
        flight = crossing.gather(self._comm).start(send.flatten(1), when_ready=True)
        self.bytes_received += flight.bytes_received
        self._flight = crossing, flight

    def settle(self) -> None:
        """Wait for the rows of other ranks that `keep` asked for."""
        if self._flight is None:
            return
        crossing, flight = self._flight
        self._flight = None
        its_rows = self.rows[crossing.left_open[0]]
        received = flight.finish().view(-1, 2, its_rows.shape[2], its_rows.shape[4])
        for index, _, place, block in _blocks(crossing, crossing.others, received):
            for part, kept in enumerate(self._keys_and_values(index)):
                _by_rows(kept, place).copy_(block[:, :, part])

    def start_giving_back(self, crossing: Crossing) -> Callable[[TakesGradients, TakesGradients], None]:
        """Take out the gradients that belong to tokens of the chunk (adjoint of `keep`). Collective.

        What remains is of chunks before it, for segments that are open at its start, too.

        Returns
        -------
        callable
            Adds what belongs to this rank onto its gradients of keys and values, once all ranks have sent their share.
        """
        if not crossing.left_open:
            return lambda dk, dv: None
        some = self.sums_of(crossing.left_open[0])[0].total
        batch, head_dim = some.shape[0], some.shape[3]
        own = some.new_empty(crossing.rows_of(crossing.rank), 2, batch, head_dim)
        others = some.new_empty(sum(map(crossing.rows_of, crossing.others)), 2, batch, head_dim)
        for ranks, its_rows in (([crossing.rank], own), (crossing.others, others)):
            for index, _, place, block in _blocks(crossing, ranks, its_rows):
                for part, gradient in enumerate(self.sums_of(index)):
                    block[:, :, part].copy_(_by_rows(gradient.total, place))
        for index in crossing.left_open:
            if not crossing.chunk.is_inside(self._pattern.branches[index]):
                for gradient in self.sums_of(index):
                    gradient.total.zero_()
        gather = flight = None
        if self._comm is not None:
            gather = crossing.gather(self._comm)
            flight = gather.start_adjoint(others.flatten(1), when_ready=True)
            self.bytes_received += flight.bytes_received

        def finish(dk: TakesGradients, dv: TakesGradients) -> None:
            if gather is not None and flight is not None:
                gather.finish_adjoint(flight, own.flatten(1))
            for _, grid, _, block in _blocks(crossing, [crossing.rank], own):
                for part, gradient in enumerate((dk, dv)):
                    gradient.add(slice(0, batch), grid, block[:, :, part].permute(2, 1, 0, 3))

        return finish

    def _keys_and_values(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kept rows of a branch, ``(batch, rows, heads, head_dim)`` each."""
        rows = self.rows[index]
        return rows[:, 0].transpose(0, 1), rows[:, 1].transpose(0, 1)

    def sums_of(self, index: int) -> tuple[GradientSum, GradientSum]:
        """Return the gradients of the keys and of the values kept of a branch, so far."""
        if index not in self.gradients:
            k, v = self._keys_and_values(index)
            self.gradients[index] = GradientSum(k), GradientSum(v)
        return self.gradients[index]


def _blocks(
    crossing: Crossing, ranks: Sequence[int], rows: torch.Tensor
) -> Iterator[tuple[int, Grid, Grid, torch.Tensor]]:
    """Yield the branches and grids of what ranks leave, with their parts ``(tokens, heads, 2, batch, head_dim)``."""
    position = 0
    for rank in ranks:
        for index, pairs in crossing.left[rank]:
            for grid, place in pairs:
                count = place.rows * place.heads
                yield index, grid, place, rows[position : position + count].unflatten(0, (place.rows, place.heads))
                position += count


def _by_rows(kept: torch.Tensor, place: Grid) -> torch.Tensor:
    """Return kept rows ``(batch, rows, heads, head_dim)`` of one place as ``(rows, heads, batch, head_dim)``."""
    return grid_view(kept, place).squeeze(1).permute(2, 1, 0, 3)
