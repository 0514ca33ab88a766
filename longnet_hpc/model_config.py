"""Sizes, attention pattern and positions of a decoder, validated once, where the values enter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from longnet_hpc.errors import ConfigError
from longnet_hpc.pattern import Pattern

__all__ = ["PAPER_DILATION_RATES", "PAPER_SEGMENT_LENGTHS", "PRESETS", "LongNetConfig", "PresetName", "at_least"]

PAPER_SEGMENT_LENGTHS = (2048, 4096, 8192, 16384, 32768)
"""Segment lengths of the paper's language models, in tokens (LongNet, Section 4.1)."""
PAPER_DILATION_RATES = (1, 2, 4, 6, 12)
"""Their dilation rates, in tokens."""


def at_least(config: object, limit: int, *names: str) -> None:
    """Raise ConfigError, naming the field, if one of a config is below a limit; None is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= limit:  # what is not a number is not, either
            raise ConfigError(f"{name} must be at least {limit}, got {value}")


@dataclass(frozen=True, kw_only=True)
class LongNetConfig:
    """A LongNet decoder (LongNet, Section 4; MAGNETO blocks)."""

    vocab_size: int = 256
    """Number of token values; 256 for bytes."""
    layers: int = 12
    """Number of decoder blocks."""
    embed_dim: int = 768
    """Width of the residual stream, in features."""
    heads: int = 12
    """Number of query heads; must divide embed_dim."""
    kv_heads: int | None = None
    """Number of key/value heads; must divide heads. None means as many as heads."""
    ffn_ratio: int = 4
    """Width of the feed-forward layer over embed_dim."""
    segment_lengths: tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    """Segment length w of each attention branch, in tokens."""
    dilation_rates: tuple[int, ...] = PAPER_DILATION_RATES
    """Dilation rate r of each attention branch, in tokens."""
    positions: Literal["rotary", "xpos", "none"] = "rotary"
    """Position encoding: rotary, xPos as in the paper (limited in length), or none but the order that a mask gives."""
    rotary_base: float = 10000.0
    """Base of the rotary wavelengths, in tokens."""
    dropout: float = 0.0
    """Probability of zeroing an activation while training, 0 to below 1. Masks depend on the global position alone."""
    tie_head: bool = True
    """Use the token embedding as output projection."""

    # What a block asks of its config and `encoder_config.EncoderConfig` leaves open is the same for all decoders.
    causal: ClassVar[bool] = True
    norms: ClassVar[Literal["sub", "pre", "post", "deep"]] = "sub"
    norm_eps: ClassVar[float] = 1e-5
    activation: ClassVar[Literal["gelu", "relu"]] = "gelu"

    def __post_init__(self) -> None:
        at_least(self, 1, "vocab_size", "layers", "embed_dim", "heads", "ffn_ratio")
        if self.embed_dim % self.heads:
            raise ConfigError(f"heads must divide embed_dim, got {self.heads} heads for width {self.embed_dim}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = embed_dim / heads must be even for rotary positions, got {self.head_dim}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ConfigError(f"kv_heads must divide heads, got {self.kv_heads} for {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not 1.0 < self.rotary_base < math.inf:
            raise ConfigError(f"rotary_base must be above 1 and finite, got {self.rotary_base}")
        if self.positions not in ("rotary", "xpos", "none"):
            raise ConfigError(f"positions must be rotary, xpos or none, got {self.positions!r}")
        _ = self.pattern  # a pattern that cannot exist is an error here, not at the first step

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.embed_dim // self.heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, in features."""
        return self.embed_dim * self.ffn_ratio

    @property
    def parameter_count(self) -> int:
        """Number of parameters, a tied head counted once."""
        width, inner = self.embed_dim, self.embed_dim * self.ffn_ratio
        kv_width = self.head_dim * (self.kv_heads or self.heads)
        attention = 2 * (width + 1) * width + 2 * (width + 1) * kv_width
        feed_forward = (width + 1) * inner + (inner + 1) * width
        norms = 3 * 2 * width + 2 * inner
        embeddings = (1 if self.tie_head else 2) * self.vocab_size * width
        return embeddings + self.layers * (attention + feed_forward + norms) + 2 * width

    @property
    def pattern(self) -> Pattern:
        """The branches of the attention."""
        return Pattern.from_lists(self.segment_lengths, self.dilation_rates)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LongNetConfig:
        """Return a named configuration with some fields changed.

        Parameters
        ----------
        name : str
            One of `PRESETS`: tiny, 125m, 350m, 760m, 2.7b (LongNet, Section 4.3).
        **changes
            Fields that differ from the preset.

        Raises
        ------
        ConfigError
            If there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return replace(PRESETS[name], **changes)


PRESETS: dict[str, LongNetConfig] = {
    "tiny": LongNetConfig(
        layers=4, embed_dim=128, heads=4, segment_lengths=(128, 1024, 8192), dilation_rates=(1, 8, 64)
    ),
    "125m": LongNetConfig(layers=12, embed_dim=768, heads=12),
    "350m": LongNetConfig(layers=24, embed_dim=1024, heads=16),
    "760m": LongNetConfig(layers=24, embed_dim=1536, heads=16),
    "2.7b": LongNetConfig(layers=32, embed_dim=2560, heads=32),
}
"""Model of each preset: a small one, and those of the paper."""

PresetName = Literal["tiny", "125m", "350m", "760m", "2.7b"]
"""Name of a preset."""
