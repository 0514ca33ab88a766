"""Dilated attention on one device against dense attention at its best, in one run on the same tensors.

    python bench/attention.py --out bench/records/attention.jsonl --picture bench/records/attention.png
    python bench/attention.py --sweep head_dim --backends hopper cudnn library --table
    python bench/attention.py --shapes 12x64 --profile

For each shape, full and causal: cuDNN's dense attention of 32,768 tokens, whose rate (FLOP/s) is the yardstick; ours,
the paper's pattern, forward and with backward, as `dilated_attention` computes it; other ways of dense attention; and
the usual way (gather each branch, attend, scatter to a dense tensor a branch, mix). The floor is our arithmetic at the
rate of the yardstick. Yardstick and ours take turns, since a card that is limited by its power is faster while it is
cool: what counts is the median of the ratios, round by round, and the lowest and highest stand beside it. Beside each
timing, output and gradients are compared with float64, and so are those of dense flash attention.

On a CPU everything runs, too, if it is made small; the yardstick is then torch's own dense attention there.
"""

import argparse
import time
from pathlib import Path

import torch
from attention_cases import SWEEPS, cases_of
from attention_measure import measure, measure_graphs
from attention_picture import draw
from attention_report import failure_line, fastest_table, linear_summary, lines_of
from timing import WARMUP

from longnet_hpc.errors import BackendError
from longnet_hpc.record import append_record, make_record, read_records, where

CHECK = "output and gradients of one sequence against float64, relative error below 0.02"


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=SWEEPS, default="none", help="what is varied (default: nothing)")
    parser.add_argument("--tokens", type=int, default=524288, help="tokens in all (default: 524288)")
    parser.add_argument("--seq-len", type=int, help="tokens a sequence (default: 32768; small: 8192)")
    parser.add_argument("--longest", type=int, default=1 << 24, help="tokens, where linear ends (default: 16777216)")
    parser.add_argument("--yardstick-len", type=int, default=32768, help="tokens of the yardstick (default: 32768)")
    parser.add_argument("--shapes", nargs="+", help="heads x head_dim, as 12x64 (default: those of the sweep)")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="attention backends (default: auto)")
    parser.add_argument(
        "--passes", nargs="+", choices=["forward", "both"], help="what is timed; both: forward with backward"
    )
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, help="timed rounds, of which the median counts (default: 7; small: 51)")
    parser.add_argument("--usual", action=argparse.BooleanOptionalAction, default=True, help="gather, attend, scatter")
    parser.add_argument("--profile", action="store_true", help="show the kernels of forward and backward by time")
    parser.add_argument("--table", action="store_true", help="print the fastest backends as a Python dict")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds after which no case starts (default: 220)")
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    parser.add_argument("--picture", type=Path, help="PNG to draw of all records in --out")
    options = parser.parse_args(words)
    if options.picture and not options.out:
        parser.error("--picture is drawn from the records in --out: give both")
    if options.repeats is None:
        options.repeats = 51 if options.sweep == "small" else 7
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return options, cases_of(options)
    except ValueError as error:
        parser.error(str(error))


def attempt(function, case, device, options):
    """Return results, or why there are none."""
    try:
        return function(case, device, options)
    except torch.cuda.OutOfMemoryError as error:
        return {"failure": f"out of memory: {str(error).splitlines()[0]}"}
    except BackendError as error:
        return {"failure": f"not done: {error}"}


def measured(cases, device, options):
    """Yield each case with its results; none starts after the limit."""
    started = time.perf_counter()
    for case in cases:
        if time.perf_counter() - started > options.limit:
            yield case, {"failure": f"not run: {options.limit:g} s have passed"}
            continue
        yield case, attempt(measure, case, device, options)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def with_graphs(pairs, device, options):
    """Add times of CUDA graphs, after all others: a capture that fails may leave torch's allocator in its mode."""
    failure = None
    for case, result in list(pairs):
        if "failure" not in result and device.type == "cuda":
            result.update({"graph_failure": failure} if failure else measure_graphs(case, device, options))
            failure = failure or result["graph_failure"]
        yield case, result


def record_of(case, result, options):
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return make_record(
        "attention",
        config={**config, **case.config()},
        results=result,
        place={**where(), "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None},
        check=(CHECK, result["passed"]),
        warmup=WARMUP,
        repeats=options.repeats,
        statistic="median",
    )


def main(words=None):
    options, cases = arguments(words)
    device = torch.device(options.device)
    pairs = measured(cases, device, options)
    if options.sweep == "small":
        pairs = with_graphs(pairs, device, options)
    done, wrong = [], False
    for case, result in pairs:
        if "failure" in result:
            print(failure_line(case, result["failure"]), flush=True)
            continue
        if case.sweep == "linear":
            result["seconds_per_token"] = result[f"{case.passes[-1]}_seconds"] / case.tokens
        print("\n".join(lines_of(case, result)), flush=True)
        wrong = wrong or not result["passed"]
        if result["passed"]:
            done.append((case, result))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            append_record(options.out, record_of(case, result, options))
    for line in linear_summary(done) if options.sweep == "linear" else ():
        print(line)
    if options.table:
        print(fastest_table(done))
    if options.picture:
        draw(read_records(options.out), options.picture)
    if wrong:
        raise SystemExit("error: attention was wrong, so its times mean nothing")


if __name__ == "__main__":
    main()
