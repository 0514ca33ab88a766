# What differs between sites: every job script of this folder reads this file, and nothing else needs an edit, but for
# the #SBATCH lines, which sbatch's own options override (--account, --partition, --nodes, --gpus-per-node, ...).
# shellcheck shell=bash

# Python with longnet_hpc, where it is not in the path of whoever submits.
# module load python
# source .venv/bin/activate

# MPI: one of three. SLURM_MPI_TYPE is what srun starts ranks with; it must be what the MPI library speaks.

# MPICH (also the wheel from PyPI). On GPUs MPICH must have been built --with-cuda or --with-hip.
export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmi2} MPIR_CVAR_CH4_NETMOD=ofi
# module load mpich; export MPIR_CVAR_ENABLE_GPU=1

# Open MPI, built --with-ucx --with-cuda (`ompi_info | grep -i cuda` tells).
# module load openmpi; export SLURM_MPI_TYPE=pmix
# export OMPI_MCA_pml=ucx UCX_TLS=rc,sm,self,cuda_copy,cuda_ipc,gdr_copy

# Cray MPICH on NVIDIA A100. mpi4py must be linked with its library for GPUs, once:
#   MPICC="cc -target-accel=nvidia80 -shared" pip install --force-reinstall --no-cache-dir --no-binary=mpi4py mpi4py
# module load cray-mpich craype-accel-nvidia80; export SLURM_MPI_TYPE=cray_shasta MPICH_GPU_SUPPORT_ENABLED=1

# One GPU a rank: all ranks of a node see all of its GPUs, and rank n of a node takes the n-th. Each rank has its own
# cores, in the order of GPUs: ranks next to each other in the sequence, which exchange most, share a node.
export SLURM_GPU_BIND=none SLURM_CPU_BIND=cores SLURM_DISTRIBUTION=block:block
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
