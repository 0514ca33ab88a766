"""Tokens/s and model-FLOP utilisation (MFU) of a training step on one device, from 32K to 1M tokens.

    python bench/step.py --out bench/records/step.jsonl
    python bench/step.py --presets 125m --tokens 1048576 --trace step.json

A step is that of `Trainer`, one sequence of random tokens and no reading: loss, backward, clipping, AdamW. Model FLOP
are 6 a weight of a matrix product and token, and 3.5 times the forward arithmetic of attention; what checkpointing
computes again does not count. Each case runs in a process of its own with a limit on its time, so that one that fails
takes no other along. Beside the timing stands a check: losses are finite and fall on tokens seen again, and up to 32K
tokens loss and gradient are those of a model that is neither compiled nor checkpointed.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from kinds import seconds_by_kind
from torch.profiler import ProfilerActivity, profile, record_function

from longnet_hpc import LongNet, LongNetConfig, Pattern, SequencePlan
from longnet_hpc.config import OPTIMIZERS
from longnet_hpc.model_config import PRESETS
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.record import append_record, make_record, where

PEAK_FLOP_PER_SECOND = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bfloat16 products by the name of the card; others by --peak-tflops."""
CHECKED_TOKENS = 32768
WARMUP = 2
LEARNING_RATE = 1e-4
OUT_OF_MEMORY = "out of memory"
ATTENTION = 3.5
"""Arithmetic of forward and backward of attention over that of forward alone: two products, then five."""
KEPT_BYTES = {"off": 38, "attention": 4, "all": 2}
"""Roughly what each way of checkpointing keeps a layer, token and feature of the width, in bytes."""
WORKING_BYTES = 44
"""Roughly what one layer needs beside that while its gradient is computed, a token and feature, in bytes."""


def model_config(case):
    config = LongNetConfig.preset(case["preset"])
    if case["geometric"]:
        pattern = Pattern.geometric(case["tokens"], *case["geometric"])
        changes = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
        config = LongNetConfig.preset(case["preset"], **changes)
    return config


def model_flop(model, tokens):
    """Return FLOP of one step, and those of them that are attention's."""
    config = model.config
    forward = config.layers * config.pattern.flop(tokens, config.heads, config.head_dim, causal=True)
    products = 3 * (model.flop(1, tokens, training=False) - forward)
    return products + ATTENTION * forward, ATTENTION * forward


