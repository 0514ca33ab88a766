"""Who launched this process, as the environment tells it: needs neither torch nor MPI."""

from __future__ import annotations

import os

__all__ = ["environment_rank", "environment_size", "launcher_environment"]

# Where each launcher writes the rank and the number of ranks. The innermost comes first: mpirun inside a Slurm step
# sets its own beside Slurm's.
_LAUNCHERS = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPICH's mpirun or srun --mpi=pmi2", "PMI_RANK", "PMI_SIZE"),
    ("PALS", "PALS_RANKID", "PALS_SIZE"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def environment_rank() -> int:
    """Return the rank that the launcher's environment gives this process, 0 if it gives none."""
    return launcher_environment()[1]


def environment_size() -> int:
    """Return the number of ranks that the launcher's environment gives, 1 if it gives none."""
    return launcher_environment()[2]


def launcher_environment() -> tuple[str, int, int]:
    """Return the launcher in words, this process's rank, and the number of ranks; 'nothing', 0 and 1 without one."""
    for launcher, rank, size in _LAUNCHERS:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            return launcher, int(os.environ[rank]), int(os.environ[size])
    return "nothing", 0, 1
