"""Weights of torchscale, the authors' implementation of LongNet, in models of this library.

A model that is loaded here attends as the paper says, exactly, on any number of ranks. torchscale does not, see
`longnet_hpc.integrations.torchscale_attention`: where outputs have to be those that it gives itself, call the model
with a `TorchscalePlan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from longnet_hpc.encoder import LongNetEncoder
from longnet_hpc.errors import CheckpointError
from longnet_hpc.integrations.torchscale_attention import TorchscalePlan, torchscale_attention
from longnet_hpc.integrations.torchscale_config import TorchscaleConfig
from longnet_hpc.integrations.weights import fill, names_in_words, read_weights
from longnet_hpc.model import LongNet

__all__ = ["TorchscalePlan", "load_decoder", "load_encoder", "torchscale_attention"]

_BLOCK_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "inner_attention_norm": "self_attn.inner_attn_ln",
    "out_proj": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "fc1": "ffn.fc1",
    "inner_ffn_norm": "ffn.ffn_layernorm",
    "fc2": "ffn.fc2",
}
"""Names of torchscale by ours, within a block."""
_OTHER_NAMES = {"norm": "layer_norm", "embedding": "embed_tokens", "head": "output_projection"}
_NO_WEIGHTS = ".self_attn.xpos.scale"
"""End of the name of a table that torchscale keeps among its weights."""


def load_encoder(
    weights: Mapping[str, torch.Tensor] | str | Path,
    config: Mapping[str, object] | object,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
) -> LongNetEncoder:
    """Return an encoder with the weights of torchscale's ``LongNetEncoder``.

    Parameters
    ----------
    weights : mapping or path
        State dict in torchscale's names, or a file of it: ``.safetensors``, or what `torch.save` wrote, of which
        nothing but tensors is read. A state dict under ``model`` is found.
    config : mapping or object
        Fields of torchscale's ``EncoderConfig`` by name, or such an object; what is missing has torchscale's default.
        ``segment_length`` and ``dilated_ratio`` may be lists, or strings of them. Dropout of any kind is left out.
    prefix : str
        What the names of the encoder's weights begin with, for example ``encoder.`` within a slide encoder; others are
        then left out.
    dtype : torch.dtype
        Of the weights of the model.

    Returns
    -------
    LongNetEncoder
        On the CPU.

    Raises
    ------
    ConfigError
        If the config is none of torchscale's, or has something that no model of ours has.
    CheckpointError
        If the file cannot be read, or the weights are not those of such an encoder.
    """
    ours = TorchscaleConfig.of(config, "encoder").encoder()
    with torch.device("meta"):  # so that no weights are drawn
        model = LongNetEncoder(ours)
    fill(model, _own(read_weights(weights), prefix), _names(model), dtype)
    return model


def load_decoder(
    weights: Mapping[str, torch.Tensor] | str | Path,
    config: Mapping[str, object] | object,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
) -> LongNet:
    """Return a language model with the weights of torchscale's ``LongNetDecoder``.

    It is a `LongNet` as others: it can be trained, saved, evaluated in a stream, and generate.

    Parameters
    ----------
    weights, prefix, dtype
        As for `load_encoder`.
    config : mapping or object
        Fields of torchscale's ``DecoderConfig``, as for `load_encoder`. The decoder must have sub-LayerNorm, GELU, an
        output layer, and positions by xPos or none at all.

    Returns
    -------
    LongNet
        On the CPU.

    Raises
    ------
    ConfigError, CheckpointError
        As for `load_encoder`.
    """
    theirs = TorchscaleConfig.of(config, "decoder")
    ours = theirs.decoder()
    with torch.device("meta"):
        model = LongNet(ours)
    own = _own(read_weights(weights), prefix)
    if theirs.share_input_output_embed and "embed_tokens.weight" in own:
        own.setdefault("output_projection.weight", own["embed_tokens.weight"])
    fill(model, own, _names(model), dtype)
    if ours.tie_head:
        model.head.weight = model.embedding.weight
    elif theirs.no_scale_embedding:
        with torch.no_grad():
            model.embedding.weight /= math.sqrt(ours.embed_dim)  # by which the model multiplies
    return model


def _own(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose names begin with a prefix, by the rest of their names."""
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if prefix and not own:
        raise CheckpointError(f"no name of a weight begins with {prefix!r}, but there is {names_in_words(weights)}")
    return {name: tensor for name, tensor in own.items() if not name.endswith(_NO_WEIGHTS)}


def _names(model: nn.Module) -> dict[str, str]:
    """Return our name of each weight of a model by torchscale's."""
    names = {}
    for name in model.state_dict():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks."):
            _, index, part = module.split(".")
            names[f"layers.{index}.{_BLOCK_NAMES[part]}.{kind}"] = name
        else:
            names[f"{_OTHER_NAMES[module]}.{kind}"] = name
    return names
