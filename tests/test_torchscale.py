import copy
import random as random_numbers
import types

import oracle
import pytest
import torch
import torchscale_oracle as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from longnet_hpc import LongNet, Pattern, SequencePlan, dilated_attention
from longnet_hpc.errors import CheckpointError, ConfigError, LongNetError, ShapeError
from longnet_hpc.integrations.torchscale import TorchscalePlan, load_decoder, load_encoder, torchscale_attention
from longnet_hpc.integrations.weights import read_weights

ENCODER = {
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_attention_heads": 6,
    "encoder_ffn_embed_dim": 40,
    "segment_length": [8, 20],
    "dilated_ratio": [1, 4],
}
DECODER = {
    "decoder_layers": 2,
    "decoder_embed_dim": 16,
    "decoder_attention_heads": 4,
    "decoder_ffn_embed_dim": 32,
    "segment_length": "[8, 18]",
    "dilated_ratio": "[1, 4]",
    "vocab_size": 17,
    "xpos_rel_pos": True,
}


def lists(config):
    """Return a config whose lists are not strings, for the oracle."""
    return {name: eval(value) if str(value).startswith("[") else value for name, value in config.items()}


def paper_attention(*args):
    return oracle.attention(*args)[0]


ATTENTIONS = {"paper": (paper_attention, False), "torchscale": (theirs.attention, True)}


def plan_of(model, seq, is_exact):
    return TorchscalePlan(model.config.pattern, seq) if is_exact else None


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seq=st.integers(1, 30),
    heads=st.integers(1, 7),
    branches=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=3),
    causal=st.booleans(),
)
def test_attention_and_gradients_equal_those_of_torchscale(seq, heads, branches, causal):
    pattern = [w for w, _ in branches], [r for _, r in branches]
    leaves = [random(2, seq, heads, 3, seed=seed).requires_grad_() for seed in range(3)]
    ours = torchscale_attention(*leaves, Pattern.from_lists(*pattern), causal=causal)
    expected = theirs.attention(*leaves, *pattern, causal)
    torch.testing.assert_close(ours, expected)
    dout = random(2, seq, heads, 3, seed=4)
    got, wanted = (torch.autograd.grad(out, leaves, dout, materialize_grads=True) for out in (ours, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_torchscale_deviates_from_the_paper_where_its_documentation_says(causal):
    q, k, v = (random(1, 24, 4, 8, seed=seed) for seed in range(3))

    def same(heads, *pattern, seq=24):
        parts = [x[:, :seq, :heads] for x in (q, k, v)]
        ours = dilated_attention(*parts, *pattern, causal=causal)
        return torch.allclose(torchscale_attention(*parts, Pattern.from_lists(*pattern), causal=causal), ours)

    assert same(4, [8, 24], [1, 4])  # one head a block: its number is its offset
    assert not same(4, [8, 24], [1, 2])  # heads 1 and 2 have each other's offset
    assert same(2, [8, 24], [1, 2])
    assert same(2, [8, 24], [1, 2], seq=20) == causal  # ragged: zeros behind what is there, seen unless causal
    assert not same(1, [6], [4])  # w is no multiple of r, and more than one segment


def test_log_sum_exp_of_exactly_zero_counts_as_absent():
    q, k, v = torch.zeros(3, 1, 4, 1, 2, dtype=torch.float64)
    v[..., :] = torch.arange(4.0)[:, None, None]
    out = torchscale_attention(q, k, v, Pattern.from_lists([1, 4], [1, 1]), causal=False)
    assert out.flatten().tolist() == [1.5] * 8  # its own value, of a softmax over one score of 0, is left out


@pytest.mark.parametrize("mode", list(ATTENTIONS))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"deepnorm": True},
        {"subln": False},
        {"subln": False, "encoder_normalize_before": False},
        {"encoder_normalize_before": False},  # which sub-LayerNorm overrules
        {"normalize_output": False, "layernorm_eps": 1e-3, "activation_fn": "relu"},
        {"subln": False, "activation_fn": "relu"},
        {"xpos_rel_pos": True},
    ],
)
def test_encoder_equals_torchscale_layer_by_layer(changes, mode):
    config = {**ENCODER, **changes}
    weights = theirs.state_dict(config, "encoder")
    attend, is_exact = ATTENTIONS[mode]
    model, x = load_encoder(weights, config, dtype=torch.float64), random(2, 30, 24)
    plan = plan_of(model, 30, is_exact)
    states, last = theirs.stack(x, weights, config, "encoder", attend)
    torch.testing.assert_close(model.states(x, plan), states)
    torch.testing.assert_close(model(x, plan), last)


