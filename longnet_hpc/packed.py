"""Documents that are packed into one sequence, and tokens that are left out of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from longnet_hpc.errors import ShapeError

__all__ = ["Integers", "documents_of"]

Integers = Sequence[int] | torch.Tensor
"""A list of integers, or a one-dimensional tensor or array of them."""


def documents_of(cu_seqlens: Integers | None) -> tuple[int, ...]:
    """Return boundaries of documents as Python's integers; none for None.

    Raises
    ------
    ShapeError
        If they are not at least 2 integers. Whether they fit a sequence is its `Partition`'s to say.
    """
    if cu_seqlens is None:
        return ()
    values = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens
    if not isinstance(values, Sequence):
        raise ShapeError(f"cu_seqlens must be a list of integers, in tokens, got {values!r}")
    wrong = next((value for value in values if not hasattr(value, "__index__")), None)
    if wrong is not None:
        raise ShapeError(f"cu_seqlens must be a list of integers, in tokens, got {wrong!r} in it")
    bounds = tuple(index(value) for value in values)
    if len(bounds) < 2:
        raise ShapeError(f"cu_seqlens must have at least 2 entries, the first 0 and the last all tokens, got {bounds}")
    return bounds
