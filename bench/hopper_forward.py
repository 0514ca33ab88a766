"""A candidate: warp-specialised forward attention for Hopper in Triton's Gluon, against cuDNN, branch by branch.

    python bench/hopper_forward.py

Not used by the library yet; docs/LOG.md says what it taught, `hopper_kernels` how it works.
"""

import argparse

import torch
import triton
from hopper_kernels import attention_kernel
from timing import gpu_seconds
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longnet_hpc import Partition, Pattern
from longnet_hpc.attention.views import grid_view
from longnet_hpc.config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.grids import piece_grids

BATCH, SEQ_LEN = 16, 32768
SHAPES = ((12, 64), (16, 128))
CACHE_BYTES = 24 << 20
"""Keys and values of the heads that are worked on together, in the causal schedule."""
REGISTERS = {2: (240, 168), 3: (160, 128)}
"""Registers of a consumer's thread, and on average, by the number of consumer warpgroups."""


def descriptor(x, rows):
    block = [1, 1, rows, x.shape[-1]]
    element = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def attention(q, k, v, out, lse, causal, scale, groups):
    """Attend (batch, heads, rows, head_dim) views of half precision, writing out (shaped as q) and lse."""
    batch, heads, rows, head_dim = q.shape
    keys = k.shape[2]
    m_tiles = triton.cdiv(rows, 64 * groups)
    tiles = m_tiles * heads * batch
    chunk = max(1, min(heads * batch, CACHE_BYTES // (keys * head_dim * 4)))
    consumer_registers, average_registers = REGISTERS[groups]
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    attention_kernel[(min(programs, tiles),)](
        *(descriptor(q, 64), descriptor(k, 128), descriptor(v, 128), descriptor(out, 64), lse, *lse.stride()),
        *(rows, keys, scale * 1.4426950408889634, tiles, m_tiles, heads, heads * batch, chunk, heads // k.shape[1]),
        BLOCK_N=128,
        STAGES=2,
        D=head_dim,
        CAUSAL=causal,
        GROUPS=groups,
        CONSUMER_REGS=consumer_registers,
        num_warps=4,
        maxnreg=average_registers,
    )


def cudnn(q, k, v, causal):
    scale = q.shape[-1] ** -0.5
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)


def flat(x, grid):
    view = grid_view(x, grid)
    return view.squeeze(1) if view.shape[1] == 1 else view.flatten(0, 1)


def measure(heads, head_dim, causal, repeats):
    torch.manual_seed(0)
    qkv = [torch.randn(BATCH, SEQ_LEN, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    whole = [x[:2].transpose(1, 2) for x in qkv]
    flop = 4 * 2 * SEQ_LEN**2 * heads * head_dim / (2 if causal else 1)
    rate = flop / gpu_seconds(lambda: cudnn(*whole, causal), repeats)
    print(f"{heads} x {head_dim}, {'causal' if causal else 'full'}: dense cuDNN {rate / 1e12:.0f} TFLOP/s")
    for w, r in zip(PAPER_SEGMENT_LENGTHS, PAPER_DILATION_RATES, strict=True):
        pattern = Pattern.from_lists([w], [r])
        line = measure_branch(pattern, qkv, causal, rate, repeats)
        print(f"  w {w:>5}, r {r:>2}: {line} of dense cuDNN's rate", flush=True)


def measure_branch(pattern, qkv, causal, rate, repeats):
    """Return what share of a rate (FLOP/s) cuDNN and the candidate reach on the strided calls of one branch."""
    heads, head_dim = qkv[0].shape[2:]
    (branch,) = pattern
    runs = Partition.from_lengths([SEQ_LEN]).runs(branch, 0)
    pairs = [pair for run in runs for pair in piece_grids(branch, run, heads, heads)]
    views = [(flat(qkv[0], grid), *(flat(x, kv_grid) for x in qkv[1:])) for grid, kv_grid in pairs]
    results = [
        (torch.empty(q.shape, device="cuda", dtype=q.dtype), q.new_empty(q.shape[:3]).float()) for q, *_ in views
    ]
    floor = BATCH * pattern.flop(SEQ_LEN, heads, head_dim, causal=causal) / rate

    def theirs():
        return [cudnn(*x, causal)[:2] for x in views]

    words = [f"{len(pairs)} calls, cuDNN {floor / gpu_seconds(theirs, repeats):4.0%}"]
    for groups in (2, 3) if head_dim == 64 else (2,):

        def ours(groups=groups):
            for x, (out, lse) in zip(views, results, strict=True):
                attention(*x, out, lse, causal, head_dim**-0.5, groups)

        words.append(f"{groups} warpgroups {floor / gpu_seconds(ours, repeats):4.0%}")
        for (out, lse), (expected, expected_lse) in zip(results, theirs(), strict=True):
            error = (out.double() - expected.double()).norm() / expected.double().norm()
            if error > 2e-3 or (lse - expected_lse.squeeze(-1)).abs().max() > 1e-3:
                raise SystemExit(f"error: wrong by {error:.1e}, so its times mean nothing")
    return ", ".join(words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6, help="timed runs, of which the median counts")
    options = parser.parse_args()
    for heads, head_dim in SHAPES:
        for causal in (False, True):
            measure(heads, head_dim, causal, options.repeats)


if __name__ == "__main__":
    main()