@pytest.mark.parametrize("mode", list(ATTENTIONS))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"xpos_rel_pos": False},
        {"no_scale_embedding": False},
        {"share_decoder_input_output_embed": True},
        {"share_decoder_input_output_embed": True, "no_scale_embedding": False},
    ],
)
def test_decoder_equals_torchscale(changes, mode):
    config = {**DECODER, **changes}
    weights = theirs.state_dict(config, "decoder")
    attend, is_exact = ATTENTIONS[mode]
    model, tokens = load_decoder(weights, config, dtype=torch.float64), torch.arange(2 * 27).reshape(2, 27) * 5 % 17
    expected = theirs.logits(tokens, weights, lists(config), attend)
    torch.testing.assert_close(model(tokens, plan_of(model, 27, is_exact)), expected)
    assert isinstance(model, LongNet)
    assert model.config.tie_head == (model.head.weight is model.embedding.weight)


@pytest.mark.parametrize("mode", list(ATTENTIONS))
def test_slide_encoder_of_768_features_and_16_heads_equals_torchscale(mode):
    config = {
        "encoder_layers": 2,
        "encoder_embed_dim": 768,
        "encoder_attention_heads": 16,
        "encoder_ffn_embed_dim": 3072,
        "dilated_ratio": "[1, 2, 4, 8, 16]",
        "segment_length": "[16, 22, 32, 45, 64]",
        "block_shift": True,
        "flash_attention": True,
    }
    weights = {f"encoder.{name}": x for name, x in theirs.state_dict(config, "encoder").items()}
    weights["cls_token"] = torch.zeros(1, 1, 768)
    attend, is_exact = ATTENTIONS[mode]
    model = load_encoder({"model": weights}, config, prefix="encoder.")
    x = random(1, 101, 768, dtype=torch.float32)
    own = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    states, last = theirs.stack(x, own, lists(config), "encoder", attend)
    with torch.no_grad():
        torch.testing.assert_close(model(x, plan_of(model, 101, is_exact)), last.float(), rtol=1e-4, atol=1e-4)
        for ours, expected in zip(model.states(x, plan_of(model, 101, is_exact)), states, strict=True):
            torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_exact", [False, True])
