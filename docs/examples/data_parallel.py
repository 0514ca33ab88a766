"""Train on a mesh of ranks: two ranks share each sequence, and torch's data parallelism adds up the gradients of all.

    mpirun -n 4 python docs/examples/data_parallel.py
    mpirun -n 4 python docs/examples/data_parallel.py --fsdp

The loss is the sum over this rank's tokens, times the number of ranks, divided by the tokens of the step on all ranks:
each rank's gradient is the share of its own tokens, of which torch takes the mean.
"""

import argparse

import torch
from mpi4py import MPI
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from longnet_hpc import LongNet, LongNetConfig, Partition, SequencePlan
from longnet_hpc.comm.mesh import split
from longnet_hpc.comm.process_group import init_process_group


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence (default: 1024)")
    parser.add_argument("--steps", type=int, default=3, help="of training (default: 3)")
    parser.add_argument("--fsdp", action="store_true", help="cut the weights over ranks (FSDP2), too")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    sequence, data = split(comm, sequence=min(2, comm.size))  # rank r works on sequence r // 2
    init_process_group(comm)  # gloo; device="cuda" for NCCL

    torch.manual_seed(0)  # the same weights on all ranks
    model = LongNet(LongNetConfig.preset("tiny"))
    own = Partition.even(options.seq_len, sequence.size).slice_of(sequence.rank)
    plan = SequencePlan.build(model.config.pattern, len(own), comm=sequence)
    if options.fsdp:
        devices = init_device_mesh("cpu", (comm.size,))
        for block in model.blocks:
            fully_shard(block, mesh=devices)
        fully_shard(model, mesh=devices)
        register_fsdp_forward_method(model, "loss")  # which gathers the weights as `forward` does
    else:
        parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    text = torch.randint(256, (data.size, options.seq_len + 1), generator=torch.Generator().manual_seed(1))
    mine = text[data.rank : data.rank + 1]  # this rank's sequence, and of it this rank's slice
    tokens, targets = mine[:, own.start : own.stop], mine[:, own.start + 1 : own.stop + 1]
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        if options.fsdp:
            loss = model.loss(tokens, targets, plan)
        else:
            loss = F.cross_entropy(parallel(tokens, plan).flatten(0, 1), targets.flatten(), reduction="sum")
        (loss * comm.size / (data.size * options.seq_len)).backward()
        optimizer.step()
        mean = comm.allreduce(float(loss.detach())) / (data.size * options.seq_len)
        if comm.rank == 0:
            print(f"step {step}: {mean:.4f} nats a token over {data.size} sequences on {comm.size} ranks", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
