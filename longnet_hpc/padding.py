"""Sequences of which some tokens are left out, as if they had been cut without them."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch

from longnet_hpc.errors import ConfigError, ShapeError
from longnet_hpc.packed import Integers

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["attend_without", "check_padding"]


class Attend(Protocol):
    """Attention of sequences, perhaps of packed documents."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Integers | None) -> torch.Tensor:
        """Return what is shaped as ``q``."""


def check_padding(key_padding_mask: torch.Tensor, batch: int, seq: int) -> torch.Tensor:
    """Return what torch takes for a key padding mask as a boolean mask ``(batch, seq)``, True for padding.

    Raises
    ------
    ShapeError
        If it has another shape.
    ConfigError
        If it is neither boolean nor made of 0 and minus infinity.
    """
    shape = tuple(key_padding_mask.shape)
    if shape not in ((batch, seq), (seq,)) or (len(shape) == 1 and batch != 1):
        raise ShapeError(f"key_padding_mask must be (batch, seq) = ({batch}, {seq}), got {shape}")
    padding = key_padding_mask.view(batch, seq)
    if padding.dtype == torch.bool:
        return padding
    hidden = padding == -torch.inf
    if not padding.is_floating_point() or padding.masked_fill(hidden, 0).any():
        raise ConfigError("key_padding_mask must be boolean, or 0 for keys that count and minus infinity for padding")
    return hidden


def attend_without(
    attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor, comm: MPI.Comm | None
) -> torch.Tensor:
    """Attend as if padding had never been in its sequences; what stands after it moves up.

    Parameters
    ----------
    attend : callable
        Computes attention of ``(1, tokens, heads, head_dim)``, and is collective over the ranks of ``comm``.
    q, k, v : torch.Tensor
        ``(batch, seq, heads or kv_heads, head_dim)``, at least one sequence.
    padding : torch.Tensor
        ``(batch, seq)``, True for padding.
    comm : mpi4py.MPI.Comm or None
        Ranks that share each sequence. All sequences are one call of ``attend`` where there are none, else each is.

    Returns
    -------
    torch.Tensor
        Shaped as ``q``, 0 where there is padding.
    """
    batch = q.shape[0]
    together = [slice(0, batch)] if comm is None else [slice(number, number + 1) for number in range(batch)]
    parts = []
    for sequences in together:
        kept = ~padding[sequences]
        rows = kept.flatten().nonzero().squeeze(1)
        cu_seqlens = [0, *accumulate(kept.sum(1).tolist())] if comm is None else None
        queries, keys, values = (x[sequences].flatten(0, 1)[rows].unsqueeze(0) for x in (q, k, v))
        mixed = attend(queries, keys, values, cu_seqlens)
        nothing = q.new_zeros(len(kept) * q.shape[1], *q.shape[2:])
        parts.append(nothing.index_copy(0, rows, mixed.squeeze(0)).view_as(q[sequences]))
    return torch.cat(parts)
