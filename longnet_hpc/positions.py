"""Position encodings from global positions: rotary, and xPos as LongNet uses it.

An encoding is a complex factor for each position and pair of neighbouring features: its angle rotates the pair, its
magnitude scales it. A new encoding is one function and one line in `POSITIONS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Protocol

import torch

from longnet_hpc.compiler_mark import assume_constant_result
from longnet_hpc.errors import ConfigError

__all__ = ["POSITIONS", "Encoding", "Rotation", "longest_xpos", "rotary", "unrotated", "xpos"]

XPOS_SCALE_BASE = 512
"""Tokens over which xPos applies its decay once."""
XPOS_GAMMA = 0.4
"""Offset of the xPos decay; the fastest decay is ``gamma / (1 + gamma)``."""
XPOS_HEADROOM = 2.0**10
"""Largest feature, before scaling, that must not overflow or vanish."""

_BLOCK = 256
"""Positions whose factors are multiples of one table: few enough for a short slice, enough that cosines are rare."""
_PIECE_NUMBERS = 2**20
"""Products made at once, in complex128 (16 MiB)."""
_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021")


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


class _Unrotated(Rotation):
    """Leaves queries and keys as they are."""

    def apply(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k


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
    """Rotate pair i by ``position * base ** (-2 i / head_dim)`` (RoFormer, Eq. 15), exact to float64 at any position.

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
    growth = torch.zeros(head_dim // 2, dtype=torch.float64, device=device)
    factor = _factor(start, local_len, head_dim, base, dtype, growth)
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
    query, key = (
        _factor(start, local_len, head_dim, base, dtype, growth / XPOS_SCALE_BASE, origin=seq_len // 2)
        for growth in (decay, -decay)
    )
    return Rotation(query, key)


def unrotated(
    start: int, local_len: int, seq_len: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Leave queries and keys as they are; parameters as for `rotary`. Positions then show in the input, or not at all.

    Parameters
    ----------
    start, local_len, seq_len, head_dim, base, dtype, device
        As for `rotary`.
    """
    nothing = torch.empty(0, device=device)
    return _Unrotated(nothing, nothing)


def longest_xpos(dtype: torch.dtype) -> int:
    """Return how many tokens the scale of `xpos` can span within the range of a dtype, with a margin."""
    finfo = torch.finfo(dtype)
    largest = math.log(min(finfo.max, 1.0 / finfo.tiny) / XPOS_HEADROOM)
    return int(2 * XPOS_SCALE_BASE * largest / math.log((1 + XPOS_GAMMA) / XPOS_GAMMA))


POSITIONS: dict[str, Encoding] = {"rotary": rotary, "xpos": xpos, "none": unrotated}
"""Every position encoding by the name that `LongNetConfig.positions` gives it."""


def _factor(
    start: int, local_len: int, head_dim: int, base: float, dtype: torch.dtype, growth: torch.Tensor, origin: int = 0
) -> torch.Tensor:
    """Return factors of angle ``position * base ** (-2 i / head_dim)``, for features of a dtype.

    Their magnitude is ``exp(growth[i] * (position - origin))``. A position is a multiple of `_BLOCK` and an offset, and
    its factor is the product of theirs, many times cheaper than a cosine in float64. Blocks are counted from position
    0: the factors of a position are the same in every slice.
    """
    device = growth.device
    anchors = torch.arange(start // _BLOCK * _BLOCK, start + local_len, _BLOCK, device=device)
    offsets = torch.arange(_BLOCK, device=device)
    of_anchors = torch.polar(((anchors - origin)[:, None] * growth).exp(), _angles(anchors, head_dim, base))
    of_offsets = torch.polar((offsets[:, None] * growth).exp(), _angles(offsets, head_dim, base))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.empty(local_len, 1, head_dim // 2, 2, dtype=wide, device=device)
    row = -(start % _BLOCK)  # the first block may begin before the slice, and the last end after it
    for piece in of_anchors.split(max(1, _PIECE_NUMBERS // of_offsets.numel())):
        products = torch.view_as_real(piece[:, None] * of_offsets).flatten(0, 1)
        end = min(row + len(products), local_len)
        result[max(row, 0) : end, 0] = products[max(-row, 0) : end - row]
        row += len(products)
    return result


def _angles(positions: torch.Tensor, head_dim: int, base: float) -> torch.Tensor:
    """Return ``positions * base ** (-2 i / head_dim)`` modulo 2 pi, ``(len(positions), head_dim / 2)`` in float64.

    A product in float64 would be wrong by its rounding, 1e-7 near position 1e9. In units of 2**-64 turns, int64
    arithmetic that wraps is exact modulo one turn; what is left of the units after their whole part is small.
    """
    whole, rest = (
        torch.tensor(values, dtype=dtype).to(positions.device, non_blocking=True)  # not to wait for a busy GPU
        for values, dtype in zip(_frequencies(head_dim, base), (torch.int64, torch.float64), strict=True)
    )
    units = (positions[:, None] * whole).double() + positions[:, None] * rest
    return units * (2 * math.pi / 2**64)


@assume_constant_result  # torch.compile does not look inside
def _frequencies(head_dim: int, base: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return whole parts and rests of ``base ** (-2 i / head_dim)`` in units of 2**-64 turns."""
    return _computed_frequencies(head_dim, base)


@lru_cache
def _computed_frequencies(head_dim: int, base: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    with localcontext(prec=50):
        units = [Decimal(base) ** (Decimal(-2 * i) / head_dim) / _TWO_PI * 2**64 for i in range(head_dim // 2)]
        return tuple(int(unit) for unit in units), tuple(float(unit % 1) for unit in units)
