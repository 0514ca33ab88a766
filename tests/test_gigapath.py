import logging
import math

import oracle
import pytest
import torch
import torchscale_oracle as theirs

from longnet_hpc.errors import CheckpointError, ConfigError, ShapeError
from longnet_hpc.integrations.gigapath import load_slide_encoder, slide_segment_lengths
from longnet_hpc.integrations.torchscale import TorchscalePlan

CONFIG = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 64,
    "segment_length": [8, 20],
    "dilated_ratio": [1, 4],
}
HOW = {"heads": 4, "segment_lengths": (8, 20), "dilation_rates": (1, 4), "grid": 50, "dtype": torch.float64}


def slide_weights():
    weights = {f"encoder.{name}": tensor for name, tensor in theirs.state_dict(CONFIG, "encoder").items()}
    generator = torch.Generator().manual_seed(9)
    shapes = {
        "patch_embed.proj.weight": (32, 12),
        "patch_embed.proj.bias": (32,),
        "cls_token": (1, 1, 32),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }
    return {**weights, **{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}}


def slide(tiles, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2, tiles, 12, generator=generator, dtype=torch.float64)
    return embeddings, torch.rand(2, tiles, 2, generator=generator) * 50 * 256


def tokens_of(weights, tiles, coords):
    """Return what LongNetViT gives its encoder: tiles by a table of positions, behind the class token."""
    table = torch.zeros(50 * 50 + 1, 32)  # the first is the class token's
    for first in range(50):
        for second in range(50):
            for cell, start in ((second, 0), (first, 16)):
                for pair in range(8):
                    angle = cell / 10000 ** (pair / 8)
                    table[1 + first * 50 + second, start + pair] = math.sin(angle)
                    table[1 + first * 50 + second, start + 8 + pair] = math.cos(angle)
    x = tiles @ weights["patch_embed.proj.weight"].double().T + weights["patch_embed.proj.bias"].double()
    places = (coords[..., 0] / 256).floor() * 50 + (coords[..., 1] / 256).floor() + 1
    x = x + table[places.long()]
    return torch.cat((weights["cls_token"].double().expand(2, -1, -1), x), dim=1)


@pytest.mark.parametrize("is_exact", [False, True])
def test_slide_encoder_equals_longnet_vit(is_exact):
    weights, (tiles, coords) = slide_weights(), slide(29)
    model = load_slide_encoder(weights, **HOW)
    own = {name.removeprefix("encoder."): x for name, x in weights.items() if name.startswith("encoder.")}
    attend = theirs.attention if is_exact else lambda *args: oracle.attention(*args)[0]
    states, last = theirs.stack(tokens_of(weights, tiles, coords), own, CONFIG, "encoder", attend)

    def norm(x):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return scaled * weights["norm.weight"].double() + weights["norm.bias"].double()

    plan = TorchscalePlan(model.config.pattern, 30) if is_exact else None
    torch.testing.assert_close(model(tiles, coords, plan), norm(last), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.states(tiles, coords, plan), [norm(x) for x in states], rtol=1e-6, atol=1e-6)


def test_weights_without_a_place_are_named_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="longnet_hpc"):
        load_slide_encoder({**slide_weights(), "pos_embed": torch.zeros(1, 3, 32)}, **HOW)
    assert "the slide encoder has no place for pos_embed" in caplog.text


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("cls_token", "another model: there is no cls_token"),
        ("encoder.layers.0.ffn.fc1.weight", "of no slide encoder"),
        ("encoder.layers.1.ffn.fc2.bias", "there is no layers.1.ffn.fc2.bias"),
    ],
)
def test_weights_of_another_model_are_one_clear_error(left_out, words):
    with pytest.raises(CheckpointError, match=words):
        load_slide_encoder({name: x for name, x in slide_weights().items() if name != left_out}, **HOW)


def test_bad_tiles_are_one_clear_error():
    model, (tiles, coords) = load_slide_encoder(slide_weights(), **HOW), slide(5)
    for bad, words in (
        ((tiles[..., :3], coords), r"tiles must be \(batch, tiles, 12\), got \(2, 5, 3\)"),
        ((tiles, coords[:, :4]), r"coords must be \(2, 5, 2\) in pixels, got \(2, 4, 2\)"),
        ((tiles, coords - 50 * 256), "coords must be 0 to below 12800 pixels"),
        ((tiles, coords + 50 * 256), "coords must be 0 to below 12800 pixels"),
        ((tiles, coords * math.nan), "coords must be 0 to below 12800 pixels"),
    ):
        with pytest.raises(ShapeError, match=words):
            model(*bad)


def test_segment_lengths_grow_with_the_image():
    assert slide_segment_lengths() == (1024, 5792, 32768, 185363, 1048576)
    assert slide_segment_lengths(65536) == (1024, 2896, 8192, 23170, 65536)
    with pytest.raises(ConfigError, match="at least 1024 tiles, got 1024 by 256 pixels"):
        slide_segment_lengths(1024)
