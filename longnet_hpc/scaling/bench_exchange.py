"""Messages of growing size by the exchanges that attention and gradients are made of, on the host and from GPUs.

Beside them stand MPI's own collectives with the same bytes, and a copy in memory, which no exchange can be faster than.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from longnet_hpc.comm import RowGather, all_reduce_sum, allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.comm.transport import Transport, use_transport
from longnet_hpc.scaling.rounds import Rounds, median_interval

__all__ = ["ExchangePoint", "exchange_points"]

_OURS = ("rows", "rows_back", "allgather", "alltoall", "sum")
_OTHERS = ("mpi_allgather", "mpi_alltoall", "copy")
_SMALLEST_BYTES, _FACTOR = 1 << 10, 4
_ROW_BYTES = 256
"""Keys of one token and head of 64 features in float32, for example."""
_BYTES_OF_A_ROUND, _MOST_OF_A_ROUND = 1 << 22, 64
"""A round repeats small messages until they have this many bytes, or this often."""
_VALUES = 997
"""Numbers whose sums over ranks float32 holds exactly."""

Operation = Callable[[], torch.Tensor]


def exchange_points(counts: Sequence[int], max_bytes: int, launch: Launch) -> list[dict[str, Any]]:
    """Return the points of the sweep: numbers of ranks, operations, ways to travel, sizes.

    ``bytes`` are those that a rank offers to others (rows, allgather), sends in all (alltoall), gives back as gradients
    to each other rank (rows_back), or sums (sum). mpi_allgather and mpi_alltoall are MPI's own, and copy is by the
    first rank alone, to another GPU if there is one.
    """
    transports = ["host"]
    if launch.transport is not None:
        transports = ["direct", "staged"] if launch.transport is Transport.DIRECT else ["staged"]
    sizes = [min(_SMALLEST_BYTES, max_bytes // _ROW_BYTES * _ROW_BYTES or _ROW_BYTES)]
    while sizes[-1] * _FACTOR <= max_bytes:
        sizes.append(sizes[-1] * _FACTOR)
    return [
        {"ranks": count, "operation": operation, "transport": transport, "bytes": size}
        for count in counts
        for operation in (*_OURS, *_OTHERS)
        for transport in transports
        for size in sizes
        if not (operation in _OTHERS and transport == "staged")
        and not (operation == "mpi_alltoall" and size < count * _ROW_BYTES)  # not a row for each
    ]


class ExchangePoint:
    """One operation of one size, on one of its ranks.

    Parameters
    ----------
    launch : Launch
        The ranks of the point, 2 at least.
    point : dict
        One of `exchange_points`.
    """

    def __init__(self, launch: Launch, point: dict[str, Any]) -> None:
        assert launch.comm is not None
        self.rounds = Rounds(launch)
        self._launch, self._size, self._rank = launch, launch.size, launch.rank
        self._transport = None if point["transport"] == "host" else Transport(point["transport"])
        count = max(1, point["bytes"] // _ROW_BYTES)
        self._repeats = max(1, min(_MOST_OF_A_ROUND, _BYTES_OF_A_ROUND // point["bytes"]))
        others = [count if other != launch.rank else 0 for other in range(launch.size)]
        before = [count if other < launch.rank else 0 for other in range(launch.size)]
        after = [count if other > launch.rank else 0 for other in range(launch.size)]
        nowhere = [0] * launch.size
        send, starts, receive, offered = others, nowhere, others, count
        not_received = 0  # what a rank has itself
        if point["operation"] in ("rows", "rows_back"):
            send, receive = after, before
        elif point["operation"] == "alltoall":
            parts = [count * rank // launch.size for rank in range(launch.size + 1)]
            send = [parts[rank + 1] - parts[rank] for rank in range(launch.size)]
            starts, receive = parts[:-1], [send[launch.rank]] * launch.size
            not_received = send[launch.rank]
        self._count, self._send, self._starts, self._receive = count, send, starts, receive
        gather = RowGather(launch.comm, send, starts, receive)
        mine = self._rows(launch.rank, offered)
        self._operation: Operation
        self._received_bytes = (sum(receive) - not_received) * _ROW_BYTES
        self._expected: Operation = self._expected_rows
        if point["operation"] == "copy":
            self._set_copy(mine)
        elif point["operation"] in _OTHERS:
            self._set_collective(point["operation"], mine)
        elif point["operation"] == "sum":
            self._operation = lambda: all_reduce_sum(launch.comm, mine)
            # Its part from each, itself included, and then the sums of all.
            own = count * _ROW_BYTES // 4 * (launch.rank + 1) // launch.size
            own -= count * _ROW_BYTES // 4 * launch.rank // launch.size
            self._received_bytes = 4 * own * launch.size + count * _ROW_BYTES
            self._expected = lambda: torch.stack([self._rows(rank, count) for rank in range(launch.size)]).sum(0)
        elif point["operation"] == "rows_back":
            gradient = self._rows(launch.rank, sum(receive))
            self._operation = lambda: gather.finish_adjoint(gather.start_adjoint(gradient), torch.zeros_like(mine))
            self._received_bytes = sum(send) * _ROW_BYTES
            self._expected = self._expected_gradient
        else:
            self._operation = lambda: gather.start(mine).finish()

    def _set_copy(self, mine: torch.Tensor) -> None:
        """Let the first rank copy, and the others do nothing."""
        if self._rank:
            self._operation = self._expected = lambda: mine
            self._received_bytes = 0
            return
        arrived = torch.empty_like(mine, device=_neighbour(mine.device))
        self._operation = lambda: arrived.copy_(mine)
        self._expected = lambda: mine.to(arrived.device)
        self._received_bytes = mine.nbytes

    def _set_collective(self, operation: str, mine: torch.Tensor) -> None:
        """Let the operation be one of MPI's own, from tensors to tensors where they are."""
        comm, size, rank = self._launch.comm, self._size, self._rank
        assert comm is not None
        gathers = operation == "mpi_allgather"
        given = mine if gathers else mine[: len(mine) // size * size]
        arrived = given.new_empty((size if gathers else 1) * len(given), given.shape[1])
        self._received_bytes = arrived.nbytes // size * (size - 1)
        call = comm.Allgather if gathers else comm.Alltoall

        def exchange() -> torch.Tensor:
            if mine.is_cuda:
                torch.cuda.current_stream(mine.device).synchronize()  # MPI knows nothing of streams
            call(_buffer(given), _buffer(arrived))
            return arrived

        def expected() -> torch.Tensor:
            everything = [self._rows(other, self._count)[: len(given)] for other in range(size)]
            part = len(given) // size
            return torch.cat(everything if gathers else [rows[rank * part :][:part] for rows in everything])

        self._operation, self._expected = exchange, expected

    def take(self, *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""

        def work() -> None:
            for _ in range(self._repeats):
                self._operation()

        with use_transport(self._transport):
            self.rounds.take(work, timed=timed)

    def results(self) -> dict[str, Any]:
        """Return what the record says of all rounds. Collective over the ranks of the point."""
        middle, low, high = (value / self._repeats for value in median_interval(self.rounds.seconds()))
        received = allgather_objects(self._launch.comm, self._received_bytes)
        return {
            "seconds": middle,
            "seconds_low": low,
            "seconds_high": high,
            "bytes_received": max(received),
            "bytes_per_second": max(received) / middle,
            "bytes_per_second_mean_of_ranks": statistics.fmean(received) / middle,
        }

    def check(self) -> tuple[str, bool]:
        """Compare what arrives with what was sent, byte by byte. Collective, as `results`."""
        with use_transport(self._transport):
            arrived = self._operation()
        right = torch.equal(arrived, self._expected())
        return "what arrived is what was sent", all(allgather_objects(self._launch.comm, right))

    def _rows(self, rank: int, count: int) -> torch.Tensor:
        """Return the rows of a rank, whose numbers no other rank has in the same order."""
        numbers = torch.arange(count * _ROW_BYTES // 4, device=self._launch.device)
        return ((numbers * (rank + 2) + rank) % _VALUES).float().view(count, _ROW_BYTES // 4)

    def _expected_rows(self) -> torch.Tensor:
        parts = []
        for rank, count in enumerate(self._receive):
            start = self._count * self._rank // self._size if any(self._starts) else 0
            parts.append(self._rows(rank, self._count)[start : start + count])
        return torch.cat(parts)

    def _expected_gradient(self) -> torch.Tensor:
        total = torch.zeros_like(self._rows(0, self._count))
        for rank in range(self._rank + 1, self._size):  # each gives back what it received, rank by rank
            starts = [0, *accumulate([self._count] * rank)]
            total += self._rows(rank, rank * self._count)[starts[self._rank] : starts[self._rank + 1]]
        return total


def _buffer(data: torch.Tensor) -> Any:
    """Return what mpi4py takes for a tensor: a GPU's as it is, which tells its address, the host's as an array."""
    return data if data.is_cuda else data.numpy()


def _neighbour(device: torch.device) -> torch.device:
    """Return another GPU of the node, if there is one; else the same device, for a copy within its memory."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    return torch.device("cuda", ((device.index or 0) + 1) % count) if count > 1 else device
