"""Kernels for Hopper, acted out on the CPU (emulator/hopper.h): what test_cuda.py says of the GPU, at smaller sizes."""

import hopper_emulator
import oracle
import pytest
import torch
from cases import HOPPER_CASES, Case

pytest.importorskip("triton")

from longnet_hpc import attention, dilated_attention
from longnet_hpc.attention.backend import AllPieces, Backend
from longnet_hpc.attention.hopper import pieces
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_for_wide_heads_equal_the_oracle(dtype, causal):
    check(Case(1, 320, 2, 1, 128, (128, 320), (1, 3), causal, seed=2), dtype)
