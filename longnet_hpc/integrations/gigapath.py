"""Slide encoders as Prov-GigaPath's ``LongNetViT``: embeddings of the tiles of an image, and one of the whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from longnet_hpc.encoder import LongNetEncoder
from longnet_hpc.encoder_config import EncoderConfig
from longnet_hpc.errors import CheckpointError, ConfigError, LongNetError, ShapeError
from longnet_hpc.integrations.torchscale import load_encoder
from longnet_hpc.integrations.weights import fill, names_in_words, read_weights
from longnet_hpc.one_process import plan_of_one
from longnet_hpc.sequence_plan import Plan

__all__ = ["SlideEncoder", "load_slide_encoder", "slide_segment_lengths"]

DILATION_RATES = (1, 2, 4, 8, 16)
"""Of all of Prov-GigaPath's slide encoders of five branches."""
CELL_PIXELS = 256
"""Side of a cell of the grid that positions count, whatever the side of a tile."""
_OWN_NAMES = {
    "tile_proj.weight": "patch_embed.proj.weight",
    "tile_proj.bias": "patch_embed.proj.bias",
    "class_token": "cls_token",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}


class SlideEncoder(nn.Module):
    """An encoder over the tiles of an image, behind a class token.

    Parameters
    ----------
    tile_dim : int
        Features of the embedding of a tile.
    config : EncoderConfig
        The encoder; embed_dim must be a multiple of 4, and its positions none.
    grid : int
        Cells of a side of the largest image.
    norm_eps : float
        Added to the variance by the last norm.
    """

    def __init__(self, tile_dim: int, config: EncoderConfig, *, grid: int = 1000, norm_eps: float = 1e-6) -> None:
        super().__init__()
        if config.embed_dim % 4:
            raise ConfigError(f"embed_dim of a slide encoder must be a multiple of 4, got {config.embed_dim}")
        self.config = config
        self.grid = grid
        self.tile_proj = nn.Linear(tile_dim, config.embed_dim)
        self.class_token = nn.Parameter(torch.randn(1, 1, config.embed_dim) * 0.02)
        self.encoder = LongNetEncoder(config)
        self.norm = nn.LayerNorm(config.embed_dim, norm_eps)

    def forward(self, tiles: torch.Tensor, coords: torch.Tensor, plan: Plan | None = None) -> torch.Tensor:
        """Return normalised embeddings; the first is the class token's, which stands for the whole image.

        Collective over the ranks of the plan.

        Parameters
        ----------
        tiles : torch.Tensor
            Embeddings of this rank's tiles, ``(batch, tiles, tile_dim)``.
        coords : torch.Tensor
            Where they lie, ``(batch, tiles, 2)``, in pixels.
        plan : Plan, optional
            Who owns which tokens, the class token being the first of the sequence: its rank has a token more than
            tiles. By default one process owns them all.

        Returns
        -------
        torch.Tensor
            ``(batch, tokens, embed_dim)``.

        Raises
        ------
        ShapeError
            If shapes do not fit, or a tile lies outside the grid. All ranks raise it.
        """
        x, plan = self._tokens(tiles, coords, plan)
        normed: torch.Tensor = self.norm(self.encoder(x, plan))
        return normed

    def states(self, tiles: torch.Tensor, coords: torch.Tensor, plan: Plan | None = None) -> list[torch.Tensor]:
        """Return what enters the encoder and what each block gives, normalised; arguments and errors as for `forward`.

        The last is not what `forward` gives, since there the encoder normalises, too.
        """
        x, plan = self._tokens(tiles, coords, plan)
        return [self.norm(state) for state in self.encoder.states(x, plan)]

    def _tokens(self, tiles: torch.Tensor, coords: torch.Tensor, plan: Plan | None) -> tuple[torch.Tensor, Plan]:
        error: LongNetError | None = None
        try:
            self._check(tiles, coords)
            if plan is None:
                plan = plan_of_one(self.config.pattern, tiles.shape[1] + 1, tiles.device)
        except LongNetError as caught:
            error = caught
        if plan is None:
            assert error is not None
            raise error
        plan.agree({}, error)
        x = self.tile_proj(tiles)
        x = x + cell_positions(coords // CELL_PIXELS, self.config.embed_dim).to(x.dtype)
        if plan.start == 0 and plan.local_len > 0:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        return x, plan

    def _check(self, tiles: torch.Tensor, coords: torch.Tensor) -> None:
        if tiles.dim() != 3 or tiles.shape[2] != self.tile_proj.in_features:
            raise ShapeError(f"tiles must be (batch, tiles, {self.tile_proj.in_features}), got {tuple(tiles.shape)}")
        weight = self.tile_proj.weight
        if tiles.dtype != weight.dtype and not torch.is_autocast_enabled(tiles.device.type):
            raise ShapeError(f"tiles must be {weight.dtype}, as the weights, or under autocast, got {tiles.dtype}")
        if not tiles.device == coords.device == weight.device:
            raise ShapeError(f"tiles and coords must be on {weight.device}, got {tiles.device} and {coords.device}")
        if coords.shape != (*tiles.shape[:2], 2):
            raise ShapeError(f"coords must be {(*tiles.shape[:2], 2)} in pixels, got {tuple(coords.shape)}")
        if coords.numel() and not (coords.min() >= 0 and coords.max() < self.grid * CELL_PIXELS):
            raise ShapeError(f"coords must be 0 to below {self.grid * CELL_PIXELS} pixels")


def cell_positions(cells: torch.Tensor, width: int) -> torch.Tensor:
    """Return sines and cosines of cells ``(..., 2)``: half of the features for each coordinate, the second first.

    Parameters
    ----------
    cells : torch.Tensor
        Whole numbers of cells.
    width : int
        Features, a multiple of 4.

    Returns
    -------
    torch.Tensor
        ``(..., width)``, float32.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=cells.device) / quarter)
    angles = cells.double().flip(-1).unsqueeze(-1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


def slide_segment_lengths(image_pixels: int = 262144, tile_pixels: int = 256) -> tuple[int, ...]:
    """Return the five segment lengths, in tokens, that Prov-GigaPath takes for images of a size.

    They grow by equal factors, from 1024 to the largest power of two that is no more than all tiles.

    Parameters
    ----------
    image_pixels, tile_pixels : int
        Sides of the largest image and of a tile.

    Raises
    ------
    ConfigError
        If there are fewer than 1024 tiles.
    """
    tiles = (image_pixels // tile_pixels) ** 2 if tile_pixels > 0 else 0
    if tiles < 1024:
        raise ConfigError(f"an image must have at least 1024 tiles, got {image_pixels} by {tile_pixels} pixels")
    most = math.floor(math.log2(tiles))
    return tuple(int(2.0 ** (10 + (most - 10) * step / 4)) for step in range(5))


def load_slide_encoder(
    weights: Mapping[str, torch.Tensor] | str | Path,
    *,
    heads: int = 16,
    segment_lengths: tuple[int, ...] | None = None,
    dilation_rates: tuple[int, ...] = DILATION_RATES,
    grid: int = 1000,
    dtype: torch.dtype = torch.float32,
) -> SlideEncoder:
    """Return a slide encoder with the weights of a ``LongNetViT``; its sizes are read off them.

    Parameters
    ----------
    weights, dtype
        As for `longnet_hpc.integrations.torchscale.load_encoder`. Weights outside the encoder that it does not need
        are left out, and named in the log.
    heads : int
        Number of heads, which weights do not show.
    segment_lengths, dilation_rates : tuple of int
        The branches; by default those of `slide_segment_lengths`.
    grid : int
        Cells of a side of the largest image.

    Returns
    -------
    SlideEncoder
        On the CPU. It attends as the paper says; for the outputs that Prov-GigaPath gives itself, call it with a
        `TorchscalePlan`.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or the weights are not those of a slide encoder.
    ConfigError
        If heads or branches do not fit.
    """
    given = read_weights(weights)
    fc1, proj = (given.get(name) for name in ("encoder.layers.0.ffn.fc1.weight", "patch_embed.proj.weight"))
    if fc1 is None or proj is None or fc1.dim() != 2 or proj.dim() != 2:
        raise CheckpointError(
            "the weights are of no slide encoder: it has a matrix patch_embed.proj and encoder.layers"
        )
    encoder = load_encoder(
        given,
        {
            "encoder_layers": len({name.split(".")[2] for name in given if name.startswith("encoder.layers.")}),
            "encoder_embed_dim": fc1.shape[1],
            "encoder_ffn_embed_dim": fc1.shape[0],
            "encoder_attention_heads": heads,
            "segment_length": segment_lengths or slide_segment_lengths(),
            "dilated_ratio": dilation_rates,
        },
        prefix="encoder.",
        dtype=dtype,
    )
    with torch.device("meta"):
        model = SlideEncoder(proj.shape[1], encoder.config, grid=grid)
    model.encoder = encoder
    own = {name: tensor for name, tensor in given.items() if not name.startswith("encoder.")}
    if left_out := sorted(own.keys() - _OWN_NAMES.values()):
        logging.getLogger("longnet_hpc").info("the slide encoder has no place for %s", names_in_words(left_out))
    names = {theirs: ours for ours, theirs in _OWN_NAMES.items()}
    fill(model, {name: own[name] for name in names if name in own}, names, dtype)
    return model
