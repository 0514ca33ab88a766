"""Dilated attention under a name that `attn_implementation` takes, for decoders of `transformers`.

The library asks for a mask once a forward pass, then each layer for its attention, with keys and values that may come
from a cache. Here no mask is ever made. What one would have said and dilated attention cannot honour is an error; where
ranks share a sequence, it takes the place of the mask, and is raised by the first layer, where all ranks agree on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from longnet_hpc.attention import BACKENDS
from longnet_hpc.comm import allgather_objects, rank_and_size
from longnet_hpc.continued import continued_attention
from longnet_hpc.errors import BackendError, ConfigError
from longnet_hpc.integrations.transformers.windows import window_attention
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.parallel import agreed_attention
from longnet_hpc.pattern import Pattern

if TYPE_CHECKING:
    from mpi4py import MPI
    from transformers import PreTrainedConfig

__all__ = ["padding_error", "register"]

_PACKED = (
    "packed sequences are not supported with models of transformers: give each a row of the batch, or pass cu_seqlens "
    "to longnet_hpc.dilated_attention in a model of your own"
)
_REFUSED = {
    "softcap": "softcapping is not supported by dilated attention: set the model's attn_logit_softcapping to None",
    "s_aux": "attention sinks are not supported by dilated attention",
    "position_bias": "a bias on the scores is not supported by dilated attention",
    "head_mask": "head_mask is not supported by dilated attention",
    "cu_seq_lens_q": _PACKED,
    "output_attentions": "output_attentions is not supported: the weights of dilated attention never exist",
}
"""Arguments of attention that must be absent, None or False, and what to say of them."""


def register(
    segment_lengths: Sequence[int] = PAPER_SEGMENT_LENGTHS,
    dilation_rates: Sequence[int] = PAPER_DILATION_RATES,
    *,
    comm: MPI.Comm | None = None,
    backend: str = "auto",
    name: str = "longnet",
) -> None:
    """Add dilated attention to the attention implementations of `transformers`.

    Afterwards ``attn_implementation="longnet"`` when a model is made, or ``model.set_attn_implementation("longnet")``,
    lets every attention layer of a decoder look at the grids of this pattern, if its values are as wide as its keys.
    Positions, their scaling, grouped queries and the cache of keys and values stay the model's.

    Parameters
    ----------
    segment_lengths, dilation_rates : sequence of int
        One w and one r per branch, in tokens; the paper's by default. One branch with r = 1 and w at least the sequence
        is the model's own attention.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share each sequence: each passes its slice to the model, see `own_slice`, and forward and backward
        are collective.
    backend : str
        Backend of attention, see `longnet_hpc.dilated_attention`.
    name : str
        What to call it. A name that was registered before gets the new pattern, in models that use it already, too.

    Raises
    ------
    PatternError
        If w or r is below 1 or the lists differ in length.
    BackendError
        If there is no such backend.

    Notes
    -----
    A model then raises `ConfigError` for what dilated attention cannot honour: padding on the left and other masks,
    packed sequences, attention sinks, softcapping, dropout of attention weights, ``output_attentions``, static caches.
    Packed sequences are known by ``cu_seq_lens_q`` or by ``position_ids`` that begin again, to which a graph of
    `torch.compile` is blind when there is a cache or a mask of padding. Sequences padded on the right are computed;
    what comes out at the padding means nothing. Layers with a sliding window keep it, on one rank; if all have one,
    which leaves nothing to this pattern, a warning is logged once.
    """
    pattern = Pattern.from_lists(segment_lengths, dilation_rates)
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    AttentionInterface.register(name, partial(_attention, pattern=pattern, comm=comm, backend=backend))
    AttentionMaskInterface.register(name, partial(_no_mask, shared=rank_and_size(comm)[1] > 1))


def _no_mask(*, shared: bool, **asked: Any) -> int | ConfigError | None:
    """Return what `_window` does in the place of a mask, and an error, too, where ranks have to agree on it first."""
    window = _window(shared=shared, **asked)
    if isinstance(window, ConfigError) and not shared:
        raise window
    return window


def _window(
    *,
    config: PreTrainedConfig,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    shared: bool,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> int | ConfigError | None:
    """Return the tokens of a sliding window, None for all that came before, or what is wrong with what was asked for.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model.
    q_length, kv_length : int
        Tokens to compute, and keys, with those of a cache.
    q_offset, kv_offset : int or torch.Tensor
        Position of the first of each; a tensor where a static cache counts.
    mask_function : callable
        Which keys a query sees.
    attention_mask : torch.Tensor, optional
        True where a token is none of padding, ``(batch, tokens so far)``.
    shared : bool
        Whether several ranks share the sequence.
    local_size : int, optional
        Tokens of a sliding window, or of a chunk.
    allow_is_causal_skip : bool
        Whether nothing was added to the mask.
    """
    is_window = (
        local_size is not None and local_size == getattr(config, "sliding_window", None) and allow_is_causal_skip
    )
    if not is_window and mask_function is not causal_mask_function:
        # A graph looks for packed sequences unless there is a mask of padding.
        compiled = "; under torch.compile pass an attention_mask of ones" if torch.compiler.is_compiling() else ""
        return ConfigError(
            "longnet cannot honour the mask that the model asks for, which is neither causal nor a sliding window: "
            f"packed sequences, blocks, chunks, or a function of one's own{compiled}"
        )
    is_whole = is_window or kv_offset == 0
    if isinstance(q_offset, torch.Tensor) or kv_offset + kv_length != q_offset + q_length or not is_whole:
        return ConfigError("longnet needs a cache that grows with the sequence: use the default DynamicCache")
    if attention_mask is not None:
        if shared and not bool(attention_mask.all()):  # a slice may well begin with padding
            return ConfigError("ranks that share a sequence take no attention_mask: leave it out; padding needs none")
        if (error := padding_error(attention_mask)) is not None:
            return error
    if not is_window:
        return None
    kinds = getattr(config, "layer_types", None) or ()
    if all(kind == "sliding_attention" for kind in kinds) and not torch.compiler.is_compiling():
        assert local_size is not None
        _warn_of_windows(config.model_type, local_size)
    return local_size


@cache
def _warn_of_windows(model_type: str, window: int) -> None:
    """Say, once, that a model leaves nothing to dilated attention."""
    logging.getLogger("longnet_hpc").warning(
        "all layers of this %s have a sliding window of %d tokens and keep it, so that none attends by the pattern: "
        "set sliding_window to None in its config for that",
        model_type,
        window,
    )


def padding_error(attention_mask: torch.Tensor) -> ConfigError | None:
    """Return what is wrong with a mask ``(batch, tokens)`` that is 0 at padding; padding on the right is not wrong."""
    tokens = attention_mask.bool()
    if bool(tokens.all()):
        return None
    if not bool(tokens[:, 0].all()):
        return ConfigError(
            "padding on the left is not supported by longnet, whose grids begin at the first token: let the tokenizer "
            "pad on the right, or generate from prompts of one length"
        )
    if bool((tokens[:, 1:] & ~tokens[:, :-1]).any()):
        return ConfigError(
            "attention_mask must not leave out tokens before others, as generation after padding on the right does: "
            "generate from prompts of one length"
        )
    return None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | int | ConfigError | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    pattern: Pattern,
    comm: MPI.Comm | None,
    backend: str,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as `transformers` calls it. Collective over the ranks of ``comm``, forward and backward.

    Parameters
    ----------
    module : torch.nn.Module
        The layer that asks.
    query : torch.Tensor
        ``(batch, heads, new tokens, head_dim)``.
    key, value : torch.Tensor
        ``(batch, kv_heads, tokens, head_dim)``, those of earlier tokens first.
    attention_mask : int, ConfigError or None
        What `_no_mask` returned; a tensor only where a user made the mask.
    dropout, scaling, **others
        Of the layer.
    pattern, comm, backend
        What was registered.

    Returns
    -------
    out : torch.Tensor
        ``(batch, new tokens, heads, head_dim)``.
    None
        In the place of the weights.
    """
    if torch.is_autocast_enabled(query.device.type):  # rotary factors of float32 make queries and keys that, too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    error = _refusal(module, attention_mask, dropout, others)
    if error is None and value.shape[3] != key.shape[3]:
        error = ConfigError(
            f"longnet needs values as wide as keys, but in {type(module).__name__} they are {value.shape[3]} and "
            f"{key.shape[3]} wide"
        )
    is_first = getattr(module, "layer_idx", None) in (None, 0)  # the others are given the same positions
    if error is None and is_first and _is_packed(others.get("position_ids")):
        error = ConfigError(f"position_ids begin again: {_PACKED}")
    shared, continued = rank_and_size(comm)[1] > 1, query.shape[2] < key.shape[2]
    if shared and error is None:
        if continued:
            error = ConfigError("ranks that share a sequence have no cache: pass use_cache=False")
        elif attention_mask is not None:
            error = ConfigError(f"layers with a sliding window, here of {attention_mask} tokens, run on one rank only")
    if shared and getattr(module, "layer_idx", None) == 0:
        misplaced = _misplaced(comm, query.shape[2], others.get("position_ids"))
        error = error or misplaced
    if error is None and isinstance(attention_mask, int):
        return window_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if error is None and continued:
        return continued_attention(q, k, v, pattern, softmax_scale=scaling, backend=backend), None
    out, _ = agreed_attention(
        q, k, v, pattern, causal=True, softmax_scale=scaling, comm=comm, backend=backend, error=error
    )
    return out, None


