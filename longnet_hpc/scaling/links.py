"""Messages between ranks as the performance model knows them: latency, rate, and what computing hides."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from longnet_hpc.comm import allgather_objects, barrier
from longnet_hpc.comm.buffers import start_alltoallv
from longnet_hpc.comm.launch import Launch
from longnet_hpc.scaling.machine import Link

__all__ = ["Links", "measure_links", "pairs_between", "pairs_within"]

_SMALL_BYTES = 1 << 10
_LARGE_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Large enough that latency does not count."""
_REPEATS = 9
_COPY_LATENCY_SECONDS = 2e-6

Pair = tuple[int | None, int | None]
"""The rank that one sends to, and that it receives from; None where there is none."""


@dataclass(frozen=True)
class Links:
    """Between ranks."""

    within: Link
    """Of a node."""
    between: Link
    """Of different nodes."""
    overlap: float
    """Share of an exchange that goes on while a rank computes."""
    remark: str
    """What was not measured, if anything."""


def measure_links(launch: Launch) -> Links:
    """Measure exchanges of pairs of ranks, all at once. Collective.

    A rank exchanges with its neighbour in the node, and with the ranks of the same place in the nodes beside it, where
    there are these. What there is not is estimated, and the remark says so.
    """
    if launch.size == 1:
        rate = _copy_rate(launch.device)
        link = Link(_COPY_LATENCY_SECONDS, rate)
        return Links(link, link, 0.0, "; one rank, so that links are estimated from copies in memory")
    nodes = allgather_objects(launch.comm, socket.gethostname())
    within, between = (
        _link(launch, pairs) if any(to is not None for to, _ in pairs) else None
        for pairs in (pairs_within(nodes), pairs_between(nodes))
    )
    remark = ""
    if between is None:
        remark = "; one node, so that links between nodes are taken as those within"
    elif within is None:
        remark = "; one rank a node, so that links within nodes are taken as those between"
    known = within or between
    assert known is not None
    return Links(within or known, between or known, _overlap(launch), remark)


def pairs_within(nodes: Sequence[str]) -> list[Pair]:
    """Return for each rank the neighbour in its node that it sends to, which sends to it, too; of the node of each."""
    pairs: list[Pair] = [(None, None)] * len(nodes)
    for ranks in _ranks_of(nodes):
        for one, other in zip(ranks[::2], ranks[1::2], strict=False):
            pairs[one], pairs[other] = (other, other), (one, one)
    return pairs


def pairs_between(nodes: Sequence[str]) -> list[Pair]:
    """Return for each rank the one of the same place in the next node, to send to, and that in the one before."""
    pairs: list[Pair] = [(None, None)] * len(nodes)
    for of_a_place in zip_longest(*_ranks_of(nodes)):
        ranks = [rank for rank in of_a_place if rank is not None]
        if len(ranks) > 1:
            for before, rank, after in zip([ranks[-1], *ranks], ranks, [*ranks[1:], ranks[0]], strict=False):
                pairs[rank] = after, before
    return pairs


def _ranks_of(nodes: Sequence[str]) -> list[list[int]]:
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    return list(by_node.values())


def _link(launch: Launch, pairs: Sequence[Pair]) -> Link:
    to, source = pairs[launch.rank]
    most = _LARGE_BYTES[launch.device.type]
    small, large = (_pair_seconds(launch, to, source, count) for count in (_SMALL_BYTES, most))
    return Link(small, (most - _SMALL_BYTES) / max(large - small, 1e-9))


def _exchange(launch: Launch, to: int | None, source: int | None, data: torch.Tensor) -> torch.Tensor:
    """Send to one rank, and receive as much from another, if there are these."""
    comm, rows = launch.comm, len(data)
    assert comm is not None
    send, receive = ([rows if other == its else 0 for other in range(comm.size)] for its in (to, source))
    return start_alltoallv(comm, data, send, [0] * comm.size, receive).finish()


def _pair_seconds(launch: Launch, to: int | None, source: int | None, count: int) -> float:
    data = torch.zeros(count // 1024, 1024, dtype=torch.uint8, device=launch.device)
    times = []
    for repeat in range(_REPEATS + 2):
        barrier(launch.comm)
        begin = time.perf_counter()
        _exchange(launch, to, source, data)
        if launch.device.type == "cuda":
            torch.cuda.synchronize(launch.device)
        if repeat >= 2:
            times.append(time.perf_counter() - begin)
    return max(allgather_objects(launch.comm, statistics.median(times)))


def _overlap(launch: Launch) -> float:
    """Return the share of an exchange that products hide, with the exchange driven between them as attention does."""
    comm = launch.comm
    assert comm is not None
    partner = launch.rank ^ 1
    valid = partner < launch.size
    data = torch.zeros(_LARGE_BYTES[launch.device.type] // 1024, 1024, dtype=torch.uint8, device=launch.device)
    counts = [len(data) if valid and other == partner else 0 for other in range(comm.size)]
    width = 1024 if launch.device.type == "cpu" else 2048  # whose products take about as long as the exchange
    a = torch.ones(width, width, device=launch.device)

    def timed(exchanges: bool, computes: bool) -> float:
        times = []
        for _ in range(5):
            barrier(comm)
            begin = time.perf_counter()
            pending = start_alltoallv(comm, data, counts, [0] * comm.size, counts) if exchanges else None
            for _ in range(8 if computes else 0):
                a @ a
                if pending is not None:
                    pending.test()
            if pending is not None:
                pending.finish()
            if launch.device.type == "cuda":
                torch.cuda.synchronize(launch.device)
            times.append(time.perf_counter() - begin)
        return max(allgather_objects(comm, statistics.median(times)))

    exchange, computing, both = timed(True, False), timed(False, True), timed(True, True)
    return min(1.0, max(0.0, (exchange + computing - both) / min(exchange, computing)))


def _copy_rate(device: torch.device) -> float:
    data = torch.zeros(_LARGE_BYTES[device.type], dtype=torch.uint8, device=device)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return _LARGE_BYTES[device.type] / statistics.median(times)
