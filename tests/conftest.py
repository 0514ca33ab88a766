import io
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels then run on the CPU


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Under mpirun rank 0 reports; another rank says what it has to say only if a test fails on it."""
    if not config.getoption("with_mpi", False):
        return
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank:
        config.pluginmanager.get_plugin("terminalreporter")._tw._file = config.held_back = io.StringIO()


def pytest_sessionfinish(session, exitstatus):
    session.config.failed = exitstatus != pytest.ExitCode.OK


def pytest_unconfigure(config):
    if hasattr(config, "held_back") and getattr(config, "failed", True):
        sys.stderr.write(config.held_back.getvalue())


@pytest.fixture
def comm():
    """The communicator of a test run under mpirun."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def shared_tmp_path(comm, tmp_path):
    """One temporary folder for all ranks: rank 0 makes it and tells the others."""
    return comm.bcast(tmp_path, root=0)
