"""Starting under mpirun, srun or alone: who launched us, which GPU is ours, and how one rank's failure ends the job."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from longnet_hpc.comm.agreement import agree_on, node_place
from longnet_hpc.comm.transport import Transport, decide_transport
from longnet_hpc.errors import LaunchError
from longnet_hpc.launcher import launcher_environment

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Launch", "start"]

_SECONDS_TO_BE_HEARD = 0.5
"""From the traceback to the abort: launchers end their pipes at once, with what they have not read yet."""


@dataclass(frozen=True)
class Launch:
    """One rank of a running job."""

    comm: MPI.Comm | None
    """All ranks; None where there is one rank and no MPI is needed."""
    rank: int
    """This rank."""
    size: int
    """Number of ranks."""
    node_rank: int
    """This rank within its node."""
    node_size: int
    """Number of ranks on this node."""
    device: torch.device
    """The device this rank computes on."""
    transport: Transport | None
    """How device memory travels; None on the CPU or alone."""
    mpi_library: str
    """First line of the MPI library's version, or 'none'."""


def start(*, device: str = "auto", transport: str = "auto") -> Launch:
    """Start MPI where a launcher asks for it, bind this rank to its device, and make failures end the job.

    Parameters
    ----------
    device : str
        ``auto`` (the GPU of this rank's place within its node, ranks sharing GPUs in turn, else the CPU), ``cpu`` or
        ``cuda``.
    transport : str
        ``auto``, ``direct`` or ``staged``: how device memory travels.

    Returns
    -------
    Launch
        Collective over all ranks.

    Raises
    ------
    LaunchError
        If the launcher started more ranks than this MPI library sees, or a GPU is asked for and not there.
        All ranks raise it.
    ShapeError
        If ranks would compute on different kinds of device, or are told different transports.
    """
    launcher, _, expected = launcher_environment()
    comm: MPI.Comm | None = None
    library = "none"
    if expected > 1:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        _abort_on_exception(comm)
        library = MPI.Get_library_version().strip().splitlines()[0].strip("\0 ")
        if comm.size != expected:
            raise LaunchError(
                f"{launcher} started {expected} ranks, but this MPI library ({library}) sees {comm.size}, "
                "so they do not fit together: use the mpirun beside this Python, or "
                "srun --mpi=pmi2 for MPICH and --mpi=pmix for Open MPI"
            )
    node_rank, node_size, _ = node_place(comm)
    error, bound = None, torch.device("cpu")
    try:
        bound = _bind(device, node_rank)
    except LaunchError as caught:
        error = caught
    agree_on(comm, {"device": bound.type}, None, error)
    return Launch(
        comm=comm,
        rank=0 if comm is None else comm.rank,
        size=1 if comm is None else comm.size,
        node_rank=node_rank,
        node_size=node_size,
        device=bound,
        transport=decide_transport(comm, transport) if bound.type == "cuda" and comm is not None else None,
        mpi_library=library,
    )


def _bind(device: str, node_rank: int) -> torch.device:
    """Return the device of the rank at a place within its node, made current where it is a GPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise LaunchError("device cuda was asked for, but torch sees no CUDA device")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    bound = torch.device("cuda", node_rank % torch.cuda.device_count())
    torch.cuda.set_device(bound)
    # On CUDA's default stream every copy that MPI makes between GPUs would wait for all kernels launched so far.
    torch.cuda.set_stream(torch.cuda.Stream(bound))
    return bound


def _abort_on_exception(comm: MPI.Comm) -> None:
    """Make an unhandled exception on one rank end all ranks, with that rank's traceback."""

    def abort(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.write(f"rank {comm.rank} of {comm.size} failed and ends the job:\n{text}")
        sys.stderr.flush()
        logging.shutdown()
        time.sleep(_SECONDS_TO_BE_HEARD)
        comm.Abort(1)

    sys.excepthook = abort
