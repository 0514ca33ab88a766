"""Simulated clusters: SimGrid platforms of nodes on a fat-tree or a dragonfly, from the numbers of a machine file.

One host is one rank. Inside a node, each rank has a link to and one from a switch that blocks nothing (NVLink). To
other nodes it has a link to and one from the network. Cables between the switches of the network are shared, so that
ranks can be in each other's way there, which the analytic model leaves out.

Routes are written out pair by pair: SimGrid's own fat-trees and dragonflies know one rate for all of their links, and
no fast links inside a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from longnet_hpc.scaling.machine import Link, Machine

__all__ = ["HOST_FLOP_PER_SECOND", "write_hostfile", "write_platform"]

HOST_FLOP_PER_SECOND = 1e9
"""Speed of a simulated host. Traces give computing in nanoseconds of it, whatever really computes."""

_LEAF_PORTS = 32
"""Ranks at a leaf switch of a fat-tree, and its cables upwards: half of the 64 ports of present switches each, as in
trees of full bandwidth. The receiver decides which cable a message takes, as static InfiniBand routing does."""
_ROUTER_PORTS = 16
"""Ranks at a router of a dragonfly, as in Slingshot."""
_GROUP_ROUTERS = 4
"""Routers of a group. Real groups have up to 32, but jobs are spread over groups; so 64 ranks fill one here."""
_ROUTER_CABLES = 8
"""Cables between two routers of a group: with detours over other routers, which adaptive routing takes and the replay
does not, each router has more than its ranks can fill."""
_GROUP_CABLES = 32
"""Cables between two groups, half of what their ranks could fill."""

_Topology = Literal["fat-tree", "dragonfly"]
_Cables = tuple[tuple[str, int], ...]


def write_platform(path: Path, machine: Machine, ranks: int, ranks_per_node: int, topology: _Topology) -> None:
    """Write the platform file of a cluster, with the hosts ``rank0``, ``rank1`` and so on.

    Parameters
    ----------
    path : Path
        File to write.
    machine : Machine
        Rates and latencies of the links.
    ranks : int
        Number of hosts.
    ranks_per_node : int
        Neighbouring ranks that share a node; more than it has devices share their links.
    topology : str
        Network between the nodes.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in _platform(machine, ranks, ranks_per_node, topology))


def write_hostfile(path: Path, ranks: int) -> None:
    """Write the file that says which host each rank is, one a line.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path.write_text("".join(f"rank{rank}\n" for rank in range(ranks)), encoding="utf-8")


def _platform(machine: Machine, ranks: int, ranks_per_node: int, topology: _Topology) -> Iterator[str]:
    share = max(1.0, ranks_per_node / machine.devices_per_node)
    yield "<?xml version='1.0'?>"
    yield '<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">'
    yield '<platform version="4.1">'
    yield '<zone id="cluster" routing="Full">'
    for rank in range(ranks):
        yield f'<host id="rank{rank}" speed="{HOST_FLOP_PER_SECOND:.0f}f"/>'
    for rank in range(ranks):
        for kind, link in (("node", machine.within), ("net", machine.between)):
            # Half of the latency at each end, none in between: with more of it, a flow gets less of a shared link.
            yield from _links([(f"{kind}{rank}.out", 1), (f"{kind}{rank}.in", 1)], link, share, 0.5)
    network = _fat_tree if topology == "fat-tree" else _dragonfly
    known: set[str] = set()
    routes: list[str] = []
    for source in range(ranks):
        for target in range(ranks):
            if source == target:
                continue
            beyond = source // ranks_per_node != target // ranks_per_node
            kind, cables = ("net", network(source, target)) if beyond else ("node", ())
            new = [cable for cable in cables if cable[0] not in known]
            known.update(name for name, _ in new)
            yield from _links(new, machine.between, 1.0, 0.0)
            way = (f"{kind}{source}.out", *(name for name, _ in cables), f"{kind}{target}.in")
            parts = "".join(f"<link_ctn id={quoteattr(name)}/>" for name in way)
            routes.append(f'<route src="rank{source}" dst="rank{target}" symmetrical="NO">{parts}</route>')
    yield from routes  # after all links
    yield "</zone>"
    yield "</platform>"


def _links(names: Iterable[tuple[str, int]], link: Link, share: float, latency: float) -> Iterator[str]:
    """Yield links of one direction, each of a number of cables; ``latency`` is their part of the machine's."""
    for name, cables in names:
        rate, seconds = link.bytes_per_second * cables / share, link.latency_seconds * latency
        yield f'<link id={quoteattr(name)} bandwidth="{rate!r}Bps" latency="{seconds!r}s"/>'


def _fat_tree(source: int, target: int) -> _Cables:
    """Return the cables between the switches on the way from a rank to another, by name and number."""
    source_leaf, target_leaf = source // _LEAF_PORTS, target // _LEAF_PORTS
    if source_leaf == target_leaf:
        return ()
    spine = target % _LEAF_PORTS
    return (f"leaf{source_leaf}.spine{spine}", 1), (f"spine{spine}.leaf{target_leaf}", 1)


def _dragonfly(source: int, target: int) -> _Cables:
    """Return the same on the shortest way: within a group from router to router, else on the cables of the groups."""
    source_router, target_router = source // _ROUTER_PORTS, target // _ROUTER_PORTS
    if source_router == target_router:
        return ()
    source_group, target_group = source_router // _GROUP_ROUTERS, target_router // _GROUP_ROUTERS
    if source_group == target_group:
        return ((f"router{source_router}.router{target_router}", _ROUTER_CABLES),)
    return ((f"group{source_group}.group{target_group}", _GROUP_CABLES),)
