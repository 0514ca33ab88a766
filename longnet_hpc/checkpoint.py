"""Checkpoints: safetensors files with weights, optimizer state and everything needed to go on, written atomically.

A state that is the same on all ranks is one file, which rank 0 writes. Where each rank has but a shard of the optimizer
state, it writes that into a file of its own, and rank 0 one with the weights, whose final name appears last of all. Any
number of ranks can read either. No pickle anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError

from longnet_hpc.checkpoint_shards import (
    SHARD_FORMAT,
    SHARDED_VERSION,
    WEIGHT,
    Shard,
    read_shards,
    shards_of,
    write_shard,
)
from longnet_hpc.config_file import from_table, to_table
from longnet_hpc.data import Corpus
from longnet_hpc.errors import CheckpointError, ConfigError
from longnet_hpc.files import make_partial, naming_errors, partial_of, put_in_place
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.tensor_file import checksum, read_tensors, write_tensors

__all__ = [
    "FOLDER",
    "Checkpoint",
    "DataOrder",
    "clean_up",
    "commit_checkpoint",
    "discard_checkpoint",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_latest",
    "remove_old",
    "save_checkpoint",
    "write_checkpoint",
    "written_so_far",
]

FORMAT = "longnet_hpc checkpoint"
FORMAT_VERSION = 3
"""Of a checkpoint in one file; of one whose optimizer state is in shards it is `SHARDED_VERSION`."""
FOLDER = "checkpoints"
"""Folder of the checkpoints within the folder of a run."""

_DESCRIPTION = {"step": int, "batch_index": int, "order": dict, "model": dict}
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class DataOrder:
    """What decides which tokens batch number i holds."""

    corpus_tokens: int
    """Size of the corpus, in tokens."""
    corpus_hash: str
    """XXH3-64 of the checksums of its chunks; the same text in other chunks counts as another corpus."""
    seq_len: int
    """Length of a sequence, in tokens."""
    batch_size: int
    """Sequences per batch."""
    seed: int
    """Chooses the order of the sequences."""
    shuffle: bool
    """Whether that order is random."""

    @classmethod
    def of(cls, corpus: Corpus, *, seq_len: int, batch_size: int, seed: int, shuffle: bool) -> DataOrder:
        """Return the order of a corpus read in this way."""
        checksums = xxhash.xxh3_64_hexdigest(corpus.chunk_checksums.astype("<u8").tobytes())
        return cls(corpus.num_tokens, checksums, seq_len, batch_size, seed, shuffle)

    def facts(self) -> dict[str, object]:
        """Return what must be the same on ranks that read together, by name."""
        return {f"{key} of the batches": value for key, value in vars(self).items()}

    def same_corpus(self, other: DataOrder) -> bool:
        """Return whether both read the same tokens, in whatever order."""
        return (self.corpus_tokens, self.corpus_hash) == (other.corpus_tokens, other.corpus_hash)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after some steps."""

    step: int
    """Steps done."""
    batch_index: int
    """Batches that the reader has delivered; where it goes on."""
    order: DataOrder
    """What it was trained on."""
    model: Mapping[str, Any]
    """Config of the model, as `longnet_hpc.config_file.to_table` gives it."""
    tensors: Mapping[str, torch.Tensor]
    """Weights and optimizer state by name, on the CPU; see `longnet_hpc.optimizer`."""

    @property
    def model_config(self) -> LongNetConfig:
        """Config of the model.

        Raises
        ------
        CheckpointError
            If this version knows no such model.
        """
        try:
            return from_table(self.model, LongNetConfig(), "model.")
        except ConfigError as error:
            raise CheckpointError(f"checkpoint of step {self.step} has a model that cannot be: {error}") from error

    @property
    def digest(self) -> str:
        """What tells model and tensors from all others."""
        content = [json.dumps(dict(self.model), sort_keys=True)]
        content += [name + checksum(tensor) for name, tensor in sorted(self.tensors.items())]
        return xxhash.xxh3_64_hexdigest("\n".join(content).encode())

    def check_fits(self, model: LongNetConfig, order: DataOrder) -> None:
        """Make sure that a training can go on from here as if it had never stopped.

        Raises
        ------
        CheckpointError
            If it is of another model, or the batches to come would be others; names the difference.
        """
        theirs, ours = to_table(self.model_config), to_table(model)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise CheckpointError(
                    f"checkpoint is of another model: its {key} is {theirs.get(key)}, not {ours.get(key)} as configured"
                )
        now = asdict(order)
        for key, value in asdict(self.order).items():
            if value != now[key]:
                raise CheckpointError(
                    f"checkpoint is of a training on other batches: its {key} is {value}, not {now[key]} as configured"
                )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a whole checkpoint into the folder of a run, as one file; on one rank only.

    It is written beside its place, flushed to the disk, and renamed, so that a file with its final name is whole.

    Raises
    ------
    OSError
        If it cannot be written; nothing with its final name then appears.
    """
    write_checkpoint(folder, checkpoint)
    return commit_checkpoint(folder, checkpoint.step)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, shard: Shard | None = None) -> None:
    """Write what this rank has of a checkpoint; it counts when rank 0 calls `commit_checkpoint`. Any thread may do it.

    Parameters
    ----------
    folder : Path
        Of the run.
    checkpoint : Checkpoint
        Tensors on the CPU or elsewhere; of a shard, the part of the optimizer state, and on the first one all weights.
    shard : Shard, optional
        Which it is. None means that nothing is in shards, and that this is the only rank that writes.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    path = _path(folder, checkpoint.step)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    with naming_errors(f"cannot write checkpoint {path}", (OSError, SafetensorError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shard is not None:
            weights = {name: tensor for name, tensor in tensors.items() if name.startswith(WEIGHT)}
            state = {name: tensor for name, tensor in tensors.items() if name not in weights}
            write_shard(path, shard, checkpoint.step, state)
            tensors = weights
        if shard is None or shard.index == 0:
            about = _description(checkpoint, shard)
            make_partial(path, lambda partial: write_tensors(partial, about, tensors))


def written_so_far(folder: Path, step: int, shard: Shard | None = None) -> int:
    """Return the size of what `write_checkpoint` has under way, in bytes: that it changes shows that it advances."""
    path = _path(folder, step)
    size = 0
    for its in (path, *(() if shard is None else (shard.path(path),))):
        with suppress(OSError):  # not begun, or whole; what is wrong the writer tells
            found = partial_of(its).stat()
            size += found.st_size + 512 * found.st_blocks  # which grow where the size was set first
    return size


def commit_checkpoint(folder: Path, step: int) -> Path:
    """Let the checkpoint count that was written, by all ranks that have a part of it; on rank 0 only.

    Raises
    ------
    OSError
        If its file cannot be renamed.
    """
    path = _path(folder, step)
    with naming_errors(f"cannot write checkpoint {path}"):
        put_in_place(path)
    return path


def discard_checkpoint(folder: Path, step: int) -> None:
    """Remove what was written of a checkpoint that does not count, as far as the system lets; on rank 0 only."""
    path = _path(folder, step)
    for part in (partial_of(path), *(() if path.exists() else shards_of(path))):
        with suppress(OSError):  # that it cannot be written is told already
            part.unlink(missing_ok=True)


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint file: the path itself, or the latest in the folder of a run.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    found = path if path.is_file() else latest_checkpoint(path)
    if found is None:
        raise CheckpointError(f"{path} is neither a checkpoint nor the folder of a run that has one")
    return found


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint in the folder of a run, None if it has none."""
    return max(_checkpoints(folder), key=_step_of, default=None)


def load_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint and verify its checksums. Each rank reads for itself.

    Parameters
    ----------
    path : Path
        Its file; shards lie beside it.
    weights_only : bool
        Leave the optimizer state unread.

    Returns
    -------
    Checkpoint
        Whole, whether it was in shards or not.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, or no checkpoint of this version.
    """

    def check(about: object) -> None:
        if isinstance(about, dict) and about.get("format") == SHARD_FORMAT:
            whole = path.name.partition(".")[0] + path.suffix
            raise CheckpointError(f"{path} is a shard of a checkpoint; give {whole}")
        of_one, of_shards = (FORMAT, FORMAT_VERSION), (FORMAT, SHARDED_VERSION)
        if not isinstance(about, dict) or (about.get("format"), about.get("format_version")) not in (of_one, of_shards):
            raise CheckpointError(f"{path} is no checkpoint of format version {FORMAT_VERSION} or {SHARDED_VERSION}")

    about, tensors = read_tensors(path, check, lambda name: name.startswith(WEIGHT) or not weights_only)
    _check_description(path, about)
    if about["format_version"] == SHARDED_VERSION and not weights_only:
        tensors |= read_shards(path, about["shards"], about["save"], about["step"], tensors)
    order = DataOrder(**about["order"])
    return Checkpoint(about["step"], about["batch_index"], order, about["model"], tensors)


def load_latest(folder: Path, tell: Callable[[str], object]) -> Checkpoint:
    """Read the latest checkpoint of a run that is whole. Each rank reads for itself.

    Parameters
    ----------
    folder : Path
        Of the run.
    tell : callable
        Takes a line for each checkpoint that is passed over.

    Raises
    ------
    CheckpointError
        If none can be read: what is wrong with the latest.
    """
    paths = sorted(_checkpoints(folder), key=_step_of, reverse=True) or [find_checkpoint(folder)]
    errors: list[CheckpointError] = []
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
            continue
        for passed_over in errors:
            tell(f"warning: {passed_over}; the training goes on from step {checkpoint.step}")
        return checkpoint
    raise errors[0]


def remove_old(folder: Path, keep: int, step: int) -> None:
    """Remove all but the latest ``keep`` checkpoints of a run up to a step; on one rank only.

    Later ones are those that were damaged when the run went on; they are replaced as it comes to them.

    Raises
    ------
    OSError
        If one cannot be removed: what is wrong with the first of them. The others are gone.
    """
    failure: OSError | None = None
    for path in sorted((path for path in _checkpoints(folder) if _step_of(path) <= step), key=_step_of)[:-keep]:
        try:
            with naming_errors(f"cannot remove old checkpoint {path}"):
                path.unlink(missing_ok=True)  # first: shards without it count for nothing
                for part in shards_of(path):
                    part.unlink(missing_ok=True)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def clean_up(folder: Path) -> None:
    """Remove what jobs left that were killed while they wrote a checkpoint; on one rank only, before any writes."""
    for path in (folder / FOLDER).glob(".step-*.partial"):
        path.unlink()
    for path in (folder / FOLDER).glob("step-*.shard-*-of-*.safetensors"):
        if not path.with_name(path.name.partition(".")[0] + ".safetensors").exists():
            path.unlink()


def _description(checkpoint: Checkpoint, shard: Shard | None) -> dict[str, object]:
    """Return what the file with the weights says of a checkpoint."""
    sharded = {} if shard is None else {"shards": shard.count, "save": shard.save}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if shard is None else SHARDED_VERSION,
        **sharded,
        "step": checkpoint.step,
        "batch_index": checkpoint.batch_index,
        "order": asdict(checkpoint.order),
        "model": dict(checkpoint.model),
    }


def _check_description(path: Path, about: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless what a checkpoint says of itself has the right types and limits."""
    sharded = {"shards": int, "save": str} if about["format_version"] == SHARDED_VERSION else {}
    for key, kind in (_DESCRIPTION | sharded).items():
        if type(about.get(key)) is not kind:
            raise CheckpointError(f"{path} is no checkpoint: its {key} is missing or of the wrong type")
    for key in ("step", "batch_index"):
        if not 0 <= about[key] < 2**63:
            raise CheckpointError(f"{path} is no checkpoint: its {key} must be 0 to 2**63 - 1")
    if sharded and about["shards"] < 1:
        raise CheckpointError(f"{path} is no checkpoint: its shards must be at least 1, got {about['shards']}")
    order = {key: type(value).__name__ for key, value in about["order"].items()}
    if order != {field.name: field.type for field in fields(DataOrder)}:
        raise CheckpointError(f"{path} is no checkpoint: its order is not that of batches")


def _path(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step-{step:08d}.safetensors"


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER).glob("step-*.safetensors") if _NAME.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