def device_of(case):
    return torch.device(case["device"] if case["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def way_to_checkpoint(case):
    """Return the way that was asked for, or the first that should fit: the less is kept, the more is done again."""
    config, device = model_config(case), device_of(case)
    if case["checkpointing"] != "auto":
        return case["checkpointing"]
    if device.type == "cpu":
        return "attention"
    there = 0.92 * torch.cuda.get_device_properties(device).total_memory - 20 * config.parameter_count
    activations = case["tokens"] * config.embed_dim
    fits = [way for way, size in KEPT_BYTES.items() if (size * config.layers + WORKING_BYTES) * activations < there]
    return fits[0] if fits else "all"


class Steps:
    """A model and all that its training steps need."""

    def __init__(self, case, checkpointing, is_compiled, device):
        torch.manual_seed(0)
        self.model = LongNet(model_config(case)).to(device)
        self.model.activation_checkpointing = checkpointing != "off"
        self.model.keep_attention = checkpointing != "all"
        self.model.half_residual = not case["float32_residual"]
        if is_compiled:
            self.model.compile_blocks()
        self.optimizer = Optimizer(self.model, OPTIMIZERS[case["preset"]])
        tokens = torch.randint(0, 256, (1, case["tokens"] + 1), device=device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.plan = SequencePlan.build(
            self.model.config.pattern, case["tokens"], backend=case["backend"], device=device
        )
        self.device = device

    def gradient(self):
        """Return the mean loss in nats a token, on the device, and the flat gradient."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model.loss(self.inputs, self.targets, self.plan) / self.targets.numel()
        loss.backward()
        with record_function("optimizer"):
            return loss.detach(), self.optimizer.flat_gradient()

    def step(self):
        """Do a step; return its loss."""
        loss, gradient = self.gradient()
        with record_function("optimizer"):
            norm = self.optimizer.step(gradient, LEARNING_RATE)
        if not math.isfinite(norm):
            raise SystemExit(f"error: the gradient has norm {norm}")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    def profiled(self, path):
        """Do a step and leave its trace in a file."""
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profile(activities=kinds, acc_events=True) as profiler:
            self.step()
        profiler.export_chrome_trace(str(path))


def gradients_differ_by(case, checkpointing, is_compiled, device):
    """Return how far loss and gradient are from those of the plain model, relatively: the worst of what is checked."""
    plain_loss, plain = Steps(case, "off", False, device).gradient()
    differences = []
    for way in {checkpointing, "attention"}:
        loss, gradient = Steps(case, way, is_compiled, device).gradient()
        differences.append(abs(float(loss / plain_loss) - 1))
        differences.append(float((gradient - plain).norm() / plain.norm()))
    return max(differences)


def measure(case):
    """Return the results of one case. On a GPU its tensors are gone when the process ends."""
    device = device_of(case)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = case["peak_tflops"] * 1e12 if case["peak_tflops"] else PEAK_FLOP_PER_SECOND.get(name)
    if peak is None:
        raise SystemExit(f"error: the peak of {name or 'a CPU'} is unknown, give --peak-tflops")
    checkpointing = way_to_checkpoint(case)
    is_compiled = case["compile"] == "on" or (case["compile"] == "auto" and device.type == "cuda")
    difference = None
    if case["tokens"] <= CHECKED_TOKENS:
        difference = gradients_differ_by(case, checkpointing, is_compiled, device)
    steps = Steps(case, checkpointing, is_compiled, device)
    losses, seconds = [], []
    for _ in range(WARMUP + case["repeats"]):
        started = time.perf_counter()
        losses.append(steps.step())
        seconds.append(time.perf_counter() - started)
        if device.type == "cuda" and len(losses) == WARMUP:
            torch.cuda.reset_peak_memory_stats()
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(case["trace"] or Path(folder, "trace.json"))
        steps.profiled(trace)
        kinds, kernels = seconds_by_kind(trace, on_gpu=device.type == "cuda")
    step_seconds = statistics.median(seconds[WARMUP:])
    flop, attention_flop = model_flop(steps.model, case["tokens"])
    return {
        "gpu": name,
        "checkpointing": checkpointing,
        "compiled": is_compiled,
        "seconds": step_seconds,
        "first_step_seconds": seconds[0],
        "tokens_per_second": case["tokens"] / step_seconds,
        "model_flop": flop,
        "model_flop_per_second": flop / step_seconds,
        "peak_flop_per_second": peak,
        "model_flop_utilisation": flop / step_seconds / peak,
        "attention_of_flop": attention_flop / flop,
        "attention_of_time": kinds["attention"] / sum(kinds.values()),
        "seconds_by_kind": kinds,
        "peak_memory_bytes": peak_bytes,
        "losses": losses,
        "relative_difference": difference,
        "longest_kernels": [
            {"name": kernel[:120], "kind": kind, "seconds": seconds} for seconds, kind, kernel in kernels[:20]
        ],
        "passed": all(map(math.isfinite, losses)) and losses[-1] < losses[0] and (difference or 0.0) < 0.05,
    }


def answer(case):
    """Measure, in a process of its own."""
    try:
        return measure(case)
    except torch.cuda.OutOfMemoryError as error:
        wanted = str(error).split(" GPU ")[0].removeprefix("CUDA out of memory. ")  # what follows is not ours to say
        failure = f"{OUT_OF_MEMORY}: {wanted}"
        return {"failure": failure, "checkpointing": way_to_checkpoint(case)}


def in_a_process(case, limit_seconds):
    """Return what `answer` returns in a new process, which ends after a limit together with all that it started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answer.json")
        command = [sys.executable, __file__, "--one", json.dumps(case), "--answer", str(path)]
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return {"failure": f"not done after {limit_seconds:g} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return json.loads(path.read_text()) if path.exists() else {"failure": f"ended with exit code {code}"}


def with_less_kept(case, result):
    """Return the case with the next way to checkpoint, if it ran out of memory and the choice was ours, else None."""
    ways, way = list(KEPT_BYTES), result.get("checkpointing")
    if case["checkpointing"] != "auto" or not result.get("failure", "").startswith(OUT_OF_MEMORY) or way == ways[-1]:
        return None
    return {**case, "checkpointing": ways[ways.index(way) + 1]}


def report(result, case, shortest):
    """Print the line of a case; ``shortest`` has the results of the fewest tokens, if these are not it."""
    memory, difference = result["peak_memory_bytes"], result["relative_difference"]
    parts = [
        f"{case['preset']} {case['tokens']:>9,} tokens: {result['seconds']:.3f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['model_flop_utilisation']:.1%}",
        f"attention {result['attention_of_flop']:.0%} of FLOP, {result['attention_of_time']:.0%} of time",
        f"checkpointing {result['checkpointing']}, peak {memory / 1e9:.1f} GB" if memory else "",
        f"a token takes {result['time_per_token_ratio']:.3f} times that of {shortest:,}" if shortest else "",
        f"off by {difference:.1e}" if difference is not None else "",
    ]
    print("; ".join(filter(None, parts)), flush=True)
    if case["trace"]:
        kinds = result["seconds_by_kind"]
        for kind, seconds in [*kinds.items(), ("idle", result["seconds"] - sum(kinds.values()))]:
            print(f"  {kind:<22}{seconds * 1e3:10.2f} ms {seconds / result['seconds']:7.1%}")
        for kernel in result["longest_kernels"]:
            print(f"  {kernel['seconds'] * 1e3:10.2f} ms  {kernel['kind']:<22}{kernel['name']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["125m", "350m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 15, 1 << 18, 1 << 20], help="of a sequence")
    parser.add_argument("--geometric", nargs=2, type=int, help="first w (tokens) and ratio; else the paper's pattern")
    parser.add_argument("--checkpointing", choices=["auto", *KEPT_BYTES], default="auto", help="default: what fits")
    parser.add_argument("--float32-residual", action="store_true", help="keep the residual stream in float32")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="auto: on a GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--backend", default="auto", help="attention backend (default: auto)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, of which the median counts")
    parser.add_argument("--peak-tflops", type=float, help="of dense bfloat16 products; known for H100 and H200 (SXM)")
    parser.add_argument("--limit", type=float, default=560.0, help="longest time of a case, in seconds")
    parser.add_argument("--trace", type=Path, help="file for a Chrome trace of one step, of one case")
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.answer.write_text(json.dumps(answer(options.one)))
        return
    if options.trace and len(options.presets) * len(options.tokens) > 1:
        parser.error("--trace is of one case: give one preset and one number of tokens")
    shared = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    shared = {key: value for key, value in shared.items() if key not in ("presets", "one", "answer")}
    wrong = False
    for preset in options.presets:
        shortest = None
        for tokens in sorted(options.tokens):
            case = {**shared, "preset": preset, "tokens": tokens}
            attempt = case
            while attempt:
                result = in_a_process(attempt, options.limit)
                if "failure" in result:
                    way = f" (checkpointing {result['checkpointing']})" if "checkpointing" in result else ""
                    print(f"{preset} {tokens:>9,} tokens{way}: {result['failure']}", flush=True)
                attempt = with_less_kept(case, result)
            if "failure" in result:
                continue
            per_token = result["seconds"] / tokens
            shortest = shortest or (tokens, per_token)
            result["time_per_token_ratio"], result["ratio_to_tokens"] = per_token / shortest[1], shortest[0]
            report(result, case, shortest[0] if tokens > shortest[0] else None)
            passed, gpu = result.pop("passed"), result.pop("gpu")
            wrong |= not passed
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                record = make_record(
                    "step",
                    config={**case, "dtype": "bfloat16" if gpu else "float32"},
                    results=result,
                    place={**where(), "gpu": gpu},
                    check=("losses are finite and fall; to 32K tokens loss and gradient are the plain model's", passed),
                    warmup=WARMUP,
                    repeats=options.repeats,
                    statistic="median",
                )
                append_record(options.out, record)
    if wrong:
        raise SystemExit("error: a step was wrong, so its time means nothing")


if __name__ == "__main__":
    main()
