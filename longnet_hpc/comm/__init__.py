"""The only importer of mpi4py: launch, agreement, buffers, and collectives with their adjoints.

Importing this package does not import mpi4py; a communicator of None means one process everywhere.
"""

from longnet_hpc.comm.agreement import (
    NodePlace,
    agree,
    agree_on,
    agreed,
    allgather_objects,
    barrier,
    broadcast_object,
    collect_objects,
    node_place,
    rank_and_size,
)
from longnet_hpc.comm.collectives import RowGather, all_reduce_sum, gather_parts, reduce_scatter_sum
from longnet_hpc.comm.groups import Groups, groups_of

__all__ = [
    "Groups",
    "NodePlace",
    "RowGather",
    "agree",
    "agree_on",
    "agreed",
    "all_reduce_sum",
    "allgather_objects",
    "barrier",
    "broadcast_object",
    "collect_objects",
    "gather_parts",
    "groups_of",
    "node_place",
    "rank_and_size",
    "reduce_scatter_sum",
]
