"""One local branch or piece at a time: normalised outputs and their log-sum-exp, merged as they come.

A backend is a pair of functions on `(batch, heads, rows, head_dim)` tensors that share one grid, and a new one is one
file and one line in `BACKENDS`. `branch` walks the grids of a branch and hands strided views to the backend.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from longnet_hpc.attention.backend import Backend
from longnet_hpc.attention.cudnn import CUDNN
from longnet_hpc.attention.hopper import HOPPER
from longnet_hpc.attention.library import LIBRARY
from longnet_hpc.attention.reference import REFERENCE
from longnet_hpc.errors import BackendError

__all__ = ["BACKENDS", "Backend", "choose_backend"]

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (HOPPER, CUDNN, LIBRARY, REFERENCE)}
"""Every backend by name, the preferred one first."""


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, packed_pieces: int = 0
) -> Backend:
    """Return the backend of a name, or for ``auto`` the first that can compute what is asked.

    Parameters
    ----------
    name : str
        ``auto`` or a key of `BACKENDS`.
    device, dtype, head_dim
        What the queries, keys and values are.
    packed_pieces : int
        Pieces of segments of packed documents, where there are any.

    Raises
    ------
    BackendError
        If there is no such backend, or the one that was forced cannot do it.
    """
    if name == "auto":
        chosen = next(
            backend
            for backend in BACKENDS.values()
            if backend.supports(device, dtype, head_dim) and packed_pieces <= backend.most_packed_pieces
        )
        if not torch.compiler.is_compiling():  # the log is no part of a graph
            _say_once(chosen.name, device.type, dtype, head_dim)
        return chosen
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if not BACKENDS[name].supports(device, dtype, head_dim):
        raise BackendError(f"backend {name} cannot compute {dtype} with head_dim {head_dim} on {device.type}")
    return BACKENDS[name]


@cache
def _say_once(name: str, device_type: str, dtype: torch.dtype, head_dim: int) -> None:
    logging.getLogger("longnet_hpc").info(
        "attention of %s, head_dim %d, on %s: backend %s",
        str(dtype).removeprefix("torch."),
        head_dim,
        device_type,
        name,
    )
