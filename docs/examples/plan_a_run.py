"""Ask what a run would need and take, before any node is asked for: no GPU, no MPI.

    python docs/examples/plan_a_run.py
    python docs/examples/plan_a_run.py --machine my_machine.toml --ranks 8 16 32       # a file that calibrate wrote

Forecasts are sums of parts; here the least node hours among the numbers of ranks on which the run fits.
"""

import argparse

from longnet_hpc import LongNetConfig
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import load_machine
from longnet_hpc.scaling.model import forecast


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100", help="name, or a TOML file (default: h100)")
    parser.add_argument("--preset", default="350m", help="model (default: 350m)")
    parser.add_argument("--seq-len", type=int, default=2**24, help="tokens of a sequence (default: 16777216)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="numbers of GPUs")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the run (default: 10000)")
    options = parser.parse_args()

    machine = load_machine(options.machine)
    config = PlanConfig(
        machine=options.machine, ranks=tuple(options.ranks), model=LongNetConfig.preset(options.preset),
        seq_len=options.seq_len, geometric=(2048, 4), steps=options.steps, activation_checkpointing=True,
        half_residual=True,
    )  # fmt: skip
    print(f"{machine.name}: {options.preset}, sequences of {options.seq_len:,} tokens; modelled, not measured")
    hours = {}
    for ranks in config.ranks:
        one = forecast(config, machine, ranks)
        needs = f"{one.memory.total / 1e9:6.1f} of {one.capacity_bytes / 1e9:.0f} GB a rank"
        if not one.fits:
            print(f"{ranks:5} ranks: {needs}, does not fit")
            continue
        hours[ranks] = one.nodes * one.seconds * options.steps / 3600
        print(
            f"{ranks:5} ranks: {needs}, {one.seconds:.2f} s a step, efficiency {one.efficiency:.1%}, "
            f"{one.bytes_received / 1e6:,.0f} MB received a rank, {hours[ranks]:,.1f} node hours"
        )
    if hours:
        best = min(hours, key=hours.get)
        print(f"fewest node hours: {best} ranks, {hours[best]:,.1f}")


if __name__ == "__main__":
    main()
