"""Attention inside graphs of `torch.compile`, made of one piece."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longnet_hpc import LongNetConfig, Pattern, SequencePlan, dilated_attention
from longnet_hpc.model import Block
from longnet_hpc.positions import rotary

PATTERN = (8, 32), (1, 3)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same(function, inputs):
    """Compare output and gradients of a function with those of its compiled form."""
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for form in (function, compiled(function)):
        out = form(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_a_plan_is_one_graph(kv_heads):
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(2, 48, heads, 8) for heads in (4, kv_heads, kv_heads)]
    assert_same(lambda q, k, v: plan.attention(q, k, v, causal=True), inputs)


def test_attention_whose_plan_is_there_is_one_graph():
    inputs = [torch.randn(1, 50, 4, 8) for _ in range(3)]
    assert_same(lambda q, k, v: dilated_attention(q, k, v, [9, 31], [1, 2]), inputs)  # the plain form comes first


def test_block_is_one_graph():
    config = LongNetConfig(
        vocab_size=17, layers=2, embed_dim=16, heads=4, segment_lengths=(8, 32), dilation_rates=(1, 3)
    )
    block, plan = Block(config, 0), SequencePlan.build(config.pattern, 48)
    rotation = rotary(0, 48, 48, 4, 1e4, torch.float32, torch.device("cpu"))
    assert_same(lambda x: block(x, plan, rotation, 0), [torch.randn(1, 48, 16)])


def test_checkpointed_attention_has_the_same_gradients():
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(1, 48, 4, 8, requires_grad=True) for _ in range(3)]
    outs = (
        plan.attention(*inputs, causal=True),
        checkpoint(lambda *x: plan.attention(*x, causal=True), *inputs, use_reentrant=False),
    )
    results = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_operators_keep_the_promises_of_torch_library():
    plan = SequencePlan.build(Pattern.from_lists(*PATTERN), 48)
    inputs = [torch.randn(1, 48, 4, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.longnet_hpc.mixture.default, (*inputs, plan.handle, True, 0.3))


def test_second_derivative_is_refused():
    inputs = [torch.randn(1, 16, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    (grad,) = torch.autograd.grad(dilated_attention(*inputs, [16], [1]).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_log_sum_exp_takes_no_part_in_gradients():
    inputs = [torch.randn(1, 16, 2, 4, requires_grad=True) for _ in range(3)]
    out, lse = dilated_attention(*inputs, [16], [1], return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad
