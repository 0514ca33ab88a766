"""Tensors and a description of them in one safetensors file, with checksums of both; no pickle anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import naming_errors
from longnet_hpc.life import life
from longnet_hpc.words import one_line

__all__ = ["MAX_HEADER_BYTES", "checksum", "read_tensors", "write_tensors"]

MAX_HEADER_BYTES = 1 << 24
"""Longest header of a file: names, shapes and checksums of its tensors."""


def write_tensors(path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors on the CPU, contiguous, with a description that JSON can hold. Any thread may do it.

    Parameters
    ----------
    path : Path
        File to write, not flushed to the disk.
    about : mapping
        The description; kinds and checksums of the tensors are added to it.
    tensors : mapping
        By name.

    Raises
    ------
    OSError or SafetensorError
        If it cannot be written; the latter is the library's way of passing on a full disk.
    """
    checksums = {}
    for name, tensor in tensors.items():
        checksums[name] = checksum(tensor)
        life.progress += 1
    kinds = {name: _kind(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**about, "checksums": checksums, "kinds": kinds})
    save_file(dict(tensors), path, {"longnet_hpc": text, "checksum": xxhash.xxh3_64_hexdigest(text.encode())})
    life.progress += 1


def read_tensors(
    path: Path, check: Callable[[object], None], wanted: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a description and tensors, and verify their checksums.

    Parameters
    ----------
    path : Path
        File that `write_tensors` made.
    check : callable
        Takes what may be the description, not yet verified, and raises CheckpointError if it is of another kind.
    wanted : callable
        Says of a name whether the tensor is to be read.

    Returns
    -------
    about, tensors : dict
        The description, and the wanted tensors by name, in the order in which they were written.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or of another kind.
    """
    with naming_errors(f"cannot read checkpoint {path}", (OSError, SafetensorError), CheckpointError):
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"cannot read checkpoint {path}: its header states {header_bytes} bytes")
        with safe_open(path, "pt") as file:
            about = _about(path, file.metadata() or {}, check)
            if about["checksums"].keys() != set(file.keys()):
                raise CheckpointError(f"checkpoint {path} is damaged: tensors are missing")
            tensors = {name: file.get_tensor(name) for name in about["checksums"] if wanted(name)}
    kinds = about.get("kinds", {})  # those of earlier versions have none
    for name, tensor in tensors.items():
        if kinds.get(name, _kind(tensor)) != _kind(tensor) or checksum(tensor) != about["checksums"][name]:
            raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {one_line(name)} does not fit")
        life.progress += 1
    return about, tensors


def checksum(tensor: torch.Tensor) -> str:
    """Return the XXH3-64 of the bytes of a contiguous tensor on the CPU."""
    return xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _about(path: Path, metadata: Mapping[str, str], check: Callable[[object], None]) -> dict[str, Any]:
    """Return the description of a file, having verified it."""
    text = metadata.get("longnet_hpc", "null")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: its description is not JSON") from error
    check(about)
    if metadata.get("checksum") != xxhash.xxh3_64_hexdigest(text.encode()):
        raise CheckpointError(f"checkpoint {path} is damaged: the checksum of its description does not fit")
    for key, absent in (("checksums", None), ("kinds", {})):
        if type(about.get(key, absent)) is not dict:
            raise CheckpointError(f"{path} is no checkpoint: its {key} is missing or of the wrong type")
    return dict(about)


def _kind(tensor: torch.Tensor) -> str:
    """Return number format and shape, which the checksum of the bytes says nothing of."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
