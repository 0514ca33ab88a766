"""Whether MPI may be handed device memory: decided once, by a real exchange in a child process that may crash."""

from __future__ import annotations

import enum
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from longnet_hpc.comm.agreement import agree_on, allgather_objects, node_place
from longnet_hpc.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "Transport",
    "decide_transport",
    "device_pointers_work",
    "device_transport",
    "is_decided",
    "use_transport",
]

VARIABLE = "LONGNET_HPC_TRANSPORT"
"""Environment variable that forces ``direct`` or ``staged``."""

# What launchers leave in the environment; with any of it left, the child believes to be part of this job.
_LAUNCHER_PREFIXES = (
    *("PMI", "PRTE", "HYDI", "HYDRA", "PALS_", "SLURM_", "MPIR_", "MPI_LOCAL"),
    *(
        "OMPI_COMM",
        "OMPI_MCA_initial",
        "OMPI_UNIVERSE",
        "OMPI_APP",
        "OMPI_ARGV",
        "OMPI_FILE",
        "OMPI_FIRST",
        "OMPI_NUM",
        "OMPI_MCA_orte",
    ),
    *("OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_ras", "OMPI_MCA_rmaps", "OMPI_MCA_shmem", "ORTE"),
)

_CHILD = """
import torch
from mpi4py import MPI
for count in (16, 1 << 22):
    sent = torch.arange(count, dtype=torch.int32, device="cuda").view(torch.uint8)
    received = torch.zeros_like(sent)
    torch.cuda.synchronize()
    MPI.COMM_SELF.Ialltoallv([sent, ([4 * count], [0]), MPI.BYTE], [received, ([4 * count], [0]), MPI.BYTE]).Wait()
    MPI.COMM_SELF.Sendrecv([sent, MPI.BYTE], 0, recvbuf=[received, MPI.BYTE], source=0)
    torch.cuda.synchronize()
    assert torch.equal(sent, received)
print("device pointers work")
"""


class Transport(enum.Enum):
    """How device memory travels."""

    DIRECT = "direct"
    """MPI reads and writes device memory (CUDA-aware MPI)."""
    STAGED = "staged"
    """Through pinned host memory."""


_decided: Transport | None = None


def is_decided() -> bool:
    """Return whether this process knows how its device memory travels."""
    return _decided is not None


def device_transport() -> Transport:
    """Return how this process's device memory travels; not collective.

    Ranks may differ, since the bytes are the same either way. A process that has not decided with the others
    (`decide_transport`) decides for itself.
    """
    return _decided or decide_transport(None)


@contextmanager
def use_transport(transport: Transport | None) -> Iterator[None]:
    """Let this process's device memory travel so within this context; None changes nothing. Not collective."""
    global _decided
    before = _decided
    _decided = transport or before
    try:
        yield
    finally:
        _decided = before


def decide_transport(comm: MPI.Comm | None, forced: str = "auto") -> Transport:
    """Decide how device memory travels and say so once, on rank 0.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        Ranks that must decide alike; direct only if every node can.
    forced : str
        ``auto``, ``direct`` or ``staged``. The environment variable `LONGNET_HPC_TRANSPORT` speaks where this is auto.

    Returns
    -------
    Transport
        The same on all ranks. Collective.

    Raises
    ------
    LaunchError
        If ``forced``, or the environment variable, is none of the three.
    ShapeError
        If ranks are told different things.
    """
    global _decided
    choice = forced if forced != "auto" else os.environ.get(VARIABLE, "auto")
    error = None
    if choice not in ("auto", "direct", "staged"):
        error = LaunchError(f"transport must be auto, direct or staged, got {choice!r}")
    agree_on(comm, {"transport": choice}, None, error)
    if choice == "auto":
        # One child a node: each starts a CUDA context, which several at once would only slow down.
        first_on_node = node_place(comm).rank == 0
        answers = allgather_objects(comm, device_pointers_work() if first_on_node else (True, ""))
        refusals = [reason for works, reason in answers if not works]
        _decided = Transport.STAGED if refusals else Transport.DIRECT
        reason = refusals[0] if refusals else "a trial exchange of device memory worked"
    else:
        _decided, reason = Transport(choice), "forced"
    if comm is None or comm.rank == 0:
        logging.getLogger("longnet_hpc").info("device memory travels %s: %s", _decided.value, reason)
    return _decided


def device_pointers_work(seconds: float = 120.0) -> tuple[bool, str]:
    """Try an exchange of device memory in a child process.

    Parameters
    ----------
    seconds : float
        Time limit; a child that hangs counts as a refusal.

    Returns
    -------
    tuple of bool and str
        Whether it worked, and if not, why.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_PREFIXES)}
    # Open MPI 4 looks for a remote shell even to start alone; any program that exists will do.
    environment.setdefault("OMPI_MCA_plm_rsh_agent", "sh")
    # A file, not a pipe: an MPI library may leave a daemon behind that keeps a pipe open for ever.
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return False, f"a trial exchange of device memory did not end within {seconds:.0f} s"
        output.seek(0)
        lines = output.read().strip().splitlines() or ["no output"]
    if code == 0 and "device pointers work" in lines:
        return True, ""
    if code < 0:
        return False, f"a trial exchange of device memory died of signal {-code}"
    return False, f"a trial exchange of device memory failed: {lines[-1]}"
