"""What torchscale's configs say, in those of this library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from longnet_hpc.encoder_config import EncoderConfig
from longnet_hpc.errors import ConfigError
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.words import one_line

__all__ = ["TorchscaleConfig"]

_WITH_KIND = {
    "embed_dim": "{}_embed_dim",
    "attention_heads": "{}_attention_heads",
    "ffn_embed_dim": "{}_ffn_embed_dim",
    "layers": "{}_layers",
    "normalize_before": "{}_normalize_before",
    "share_input_output_embed": "share_{}_input_output_embed",
}
"""Fields whose names say encoder or decoder in torchscale."""

_WITHOUT_EFFECT = {
    *("dropout", "drop_path_rate", "attention_dropout", "activation_dropout", "bert_init"),
    *("moe_top1_expert", "moe_expert_count", "moe_gating_use_fp32", "moe_eval_capacity_token_fraction"),
    *("moe_second_expert_policy", "moe_normalize_gate_prob_before_dropping"),
    *("max_source_positions", "max_target_positions", "img_size", "patch_size", "in_chans"),
    *("checkpoint_activations", "fsdp", "ddp_rank", "flash_attention", "seq_parallel", "block_shift"),
}
"""Fields that say how to train, or where; block_shift is of slide encoders, and torchscale does not look at it."""


@dataclass(frozen=True, kw_only=True)
class TorchscaleConfig:
    """The fields of torchscale's configs that decide what a model computes, and its defaults; see `of`."""

    embed_dim: int = 768
    attention_heads: int = 12
    ffn_embed_dim: int = 3072
    layers: int = 12
    normalize_before: bool = True
    normalize_output: bool = True
    activation_fn: str = "gelu"
    deepnorm: bool = False
    subln: bool = True
    layernorm_eps: float = 1e-5
    xpos_rel_pos: bool = False
    vocab_size: int = -1
    no_output_layer: bool = False
    share_input_output_embed: bool = False
    no_scale_embedding: bool = True
    segment_length: tuple[int, ...] = ()
    dilated_ratio: tuple[int, ...] = ()
    # Of these, no model of ours has any other value.
    xpos_scale_base: int = 512
    moe_freq: int = 0
    use_xmoe: bool = False
    multiway: bool = False
    rel_pos_buckets: int = 0
    max_rel_pos: int = 0
    layernorm_embedding: bool = False

    @classmethod
    def of(cls, config: Mapping[str, object] | object, kind: Literal["encoder", "decoder"]) -> TorchscaleConfig:
        """Read torchscale's ``EncoderConfig`` or ``DecoderConfig``.

        Parameters
        ----------
        config : mapping or object
            Fields by name, or an object that has them; what is missing has torchscale's default. ``segment_length`` and
            ``dilated_ratio`` may be sequences of integers, or strings of them.
        kind : str
            Which of the two.

        Raises
        ------
        ConfigError
            If a field is unknown, of the wrong type, or one that no model of ours has.
        """
        given = dict(config) if isinstance(config, Mapping) else dict(vars(config))
        known: dict[str, Any] = {}
        for field in fields(cls):
            name = _WITH_KIND.get(field.name, field.name).format(kind)
            if name not in given:
                continue
            value, default = given.pop(name), field.default
            known[field.name] = _read(name, value, default)
            if field.name in _FIXED and known[field.name] != default:
                raise ConfigError(f"{name} must be {default}, got {value!r}: no model of this library has another")
        unknown = sorted(str(name) for name in given.keys() - _WITHOUT_EFFECT)
        if unknown:
            raise ConfigError(f"no {kind} of torchscale has a field {one_line(unknown[0])}")
        return cls(**known)

    def encoder(self) -> EncoderConfig:
        """Return the config of an encoder of ours.

        Raises
        ------
        ConfigError
            If none computes this.
        """
        if self.vocab_size > 0 and not self.no_output_layer:
            raise ConfigError("an encoder of this library has no output layer: no_output_layer must be True")
        if not self.no_scale_embedding:
            raise ConfigError(
                "an encoder of this library takes embeddings as they are: no_scale_embedding must be True"
            )
        norms: Literal["sub", "pre", "post", "deep"]
        if self.deepnorm:  # before anything else, as torchscale settles it
            norms = "deep"
        elif self.subln:
            norms = "sub"
        else:
            norms = "pre" if self.normalize_before else "post"
        return EncoderConfig(
            layers=self.layers,
            embed_dim=self.embed_dim,
            heads=self.attention_heads,
            ffn_dim=self.ffn_embed_dim,
            segment_lengths=self.segment_length,
            dilation_rates=self.dilated_ratio,
            norms=norms,
            output_norm=self.normalize_output and norms in ("sub", "pre"),
            norm_eps=self.layernorm_eps,
            activation=self.activation_fn,  # type: ignore[arg-type]
            positions="xpos" if self.xpos_rel_pos else "none",
        )

    def decoder(self) -> LongNetConfig:
        """Return the config of a decoder of ours.

        Raises
        ------
        ConfigError
            If none computes this.
        """
        for name, must_be in (
            ("deepnorm", False),
            ("subln", True),
            ("normalize_before", True),
            ("activation_fn", LongNetConfig.activation),
            ("layernorm_eps", LongNetConfig.norm_eps),
            ("no_output_layer", False),
        ):
            if getattr(self, name) != must_be:
                theirs = _WITH_KIND.get(name, name).format("decoder")
                raise ConfigError(f"a decoder of this library has {theirs} {must_be}, got {getattr(self, name)!r}")
        if self.embed_dim < 1 or self.ffn_embed_dim % self.embed_dim:
            raise ConfigError(
                f"decoder_ffn_embed_dim must be a multiple of decoder_embed_dim, "
                f"got {self.ffn_embed_dim} and {self.embed_dim}"
            )
        return LongNetConfig(
            vocab_size=self.vocab_size,
            layers=self.layers,
            embed_dim=self.embed_dim,
            heads=self.attention_heads,
            ffn_ratio=self.ffn_embed_dim // self.embed_dim,
            segment_lengths=self.segment_length,
            dilation_rates=self.dilated_ratio,
            positions="xpos" if self.xpos_rel_pos else "none",
            tie_head=self.share_input_output_embed and not self.no_scale_embedding,
        )


_FIXED = (
    "xpos_scale_base",
    "moe_freq",
    "use_xmoe",
    "multiway",
    "rel_pos_buckets",
    "max_rel_pos",
    "layernorm_embedding",
)


def _read(name: str, value: object, default: object) -> object:
    if isinstance(default, tuple):
        return _integers(name, value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"{name} must be {type(default).__name__}, got {value!r}")
    return value


def _integers(name: str, value: object) -> tuple[int, ...]:
    """Return integers from a sequence of them, or from a string that writes one, without evaluating it as code."""
    its = value
    if isinstance(its, str):
        try:
            its = json.loads(its)
        except (ValueError, RecursionError):
            its = None
    if not isinstance(its, list | tuple) or not its or any(type(item) is not int for item in its):
        raise ConfigError(f"{name} must be integers, as in [1024, 2048], got {one_line(repr(value))}")
    return tuple(its)
