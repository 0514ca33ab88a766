"""How much of the exchange of keys and values is hidden behind computing.

    mpirun -n 2 python bench/overlap.py --out bench/records/overlap.jsonl

The exchange alone, started and finished at once, against the time that attention, forward and backward, waits for the
same exchange while it computes; the slowest rank counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from longnet_hpc import Partition, Pattern, SequencePlan
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

    def exchange_alone():
        barrier(launch.comm)
        started = time.perf_counter()
        for _, exchange in plan.exchanges(options.heads, options.heads, causal=False):
            rows = exchange.finish(exchange.start(k, v), k)
            back = exchange.start_adjoint(rows, k)
            exchange.finish_adjoint(back, torch.zeros_like(k), torch.zeros_like(v))
        return time.perf_counter() - started

    def attention():
        barrier(launch.comm)
        waited, received = plan.seconds_waited, plan.bytes_received
        started = time.perf_counter()
        plan.attention(q, k, v, causal=False).sum().backward()
        seconds = time.perf_counter() - started
        return seconds, plan.seconds_waited - waited, plan.bytes_received - received

    def slowest(values):
        return max(allgather_objects(launch.comm, statistics.median(values)))

    exchange_alone()
    attention()
    alone = slowest([exchange_alone() for _ in range(options.repeats)])
    runs = [attention() for _ in range(options.repeats)]
    seconds, waited = slowest([run[0] for run in runs]), slowest([run[1] for run in runs])
    same = torch.isfinite(q.grad).all().item() and all(allgather_objects(launch.comm, runs[0][2] == runs[-1][2]))
    if launch.rank == 0:
        record = make_record(
            "overlap",
            config={key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            results={
                "bytes_received": runs[0][2],
                "exchange_alone_seconds": alone,
                "attention_seconds": seconds,
                "waited_seconds": waited,
                "hidden_fraction": 1 - waited / alone,
            },
            place=where(launch),
            check=("finite gradients, the same bytes in each run", same),
            warmup=1,
            repeats=options.repeats,
            statistic="median, slowest rank",
        )
        print(json.dumps(record["results"], indent=1))
        if options.out:
            append_record(options.out, record)


if __name__ == "__main__":
    main()
