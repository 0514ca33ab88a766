"""Kernels for Hopper, acted out on the CPU (emulator/hopper.h): what test_cuda.py says of the GPU, at smaller sizes."""

import importlib.machinery
import itertools
import math
import struct
import sys
import types

import hopper_emulator
import oracle
import pytest
import torch
from cases import HOPPER_CASES, Case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from streamed import STREAMED_CASES, streamed_attention

pytest.importorskip("triton")

from longnet_hpc import attention, dilated_attention
from longnet_hpc.attention import hopper
from longnet_hpc.attention.backend import AllPieces, Backend
from longnet_hpc.attention.hopper import pieces
from longnet_hpc.attention.hopper.backward import backward_job
from longnet_hpc.attention.hopper.gradients import add_rows
from longnet_hpc.attention.hopper.jobs import Rows
from longnet_hpc.attention.hopper.launch import missing
from longnet_hpc.attention.hopper.rows import MAX_JOBS, divisor
from longnet_hpc.attention.hopper.statistics import find_statistics
from longnet_hpc.attention.library import LIBRARY

pytestmark = [
    pytest.mark.skipif(hopper_emulator.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs the kernels themselves"),
]

TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def emulated():
    with pytest.MonkeyPatch.context() as patch:
        hopper_emulator.install(patch)
        everything = AllPieces(takes=pieces.takes, forward=pieces.forward, backward=pieces.backward)
        backend = Backend("hopper", lambda *_: True, LIBRARY.forward, LIBRARY.backward, everything)
        patch.setitem(attention.BACKENDS, "hopper", backend)
        yield


def check(case, dtype):
    q, k, v, dout = case.tensors(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, *case.pattern, causal=case.causal, backend="hopper", return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, case.causal)
    for actual, right in zip((out.detach(), lse, *grads), expected, strict=True):
        torch.testing.assert_close(actual.double(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_kernels_equal_the_oracle(name, causal):
    batch, seq, heads, kv_heads, *pattern = HOPPER_CASES[name]
    check(Case(batch, seq, heads, kv_heads, 64, *pattern, causal, seed=1), torch.bfloat16)


@pytest.mark.parametrize("name", STREAMED_CASES)
def test_chunks_equal_the_oracle(name):
    batch, seq, heads, kv_heads, w, r, bounds = STREAMED_CASES[name]
    tensors = Case(batch, seq, heads, kv_heads, 64, w, r, True, seed=4).tensors(torch.bfloat16)
    actual = streamed_attention(*tensors, (w, r), bounds, backend="hopper")
    expected = oracle.attention_with_gradients(*tensors, w, r, True)
    for ours, right in zip(actual, (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(ours.double(), right, atol=TOLERANCE[torch.bfloat16], rtol=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_that_are_not_there_weigh_nothing_where_the_log_sum_exp_is_small(dtype):
    """A row beyond the last scores 0, which is a large number beside scores far below."""
    q, k, v, dout = Case(1, 200, 1, 1, 64, (200,), (1,), False, seed=3).tensors(dtype)
    q[..., 0], k[..., 0] = 30.0, -30.0  # 900 / 8 below zero
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for backend in ("hopper", "library"):
        out = dilated_attention(*leaves, [200], [1], backend=backend)
        results.append(torch.autograd.grad(out, leaves, dout))
    for actual, right in zip(*results, strict=True):
        torch.testing.assert_close(actual, right, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_for_wide_heads_equal_the_oracle(dtype, causal):
    check(Case(1, 320, 2, 1, 128, (128, 320), (1, 3), causal, seed=2), dtype)


@st.composite
def shapes_with_grids(draw):
    """Draw a batch, tokens and heads, and grids of any kind there, of two numbers so that few kernels are built."""
    batch, seq, heads = draw(st.integers(1, 2)), draw(st.integers(1, 60)), draw(st.integers(1, 5))
    grids = []
    for _ in range(draw(st.sampled_from((2, MAX_JOBS + 2)))):
        start = draw(st.integers(0, seq - 1))
        length = draw(st.integers(1, seq - start))
        count, rate = draw(st.integers(1, (seq - start) // length)), draw(st.integers(1, 9))
        grids.append(Rows(start, length, count, rate, draw(st.integers(0, rate - 1))))
    return batch, seq, heads, grids


def any_grids(test):
    """Let a test run for each kind of rows and many grids, some of them long enough for several blocks."""
    long = (2, 400, 3, [Rows(10, 150, 2, 1, 0), Rows(0, 400, 1, 2, 1)])
    test = example(case=long)(given(case=shapes_with_grids())(test))
    test = settings(max_examples=20, deadline=None, derandomize=True)(test)
    return pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])(test)


def random_rows(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def points(rows, heads):
    """Return token, head, piece and number of every row of a grid."""
    found = [
        (rows.start + piece * rows.length + inside, head, piece, row)
        for piece in range(rows.count)
        for head in range(heads)
        for row, inside in enumerate(range((head + rows.shift) % rows.rate, rows.length, rows.rate))
    ]
    return torch.tensor(found, dtype=torch.long).view(-1, 4).unbind(1)


@any_grids
def test_statistics_equal_their_formula(head_dim, dtype, case):
    batch, seq, heads, grids = case
    out, dout = random_rows(batch, seq, heads, head_dim, dtype=dtype)
    lse, _ = random_rows(batch, seq, heads)
    jobs = [backward_job(out, rows) for rows in grids]
    for job in jobs:
        job.statistics[:] = 7.0  # which stays where no row is
    find_statistics(out, dout, lse, jobs)
    delta = (out.double() * dout.double()).sum(-1).float()
    for job in jobs:
        token, head, piece, row = points(job.rows, heads)
        for actual, right in zip(job.statistics.unbind(3), (lse * math.log2(math.e), delta), strict=True):
            expected = torch.full_like(actual.flatten(2), 7.0)
            expected.unflatten(0, (batch, -1))[:, piece, head, row] = right[:, token, head]
            torch.testing.assert_close(actual.flatten(2), expected, atol=1e-4, rtol=1e-5)


@any_grids
def test_rows_are_added_in_place_and_rounded_once(head_dim, dtype, case):
    batch, seq, heads, grids = case
    sums = random_rows(batch, seq, heads, head_dim, dtype=dtype)
    jobs = [backward_job(sums[0], rows) for rows in grids]
    for job in jobs:
        for part, numbers in zip((job.dk, job.dv), random_rows(*job.dk.shape), strict=True):
            part.copy_(numbers)
    expected = [x.clone() for x in sums]
    for first in range(0, len(jobs), MAX_JOBS):
        wide = [x.float() for x in expected]
        for job in jobs[first : first + MAX_JOBS]:
            token, head, piece, row = points(job.rows, heads)
            for total, part in zip(wide, (job.dk, job.dv), strict=True):
                total[:, token, head] += part.unflatten(0, (batch, -1))[:, piece, row, head]
        expected = [x.to(dtype) for x in wide]
    add_rows(*sums, jobs)
    for actual, right in zip(sums, expected, strict=True):
        assert torch.equal(actual, right)


@settings(derandomize=True)
@given(x=st.integers(0, 2**31 - 1), number=st.integers(1, 2**31 - 1))
@example(x=2**31 - 1, number=3)
def test_quotients_are_products(x, number):
    number, factor, shift = struct.unpack("<3I", divisor(number))
    assert x * factor >> shift == x // number


def test_what_is_missing_is_said_where_the_driver_is_older_than_the_compiler(monkeypatch):
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = types.SimpleNamespace(cuDriverGetVersion=lambda: (0, 12080))
    bindings.nvrtc = types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    for name in ("cuda", "cuda.bindings"):
        module = types.ModuleType(name) if name == "cuda" else bindings
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    assert missing() == "NVRTC is of CUDA 13, the driver of 12"
    bindings.driver.cuDriverGetVersion = lambda: (0, 13000)
    assert missing() is None


def test_attention_compiles_into_one_graph_where_the_gpu_is_asked_for_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def supports(device, dtype, head_dim):
        hopper._can_launch(device)
        return False

    monkeypatch.setitem(attention.BACKENDS, "hopper", Backend("hopper", supports, LIBRARY.forward, LIBRARY.backward))
    x = torch.randn(1, 32, 2, 8)

    def attend(x):
        return dilated_attention(x, x, x, [8, 32], [1, 2])

    expected = attend(x)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="eager")(x), expected)
    hopper._can_launch.cache_clear()


def test_packed_documents_equal_the_oracle_of_each_alone():
    pattern, cu_seqlens = ((64, 256), (1, 3)), [0, 70, 71, 199, 230]
    tensors = Case(1, cu_seqlens[-1], 2, 2, 64, *pattern, True, seed=5).tensors(torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = dilated_attention(*leaves, *pattern, causal=True, cu_seqlens=cu_seqlens, backend="hopper")
    actual = (out.detach(), *torch.autograd.grad(out, leaves, tensors[3]))
    for start, stop in itertools.pairwise(cu_seqlens):
        expected = oracle.attention_with_gradients(*(x[:, start:stop] for x in tensors), *pattern, True)
        for ours, right in zip(actual, (expected[0], *expected[2:]), strict=True):
            torch.testing.assert_close(ours[:, start:stop].double(), right, atol=6e-2, rtol=6e-2)
