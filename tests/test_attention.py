import math

import numpy
import oracle
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc import Pattern, SequencePlan, dilated_attention, sequence_plan
from longnet_hpc.attention import BACKENDS, Backend, branch, reference, views
from longnet_hpc.errors import BackendError, PatternError, ShapeError
from longnet_hpc.pattern import Branch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def results(case, dtype, backend="auto", laid_out=lambda x: x):
    """Return (out, lse, dq, dk, dv) of the library and of the oracle on the same rounded inputs."""
    q, k, v, dout = case.tensors(dtype)
    leaves = [laid_out(x).detach().requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, *case.pattern, causal=case.causal, backend=backend, return_lse=True)
    grads = torch.autograd.grad(out, leaves, dout)
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, case.causal)
    return (out.detach(), lse, *grads), expected


def assert_close(actual, expected, tolerance):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_result_equals_oracle_for_random_cases(dtype, case):
    assert_close(*results(case, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_result_equals_oracle_in_half_precision(dtype, case):
    assert_close(*results(case, dtype), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_reference_backend_equals_oracle(case):
    assert_close(*results(case, torch.float64, "reference"), 1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(("heads first", "head_dim strided", "fused qkv")))
def test_result_is_exact_for_strided_inputs(case, layout):
    def laid_out(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "head_dim strided":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return torch.cat((x, x + 1, x - 1), dim=-1)[..., : x.shape[-1]]

    assert_close(*results(case, torch.float64, laid_out=laid_out), 1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_pattern_equals_scaled_dot_product_attention(causal):
    q, k, v = torch.randn(3, 2, 50, 4, 8, dtype=torch.float64)
    ours = dilated_attention(q, k, v, [50], [1], causal=causal)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-12, rtol=1e-12)


def test_query_on_no_grid_gets_zero_and_minus_infinity():
    q, k, v = torch.randn(3, 1, 12, 2, 4)
    out, lse = dilated_attention(q, k, v, [12], [3], return_lse=True)
    off_grid = torch.tensor([[p % 3 != h for h in range(2)] for p in range(12)])
    assert off_grid.any()
    assert (out[0][off_grid] == 0).all()
    assert (lse[0][off_grid] == -torch.inf).all()
    assert torch.isfinite(lse[0][~off_grid]).all()


def test_key_offered_by_two_branches_counts_twice():
    q, k, v = torch.randn(3, 1, 8, 1, 4, dtype=torch.float64)
    _, once = dilated_attention(q, k, v, [8], [1], return_lse=True)
    _, twice = dilated_attention(q, k, v, [8, 8], [1, 1], return_lse=True)
    torch.testing.assert_close(twice, once + torch.log(torch.tensor(2.0, dtype=torch.float64)))


def test_head_offset_is_head_modulo_rate_not_a_block_of_heads():
    v = torch.arange(8, dtype=torch.float64).reshape(1, 8, 1, 1).expand(1, 8, 4, 1)
    zeros = torch.zeros_like(v)
    out = dilated_attention(zeros, zeros, v, [8], [2])
    # With equal scores a query on the grid gets the mean position of the grid: 3 for even heads, 4 for odd ones.
    assert out[0, 0, :, 0].tolist() == [3.0, 0.0, 3.0, 0.0]
    assert out[0, 1, :, 0].tolist() == [0.0, 4.0, 0.0, 4.0]


def test_ragged_segment_has_no_padding_in_its_softmax():
    v = torch.ones(1, 5, 1, 1, dtype=torch.float64)
    out, lse = dilated_attention(torch.zeros_like(v), torch.zeros_like(v), v, [4], [1], return_lse=True)
    torch.testing.assert_close(out, v)
    assert lse[0, 4, 0].item() == 0.0  # one key of score 0, which a test for "absent" must not take for none


def test_log_sum_exp_of_zero_is_merged_like_any_other():
    """With equal scores of 0 a segment of one key has lse 0; those who take that for "absent" lose the key."""
    v = torch.arange(1, 7, dtype=torch.float64).reshape(1, 6, 1, 1)
    zeros = torch.zeros_like(v)
    for pattern in (([1, 3], [1, 1]), ([3, 1], [1, 1]), ([1, 1, 6], [1, 1, 1])):
        expected = oracle.attention_with_gradients(zeros, zeros, v, v, *pattern, False)[:2]
        torch.testing.assert_close(dilated_attention(zeros, zeros, v, *pattern, return_lse=True), expected)


def test_sums_over_branches_are_wide_for_half_precision():
    """64 times the same branch changes nothing but the log-sum-exp; sums in bfloat16 would drift by per cents."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 96, 2, 8, dtype=torch.bfloat16)
    results = []
    for times in (1, 64):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*leaves, [96] * times, [1] * times)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for once, many in zip(*results, strict=True):
        assert (once.double() - many.double()).norm() / once.double().norm() < 4e-3


@pytest.mark.parametrize("heads", [4, 2])
def test_backend_is_handed_the_tensors_themselves(monkeypatch, heads):
    """No gathered copies: every query, key and value that a kernel gets lies in the memory of the caller's tensors."""
    q, k, v = (torch.randn(1, 48, n, 4, requires_grad=True) for n in (4, heads, heads))
    owned = [x.untyped_storage().data_ptr() for x in (q, k, v)]
    library, seen = BACKENDS["library"], []

    def forward(*views, **options):
        seen.append([x.untyped_storage().data_ptr() for x in views])
        return library.forward(*views, **options)

    def backward(dout, *others, **options):
        seen.append([x.untyped_storage().data_ptr() for x in others[:3]])
        return library.backward(dout, *others, **options)

    monkeypatch.setitem(BACKENDS, "spy", Backend("spy", library.supports, forward, backward))
    dilated_attention(q, k, v, [7, 16, 48], [1, 3, 5], causal=True, backend="spy").sum().backward()
    assert len(seen) > 6
    assert all(views == owned for views in seen)


def test_many_pieces_are_computed_some_at_a_time(monkeypatch):
    for limit in (1, 5):
        monkeypatch.setattr(views, "MAX_PIECES", limit)
        monkeypatch.setattr(branch, "MAX_PIECES", limit)
        case = Case(2, 70, 3, 1, 4, (4, 30), (1, 2), True, seed=1)
        assert_close(*results(case, torch.float64), 1e-10)


def test_memory_of_the_reference_does_not_grow_with_the_number_of_pieces(monkeypatch):
    sizes = []
    scores = reference._scores

    def counted(*arguments, **options):
        made = scores(*arguments, **options)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(reference, "_scores", counted)
    monkeypatch.setattr(reference, "BLOCK_SCORES", 2 * 3 * 8 * 8)
    leaves = [torch.randn(2, 160, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*leaves, [8], [1], backend="reference")
    expected = oracle.attention_with_gradients(*leaves, torch.ones_like(out), [8], [1], False)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), tuple(expected[2:]))
    assert max(sizes) <= 2 * 3 * 8 * 8


def test_gradient_passes_gradcheck_through_the_mixture_weights():
    leaves = [torch.randn(1, 11, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: dilated_attention(*x, [4, 11], [1, 2], causal=True), leaves)


def test_softmax_scale_is_used():
    q, k, v, dout = torch.randn(4, 1, 20, 2, 4, dtype=torch.float64)
    expected = oracle.attention_with_gradients(q, k, v, dout, [7, 20], [1, 2], True, scale=0.9)[0]
    torch.testing.assert_close(dilated_attention(q, k, v, [7, 20], [1, 2], causal=True, softmax_scale=0.9), expected)


def test_no_dense_temporary_is_saved_per_branch():
    leaves = [torch.randn(1, 256, 4, 8, requires_grad=True) for _ in range(3)]
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dilated_attention(*leaves, [16, 32, 64, 128, 256], [1, 2, 4, 8, 16])
    assert sum(saved) <= 4 * 256 * 4 * 8 + 256 * 4  # q, k, v, out and lse, whatever the number of branches


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"segment_lengths": [0]}, PatternError, "segment length must be at least 1, got 0"),
        ({"dilation_rates": [0]}, PatternError, "dilation rate must be at least 1, got 0"),
        ({"dilation_rates": [1, 2]}, PatternError, "must pair up, got 1 and 2"),
        ({"segment_lengths": [2.5]}, PatternError, "must be an integer, got 2.5"),
        ({"segment_lengths": [], "dilation_rates": []}, PatternError, "at least 1 branch"),
        ({"q": torch.zeros(1, 8, 4)}, ShapeError, "(1, 8, 4)"),
        ({"k": torch.zeros(1, 7, 4, 4)}, ShapeError, "(1, 7, 4, 4)"),
        ({"k": torch.zeros(1, 8, 3, 4), "v": torch.zeros(1, 8, 3, 4)}, ShapeError, "must divide"),
        ({"k": torch.zeros(1, 8, 4, 4).double()}, ShapeError, "float64"),
        ({"q": torch.zeros(1, 8, 4, 4).int()}, ShapeError, "int32"),
        ({"q": torch.zeros(1, 8, 4, 4).to(torch.float8_e5m2)}, ShapeError, "float8_e5m2"),
        ({"segment_lengths": 8}, PatternError, "must be a list of integers, one a branch, got 8"),
        ({"softmax_scale": math.nan}, ShapeError, "finite number above 0, got nan"),
        ({"softmax_scale": 0.0}, ShapeError, "finite number above 0, got 0.0"),
        ({"softmax_scale": "x"}, ShapeError, "finite number above 0, got 'x'"),
        ({"q": None}, ShapeError, "must be tensors, got NoneType, Tensor, Tensor"),
        ({"backend": "magic"}, BackendError, "'magic'"),
    ],
)
def test_bad_argument_is_one_clear_error(change, error, words):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 8, 4, 4)) | {"segment_lengths": [8], "dilation_rates": [1]} | change
    with pytest.raises(error) as caught:
        dilated_attention(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_autocast_does_not_lower_the_products_of_attention():
    leaves = [torch.randn(1, 40, 2, 4, requires_grad=True) for _ in range(3)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = dilated_attention(*leaves, [16, 40], [1, 2], causal=True, backend="reference")
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_branch_that_is_one_object_twice_counts_twice():
    twice_the_same = Branch(8, 1)
    sequence_plan._PLANS.clear()  # an equal pattern of two objects may be there
    x = torch.randn(1, 8, 2, 4)
    (once, lse_once), (twice, lse_twice) = (
        SequencePlan.build(Pattern(branches), 8).attend(x, x, x, causal=False)
        for branches in ((twice_the_same,), [twice_the_same, twice_the_same])
    )
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(lse_twice, lse_once + math.log(2))


def test_integers_of_numpy_are_integers():
    assert Branch(numpy.int64(8), numpy.uint8(2)) == Branch(8, 2)
    assert type(Branch(numpy.int64(8), 2).segment_length) is int
