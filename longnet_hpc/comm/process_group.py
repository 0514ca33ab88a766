"""`torch.distributed` brought up over the ranks of a communicator: no launcher of torch's, no environment variables."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its own stubs do not name it

from longnet_hpc.comm.agreement import agreed, broadcast_object, node_place, rank_and_size
from longnet_hpc.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["init_process_group"]


def init_process_group(
    comm: MPI.Comm | None, *, device: Literal["cpu", "cuda"] = "cpu", timeout: float = 600.0
) -> None:
    """Make the ranks of a communicator the default process group of torch, for its data parallelism.

    Rank 0 opens a `torch.distributed.TCPStore` on a free port and tells the others its address over MPI.
    `torch.distributed.destroy_process_group` ends the group.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        The ranks, in the same order; None for a group of one.
    device : str
        Where tensors lie: ``cpu`` for gloo, ``cuda`` for NCCL, on each rank's current device.
    timeout : float
        Seconds after which a rank that waits for others gives up.

    Raises
    ------
    LaunchError
        If there is a process group already, or a rank cannot reach rank 0. All ranks raise it. Collective.
    """
    rank, size = rank_and_size(comm)
    patience = timedelta(seconds=timeout)
    store: TCPStore | None = None
    with agreed(comm, LaunchError, facts={"device": device}):
        if distributed.is_initialized():
            raise LaunchError("torch.distributed has a process group already; destroy_process_group ends it")
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise LaunchError(f"device must be cpu, or cuda where torch sees a GPU, got {device!r}")
        if rank == 0:
            store = TCPStore("127.0.0.1", 0, size, True, patience, wait_for_workers=False)
    beside_first = node_place(comm).first_node
    host, port = broadcast_object(comm, (socket.gethostname(), 0 if store is None else store.port))
    with agreed(comm, LaunchError):
        if store is None:
            address = "127.0.0.1" if beside_first else host
            try:
                store = TCPStore(address, port, size, False, patience)
            except RuntimeError as error:
                raise LaunchError(f"rank {rank} cannot reach rank 0 at {address}:{port}: {error}") from error
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=patience,
        device_id=None if device == "cpu" else torch.device(device, torch.cuda.current_device()),
    )
