"""Sums over branches by Triton kernels; without a GPU, in Triton's interpreter (conftest.py)."""

import itertools

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


@pytest.mark.parametrize("documents", [2, 9, 40])  # 4 and 18 parts of a head in one pass; 80 pieces are too many
def test_packed_documents_equal_the_oracle_of_each_alone(documents, monkeypatch):
    made = []
    monkeypatch.setattr(branch, "softmax_sum", lambda q: made.append(SoftmaxParts(q)) or made[-1])
    lengths = [1 + (7 * number) % 5 for number in range(documents)]
    cu_seqlens, pattern = [0, *itertools.accumulate(lengths)], ((16, 20), (1, 3))
    tensors = Case(1, cu_seqlens[-1], 2, 2, 4, *pattern, True, seed=5).tensors(torch.float32)
    leaves = [x.to(DEVICE).requires_grad_() for x in tensors[:3]]
    out = dilated_attention(*leaves, *pattern, causal=True, cu_seqlens=cu_seqlens)
    actual = (out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(DEVICE)))
    assert len(made) == (documents < 40)
    for start, stop in itertools.pairwise(cu_seqlens):
        expected = oracle.attention_with_gradients(*(x[:, start:stop] for x in tensors), *pattern, True)
        for ours, right in zip(actual, (expected[0], *expected[2:]), strict=True):
            torch.testing.assert_close(ours[:, start:stop].double().cpu(), right, atol=2e-5, rtol=2e-5)
