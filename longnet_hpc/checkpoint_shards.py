"""Shards of a checkpoint: the optimizer state of each rank in a file of its own, beside the one with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from longnet_hpc.errors import CheckpointError
from longnet_hpc.files import replace_file
from longnet_hpc.tensor_file import read_tensors, write_tensors

__all__ = ["SHARDED_VERSION", "SHARD_FORMAT", "WEIGHT", "Shard", "read_shards", "shards_of", "write_shard"]

SHARDED_VERSION = 4
"""Format version of shards, and of the file with the weights that they belong to."""
SHARD_FORMAT = "longnet_hpc shard of a checkpoint"
"""What tells a shard from the file with the weights."""

WEIGHT = "weight."
"""What the names of weights begin with."""


@dataclass(frozen=True)
class Shard:
    """Which part of a checkpoint a rank writes."""

    index: int
    """Its place among all, from 0."""
    count: int
    """Number of shards."""
    save: str
    """What the files of one checkpoint have in common, and those of no other, nor of another attempt at it."""

    def path(self, checkpoint: Path) -> Path:
        """Return the file of this shard beside that of the weights."""
        return checkpoint.with_suffix(f".shard-{self.index + 1:05d}-of-{self.count:05d}.safetensors")

    @property
    def facts(self) -> dict[str, object]:
        """What its file says of it."""
        return {"format": SHARD_FORMAT, "format_version": SHARDED_VERSION, **asdict(self)}


def write_shard(checkpoint: Path, shard: Shard, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a shard beside the file of a checkpoint, whole or not at all. Any thread may do it.

    Parameters
    ----------
    checkpoint : Path
        File of the weights, which need not be there yet.
    shard : Shard
        Which it is.
    step : int
        Of the checkpoint.
    tensors : mapping
        Parts of the optimizer state, flat, on the CPU.

    Raises
    ------
    OSError or SafetensorError
        If it cannot be written.
    """
    facts = {**shard.facts, "step": step}
    replace_file(shard.path(checkpoint), lambda partial: write_tensors(partial, facts, tensors))


def read_shards(
    checkpoint: Path, count: int, save: str, step: int, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read all shards of a checkpoint, verify their checksums, and put the parts of each name together.

    Parameters
    ----------
    checkpoint : Path
        File of the weights.
    count, save, step
        As that file says.
    weights : mapping
        By name: the parts of ``exp_avg.a`` together have shape and dtype of ``weight.a``.

    Raises
    ------
    CheckpointError
        If one is missing, damaged, or of another checkpoint, or if they do not fit together.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for index in range(count):
        shard = Shard(index, count, save)
        path, facts = shard.path(checkpoint), {**shard.facts, "step": step}

        def check(about: object, path: Path = path, facts: dict[str, object] = facts) -> None:
            if not isinstance(about, dict) or {key: about.get(key) for key in facts} != facts:
                raise CheckpointError(f"checkpoint {checkpoint} is damaged: {path.name} is of another one")

        for name, tensor in read_tensors(path, check, lambda _: True)[1].items():
            parts.setdefault(name, []).append(tensor.reshape(-1))
    whole = {}
    for name, its_parts in parts.items():
        weight = weights.get(WEIGHT + name.partition(".")[2])
        numbers = sum(part.numel() for part in its_parts)
        if weight is None or numbers != weight.numel() or any(part.dtype != weight.dtype for part in its_parts):
            raise CheckpointError(f"checkpoint {checkpoint} is damaged: its shards do not fit together")
        whole[name] = torch.cat(its_parts).view(weight.shape)
    return whole


def shards_of(checkpoint: Path) -> list[Path]:
    """Return the shards that lie beside the file of a checkpoint, those of other attempts at it, too."""
    return list(checkpoint.parent.glob(f"{checkpoint.stem}.shard-*-of-*.safetensors"))
