"""How much of the exchange of keys and values is hidden behind computing.

    mpirun -n 2 python bench/overlap.py --out bench/records/overlap.jsonl

Time inside MPI (test and wait) of the exchange alone, against the same inside attention, forward and backward, that
starts it, computes, drives it with a test between kernels, and waits for what is left; the slowest rank counts. Packing
and unpacking rows is computing and counted in neither. On a CPU the copying itself happens inside these calls.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from longnet_hpc import Partition, Pattern, SequencePlan, dilated_attention
from longnet_hpc.attention.sums import GradientSum
from longnet_hpc.comm import allgather_objects, barrier
from longnet_hpc.comm.launch import start
from longnet_hpc.record import append_record, make_record, where


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of the whole sequence (default: 65536)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file that the record is appended to")
    options = parser.parse_args()
    launch = start()
    if launch.comm is None:
        raise SystemExit("error: there is nothing to overlap on one rank: use mpirun -n 2 or more")
    torch.manual_seed(launch.rank)
    pattern = Pattern.from_lists([1024, options.tokens], [1, 4])
    local_len = len(Partition.even(options.tokens, launch.size).slice_of(launch.rank))
    plan = SequencePlan.build(pattern, local_len, comm=launch.comm)
    q, k, v = (
        torch.randn(1, local_len, options.heads, options.head_dim, device=launch.device, requires_grad=True)
        for _ in range(3)
    )

    @torch.no_grad()
    def exchange_alone():
        seconds = 0.0
        for _, exchange in plan.exchanges(options.heads, options.heads, causal=False):
            barrier(launch.comm)
            there = exchange.start(k, v)
            rows = exchange.unpack(exchange.finish(there, k))
            barrier(launch.comm)
            back = exchange.start_adjoint(rows, k)
            exchange.finish_adjoint(back, k, GradientSum(k), GradientSum(v))
            seconds += there.seconds_waited + back.seconds_waited
        return seconds

    def attention():
        barrier(launch.comm)
        tested, waited, received = plan.seconds_tested, plan.seconds_waited, plan.bytes_received
        started = time.perf_counter()
        plan.attention(q, k, v, causal=False).sum().backward()
        return {
            "attention_seconds": time.perf_counter() - started,
            "tested_seconds": plan.seconds_tested - tested,
            "waited_seconds": plan.seconds_waited - waited,
            "bytes_received": plan.bytes_received - received,
        }

    def right():
        """Whether this rank's first tokens are what one process makes of the whole sequence, in float64."""
        whole = [torch.cat(allgather_objects(launch.comm, x.detach().cpu()), dim=1).double() for x in (q, k, v)]
        expected = dilated_attention(*whole, pattern.segment_lengths, pattern.dilation_rates, backend="reference")
        mine = plan.attention(q, k, v, causal=False).detach().cpu()
        own = expected[:, plan.start : plan.start + plan.local_len]
        return all(allgather_objects(launch.comm, (mine.double() - own).abs().max().item() < 2e-5))

    def slowest(values):
        return max(allgather_objects(launch.comm, statistics.median(values)))

    exchange_alone()
    attention()
    alone = slowest([exchange_alone() for _ in range(options.repeats)])
    runs = [attention() for _ in range(options.repeats)]
    results = {name: slowest([run[name] for run in runs]) for name in runs[0]}
    inside = slowest([run["tested_seconds"] + run["waited_seconds"] for run in runs])
    correct = right()
    if launch.rank == 0:
        record = make_record(
            "overlap",
            config={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            results={**results, "exchange_alone_seconds": alone, "hidden_fraction": 1 - inside / alone},
            place=where(launch),
            check=("output against one process in float64 by the reference, 2e-5", correct),
            warmup=1,
            repeats=options.repeats,
            statistic="median, slowest rank",
        )
        print(json.dumps(record["results"], indent=1))
        if options.out:
            append_record(options.out, record)
    if not correct:
        raise SystemExit("error: attention was wrong, so its times mean nothing")


if __name__ == "__main__":
    main()
