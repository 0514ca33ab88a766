"""Dilated attention in the place of `torch.nn.functional.scaled_dot_product_attention`: same layout, same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from longnet_hpc.errors import ConfigError, LongNetError, ShapeError
from longnet_hpc.packed import Integers
from longnet_hpc.parallel import agreed_attention
from longnet_hpc.pattern import Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    comm: MPI.Comm | None = None,
    cu_seqlens: Integers | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute `longnet_hpc.dilated_attention` in torch's layout, with the sequence after the heads.

    With one branch of w at least ``seq`` and r = 1 it is `torch.nn.functional.scaled_dot_product_attention`. As there,
    autocast computes in its dtype.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, seq, head_dim)``, of self-attention: keys and values are those of the same tokens.
    key, value : torch.Tensor
        Shaped alike; with ``enable_gqa`` they may have fewer heads, which divide those of the queries.
    attn_mask : None
        Not supported: it would have as many entries as dense attention. See ``is_causal`` and ``cu_seqlens``.
    dropout_p : float
        Must be 0: the weights never exist.
    is_causal : bool
        Whether a query sees only keys at or before its own position.
    scale : float, optional
        Factor on the scores, above 0; ``head_dim ** -0.5`` by default.
    enable_gqa : bool
        Whether several query heads may share a key/value head.
    segment_lengths, dilation_rates, comm, cu_seqlens, backend
        As for `longnet_hpc.dilated_attention`.

    Returns
    -------
    torch.Tensor
        Shaped as ``query``. Collective over the ranks of ``comm``, forward and backward.

    Raises
    ------
    ConfigError
        If an argument cannot be honoured. All ranks raise it, as all others.
    PatternError, PartitionError, ShapeError, BackendError
        As `longnet_hpc.dilated_attention`.
    """
    error: LongNetError | None = None
    pattern: Pattern | None = None
    q, k, v = query, key, value
    try:
        _check(query, key, value, attn_mask, dropout_p, enable_gqa)
        pattern = Pattern.from_lists(segment_lengths, dilation_rates)
        q, k, v = (_cast(x).transpose(1, 2) for x in (query, key, value))
    except LongNetError as caught:
        error = caught
    out, _ = agreed_attention(
        *(q, k, v, pattern),
        causal=is_causal,
        softmax_scale=scale,
        comm=comm,
        cu_seqlens=cu_seqlens,
        backend=backend,
        error=error,
    )
    return out.transpose(1, 2)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: object,
    dropout_p: float,
    enable_gqa: bool,
) -> None:
    inputs = (query, key, value)
    if not all(isinstance(x, torch.Tensor) for x in inputs):
        raise ShapeError(f"query, key and value must be tensors, got {', '.join(type(x).__name__ for x in inputs)}")
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    if any(x.is_nested or x.dim() != 4 for x in inputs):
        raise ShapeError(f"query, key and value must be (batch, heads, seq, head_dim), got {shapes}")
    if len({x.shape[2] for x in inputs}) != 1:
        raise ShapeError(f"query, key and value must be of the same tokens, got {shapes}")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ShapeError(f"key and value must have as many heads as query, without enable_gqa, got {shapes}")
    if attn_mask is not None:
        raise ConfigError("attn_mask must be None: use is_causal, or cu_seqlens for documents and padding")
    if dropout_p != 0.0:
        raise ConfigError(f"dropout_p must be 0: the weights of dilated attention never exist, got {dropout_p}")


def _cast(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as autocast gives it to torch's function."""
    device = x.device.type
    lowered = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if lowered else x
