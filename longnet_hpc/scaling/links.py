"""Messages between ranks as the performance model knows them: latency, rate, and what computing hides."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from longnet_hpc.comm import allgather_objects, barrier
from longnet_hpc.comm.buffers import start_alltoallv
from longnet_hpc.comm.launch import Launch
from longnet_hpc.scaling.machine import Link

__all__ = ["Links", "measure_links"]

_SMALL_BYTES, _LARGE_BYTES = 1 << 10, 1 << 24
_REPEATS = 9
_COPY_LATENCY_SECONDS = 2e-6


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

    A rank exchanges with its neighbour in the node, and with the rank of the same place in the next node, where there
    are these. What there is not is estimated, and the remark says so.
    """
    if launch.size == 1:
        rate = _copy_rate(launch.device)
        link = Link(_COPY_LATENCY_SECONDS, rate)
        return Links(link, link, 0.0, "; one rank, so that links are estimated from copies in memory")
    nodes = launch.size // launch.node_size
    within = _link(launch, launch.rank ^ 1) if launch.node_size > 1 else None
    between = _link(launch, (launch.rank + launch.node_size) % launch.size) if nodes > 1 else None
    remark = ""
    if between is None:
        remark = "; one node, so that links between nodes are taken as those within"
    elif within is None:
        remark = "; one rank a node, so that links within nodes are taken as those between"
    known = within or between
    assert known is not None
    return Links(within or known, between or known, _overlap(launch), remark)


def _link(launch: Launch, partner: int) -> Link:
    small, large = (_pair_seconds(launch, partner, count) for count in (_SMALL_BYTES, _LARGE_BYTES))
    return Link(small, (_LARGE_BYTES - _SMALL_BYTES) / max(large - small, 1e-9))


def _exchange(launch: Launch, partner: int, data: torch.Tensor) -> torch.Tensor:
    """Send to one rank, and receive from the rank that this one is the partner of."""
    comm, rows = launch.comm, len(data)
    assert comm is not None
    valid = partner < launch.size
    backward = launch.rank ^ 1 if partner == launch.rank ^ 1 else (launch.rank - partner + launch.rank) % launch.size
    send = [rows if valid and other == partner else 0 for other in range(comm.size)]
    receive = [rows if valid and other == backward else 0 for other in range(comm.size)]
    return start_alltoallv(comm, data, send, [0] * comm.size, receive).finish()


def _pair_seconds(launch: Launch, partner: int, count: int) -> float:
    data = torch.zeros(count // 1024, 1024, dtype=torch.uint8, device=launch.device)
    times = []
    for repeat in range(_REPEATS + 2):
        barrier(launch.comm)
        begin = time.perf_counter()
        _exchange(launch, partner, data)
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
    data = torch.zeros(_LARGE_BYTES // 1024, 1024, dtype=torch.uint8, device=launch.device)
    counts = [len(data) if valid and other == partner else 0 for other in range(comm.size)]
    width = 1024 if launch.device.type == "cpu" else 8192
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
    data = torch.zeros(_LARGE_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.clone()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return _LARGE_BYTES / statistics.median(times)
