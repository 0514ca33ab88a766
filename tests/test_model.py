import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longnet_hpc import LongNet, LongNetConfig, Pattern, SequencePlan
from longnet_hpc import cross_entropy as pieces
from longnet_hpc.errors import ConfigError, ShapeError
from longnet_hpc.model_config import PRESETS

MICRO = LongNetConfig(
    vocab_size=17, layers=2, embed_dim=16, heads=4, kv_heads=2, segment_lengths=(8, 32), dilation_rates=(1, 3)
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def micro_model(**changes):
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**{**vars(MICRO), **changes})).double()


def tokens(seq, batch=2, seed=0):
    return torch.randint(0, 17, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"tie_head": False}, {"ffn_ratio": 3, "layers": 5}])
def test_parameters_are_counted_without_the_model(changes):
    model = micro_model(**changes)
    assert model.config.parameter_count == model.parameter_count


def test_plan_of_another_pattern_is_refused():
    model, x = micro_model(), tokens(29)
    plan = SequencePlan.build(Pattern.from_lists([29], [1]), 29)
    with pytest.raises(ShapeError, match=r"w = \[29\], r = \[1\], not the model's w = \[8, 32\], r = \[1, 3\]"):
        model(x, plan)


def test_later_token_does_not_change_earlier_logits():
    model, x = micro_model(), tokens(29)
    changed = x.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 17
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_loss_equals_cross_entropy_of_the_logits_with_gradients(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_LOGITS", 17 * 5)
    model, x, y = micro_model(), tokens(23), tokens(23, seed=1)
    y[0, :4] = -100
    loss = model.loss(x, y)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.token_losses(x, y).sum(), expected.detach())


def test_gradient_equals_finite_differences():
    model, x, y = micro_model(), tokens(13), tokens(13, seed=1)
    model.loss(x, y).backward()
    weight = model.blocks[0].q_proj.weight
    direction = torch.randn_like(weight)
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        up = model.loss(x, y)
        weight -= 2 * step * direction
        down = model.loss(x, y)
    assert (weight.grad * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5)


@pytest.mark.parametrize("keep_attention", [False, True])
def test_activation_checkpointing_and_dropout_give_the_same_gradients(keep_attention):
    model, x, y = micro_model(dropout=0.3), tokens(13), tokens(13, seed=1)
    plain = torch.autograd.grad(model.loss(x, y, dropout_seed=5), list(model.parameters()))
    model.activation_checkpointing, model.keep_attention = True, keep_attention
    torch.testing.assert_close(torch.autograd.grad(model.loss(x, y, dropout_seed=5), list(model.parameters())), plain)


@pytest.mark.parametrize(("half_residual", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_residual_stream_is_in_half_precision_if_asked(half_residual, dtype):
    model, x, streams = micro_model().float(), tokens(13), []
    exact = model.loss(x, x).item()
    model.half_residual = half_residual
    model.blocks[1].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(x, x).item() == pytest.approx(exact, rel=2e-2)
    assert streams == [dtype]


def test_dropout_is_off_in_evaluation_and_depends_on_the_seed_in_training():
    model, x = micro_model(dropout=0.5), tokens(13)
    assert not torch.equal(model.hidden(x, dropout_seed=1), model.hidden(x, dropout_seed=2))
    assert not torch.equal(model(x, dropout_seed=1), model(x, dropout_seed=2))
    losses = [model.token_losses(x, x, dropout_seed=seed) for seed in (1, 2)]
    assert not torch.equal(*losses)
    assert torch.equal(model.eval().hidden(x, dropout_seed=1), model.hidden(x, dropout_seed=2))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_preset_has_the_size_of_the_paper(name):
    config = PRESETS[name]
    with torch.device("meta"):
        count = LongNet(config).parameter_count - config.vocab_size * config.embed_dim
    assert count == pytest.approx(12 * config.layers * config.embed_dim**2, rel=0.01)
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert config.dilation_rates == (1, 2, 4, 6, 12)


def test_initialisation_has_the_gains_of_magneto():
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(layers=8, embed_dim=256, heads=4))
    block = model.blocks[0]
    gain = math.sqrt(math.log(16))
    for layer, factor in ((block.q_proj, 1.0), (block.v_proj, gain), (block.fc1, gain), (block.out_proj, gain)):
        xavier = math.sqrt(2 / (layer.in_features + layer.out_features))
        assert layer.weight.std().item() == pytest.approx(factor * xavier, rel=0.02)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("bad", "words"),
    [(torch.tensor([[3, 17]]), "token 17 is outside the vocabulary of 17"), (torch.zeros(4).long(), "(batch, seq)")],
)
def test_bad_tokens_are_one_clear_error(bad, words):
    with pytest.raises(ShapeError) as caught:
        micro_model()(bad)
    assert words in str(caught.value)


@pytest.mark.parametrize("target", [17, -1, -99])
@pytest.mark.parametrize("name", ["loss", "token_losses"])
def test_target_outside_the_vocabulary_is_one_clear_error(target, name):
    model, y = micro_model(), tokens(8)
    y[1, 3] = target
    with pytest.raises(ShapeError, match=f"target {target} is outside the vocabulary of 17"):
        getattr(model, name)(tokens(8), y)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "heads must divide embed_dim, got 3"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got 3"),
        ({"dropout": 1.0}, "below 1, got 1.0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"positions": "absolute"}, "got 'absolute'"),
    ],
)
def test_bad_configuration_is_one_clear_error(change, words):
    with pytest.raises(ConfigError) as caught:
        LongNetConfig(**{**vars(MICRO), **change})
    assert words in str(caught.value)


def test_flop_equals_what_torch_counts_plus_the_attention():
    model, x = micro_model(segment_lengths=(8, 32), dilation_rates=(1, 4)), tokens(64)
    with FlopCounterMode(display=False) as counter:
        model(x)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm) if op in counted)
    pairs = 4 * (64 // 8 * 8 * 9 // 2) + 4 * (64 // 32 * 8 * 9 // 2)  # head by head: visible keys of all queries
    expected = products + 2 * 2 * 4 * 4 * pairs  # batch, layers, 4 FLOP a pair and feature, head_dim
    assert model.flop(2, 64, training=False) == expected
    assert model.flop(2, 64, training=True) == 3 * expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_keeps_parameters_and_sums_in_float32(device, checkpointing):
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(**{**vars(MICRO), "embed_dim": 64})).to(device)
    x, y = tokens(40).to(device), tokens(40, seed=1).to(device)
    expected = model.loss(x, y)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    model.activation_checkpointing = checkpointing
    with torch.autocast(device, torch.bfloat16):
        loss = model.loss(x, y)
        assert model(x).dtype == model.token_losses(x, y).dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for grad, exact in zip(torch.autograd.grad(loss, list(model.parameters())), expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() <= 0.05 * exact.norm() + 1e-3


def test_plan_and_targets_of_another_length_are_one_clear_error():
    model = micro_model()
    plan = SequencePlan.build(model.config.pattern, 9)
    with pytest.raises(ShapeError, match="owns 9 tokens of the plan, got 8"):
        model(tokens(8), plan)
    with pytest.raises(ShapeError, match="targets must be shaped"):
        model.loss(tokens(8), tokens(9))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_narrow_integers_are_tokens_too_and_truth_values_are_not(dtype):
    model, x = micro_model(), tokens(8)
    assert torch.equal(model(x.to(dtype)), model(x))
    with pytest.raises(ShapeError, match=r"must be integers .* got torch\.bool"):
        model(x.bool())
