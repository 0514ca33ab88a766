"""How far forecasts of the performance model are from what is measured, on shapes that `calibrate` does not measure.

    mpirun -n 2 python -m longnet_hpc calibrate --output runs/machine.toml
    mpirun -n 2 python bench/forecast.py --machine runs/machine.toml --out bench/records/forecast_check.jsonl

Each case is a step of a model on all ranks, timed as `bench step` does, with its loss checked against that of the same
sequence in chunks; beside its record stands that of the forecast, so that reports compare them.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from longnet_hpc import LongNetConfig
from longnet_hpc.comm.launch import start
from longnet_hpc.config_file import to_table
from longnet_hpc.model_config import PRESETS
from longnet_hpc.record import append_record, make_record, where
from longnet_hpc.scaling.bench_steps import Steps, StepsPoint
from longnet_hpc.scaling.config import BenchConfig, PlanConfig
from longnet_hpc.scaling.machine import load_machine
from longnet_hpc.scaling.model import forecast
from longnet_hpc.scaling.plan import record_of
from longnet_hpc.trace import Trace, use

TINY = PRESETS["tiny"]
GROWING = LongNetConfig(
    layers=6, embed_dim=192, heads=4, kv_heads=2,
    segment_lengths=(512, 2048, 8192, 32768), dilation_rates=(1, 4, 16, 64),
)  # fmt: skip
MEDIUM = LongNetConfig(layers=3, embed_dim=384, heads=6, segment_lengths=(1024, 4096, 16384), dilation_rates=(1, 4, 16))
WIDE = replace(PRESETS["125m"], layers=2)
CPU_CASES = [
    {"model": TINY, "tokens": 65536},
    {"model": TINY, "tokens": 16384},
    {"model": TINY, "tokens": 32768, "activation_checkpointing": True},
    {"model": TINY, "tokens": 65536, "task": "eval"},
    {"model": GROWING, "tokens": 32768},
    {"model": GROWING, "tokens": 16384, "activation_checkpointing": True, "keep_attention": False},
    {"model": MEDIUM, "tokens": 16384},
    {"model": WIDE, "tokens": 8192},
    {"model": WIDE, "tokens": 16384, "task": "eval"},
]
GEOMETRIC = {"segment_lengths": tuple(2048 * 4**i for i in range(5)), "dilation_rates": tuple(4**i for i in range(5))}
GPU_CASES = [
    {"model": replace(PRESETS["125m"], **GEOMETRIC), "tokens": 131072, "half_residual": True},
    {"model": PRESETS["125m"], "tokens": 65536},
    {"model": PRESETS["125m"], "tokens": 262144, "activation_checkpointing": True},
    {"model": replace(PRESETS["350m"], layers=6, **GEOMETRIC), "tokens": 131072, "half_residual": True},
    {"model": replace(PRESETS["125m"], **GEOMETRIC), "tokens": 524288, "task": "eval", "half_residual": True},
    {"model": replace(PRESETS["125m"], embed_dim=512, heads=4, layers=8), "tokens": 131072, "half_residual": True},
]


def measure(case, launch, machine_name, machine, repeats):
    """Return the records of a case, measured and forecast, on rank 0; None elsewhere."""
    tokens = case["tokens"]
    options = {key: value for key, value in case.items() if key != "tokens"}
    bench = BenchConfig(sweep="step", tokens=tokens, ranks=(launch.size,), repeats=repeats, **options)
    plan = PlanConfig(
        machine=machine_name, seq_len=tokens, ranks=(launch.size,), ranks_per_node=launch.node_size, **options
    )
    torch.compiler.reset()  # torch keeps so many graphs of one code, and each case has its own
    with use(Trace(on_gpu=launch.device.type == "cuda")):
        point = StepsPoint(Steps(bench, launch.device), launch, tokens)
        for number in range(bench.warmup + bench.repeats):
            point.take(timed=number >= bench.warmup)
        results, check = point.results(), point.check()
    its = {"ranks": launch.size, "tokens": tokens * bench.batch_size}
    measured = make_record(
        "bench step",
        config=to_table(bench) | {"point": its},
        results=results,
        place=where(launch),
        check=check,
        warmup=bench.warmup,
        repeats=bench.repeats,
        statistic="median of the slowest rank, and its 95% confidence interval",
    )
    return measured, record_of("plan", plan, forecast(plan, machine, launch.size))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="machine by name, or a file that calibrate wrote")
    parser.add_argument("--out", type=Path, help="JSON lines to append the records to")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each case, of which the median counts")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of cases, from 0; all by default")
    options = parser.parse_args()
    launch, machine = start(), load_machine(options.machine)
    cases = GPU_CASES if launch.device.type == "cuda" else CPU_CASES
    if options.cases and not set(options.cases) <= set(range(len(cases))):
        parser.error(f"--cases must be 0 to {len(cases) - 1}, got {' '.join(map(str, options.cases))}")
    errors = []
    for number, case in enumerate(cases):
        if options.cases and number not in options.cases:
            continue
        measured, planned = measure(case, launch, options.machine, machine, options.repeats)
        if launch.rank:
            continue
        for record in (measured, planned) if options.out else ():
            append_record(options.out, record)
        model, (real, told) = case["model"], (record["results"] for record in (measured, planned))
        errors.append(told["seconds"] / real["seconds"] - 1)
        its = told["memory_bytes"]  # a step that is measured writes no checkpoint
        memory = its["total"] - its["process" if launch.device.type == "cuda" else "checkpoint"]
        print(
            f"{number}: {launch.size} ranks, {model.layers} x {model.embed_dim} x {model.heads}, {case['tokens']:,} "
            f"tokens, {case.get('task', 'train')}: {real['seconds']:.3f} s [{real['seconds_low']:.3f}, "
            f"{real['seconds_high']:.3f}], forecast {told['seconds']:.3f} ({errors[-1]:+.1%}); received "
            f"{real['bytes_received']:,} and {told['bytes_received']:,} bytes; memory "
            f"{real['peak_memory_bytes'] / 1e9:.2f} and {memory / 1e9:.2f} GB "
            f"({memory / real['peak_memory_bytes'] - 1:+.1%}); {'passed' if measured['check']['passed'] else 'FAILED'}",
            flush=True,
        )
    if errors:
        print(
            f"median error of the time {statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}"
        )


if __name__ == "__main__":
    main()
