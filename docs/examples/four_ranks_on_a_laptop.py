"""Share one sequence over ranks: attention of slices, its gradient, and what travelled.

    mpirun -n 4 python docs/examples/four_ranks_on_a_laptop.py

Each rank owns a slice and passes the communicator; slices may be uneven. Results are those of one process, which rank 0
computes beside it to compare.
"""

import argparse

import numpy as np
import torch
from mpi4py import MPI

from longnet_hpc import Partition, Pattern, SequencePlan, dilated_attention


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens over all ranks (default: 4096)")
    options = parser.parse_args()
    comm, (batch, heads, head_dim) = MPI.COMM_WORLD, (1, 4, 32)
    pattern = Pattern.geometric(options.seq_len, base=512, ratio=4)

    # Slices that grow with the rank, since causal attention has less to do at the start of a sequence.
    weights = np.linspace(1.5, 0.5, comm.size)
    bounds = np.rint(options.seq_len * np.cumsum([0, *weights]) / weights.sum()).astype(int)
    own = Partition(tuple(int(bound) for bound in bounds)).slice_of(comm.rank)

    torch.manual_seed(0)  # every rank draws the whole sequence and keeps its slice; a model would read its own tokens
    whole = torch.randn(3, batch, options.seq_len, heads, head_dim)
    q, k, v = whole[:, :, own.start : own.stop].clone().requires_grad_()

    # In one call, in which ranks first agree on shapes and slices ...
    out = dilated_attention(q, k, v, pattern.segment_lengths, pattern.dilation_rates, causal=True, comm=comm)

    # ... or by a plan that is made once, for many calls.
    plan = SequencePlan.build(pattern, len(own), comm=comm)
    before = plan.bytes_received
    again = plan.attention(q, k, v, causal=True)
    received = plan.bytes_received - before
    assert torch.equal(out, again)

    out.square().sum().backward()  # collective, too: gradients of keys and values go back to their owners
    gathered = comm.gather(out.detach(), root=0)
    told = comm.gather(f"rank {comm.rank}: tokens {own.start} to {own.stop - 1}, received {received:,} bytes", root=0)
    if comm.rank == 0:
        alone = dilated_attention(*whole, pattern.segment_lengths, pattern.dilation_rates, causal=True)
        torch.testing.assert_close(torch.cat(gathered, dim=1), alone)
        everything = 2 * whole[1].numel() * whole.element_size()
        print("\n".join(told))
        print(f"all keys and values are {everything:,} bytes; the result is that of one process")


if __name__ == "__main__":
    main()
