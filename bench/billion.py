"""Attention over a billion tokens in all, cut into sequences of 8K to 1B tokens: the paper's figure of runtimes.

    python bench/billion.py --out bench/records/billion.jsonl --picture bench/records/billion.png
    python bench/billion.py --total-tokens 65536 --longest 32768 --repeats 2 --dense-limit 4      # small, on a CPU

Forward alone, one device. Three branches: segments of 2,048 tokens, of the tokens of one rank, of the whole sequence,
with dilation rate w / 2048 (LongNet, Fig. 5). One device plays one rank's share after another: a call computes the
tokens of one rank (--tokens-per-call), as many sequences as they hold, over the same tensors each time; a sequence
that is longer is streamed through time in chunks of as many tokens. The time of all tokens is that of one call, or
of one such sequence, times their number, with --whole that of all of them.

Beside it torch's dense attention, up to the length at which all tokens would take longer than --dense-limit; beyond,
its time is extrapolated, since it grows as the length, and the record is of kind ``modelled``. Beside each timing,
rows of the output are compared with float64.
"""

import argparse
from pathlib import Path

import torch
from billion_measure import Tensors, extrapolated, measure, pattern_of, repeats_of
from billion_picture import draw
from timing import WARMUP

from longnet_hpc.errors import BackendError
from longnet_hpc.record import append_record, make_record, read_records, where

CHECK = "48 rows of the output against float64, relative error below 0.02 (float32: 0.0001)"
SHORTEST = 8192


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-tokens", type=int, default=1 << 30, help="tokens in all (default: 1073741824)")
    parser.add_argument("--shortest", type=int, default=SHORTEST, help="tokens of a sequence (default: 8192)")
    parser.add_argument("--longest", type=int, help="tokens of a sequence (default: all)")
    parser.add_argument("--tokens-per-call", type=int, default=1 << 24, help="tokens of a rank (default: 16777216)")
    parser.add_argument("--heads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default: 64)")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backend", default="auto", help="attention backend (default: auto)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds, of which the mean counts (default: 10)")
    parser.add_argument("--long-repeats", type=int, default=3, help="most rounds above 64M tokens (default: 3)")
    parser.add_argument("--whole", action="store_true", help="time all tokens, not one call (dense: always one call)")
    parser.add_argument(
        "--dense-limit", type=float, default=20.0, help="seconds of dense attention over all tokens (default: 20)"
    )
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    parser.add_argument("--picture", type=Path, help="PNG to draw of the records in --out")
    options = parser.parse_args(words)
    options.tokens_per_call = min(options.tokens_per_call, options.total_tokens)
    options.longest = options.longest or options.total_tokens
    for name in ("total_tokens", "shortest", "longest", "tokens_per_call"):
        value = getattr(options, name)
        if value < 1 or value & (value - 1):
            parser.error(f"--{name.replace('_', '-')} must be a power of two, got {value}")
    for name in ("heads", "head_dim", "repeats", "long_repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not options.shortest <= options.longest <= options.total_tokens:
        parser.error(
            f"sequences from --shortest {options.shortest} to --longest {options.longest} tokens must be cut from "
            f"--total-tokens {options.total_tokens}"
        )
    if options.shortest > options.tokens_per_call:
        parser.error(f"a call of --tokens-per-call {options.tokens_per_call} must hold a sequence of --shortest")
    if options.longest > options.tokens_per_call and not options.causal:
        parser.error(f"without causal masks, --longest is at most --tokens-per-call {options.tokens_per_call}")
    if options.picture and not options.out:
        parser.error("--picture is drawn from the records in --out: give both")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.dtype == "auto":
        options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def lengths(options):
    """Return the lengths of sequences, doubling."""
    return [1 << power for power in range(options.shortest.bit_length() - 1, options.longest.bit_length())]


def measured(options):
    """Yield each length with the results of dilated attention and of dense attention, None where there are none."""
    tensors, known = Tensors(options), None
    for seq_len in lengths(options):
        # As far as was measured, the time of dense attention doubles with the length, or a little less.
        with_dense = seq_len <= options.tokens_per_call and (
            known is None or extrapolated(*known, seq_len)["seconds"] <= options.dense_limit
        )
        try:
            dilated, dense = measure(seq_len, tensors, options, with_dense=with_dense)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{seq_len:>13,}  out of memory: {str(error).splitlines()[0]}", flush=True)
            continue
        if dense:
            known = dense, seq_len
        elif known:
            dense = extrapolated(*known, seq_len)
        yield seq_len, dilated, dense
        if options.device == "cuda":
            torch.cuda.empty_cache()


def record_of(attention, seq_len, results, options):
    """Return the record of one length, of ``dilated`` or ``dense`` attention."""
    is_modelled = "extrapolated_from_seq_len" in results
    pattern = pattern_of(seq_len, options.tokens_per_call)
    branches = (pattern.segment_lengths, pattern.dilation_rates) if attention == "dilated" else ((seq_len,), (1,))
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    config |= {"attention": attention, "seq_len": seq_len}
    config |= dict(zip(("segment_lengths", "dilation_rates"), map(list, branches), strict=True))
    return make_record(
        "billion",
        config=config,
        results=results,
        place={**where(), "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None},
        check=(CHECK + (", at the length that was measured" if is_modelled else ""), results["passed"]),
        warmup=0 if is_modelled else WARMUP,
        repeats=0 if is_modelled else repeats_of(seq_len, options),
        statistic="extrapolated" if is_modelled else "mean",
        kind="modelled" if is_modelled else "measured",
    )


def head_of(options):
    mask = "causal" if options.causal else "full"
    return "\n".join(
        [
            f"{options.total_tokens:,} tokens in all, forward, {options.heads} heads of {options.head_dim}, {mask}, "
            f"{options.dtype} on {options.device}; ~ is extrapolated",
            f"{'sequence':>13}  {'calls':>8} {'dilated':>11} {'a token':>10} {'rate':>14} "
            f"{'dense':>13} {'times dilated':>14}   error",
        ]
    )


def line_of(seq_len, dilated, dense):
    """Return a line of the table."""
    rate, unit = dilated["flop_per_second"], "G"
    if rate >= 1e11:
        rate, unit = rate / 1e3, "T"
    line = (
        f"{seq_len:>13,}  {dilated['calls']:>8,} {dilated['seconds']:>9.4g} s "
        f"{1e9 * dilated['seconds_per_token']:>7.4g} ns {rate / 1e9:>6.1f} {unit}FLOP/s"
    )
    if dense:
        mark = "~" if "extrapolated_from_seq_len" in dense else ""
        line += f" {mark + format(dense['seconds'], ',.4g'):>11} s {dense['seconds'] / dilated['seconds']:>14,.2f}"
    else:
        line += " " * 29
    passed = dilated["passed"] and (not dense or dense["passed"])
    return f"{line}   {dilated['relative_error']:.1e}" + ("" if passed else "  WRONG, so the times mean nothing")


def main(words=None):
    options = arguments(words)
    print(head_of(options), flush=True)
    wrong = False
    try:
        for seq_len, dilated, dense in measured(options):
            print(line_of(seq_len, dilated, dense), flush=True)
            for attention, results in (("dilated", dilated), ("dense", dense)):
                if results is None:
                    continue
                wrong = wrong or not results["passed"]
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    append_record(options.out, record_of(attention, seq_len, results, options))
    except BackendError as error:
        raise SystemExit(f"error: {error}") from error
    if options.picture:
        draw(read_records(options.out), options.picture)
    if wrong:
        raise SystemExit("error: attention was wrong, so its times mean nothing")


if __name__ == "__main__":
    main()
