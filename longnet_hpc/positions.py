"""Position encodings from global positions: rotary, and xPos as LongNet uses it.

An encoding is a complex factor for each position and pair of neighbouring features: its angle rotates the pair, its
magnitude scales it. A new encoding is one function and one line in `POSITIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from longnet_hpc.errors import ConfigError

__all__ = ["POSITIONS", "Encoding", "Rotation", "longest_xpos", "rotary", "xpos"]

XPOS_SCALE_BASE = 512
"""Tokens over which xPos applies its decay once."""
XPOS_GAMMA = 0.4
"""Offset of the xPos decay; the fastest decay is ``gamma / (1 + gamma)``."""
XPOS_HEADROOM = 2.0**10
"""Largest feature, before scaling, that must not overflow or vanish."""


@dataclass(frozen=True)
class Rotation:
    """Factors of the queries and keys of one slice, made once a forward pass and shared by all layers."""

    query: torch.Tensor
    """``(local_len, 1, head_dim / 2, 2)``, real and imaginary parts, float32, or float64 for float64."""
    key: torch.Tensor
    """Shaped as the factors of the queries."""

    def apply(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate features (2i, 2i + 1) of queries and keys, in float32 or wider, and return them in their own dtype.

        Parameters
        ----------
        q, k : torch.Tensor
            ``(batch, local_len, heads, head_dim)`` with an even head_dim.
        """
        return _multiply(q, self.query), _multiply(k, self.key)


def _multiply(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    pairs = x.to(factor.dtype).contiguous().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes no code for complex numbers, and fuses this with its neighbours
        real, imaginary = factor.unsqueeze(-2).unbind(-1)
        sign = torch.arange(-1, 2, 2, dtype=factor.dtype, device=x.device)
        rotated = pairs * real + pairs.flip(-1) * (imaginary * sign)
    else:  # one pass
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(factor))
    result: torch.Tensor = rotated.flatten(-2).to(x.dtype)
    return result


class Encoding(Protocol):
    """A position encoding."""

    def __call__(
        self,
        start: int,
        local_len: int,
        seq_len: int,
        head_dim: int,
        base: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Rotation:
        """Return the factors for ``local_len`` positions from ``start`` of a sequence of ``seq_len`` tokens."""


def rotary(
    start: int, local_len: int, seq_len: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Rotate pair i by ``position * base ** (-2 i / head_dim)`` (RoFormer, Eq. 15), angles in float64.

    Parameters
    ----------
    start, local_len : int
        Global position of the slice's first token, and its tokens.
    seq_len : int
        Tokens of the whole sequence, on all ranks; without effect here.
    head_dim : int
        Features of a head, even.
    base : float
        Base of the wavelengths.
    dtype, device
        Those of the queries and keys.
    """
    angles = _angles(start, local_len, head_dim, base, device)
    factor = _factor(torch.ones_like(angles), angles, dtype)
    return Rotation(factor, factor)


def xpos(
    start: int, local_len: int, seq_len: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Rotate as `rotary`, and scale pair i of the queries by ``zeta_i ** ((position - seq_len // 2) / 512)``.

    Keys are divided by the same, so that scores decay with the distance and depend on nothing else (Sun et al. 2022,
    A Length-Extrapolatable Transformer, Section 3.2); ``zeta_i = (2 i + 0.4 head_dim) / (1.4 head_dim)``.

    Parameters
    ----------
    start, local_len, seq_len, head_dim, base, dtype, device
        As for `rotary`.

    Raises
    ------
    ConfigError
        If the sequence is so long that the scale would overflow ``dtype``; see `longest_xpos`.
    """
    if seq_len > longest_xpos(dtype):
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"xPos in {name} overflows beyond {longest_xpos(dtype)} tokens, got {seq_len}; use rotary positions"
        )
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    decay = ((pair / head_dim + XPOS_GAMMA) / (1 + XPOS_GAMMA)).log()
    exponent = _positions(start - seq_len // 2, local_len, device) / XPOS_SCALE_BASE
    scale = torch.exp(exponent * decay)
    angles = _angles(start, local_len, head_dim, base, device)
    return Rotation(_factor(scale, angles, dtype), _factor(scale.reciprocal(), angles, dtype))


def longest_xpos(dtype: torch.dtype) -> int:
    """Return how many tokens the scale of `xpos` can span within the range of a dtype, with a margin."""
    finfo = torch.finfo(dtype)
    largest = math.log(min(finfo.max, 1.0 / finfo.tiny) / XPOS_HEADROOM)
    return int(2 * XPOS_SCALE_BASE * largest / math.log((1 + XPOS_GAMMA) / XPOS_GAMMA))


POSITIONS: dict[str, Encoding] = {"rotary": rotary, "xpos": xpos}
"""Every position encoding by the name that `LongNetConfig.positions` gives it."""


def _angles(start: int, local_len: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Return the angles ``(local_len, 1, head_dim / 2)`` in float64: float32 cannot tell neighbours near 1e9 apart."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    return _positions(start, local_len, device) * base ** (-pair / head_dim)


def _positions(start: int, local_len: int, device: torch.device) -> torch.Tensor:
    """Return integers from ``start``, ``(local_len, 1, 1)``, in float64, which holds them exactly up to 2**53."""
    return torch.arange(start, start + local_len, device=device).double()[:, None, None]


def _factor(magnitude: torch.Tensor, angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return complex factors as real and imaginary parts, for features of a dtype, from float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.stack(((magnitude * angles.cos()).to(wide), (magnitude * angles.sin()).to(wide)), dim=-1)
