import pytest


@pytest.fixture
def comm():
    """The communicator of a test run under mpirun."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def shared_tmp_path(comm, tmp_path):
    """One temporary folder for all ranks: rank 0 makes it and tells the others."""
    return comm.bcast(tmp_path, root=0)
