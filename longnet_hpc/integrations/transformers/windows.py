"""Causal attention within a sliding window, in time and memory linear in the sequence.

Some decoders alternate layers that see all that came before with layers that see a window. Dilated attention takes the
place of the former; the latter keep their window, which is as cheap already.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["window_attention"]


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float | None
) -> torch.Tensor:
    """Attend to the last ``window`` tokens, a query's own included.

    Parameters
    ----------
    query : torch.Tensor
        ``(batch, heads, new tokens, head_dim)``.
    key, value : torch.Tensor
        ``(batch, kv_heads, tokens, head_dim)``: those of the new tokens, and before these of earlier ones, as many as
        there were or at least ``window - 1``.
    window : int
        Tokens that a query sees.
    scale : float or None
        Factor on the scores; ``head_dim ** -0.5`` by default.

    Returns
    -------
    torch.Tensor
        Shaped as ``query``.
    """
    new, past = query.shape[2], key.shape[2] - query.shape[2]
    near = min(new, window)
    seen = slice(max(0, past - window + 1), past + near)
    first = _banded(query[:, :, :near], key[:, :, seen], value[:, :, seen], window, scale)
    if new == near:
        return first
    # Blocks of a window each: one sees itself and the block before it, which is there.
    blocks = -(-(new - window) // window)
    padding = (0, 0, 0, window * (blocks + 1) - new)
    queries = F.pad(query[:, :, window:], padding).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        F.pad(x[:, :, past:], padding).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)
        for x in (key, value)
    )
    rest = _banded(queries, keys, values, window, scale).unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, rest[:, :, : new - window]), dim=2)


def _banded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float | None
) -> torch.Tensor:
    """Attend within a window; the last query is the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # of these few; any kernel then fits
    rows = torch.arange(query.shape[2], device=query.device)[:, None] + (key.shape[2] - query.shape[2])
    columns = torch.arange(key.shape[2], device=query.device)
    mask = (columns <= rows) & (columns > rows - window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
