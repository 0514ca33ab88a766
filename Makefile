# Two commands do everything on a fresh machine with Python 3.11 and no MPI: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
MPI ?= mpich
bin := $(CURDIR)/$(VENV)-$(MPI)/bin

export OMP_NUM_THREADS = 1
# Open MPI asks for these as root or with more ranks than cores; MPICH does not read them.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe = 1
export PRTE_MCA_hwloc_default_binding_policy = none

# The wheel of an MPI of PyPI; or, with MPI=debian, mpi4py made against what apt-get installed.
ifeq ($(MPI),debian)
extras = test
own_mpi4py = $(bin)/python -m pip install -q -c constraints.txt --no-cache-dir --no-binary mpi4py mpi4py
else
extras = $(MPI),test
endif

.PHONY: setup demo docs lint test test-one test-parallel test-slurm test-debian

setup: $(bin)/.ready

$(bin)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-$(MPI)
	$(bin)/python -m pip install -q -c constraints.txt torch
	$(own_mpi4py)
	$(bin)/python -m pip install -q -c constraints.txt -e '.[$(extras)]'
	touch $@

demo: setup
	PATH=$(bin):$$PATH $(bin)/mpirun -n 4 $(bin)/python -m longnet_hpc.run

# Pages and API reference; a warning is an error.
docs: setup
	rm -rf docs/generated
	$(bin)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy longnet_hpc

# Two at a time: many wait for processes that they started.
test-one: setup
	$(bin)/python -m pytest -n 2 --dist loadfile -m "not mpi and not slurm" tests

# One process group per number of ranks, with a limit on the whole so that a hang is a failure.
test-parallel: setup
	for ranks in 2 3 4; do \
	  PATH=$(bin):$$PATH timeout 1500 mpirun -n $$ranks $(bin)/python -m mpi4py -m pytest -x -m mpi --with-mpi tests \
	  || exit 1; done

# Job scripts on a Slurm of several virtual nodes, which these tests start and stop; skipped where none is installed.
test-slurm: setup
	timeout 1200 $(bin)/python -m pytest -rs -m slurm tests/slurm

# By hand: a third MPI, of Debian's packages openmpi-bin and libopenmpi-dev, or mpich and libmpich-dev.
test-debian:
	$(MAKE) test-parallel MPI=debian

test: lint test-one test-parallel test-slurm
	$(MAKE) test-parallel MPI=openmpi
	@echo "all tests passed"
