"""Dilated attention under a name that `attn_implementation` takes, for any decoder of `transformers`.

The library asks for a mask once a forward pass, then each layer for its attention, with keys and values that may come
from a cache. Here no mask is ever made. What a mask would have said and dilated attention cannot honour is an error,
which takes the place of the mask: it is raised where all ranks can agree on it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from longnet_hpc.attention import BACKENDS
from longnet_hpc.comm import rank_and_size
from longnet_hpc.config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.continued import continued_attention
from longnet_hpc.errors import BackendError, ConfigError, LongNetError
from longnet_hpc.parallel import agreed_attention
from longnet_hpc.pattern import Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["register"]

_REFUSED = {
    "softcap": "softcapping is not supported by dilated attention: set the model's attn_logit_softcapping to None",
    "s_aux": "attention sinks are not supported by dilated attention",
    "position_bias": "a bias on the scores is not supported by dilated attention",
    "head_mask": "head_mask is not supported by dilated attention",
    "cu_seq_lens_q": "packed sequences are not supported by dilated attention: give each a row of the batch",
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
    lets every attention layer of a decoder look at the grids of this pattern. Positions, their scaling, grouped queries
    and the cache of keys and values stay the model's.

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
    packed sequences, attention sinks, softcapping, sliding windows, dropout of attention weights,
    ``output_attentions``, static caches. Sequences padded on the right are computed; what comes out at the padding
    means nothing.
    """
    pattern = Pattern.from_lists(segment_lengths, dilation_rates)
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    AttentionInterface.register(name, partial(_attention, pattern=pattern, comm=comm, backend=backend))
    AttentionMaskInterface.register(name, _no_mask)


def _no_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> ConfigError | None:
    """Return None in the place of a mask, or what is wrong with the mask that was asked for.

    Parameters
    ----------
    q_length, kv_length : int
        Tokens to compute, and keys, with those of a cache.
    q_offset : int or torch.Tensor
        Position of the first token to compute; a tensor where a static cache counts.
    mask_function : callable
        Which keys a query sees; must be the library's causal one.
    attention_mask : torch.Tensor, optional
        True where a token is none of padding, ``(batch, tokens so far)``.
    """
    if mask_function is not causal_mask_function:
        return ConfigError(
            "the model asks for more than a causal mask (packed sequences, blocks or a mask function), which dilated "
            "attention cannot honour"
        )
    if isinstance(q_offset, torch.Tensor) or kv_length != q_offset + q_length:
        return ConfigError(
            f"{kv_length} keys for {q_length} tokens are no cache that grows with the sequence, as dilated attention "
            "needs it: use the default DynamicCache"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if not bool(attention_mask[:, 0].all()):
        return ConfigError(
            "padding on the left is not supported by dilated attention, whose grids begin at the first token: set the "
            "tokenizer's padding_side to 'right', or generate from prompts of one length"
        )
    if bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any()):
        return ConfigError(
            "attention_mask must not leave out tokens before others (as generation after padding on the right does): "
            "generate from prompts of one length"
        )
    return None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | ConfigError | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
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
    attention_mask : ConfigError or None
        What `_no_mask` returned; a tensor only where a user made the mask.
    dropout, scaling, is_causal, **others
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
    error: LongNetError | None = None
    if isinstance(attention_mask, ConfigError):
        error = attention_mask
    elif attention_mask is not None:
        error = ConfigError(
            f"a custom attention mask, here {tuple(attention_mask.shape)}, is not supported by dilated attention"
        )
    elif not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        error = ConfigError(f"attention of {type(module).__name__} is not causal; longnet is for decoders")
    elif dropout > 0.0:
        error = ConfigError(
            f"dropout of attention weights is not supported, got {dropout}: set the model's attention_dropout to 0"
        )
    elif others.get("sliding_window") is not None:
        error = ConfigError(f"sliding windows, here of {others['sliding_window']} tokens, are not supported")
    else:
        error = next(
            (ConfigError(words) for key, words in _REFUSED.items() if others.get(key) not in (None, False)), None
        )

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    alone = rank_and_size(comm)[1] == 1
    if error is None and q.shape[1] < k.shape[1]:
        if alone:
            return continued_attention(q, k, v, pattern, softmax_scale=scaling, backend=backend), None
        error = ConfigError("ranks that share a sequence cannot generate from a cache: pass use_cache=False")
    out, _ = agreed_attention(
        q, k, v, pattern, causal=True, softmax_scale=scaling, comm=comm, backend=backend, error=error
    )
    return out, None