def test_gradients_of_an_encoder_equal_with_activation_checkpointing(is_exact):
    model, x = load_encoder(theirs.state_dict(ENCODER, "encoder"), ENCODER, dtype=torch.float64), random(1, 30, 24)
    grads = []
    for model.activation_checkpointing, model.keep_attention in ((False, True), (True, True), (True, False)):
        loss = model(x, plan_of(model, 30, is_exact)).square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_weights_are_copies_and_need_gradients():
    weights = theirs.state_dict(ENCODER, "encoder")
    kept = copy.deepcopy(weights)
    model = load_encoder(weights, types.SimpleNamespace(**ENCODER))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(weights, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_weights_come_from_a_file(tmp_path, name):
    weights, path = theirs.state_dict(ENCODER, "encoder"), tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save({"model": weights}, path)
    expected = load_encoder(weights, ENCODER).state_dict()
    torch.testing.assert_close(load_encoder(path, ENCODER).state_dict(), expected, rtol=0, atol=0)


class _Pickled:
    def __reduce__(self):
        return pytest.fail, ("something in a file was executed",)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_damaged_file_is_one_clear_error(tmp_path, name, damage):
    path = tmp_path / name
    weights = theirs.state_dict(ENCODER, "encoder")
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x80\x02q!" * 99}[damage])
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, ENCODER)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_file_with_changed_bytes_is_read_or_refused_in_one_line(tmp_path, kind):
    path, weights = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth"), {"a": torch.zeros(3)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    whole, draw, refused = path.read_bytes(), random_numbers.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 8))):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_file_with_anything_to_execute_is_refused(tmp_path):
    torch.save({"model": theirs.state_dict(ENCODER, "encoder"), "evil": _Pickled()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth are damaged, or no file of tensors alone"):
        load_encoder(tmp_path / "evil.pth", ENCODER)


def _without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: _without(w, "layers.1.ffn.fc1.bias"), "another model: there is no layers.1.ffn.fc1.bias"),
        (lambda w: {**w, "decoder.x": w["layer_norm.bias"]}, "another model: the model has no decoder.x"),
        (lambda w: {"layers.0.ffn.fc1.bias": torch.zeros(40)}, "no layers.0.self_attn_layer_norm.weight, "),
        (
            lambda w: {**w, "layers.0.self_attn.q_proj.weight": torch.zeros(8, 24)},
            "layers.0.self_attn.q_proj.weight must be (24, 24), got torch.float32 (8, 24)",
        ),
        (lambda w: {**w, "layer_norm.bias": torch.zeros(24).long()}, "must be (24,), got torch.int64 (24,)"),
        (lambda w: {"args": 3}, "no state dict"),
        (lambda w: {3: torch.zeros(1)}, "no state dict"),
    ],
)
def test_weights_of_another_model_are_one_clear_error(spoil, words):
    with pytest.raises(CheckpointError) as caught:
        load_encoder(spoil(theirs.state_dict(ENCODER, "encoder")), ENCODER)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_prefix_that_no_name_has_is_one_clear_error():
    with pytest.raises(CheckpointError, match="begins with 'encoder.', but there is layers"):
        load_encoder(theirs.state_dict(ENCODER, "encoder"), ENCODER, prefix="encoder.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_attention_heads": 5}, "heads must divide embed_dim, got 5"),
        ({"encoder_layer": 3}, "no encoder of torchscale has a field encoder_layer"),
        ({"moe_freq": 2}, "moe_freq must be 0, got 2"),
        ({"multiway": True}, "multiway must be False, got True"),
        ({"layernorm_embedding": True}, "layernorm_embedding must be False"),
        ({"encoder_layers": "2"}, "encoder_layers must be int, got '2'"),
        ({"segment_length": "__import__('os')"}, "segment_length must be integers, as in [1024, 2048]"),
        ({"segment_length": None}, "segment_length must be integers"),
        ({"dilated_ratio": [1]}, "got 2 and 1"),
        ({"activation_fn": "swish"}, "activation must be one of gelu, relu, got 'swish'"),
        ({"vocab_size": 7}, "no_output_layer must be True"),
        ({"no_scale_embedding": False}, "no_scale_embedding must be True"),
    ],
)
def test_bad_config_of_an_encoder_is_one_clear_error(changes, words):
    with pytest.raises(LongNetError) as caught:
        load_encoder(theirs.state_dict(ENCODER, "encoder"), {**ENCODER, **changes})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepnorm": True}, "a decoder of this library has deepnorm False, got True"),
        ({"decoder_normalize_before": False}, "has decoder_normalize_before True, got False"),
        ({"layernorm_eps": 1e-6}, "has layernorm_eps 1e-05, got 1e-06"),
        ({"decoder_ffn_embed_dim": 40}, "must be a multiple of decoder_embed_dim, got 40 and 16"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
    ],
)
def test_bad_config_of_a_decoder_is_one_clear_error(changes, words):
    with pytest.raises(ConfigError, match=words):
        load_decoder(theirs.state_dict(DECODER, "decoder"), {**DECODER, **changes})


def test_plan_of_another_length_or_pattern_and_bad_embeddings_are_one_clear_error():
    model, x = load_encoder(theirs.state_dict(ENCODER, "encoder"), ENCODER), random(1, 9, 24, dtype=torch.float32)
    with pytest.raises(ShapeError, match="owns 8 tokens of the plan, got 9"):
        model(x, TorchscalePlan(model.config.pattern, 8))
    with pytest.raises(ShapeError, match="the plan has pattern"):
        model(x, SequencePlan.build(Pattern.from_lists([9], [1]), 9))
    for bad, words in ((x[0], r"must be \(batch, seq, 24\), got \(9, 24\)"), (x.double(), "must be torch.float32")):
        with pytest.raises(ShapeError, match=words):
            model(bad)
    with pytest.raises(ShapeError, match="at least 1 token"):
        torchscale_attention(*torch.zeros(3, 1, 0, 2, 2), model.config.pattern, causal=False)
