"""Run this Python on several ranks, as a child of a test that has none: with the mpirun beside it, on either MPI."""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

# With any of these left, a child believes to be part of the job that the tests run in.
_LAUNCHERS = ("PMI", "PMIX", "PRTE", "OMPI", "HYDRA", "HYDI", "MPIR", "MPI_LOCAL", "PALS", "SLURM")

# Open MPI refuses to run as root, or with more ranks than cores, unless told that this is meant. MPICH does not look.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # the same for Open MPI 4
}

MODEL = (
    *("--model.layers", "2", "--model.embed-dim", "32", "--model.heads", "4"),
    *("--model.segment-lengths", "48", "256", "--model.dilation-rates", "1", "4"),
)
"""Options for a model so small that a step takes milliseconds."""


SECONDS = 240
"""After which a child hangs: many times what any takes on two cores that nobody else uses."""
_LOOP_SECONDS = 0.06
"""Processor time of `slowness`'s loop where the figures of docs/LOG.md are from."""


def slowness():
    """Return how many times the processor time of that machine a loop takes here and now, at least 1."""
    begin, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return max(1.0, (time.process_time() - begin) / _LOOP_SECONDS)


def patience(seconds):
    """Return in how many whole seconds a rank that is not stuck advances here, if it takes so many there."""
    return math.ceil(seconds * slowness())


def environment(**more):
    """Return this environment without a launcher's variables, fit for either MPI on two cores."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHERS)}
    path = os.pathsep.join(filter(None, (str(ROOT), clean.get("PYTHONPATH"))))
    return clean | _OPEN_MPI | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def run_python(*words, ranks=1, cwd=None, timeout=SECONDS):
    """Run ``python words...`` on some ranks; 1 means without mpirun."""
    if ranks > 1 and MPIRUN is None:
        pytest.skip("needs an mpirun")
    launcher = (MPIRUN, "-n", str(ranks)) if ranks > 1 else ()
    return subprocess.run(
        [*launcher, sys.executable, *map(str, words)],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_command(*words, ranks=1, cwd=None, timeout=SECONDS):
    """Run ``python -m longnet_hpc.run words...``."""
    return run_python("-m", "longnet_hpc.run", *words, ranks=ranks, cwd=cwd, timeout=timeout)


def error_lines(done):
    """Return what a command that ended with code 2 said in error, having made sure that it showed no traceback."""
    assert done.returncode == 2, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]