def _refusal(
    module: torch.nn.Module, attention_mask: object, dropout: float, others: Mapping[str, Any]
) -> ConfigError | None:
    """Return what is wrong with what a layer asks for, if anything is."""
    if isinstance(attention_mask, ConfigError):
        return attention_mask
    if isinstance(attention_mask, torch.Tensor):
        return ConfigError(f"longnet cannot honour an attention mask of one's own, got {tuple(attention_mask.shape)}")
    is_causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return ConfigError(f"longnet is for decoders, and {type(module).__name__} is not causal")
    if dropout > 0.0:
        return ConfigError(
            f"dropout of attention weights is not supported in training, got {dropout}: set attention_dropout to 0"
        )
    if others.get("sliding_window") not in (None, attention_mask):
        return ConfigError(
            f"{type(module).__name__} has a sliding window of {others['sliding_window']} tokens, but not so its mask"
        )
    asked = (key for key in _REFUSED if others.get(key) is not None and others[key] is not False)
    return next((ConfigError(_REFUSED[key]) for key in asked), None)


def _is_packed(position_ids: torch.Tensor | None) -> bool:
    """Return whether positions ``(batch, new tokens)`` begin again; those that stay at 0 after that are of padding."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] == 1 or torch.compiler.is_compiling():
        return False
    steps = position_ids.diff(dim=1)
    return bool(((steps <= 0).cumsum(dim=1) * (steps > 0)).any())


def _misplaced(comm: MPI.Comm | None, local_len: int, position_ids: torch.Tensor | None) -> ConfigError | None:
    """Return, on all ranks the same, what is wrong with the positions of their slices, if anything is. Collective."""
    first = None if position_ids is None else int(position_ids[0, 0])
    start = 0
    for rank, (length, its_first) in enumerate(allgather_objects(comm, (local_len, first))):
        if its_first not in (None, start):
            return ConfigError(
                f"position_ids of rank {rank} begin at {its_first}, but its slice at {start}: see "
                "longnet_hpc.integrations.transformers.own_slice"
            )
        start += length
    return None
