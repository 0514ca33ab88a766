"""Sums over branches, in float32 or wider, added to as the parts come: the merged softmax, and gradients.

A grid touches each of its rows once (but for a shared key/value head), so adding is by view and in place.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch

from longnet_hpc.attention.views import grid_view
from longnet_hpc.grids import Grid

__all__ = [
    "FEW_PIECES",
    "GradientCollector",
    "GradientSum",
    "HeldGradients",
    "SoftmaxCollector",
    "SoftmaxSum",
    "TakesGradients",
    "gradient_sum",
    "softmax_sum",
    "wide_dtype",
]


FEW_PIECES = 64
"""Pieces of all branches that sums in one pass are good for, which look for each token in each of them. A slice has at
most three a branch, unless documents are packed in it."""


class SoftmaxCollector(Protocol):
    """What merges the softmax of branches: `SoftmaxSum`, or `parts.SoftmaxParts`."""

    def add(self, sequences: slice, grid: Grid, out: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
        """Merge the normalised output of some keys."""

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp."""


class TakesGradients(Protocol):
    """What parts of a gradient are added to."""

    def add(self, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        """Add a part onto a grid of some sequences."""


class GradientCollector(TakesGradients, Protocol):
    """What sums gradients of branches: `GradientSum`, or `parts.GradientParts`."""

    def result(self) -> torch.Tensor:
        """Return the sum."""


def softmax_sum(q: torch.Tensor) -> SoftmaxCollector:
    """Return what merges branches best where ``q`` lies."""
    if _in_one_pass(q.device.type, q.dtype) and not _captured():
        from longnet_hpc.attention.parts import SoftmaxParts

        return SoftmaxParts(q)
    return SoftmaxSum(q)


def gradient_sum(x: torch.Tensor) -> GradientCollector:
    """Return what sums gradients best where ``x`` lies."""
    if _in_one_pass(x.device.type, x.dtype) and not _captured():
        from longnet_hpc.attention.parts import GradientParts

        return GradientParts(x)
    return GradientSum(x)


@cache
def _in_one_pass(device_type: str, dtype: torch.dtype) -> bool:
    if device_type != "cuda" or dtype == torch.float64:
        return False
    there = find_spec("triton") is not None
    if not there:
        logging.getLogger("longnet_hpc").info("sums over branches are made branch by branch: triton is not installed")
    return there


def _captured() -> bool:
    """Return whether a CUDA graph is being made, in which no table of addresses can be sent to the GPU."""
    return torch.cuda.is_current_stream_capturing()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SoftmaxSum:
    """The softmax over all keys seen so far (LongNet, Eq. 9-10).

    Parameters
    ----------
    q : torch.Tensor
        The queries, ``(batch, seq, heads, head_dim)``.
    """

    def __init__(self, q: torch.Tensor) -> None:
        wide = wide_dtype(q.dtype)
        self._dtype = q.dtype
        self._out = torch.zeros(q.shape, dtype=wide, device=q.device)
        self._lse = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)

    def add(self, sequences: slice, grid: Grid, out: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
        """Merge the normalised output of some keys.

        Parameters
        ----------
        sequences : slice
            Sequences of the batch.
        grid : Grid
            The queries.
        out, lse : torch.Tensor
            ``(sequences * count, heads, rows, head_dim)`` and the same without the last dim; lse is finite, since a
            row on a grid sees at least one key.
        first : bool
            Whether nothing has been merged into these rows before.
        """
        total = grid_view(self._out[sequences], grid)
        total_lse = grid_view(self._lse[sequences].unsqueeze(-1), grid).squeeze(-1)
        out, lse = out.view(total.shape), lse.view(total_lse.shape)
        if first:
            total.copy_(out)
            total_lse.copy_(lse)
            return
        merged = torch.logaddexp(total_lse, lse)
        total.mul_((total_lse - merged).exp_().unsqueeze(-1))
        total.addcmul_(out.to(total.dtype), (lse - merged).exp_().unsqueeze(-1))
        total_lse.copy_(merged)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output in the dtype of the queries, and the log-sum-exp ``(batch, seq, heads)``."""
        return self._out.to(self._dtype), self._lse


class GradientSum:
    """The sum of gradients of one tensor.

    Parameters
    ----------
    x : torch.Tensor
        What the gradient is of, ``(batch, seq, heads, head_dim)``.

    Attributes
    ----------
    total : torch.Tensor
        The sum so far, float32 or wider, shaped as ``x``.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._dtype = x.dtype
        self.total = torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device)

    def add(self, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        """Add ``part`` ``(sequences * count, heads, rows, head_dim)`` onto a grid of some sequences."""
        total = grid_view(self.total[sequences], grid)
        part = part.view(total.shape)
        if grid.one_head:
            total[:, :, 0] += part.sum(2, dtype=total.dtype)
        else:
            total += part

    def result(self) -> torch.Tensor:
        """Return the sum in the dtype of the tensor."""
        return self.total.to(self._dtype)


class HeldGradients:
    """Parts of a gradient whose sum is not there yet."""

    def __init__(self) -> None:
        self._parts: list[tuple[slice, Grid, torch.Tensor]] = []

    def add(self, sequences: slice, grid: Grid, part: torch.Tensor) -> None:
        """Keep a part."""
        self._parts.append((sequences, grid, part))

    def add_to(self, total: TakesGradients) -> None:
        """Add all parts onto a sum."""
        for part in self._parts:
            total.add(*part)
