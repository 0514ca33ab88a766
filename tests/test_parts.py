"""Sums over branches by Triton kernels; without a GPU, in Triton's interpreter (conftest.py)."""

import oracle
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings

pytest.importorskip("triton")

from longnet_hpc import dilated_attention, mixture
from longnet_hpc.attention import branch
from longnet_hpc.attention.parts import GradientParts, SoftmaxParts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def in_one_pass():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "softmax_sum", SoftmaxParts)
        for module in (branch, mixture):
            patch.setattr(module, "gradient_sum", GradientParts)
        yield


def check(case, dtype, tolerance):
    q, k, v, dout = case.tensors(dtype)
    leaves = [x.to(DEVICE).requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, *case.pattern, causal=case.causal, return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout.to(DEVICE))
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, case.causal)
    for actual, right in zip((out.detach(), lse, *grads), expected, strict=True):
        torch.testing.assert_close(actual.double().cpu(), right, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases(max_seq=36))
def test_result_equals_oracle_for_random_cases(case):
    check(case, torch.float32, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_result_equals_oracle_in_half_precision(dtype):
    check(Case(2, 50, 4, 2, 8, (8, 30, 50), (1, 2, 5), True, seed=0), dtype, 6e-2)


def test_more_tokens_than_one_program_visits_and_a_query_on_no_grid():
    check(Case(2, 75, 2, 2, 4, (40, 75), (3, 5), False, seed=1), torch.float32, 2e-5)


def test_parts_of_some_sequences_alone_are_theirs():
    """Batches whose strides do not allow one call are computed sequence by sequence."""
    case = Case(3, 24, 2, 2, 4, (8, 24), (1, 2), False, seed=2)
    q, k, v, dout = case.tensors(torch.float32)
    leaves = [torch.cat((x, x), dim=1)[:, :24].to(DEVICE).requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, *case.pattern)
    grads = torch.autograd.grad(out, leaves, dout.to(DEVICE))
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, False)
    for actual, right in zip((out.detach(), *grads), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(actual.double().cpu(), right, atol=2e-5, rtol=2e-5)


def test_segments_and_steps_longer_than_kernels_can_count():
    check(Case(1, 20, 3, 3, 4, (2**33, 2**32), (2**32, 3), True, seed=3), torch.float32, 2e-5)
