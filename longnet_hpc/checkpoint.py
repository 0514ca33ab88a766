"""Checkpoints: one safetensors file with weights, optimizer state and everything needed to go on, written atomically.

The state is the same on all ranks, so rank 0 writes it and any number of ranks can read it. No pickle anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longnet_hpc.config import LongNetConfig
from longnet_hpc.config_file import from_table, to_table
from longnet_hpc.data import Corpus
from longnet_hpc.errors import CheckpointError, ConfigError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.words import one_line

__all__ = [
    "FOLDER",
    "Checkpoint",
    "DataOrder",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_latest",
    "remove_old",
    "save_checkpoint",
]

FORMAT = "longnet_hpc checkpoint"
FORMAT_VERSION = 3
FOLDER = "checkpoints"
"""Folder of the checkpoints within the folder of a run."""

MAX_HEADER_BYTES = 1 << 24
"""Longest header of a checkpoint: names, shapes and checksums of its tensors."""

_DESCRIPTION = {"step": int, "batch_index": int, "order": dict, "model": dict, "checksums": dict, "kinds": dict}
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
        content += [name + _checksum(tensor) for name, tensor in sorted(self.tensors.items())]
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
    """Write a checkpoint into the folder of a run; on one rank only.

    It is written beside its place, flushed to the disk, and renamed, so that a file with its final name is whole.

    Raises
    ------
    OSError
        If it cannot be written; nothing with its final name then appears.
    """
    path = folder / FOLDER / f"step-{checkpoint.step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "batch_index": checkpoint.batch_index,
        "order": asdict(checkpoint.order),
        "model": dict(checkpoint.model),
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        "kinds": {name: _kind(tensor) for name, tensor in tensors.items()},
    }

    def write(partial: Path) -> None:
        text = json.dumps(about)
        with naming_errors(f"cannot write checkpoint {path}", (SafetensorError,)):  # its way of passing on a full disk
            save_file(tensors, partial, {"longnet_hpc": text, "checksum": xxhash.xxh3_64_hexdigest(text.encode())})

    replace_file(path, write)
    return path


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


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its checksums. Each rank reads for itself.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or no checkpoint of this version.
    """
    with naming_errors(f"cannot read checkpoint {path}", (OSError, SafetensorError), CheckpointError):
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"cannot read checkpoint {path}: its header states {header_bytes} bytes")
        with safe_open(path, "pt") as file:
            about = _about(path, file.metadata() or {})
            if about["checksums"].keys() != set(file.keys()):
                raise CheckpointError(f"checkpoint {path} is damaged: tensors are missing")
            tensors = {name: file.get_tensor(name) for name in about["checksums"]}
    kinds = about.get("kinds", {})  # those of earlier versions have none
    for name, tensor in tensors.items():
        if kinds.get(name, _kind(tensor)) != _kind(tensor) or _checksum(tensor) != about["checksums"][name]:
            raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {one_line(name)} does not fit")
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


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says of itself, having verified it."""
    text = metadata.get("longnet_hpc", "null")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: its description is not JSON") from error
    if not isinstance(about, dict) or (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path} is no checkpoint of format version {FORMAT_VERSION}")
    if metadata.get("checksum") != xxhash.xxh3_64_hexdigest(text.encode()):
        raise CheckpointError(f"checkpoint {path} is damaged: the checksum of its description does not fit")
    for key, kind in _DESCRIPTION.items():
        if type(about.get(key, {} if key == "kinds" else None)) is not kind:
            raise CheckpointError(f"{path} is no checkpoint: its {key} is missing or of the wrong type")
    for key in ("step", "batch_index"):
        if not 0 <= about[key] < 2**63:
            raise CheckpointError(f"{path} is no checkpoint: its {key} must be 0 to 2**63 - 1")
    order = {key: type(value).__name__ for key, value in about["order"].items()}
    if order != {field.name: field.type for field in fields(DataOrder)}:
        raise CheckpointError(f"{path} is no checkpoint: its order is not that of batches")
    return about


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the latest ``keep`` checkpoints of a run; on one rank only."""
    for path in sorted(_checkpoints(folder), key=_step_of)[:-keep]:
        path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in (folder / FOLDER).glob("step-*.safetensors") if _NAME.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _kind(tensor: torch.Tensor) -> str:
    """Return number format and shape, which the checksum of the bytes says nothing of."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
