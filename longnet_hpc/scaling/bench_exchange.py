"""Messages of growing size by the exchanges that attention and gradients are made of, on the host and from GPUs."""

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
    to each other rank (rows_back), or sums (sum).
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
        for operation in ("rows", "rows_back", "allgather", "alltoall", "sum")
        for transport in transports
        for size in sizes
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
        if point["operation"] in ("rows", "rows_back"):
            send, receive = after, before
        elif point["operation"] == "alltoall":
            parts = [count * rank // launch.size for rank in range(launch.size + 1)]
            send = [parts[rank + 1] - parts[rank] for rank in range(launch.size)]
            starts, receive = parts[:-1], [send[launch.rank]] * launch.size
        self._count, self._send, self._starts, self._receive = count, send, starts, receive
        gather = RowGather(launch.comm, send, starts, receive)
        mine = self._rows(launch.rank, offered)
        self._operation: Operation
        self._received_bytes = sum(receive) * _ROW_BYTES
        self._expected = self._expected_rows
        if point["operation"] == "sum":
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
