"""Dropout whose mask is a pure function of where an activation stands, not of a random generator's state.

So the mask is the same on any number of ranks and when a block is recomputed under activation checkpointing.
"""

from __future__ import annotations

import torch

__all__ = ["position_dropout"]

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_PIECE_ELEMENTS = 1 << 22


def position_dropout(x: torch.Tensor, probability: float, *, seed: int, site: int, start: int) -> torch.Tensor:
    """Zero activations at random and scale the others by ``1 / (1 - probability)``.

    The mask is a hash (splitmix64) of seed, site, sequence of the batch, global position and feature.

    Parameters
    ----------
    x : torch.Tensor
        Activations, ``(batch, local_len, features)``.
    probability : float
        Probability of zeroing, 0 to below 1; 0 returns ``x`` itself.
    seed : int
        Any integer; the same on all ranks.
    site : int
        Number of the place in the model, so that places differ.
    start : int
        Global position of the first token of the slice.

    Returns
    -------
    torch.Tensor
        Shaped as ``x``; differentiable.
    """
    if probability == 0.0:
        return x
    batch, local_len, features = x.shape
    key = _mixed(_mixed(seed) + site)
    sequences = torch.arange(batch, device=x.device)[:, None] * _signed(_GOLDEN) + _signed(key)
    positions = torch.arange(start, start + local_len, device=x.device) * _signed(_GOLDEN)
    rows = _mix_(_mix_(sequences) + positions)
    stream = torch.arange(1, features + 1, device=x.device) * _signed(_GOLDEN)
    threshold = round(probability * 2**53)
    dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    piece = max(1, _PIECE_ELEMENTS // max(1, batch * features))  # the hash needs 8 bytes an activation, the mask one
    for part, part_rows in zip(dropped.split(piece, dim=1), rows.split(piece, dim=1), strict=True):
        part.copy_(_shift_right(_mix_(part_rows[..., None] + stream), 11) < threshold)
    return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - probability))


def _mix_(z: torch.Tensor) -> torch.Tensor:
    """Finish a splitmix64 hash in place: int64 arithmetic that wraps, shifts that bring in zeros."""
    z ^= _shift_right(z, 30)
    z *= _signed(_FIRST)
    z ^= _shift_right(z, 27)
    z *= _signed(_SECOND)
    z ^= _shift_right(z, 31)
    return z


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    shifted: torch.Tensor = (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
    return shifted


def _mixed(number: int) -> int:
    """Hash one Python integer as `_mix_` hashes a tensor's, for the scalars that come first."""
    return int(_mix_(torch.tensor(_signed((number + 1) * _GOLDEN))))


def _signed(number: int) -> int:
    """Return the int64 with the low 64 bits of a number."""
    return ((number + 2**63) % 2**64) - 2**63
