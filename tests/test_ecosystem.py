"""Dilated attention and LongNet inside what torch and its packages offer; on several ranks: test_mpi_ecosystem.py."""

import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longnet_hpc import DilatedAttention, LongNet, LongNetConfig, scaled_dot_product_attention, sequence_plan
from longnet_hpc.attention import branch
from longnet_hpc.encoder import LongNetEncoder
from longnet_hpc.encoder_config import EncoderConfig

DILATED = {"segment_lengths": (8, 32), "dilation_rates": (1, 3)}


@pytest.fixture(autouse=True)
def no_plan_is_there():
    sequence_plan._PLANS.clear()
    torch.compiler.reset()
    torch.manual_seed(0)


def micro_model(**changes):
    sizes = {"vocab_size": 17, "layers": 2, "embed_dim": 16, "heads": 4, "kv_heads": 2, **DILATED, **changes}
    return LongNet(LongNetConfig(**sizes))


def tokens(seed=0, vocab_size=17):
    return torch.randint(0, vocab_size, (2, 48), generator=torch.Generator().manual_seed(seed))


def encoder_layer(**changes):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    layer.self_attn = DilatedAttention(32, 4, **{**DILATED, **changes})
    return layer


def module_case():
    module = DilatedAttention(32, 4, **DILATED)
    return lambda x: module(x, x, x, is_causal=True)[0], torch.randn(2, 40, 32), list(module.parameters())


def function_case():
    return (
        lambda x: scaled_dot_product_attention(x, x.flip(3), x, is_causal=True, cu_seqlens=[0, 11, 40], **DILATED),
        torch.randn(2, 4, 40, 8),
        [],
    )


def model_case():
    model = micro_model()
    return model, tokens(), list(model.parameters())


@pytest.mark.parametrize("case", [module_case, function_case, model_case])
def test_compiled_function_is_one_graph_with_the_same_gradients(case):
    function, x, leaves = case()
    if x.is_floating_point():
        leaves.append(x.requires_grad_())
    results = []
    for form in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        out = form(x)
        results.append((out.detach(), *torch.autograd.grad(out.square().mean(), leaves)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_autocast_of_the_module_is_that_of_torchs_module():
    ours = DilatedAttention(32, 4, segment_lengths=[40], dilation_rates=[1])
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 32)
    exact = ours(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(x, x, x)[0], theirs(x, x, x, need_weights=False)[0]
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(actual.float(), exact, atol=1e-2, rtol=1e-2)


def test_autocast_of_the_model_has_nearly_the_same_gradients_in_float32():
    model, x, losses = micro_model(), tokens(), []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(model.loss(x, x.flip(1)) / x.numel())
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert all(grad.dtype == torch.float32 for grad in grads[1])
    assert abs(losses[1] - losses[0]) > 1e-6  # it did compute in bfloat16
    scale = max(grad.abs().max() for grad in grads[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=2e-2 * float(scale))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layer_computes_attention_again_and_has_the_same_gradients(use_reentrant, monkeypatch):
    layer, calls = encoder_layer(), []
    softmax_sum = branch.softmax_sum
    monkeypatch.setattr(branch, "softmax_sum", lambda q: calls.append(q) or softmax_sum(q))
    x = torch.randn(2, 40, 32, requires_grad=True)
    plain = layer(x)
    kept = checkpoint(layer, x, use_reentrant=use_reentrant)
    leaves = [x, *layer.parameters()]
    results = []
    for out in (plain, kept):
        for leaf in leaves:
            leaf.grad = None
        out.square().mean().backward()
        results.append([leaf.grad for leaf in leaves])
    assert len(calls) == 3
    torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("tie_head", [False, True])
def test_quantised_model_computes_nearly_the_same(tie_head):
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

    model, x = micro_model(embed_dim=64, vocab_size=50, tie_head=tie_head).eval(), tokens(vocab_size=50)
    with torch.no_grad():
        expected = model(x)
        quantize_(model, Int8WeightOnlyConfig())
        actual = model(x)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 13
    assert all(isinstance(module.weight, Int8Tensor) for module in linear)
    assert 1e-4 < (actual - expected).norm() / expected.norm() < 3e-2


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_exported_model_needs_no_plan_of_the_process_that_exported_it(positions):
    model = micro_model(positions=positions).eval()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (tokens(),)), file)
    sequence_plan._PLANS.clear()
    file.seek(0)
    program = torch.export.load(file)
    operators = {str(node.target) for node in program.graph.nodes}
    assert {name for name in operators if "longnet_hpc" in name} == {"longnet_hpc.dilated_attention.default"}
    other = tokens(seed=1)
    torch.testing.assert_close(program.module()(other), model(other), atol=1e-5, rtol=1e-5)


def test_encoder_is_one_graph_and_can_be_exported():
    torch.manual_seed(0)
    encoder = LongNetEncoder(
        EncoderConfig(layers=1, embed_dim=16, heads=2, segment_lengths=(8, 32), dilation_rates=(1, 2))
    )
    x = torch.randn(1, 32, 16)
    expected = encoder(x)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    program = torch.export.export(encoder.eval(), (x,))
    assert not any("mixture" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)
