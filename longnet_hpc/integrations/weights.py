"""Weights of others, from files that are not trusted."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import naming_errors
from longnet_hpc.words import joined, one_line

__all__ = ["fill", "names_in_words", "read_weights"]

_OF_TORCH = (
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    PickleError,
)
"""What `torch.load` raises over a file that is damaged, or has more in it than tensors."""
_MOST_NAMED = 4
"""Most names of weights in an error."""


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
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of damage that is an error anyway
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except _OF_TORCH as error:
            raise CheckpointError(f"weights {path} are damaged, or no file of tensors alone") from error
    return _state_dict(loaded, str(path))


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor], names: Mapping[str, str], dtype: torch.dtype) -> None:
    """Put copies of weights into a model, in the place of those that it was made with.

    Parameters
    ----------
    model : nn.Module
        May lie on the meta device, as far as weights are put into it.
    weights : mapping
        By the names of others.
    names : mapping
        Our name of each by theirs; all must be there, and no others.
    dtype : torch.dtype
        Of the copies.

    Raises
    ------
    CheckpointError
        If names or shapes do not fit.
    """
    problems = []
    if missing := [name for name in names if name not in weights]:
        problems.append(f"there is no {names_in_words(missing)}")
    if unexpected := [name for name in weights if name not in names]:
        problems.append(f"the model has no {names_in_words(unexpected)}")
    if problems:
        raise CheckpointError(f"the weights are of another model: {'; '.join(problems)}")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    copies = {}
    for theirs, ours in names.items():
        tensor = weights[theirs].detach()
        if tensor.shape != shapes[ours] or not tensor.dtype.is_floating_point:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the weights are of another model: {theirs} must be {tuple(shapes[ours])}, got {got}"
            )
        copies[ours] = tensor.to(dtype, copy=True)
    model.load_state_dict(copies, strict=False, assign=True)


def names_in_words(names: Iterable[str]) -> str:
    """Return the first of some names, as they may stand in an error."""
    return joined((one_line(name) for name in names), _MOST_NAMED)


def _state_dict(loaded: Any, source: str) -> Mapping[str, torch.Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
    ):
        raise CheckpointError(f"{source} is no state dict, which has tensors by name, nor has it one under model")
    return loaded
