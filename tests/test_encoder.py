import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torchscale_oracle as theirs

from longnet_hpc import EncoderConfig, LongNetEncoder
from longnet_hpc.errors import ConfigError, LongNetError

MICRO = EncoderConfig(
    layers=2, embed_dim=16, heads=4, ffn_dim=24, segment_lengths=(8, 32), dilation_rates=(1, 3), positions="rotary"
)
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "document_embedding.py"


def micro_encoder(**changes):
    torch.manual_seed(0)
    return LongNetEncoder(EncoderConfig(**{**vars(MICRO), **changes})).double()


def embeddings(seq, batch=2):
    return torch.randn(batch, seq, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_token_changes_those_before_and_after_it():
    model, x = micro_encoder(), embeddings(24)
    changed = x.clone()
    changed[:, 12] += 1
    differs = (model(x) != model(changed)).any(-1).any(0)
    assert differs[:12].any()
    assert differs[13:].any()


def test_positions_matter_only_where_there_are_any():
    x = embeddings(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    for positions, is_same in (("none", True), ("rotary", False), ("xpos", False)):
        model = micro_encoder(positions=positions, segment_lengths=(8,), dilation_rates=(1,))
        assert torch.allclose(model(x)[:, order], model(x[:, order])) == is_same


def test_gradient_equals_finite_differences():
    model, x = micro_encoder(layers=1), embeddings(9, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.parametrize(
    ("norms", "gain"), [("sub", math.sqrt(math.log(16))), ("pre", 1.0), ("post", 1.0), ("deep", 64**-0.25)]
)
def test_initialisation_has_the_gains_of_its_norms(norms, gain):
    torch.manual_seed(0)
    block = LongNetEncoder(EncoderConfig(layers=8, embed_dim=256, heads=4, ffn_dim=1024, norms=norms)).blocks[0]
    for layer, factor in ((block.q_proj, 1.0), (block.v_proj, gain), (block.fc1, gain), (block.out_proj, gain)):
        xavier = math.sqrt(2 / (layer.in_features + layer.out_features))
        assert layer.weight.std().item() == pytest.approx(factor * xavier, rel=0.02)


def test_dropout_depends_on_the_seed_in_training_and_is_off_in_evaluation():
    model, x = micro_encoder(dropout=0.5), embeddings(13)
    assert not torch.equal(model(x, dropout_seed=1), model(x, dropout_seed=2))
    assert torch.equal(model(x, dropout_seed=1), model(x, dropout_seed=1))
    assert torch.equal(model.eval()(x, dropout_seed=1), model(x, dropout_seed=2))


def test_autocast_computes_in_half_precision():
    model, x = micro_encoder().float(), embeddings(40).float()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert 0 < (half - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "heads must divide embed_dim, got 3"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"norms": "none"}, "norms must be one of sub, pre, post, deep, got 'none'"),
        ({"positions": "absolute"}, "positions must be one of none, rotary, xpos, got 'absolute'"),
        ({"embed_dim": 12}, "must be even for rotary, got 3"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0 and below 1, got 0.0"),
        ({"dropout": 1.0}, "below 1, got 1.0"),
        ({"dilation_rates": (1,)}, "must pair up, got 2 and 1"),
    ],
)
def test_bad_configuration_is_one_clear_error(change, words):
    with pytest.raises(LongNetError) as caught:
        EncoderConfig(**{**vars(MICRO), **change})
    assert words in str(caught.value)
    assert isinstance(caught.value, ConfigError) or "pair up" in words


def test_example_embeds_documents(tmp_path, capsys):
    config = {
        "encoder_layers": 1,
        "encoder_embed_dim": 16,
        "encoder_attention_heads": 2,
        "encoder_ffn_embed_dim": 32,
        "segment_length": "[64, 256]",
        "dilated_ratio": "[1, 4]",
    }
    weights = {f"encoder.{name}": x for name, x in theirs.state_dict(config, "encoder").items()}
    weights["embed_tokens.weight"] = torch.randn(256, 16, generator=torch.Generator().manual_seed(3))
    torch.save(weights, tmp_path / "encoder.pth")
    (tmp_path / "encoder.json").write_text(json.dumps(config))
    texts = {"twice.txt": b"abc" * 200, "again.txt": b"abc" * 200, "other.txt": bytes(range(256)) * 2}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    example, paths = runpy.run_path(str(EXAMPLE)), [str(tmp_path / name) for name in texts]
    of_torchscale = ["--weights", str(tmp_path / "encoder.pth"), "--config", str(tmp_path / "encoder.json")]
    for words in ([], of_torchscale, [*of_torchscale, "--torchscale"]):
        example["main"]([*paths, *words, "--output", str(tmp_path / "out" / "embeddings.pt")])
        first, again, other = torch.load(tmp_path / "out" / "embeddings.pt").values()
        torch.testing.assert_close(first, again)
        assert not torch.allclose(first, other, rtol=1e-2)
        assert "1.0000  1.0000" in capsys.readouterr().out
