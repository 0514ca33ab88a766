"""Time and peak memory of dilated attention, forward and backward, as the sequence grows.

    python bench/linear.py --out bench/records/linear.jsonl

Each length runs in a process of its own, so that peak memory is that length's. Prints a line a length, then
the exponents fitted to time and to memory (above that after one warm-up pass of 1,024 tokens) over length; 1 is linear.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from longnet_hpc import dilated_attention
from longnet_hpc.record import append_record, make_record, where

PATTERN = {"segment_lengths": [512, 1024, 2048, 4096, 8192], "dilation_rates": [1, 2, 4, 6, 12]}
HEADS, HEAD_DIM = 4, 32


def measure(seq_len, repeats):
    """Return (seconds, peak bytes above the start, worst difference to the reference) of one length."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def step(length, backend="auto"):
        leaves = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
        started = time.perf_counter()
        out = dilated_attention(*leaves, **PATTERN, causal=True, backend=backend)
        out.sum().backward()
        return time.perf_counter() - started, out.detach(), leaves

    step(1024)  # warm-up
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(step(seq_len)[0] for _ in range(repeats))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - base
    # The check comes last, since its memory must not count: the same numbers by plain matrix products in float64.
    _, out, leaves = step(8192)
    with torch.no_grad():
        expected = dilated_attention(*(x.double() for x in leaves), **PATTERN, causal=True, backend="reference")
    return seconds, peak, (out.double() - expected).abs().max().item()


def exponent(points, key):
    """Return the slope of log(key) over log(tokens), least squares."""
    x, y = ([math.log(point[name]) for point in points] for name in ("tokens", key))
    return statistics.linear_regression(x, y).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortest", type=int, default=8192, help="tokens (default: 8192)")
    parser.add_argument("--longest", type=int, default=524288, help="tokens (default: 524288)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a length, of which the median counts")
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.repeats)))
        return
    config = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "causal": True, "threads": 1, **PATTERN}
    how = {"warmup": 1, "repeats": options.repeats, "statistic": "median", "place": where()}
    points = []
    seq_len = options.shortest
    while seq_len <= options.longest:
        command = [sys.executable, __file__, "--one", str(seq_len), "--repeats", str(options.repeats)]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        seconds, peak, difference = json.loads(answer.stdout)
        assert difference < 2e-5, f"wrong results: off by {difference}"
        points.append({"tokens": seq_len, "seconds": seconds, "peak_bytes": peak, "max_difference": difference})
        print(f"{seq_len:>9,} tokens  {seconds:8.3f} s  {peak / 2**20:8.0f} MiB  {seq_len / seconds:10,.0f} tokens/s")
        seq_len *= 2
    fit = {"time_exponent": exponent(points, "seconds"), "memory_exponent": exponent(points, "peak_bytes")}
    print(f"fitted exponents: time {fit['time_exponent']:.3f}, memory {fit['memory_exponent']:.3f}")
    if options.out:
        check = ("8,192 tokens against the float64 reference, 2e-5", True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = make_record("linear", config=config, results={"lengths": points, **fit}, check=check, **how)
        append_record(options.out, record)


if __name__ == "__main__":
    main()
