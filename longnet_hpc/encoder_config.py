"""What an encoder is, validated where the values enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from longnet_hpc.errors import ConfigError
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS, at_least
from longnet_hpc.pattern import Pattern

__all__ = ["EncoderConfig"]

_CHOICES = {
    "norms": ("sub", "pre", "post", "deep"),
    "activation": ("gelu", "relu"),
    "positions": ("none", "rotary", "xpos"),
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional LongNet: blocks of dilated attention over embeddings, without a vocabulary."""

    layers: int = 12
    """Number of blocks."""
    embed_dim: int = 768
    """Width of the residual stream, in features."""
    heads: int = 12
    """Number of heads; must divide embed_dim."""
    ffn_dim: int = 3072
    """Width of the feed-forward layer, in features."""
    segment_lengths: tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    """Segment length w of each attention branch, in tokens."""
    dilation_rates: tuple[int, ...] = PAPER_DILATION_RATES
    """Dilation rate r of each attention branch, in tokens."""
    norms: Literal["sub", "pre", "post", "deep"] = "sub"
    """Before each sublayer and once within it (sub-LayerNorm, MAGNETO), before it, after it, or as in DeepNet."""
    output_norm: bool = True
    """Normalise what the last block gives."""
    norm_eps: float = 1e-5
    """Added to the variance by norms, above 0."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Nonlinearity of the feed-forward layer."""
    positions: Literal["none", "rotary", "xpos"] = "none"
    """Position encoding within attention; with none, the embeddings have to tell positions."""
    rotary_base: float = 10000.0
    """Base of the rotary wavelengths, in tokens."""
    dropout: float = 0.0
    """Probability of zeroing an activation while training, 0 to below 1. Masks depend on the global position alone."""

    causal: ClassVar[bool] = False
    kv_heads: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        at_least(self, 1, "layers", "embed_dim", "heads", "ffn_dim")
        if self.embed_dim % self.heads:
            raise ConfigError(f"heads must divide embed_dim, got {self.heads} heads for width {self.embed_dim}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.positions != "none" and self.head_dim % 2:
            raise ConfigError(f"head_dim = embed_dim / heads must be even for {self.positions}, got {self.head_dim}")
        if not 0.0 < self.norm_eps < 1.0:
            raise ConfigError(f"norm_eps must be above 0 and below 1, got {self.norm_eps}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        _ = self.pattern  # a pattern that cannot exist is an error here, not at the first call

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.embed_dim // self.heads

    @property
    def pattern(self) -> Pattern:
        """The branches of the attention."""
        return Pattern.from_lists(self.segment_lengths, self.dilation_rates)
