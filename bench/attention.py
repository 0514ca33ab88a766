"""Dilated attention on one GPU against dense attention at its best, in one run on the same tensors.

    python bench/attention.py --out bench/records/attention.jsonl

For each shape, full and causal: cuDNN's dense attention at the length of the sequence, whose rate (FLOP/s) is the
yardstick; ours, the paper's pattern, forward and with backward, as `dilated_attention` computes it; and the usual way
(gather each branch, attend, scatter to a dense tensor a branch, mix). The floor is our arithmetic at the rate of dense
attention. Beside each timing, one sequence is compared with float64, and so is dense attention.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import gpu_seconds

from longnet_hpc import Pattern, dilated_attention
from longnet_hpc.config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.record import append_record, make_record, where

SHAPES = {"12x64": (12, 64), "16x128": (16, 128)}
PATTERN = (PAPER_SEGMENT_LENGTHS, PAPER_DILATION_RATES)
BACKWARD = 2.5
"""Arithmetic of a backward pass over that of a forward pass: five products instead of two."""


def dense(q, k, v, causal):
    """Dense attention of `(batch, seq, heads, head_dim)` by cuDNN."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)


def gather_attend_scatter(q, k, v, causal):
    """The usual way: copies to compact tensors and back to a dense one, branch by branch; w must divide seq."""
    batch, seq, heads, head_dim = q.shape
    outs, lses = [], []
    for w, r in zip(*PATTERN, strict=True):
        w = min(w, seq)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        for offset in range(min(r, heads)):
            grid = (slice(None), slice(None), slice(offset, None, r), slice(offset, None, r))
            rows = [x.view(batch, seq // w, w, heads, head_dim)[grid].flatten(0, 1) for x in (q, k, v)]
            rows = [x.transpose(1, 2).contiguous() for x in rows]
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention(*rows, 0.0, causal, False)[:2]
            shape = (batch, seq // w, *part.transpose(1, 2).shape[1:])
            out.view(batch, seq // w, w, heads, head_dim)[grid] = part.transpose(1, 2).reshape(shape)
            lse.view(batch, seq // w, w, heads)[grid] = part_lse.transpose(1, 2).reshape(shape[:-1])
        outs.append(out)
        lses.append(lse)
    weights = torch.softmax(torch.stack(lses), dim=0)
    return sum(out * weight.unsqueeze(-1) for out, weight in zip(outs, weights.to(q.dtype), strict=True))


def relative_error(function, leaves, exact):
    """Return the relative error (Euclidean norm) of output and gradients against float64, tensor by tensor."""
    results = []
    for make, dtype in ((function, leaves[0].dtype), (exact, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = make(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.double().sum(), inputs)])
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def measure(heads, head_dim, causal, options):
    batch, seq = options.tokens // options.seq_len, options.seq_len
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, seq, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(4)
    )
    leaves = (q, k, v)

    def ours(*inputs):
        return dilated_attention(*inputs, *PATTERN, causal=causal, backend=options.backend)

    def both(function, inputs, grad):
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    few = [x[:2].detach().requires_grad_() for x in leaves]
    flop = 4 * 2 * seq**2 * heads * head_dim / (2 if causal else 1)
    result = {}
    with torch.no_grad():
        result["dense_forward_flop_per_second"] = flop / gpu_seconds(lambda: dense(*few, causal), options.repeats)
    dense_both = gpu_seconds(both(lambda *x: dense(*x, causal), few, dout[:2]), options.repeats)
    result["dense_both_flop_per_second"] = flop * (1 + BACKWARD) / dense_both
    flop = batch * Pattern.from_lists(*PATTERN).flop(seq, heads, head_dim, causal=causal)
    with torch.no_grad():
        result["forward_seconds"] = gpu_seconds(lambda: ours(*leaves), options.repeats)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result["both_seconds"] = gpu_seconds(both(ours, leaves, dout), options.repeats)
    result["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
    result["tensor_bytes"] = q.numel() * q.element_size()
    with torch.no_grad():
        usual = gpu_seconds(lambda: gather_attend_scatter(*leaves, causal), options.repeats) if options.usual else None
    result["gather_attend_scatter_forward_seconds"] = usual
    result["forward_floor_seconds"] = flop / result["dense_forward_flop_per_second"]
    result["both_floor_seconds"] = flop * (1 + BACKWARD) / result["dense_both_flop_per_second"]
    result["forward_of_floor"] = result["forward_floor_seconds"] / result["forward_seconds"]
    result["both_of_floor"] = result["both_floor_seconds"] / result["both_seconds"]
    one = [x[:1].detach() for x in leaves]
    result["relative_errors"] = relative_error(
        ours, one, lambda *x: dilated_attention(*x, *PATTERN, causal=causal, backend="reference")
    )
    short = [x[:1, :2048].detach() for x in leaves]
    result["dense_relative_errors"] = relative_error(
        lambda *x: dense(*x, causal),
        short,
        lambda *x: dilated_attention(*x, [2048], [1], causal=causal, backend="reference"),
    )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=524288, help="tokens in all (default: 524288)")
    parser.add_argument("--seq-len", type=int, default=32768, help="tokens a sequence (default: 32768)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="heads x head_dim")
    parser.add_argument("--backend", default="auto", help="attention backend (default: auto)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs, of which the median counts")
    parser.add_argument("--usual", action="store_true", help="also time gather, attend, scatter")
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    options = parser.parse_args()
    place = {**where(), "gpu": torch.cuda.get_device_name()}
    for name in options.shapes:
        for causal in (False, True):
            result = measure(*SHAPES[name], causal, options)
            passed = max(result["relative_errors"]) < 0.02
            print(
                f"{name} {'causal' if causal else 'full':>6}: forward {result['forward_seconds'] * 1e3:6.2f} ms, "
                f"{result['forward_of_floor']:.0%} of dense attention's rate; with backward "
                f"{result['both_seconds'] * 1e3:6.2f} ms, {result['both_of_floor']:.0%}; errors "
                + " ".join(f"{error:.1e}" for error in result["relative_errors"]),
                flush=True,
            )
            if options.out:
                config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
                record = make_record(
                    "attention",
                    config={**config, "shape": name, "causal": causal, "dtype": "bfloat16"},
                    results=result,
                    place=place,
                    check=("output and gradients of one sequence against float64, relative error below 0.02", passed),
                    warmup=2,
                    repeats=options.repeats,
                    statistic="median",
                )
                append_record(options.out, record)
            else:
                print(json.dumps(result))
            if not passed:
                raise SystemExit("error: attention was wrong, so its times mean nothing")


if __name__ == "__main__":
    main()
