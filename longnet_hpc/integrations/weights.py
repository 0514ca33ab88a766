"""Weights of others, from files that are not trusted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import naming_errors

__all__ = ["read_weights"]

_OF_TORCH = (
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    AssertionError,
    pickle.PickleError,
)
"""What `torch.load` raises over a file that is damaged, or has more in it than tensors."""


def read_weights(source: Mapping[str, torch.Tensor] | str | Path) -> Mapping[str, torch.Tensor]:
    """Return a state dict, on the CPU if it comes from a file.

    Parameters
    ----------
    source : mapping or path
        The state dict itself, or a file: ``.safetensors``, or one that `torch.save` wrote. Of that nothing but tensors
        and plain Python values is read, never what would have to be executed; a state dict under ``model`` is found.

    Raises
    ------
    CheckpointError
        If the file cannot be read or has no state dict.
    """
    if isinstance(source, Mapping):
        return _state_dict(source, "the mapping")
    path = Path(source)
    if path.suffix == ".safetensors":
        with naming_errors(f"cannot read weights {path}", (OSError, SafetensorError), CheckpointError):
            return load_file(path)
    with naming_errors(f"cannot read weights {path}", raised=CheckpointError):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except _OF_TORCH as error:
            raise CheckpointError(f"weights {path} are damaged, or no file of tensors alone") from error
    return _state_dict(loaded, str(path))


def _state_dict(loaded: Any, source: str) -> Mapping[str, torch.Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise CheckpointError(f"{source} is no state dict, which has tensors by name, nor has it one under model")
    return loaded
