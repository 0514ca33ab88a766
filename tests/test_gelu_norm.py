"""LayerNorm of GELU by Triton kernels; without a GPU, in Triton's interpreter (conftest.py)."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longnet_hpc import LongNet, LongNetConfig, gelu_norm
from longnet_hpc.errors import ShapeError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def by_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gelu_norm, "_by_kernels", lambda h: True)


def plain(h, weight, bias):
    return F.layer_norm(F.gelu(h), h.shape[-1:], weight, bias, EPS)


def ours(h, weight, bias):
    return gelu_norm.gelu_norm(h, weight, bias, EPS)


def inputs(rows, features, dtype=torch.float32, seed=0):
    """Return activations, weight, bias, and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    h, dout = torch.randn(2, rows, features, generator=generator).mul(2).to(dtype)
    weight, bias = torch.randn(2, features, generator=generator)
    return tuple(x.to(DEVICE) for x in (h, weight + 1, bias, dout))


def with_gradients(function, h, weight, bias, dout):
    leaves = [x.detach().requires_grad_() for x in (h, weight, bias)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def assert_near(actual, expected, factor=1.0):
    """Compare, each tensor to the precision of its dtype, with what is largest in it."""
    for one, right in zip(actual, expected, strict=True):
        bound = factor * TOLERANCE[one.dtype] * max(1.0, float(right.abs().max()))
        torch.testing.assert_close(one.double(), right.double(), atol=bound, rtol=0)


@pytest.mark.parametrize("features", [1, 2, 3, 48, 100, 768, 1000, 3072])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_result_and_gradients_equal_those_in_float64(by_kernels, features, dtype):
    x = inputs(5, features, dtype, seed=features)
    expected = with_gradients(plain, *(each.double() for each in x))
    actual = with_gradients(ours, *x)
    assert [each.dtype for each in actual] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(actual, expected, 20 if features == 2 else 1)  # two normed features are 1 and -1: a step


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 49, 110])
def test_rows_fewer_and_more_than_programs_equal_those_in_float64(by_kernels, rows, monkeypatch):
    monkeypatch.setattr(gelu_norm, "_FORWARD_WARPS", 48)  # on a CPU these are the programs, and 16 backward
    x = inputs(rows, 24, seed=rows)
    expected = with_gradients(plain, *(each.double() for each in x))
    actual = with_gradients(ours, *x)
    if rows:
        assert_near(actual, expected)
    else:
        assert not any(each.any() for each in actual)


def test_extreme_activations_give_what_they_give_in_float64(by_kernels):
    h, weight, bias, dout = inputs(1, 64)
    h[:, ::3] = torch.tensor([-1e4, -40.0, -14.0, -6.0, -1e-8, 0.0, 1e-8, 5.0, 14.0, 40.0, 3e4]).repeat(2).to(DEVICE)
    expected = with_gradients(plain, *(each.double() for each in (h, weight, bias, dout)))
    assert_near(with_gradients(ours, h, weight, bias, dout), expected)


def test_strided_tensors_and_more_dims_are_taken(by_kernels):
    h, weight, bias, dout = inputs(12, 40)
    tensors = h.view(3, 4, 40).transpose(0, 1), weight, bias, dout.view(3, 4, 40).transpose(0, 1)
    expected = with_gradients(plain, *(each.double() for each in tensors))
    assert_near(with_gradients(ours, *tensors), expected)


@pytest.mark.parametrize("lengths", [(4, 8), (8, 4), (1, 8)])
def test_weight_and_bias_of_other_features_are_refused(by_kernels, lengths):
    with pytest.raises(ShapeError, match="features of h"):
        ours(torch.zeros(2, 8, device=DEVICE), *(torch.zeros(n, device=DEVICE) for n in lengths))


def test_autocast_leaves_result_in_the_dtype_of_activations(by_kernels):
    h, weight, bias, _ = inputs(3, 40, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ours(h, weight, bias)
    assert torch.equal(out, ours(h, weight, bias))
    assert out.dtype == torch.bfloat16


def test_gradients_are_the_same_bits_each_time(by_kernels):
    x = inputs(40, 40, torch.bfloat16)
    first, second = with_gradients(ours, *x), with_gradients(ours, *x)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_operators_keep_the_promises_of_torch_library(by_kernels):
    h, weight, bias, dout = inputs(6, 40)
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    torch.library.opcheck(torch.ops.longnet_hpc.gelu_norm.default, (*leaves, EPS))
    _, means, rstds = torch.ops.longnet_hpc.gelu_norm(*leaves, EPS)
    others = (x.detach() for x in (dout, h, weight, means, rstds))
    torch.library.opcheck(torch.ops.longnet_hpc.gelu_norm_backward.default, tuple(others))


def test_second_derivative_is_refused(by_kernels):
    h, weight, bias, _ = inputs(2, 8)
    (grad,) = torch.autograd.grad(ours(h.requires_grad_(), weight, bias).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_is_one_graph_with_the_same_bits(by_kernels, recomputed):
    def function(h, weight, bias):
        h = 2 * h
        return checkpoint(ours, h, weight, bias, use_reentrant=False) if recomputed else ours(h, weight, bias)

    torch.compiler.reset()
    x = inputs(7, 40)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(with_gradients(compiled, *x), with_gradients(function, *x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_itself_computes_float64_and_on_cpus(dtype):
    h, weight, bias, dout = inputs(6, 40)
    x = [each.to("cpu", dtype) for each in (h, weight, bias, dout)]
    for actual, expected in zip(with_gradients(ours, *x), with_gradients(plain, *x), strict=True):
        assert torch.equal(actual, expected)
    assert not gelu_norm._by_kernels(torch.zeros(1, 8, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("checkpointing", ["none", "all but attention", "all"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_model_by_kernels_has_loss_and_gradients_of_plain_modules(by_kernels, monkeypatch, is_compiled, checkpointing):
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "layers": 2, "embed_dim": 16, "heads": 4}
    model = LongNet(LongNetConfig(**sizes, segment_lengths=(8, 32), dilation_rates=(1, 3))).to(DEVICE)
    model.activation_checkpointing, model.keep_attention = checkpointing != "none", checkpointing == "all but attention"
    tokens = torch.randint(0, 17, (2, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def loss_and_gradients():
        loss = model.loss(tokens, tokens.flip(1))
        return loss.detach().float(), *torch.autograd.grad(loss, list(model.parameters()))

    with monkeypatch.context() as patch:
        patch.setattr(gelu_norm, "_by_kernels", lambda h: False)
        expected = loss_and_gradients()
    if is_compiled:
        model.compile_blocks("aot_eager")
    assert_near(loss_and_gradients(), expected, 10)
