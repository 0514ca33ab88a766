"""Writing corpus files: one shard, and the file that joins shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from longnet_hpc.data.hdf5_file import FORMAT, FORMAT_VERSION
from longnet_hpc.data.tokenizer import Tokenizer

__all__ = ["Shard", "ShardWriter", "join_shards"]

_COLUMNS = {
    "chunk_checksums": np.uint64,
    "chunk_starts": np.int64,
    "document_names": np.uint8,
    "document_name_offsets": np.int64,
    "document_offsets": np.int64,
}
_COLUMN_CHUNK = 1 << 13
_HDF5_VERSIONS = ("v110", "v110")  # the first with virtual datasets; its metadata carry checksums, but not its heap
# of variable-length strings, over which a damaged file can make HDF5 loop without end: strings here have fixed length


@dataclass(frozen=True)
class Shard:
    """What one rank wrote."""

    name: str
    """Name of the file within the corpus's folder, once all is well."""
    num_tokens: int
    """Number of tokens."""
    num_bytes: int
    """Size of the text in bytes."""
    num_documents: int
    """Number of documents."""


class ShardWriter:
    """Writes one corpus file, document by document, holding one chunk of tokens in memory.

    Parameters
    ----------
    path : Path
        File to write. It is a corpus only after `close`.
    tokenizer : Tokenizer
        What makes the tokens.
    chunk_tokens : int
        Tokens per chunk.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, chunk_tokens: int) -> None:
        self.num_bytes = 0
        self.num_documents = 0
        self._path = path
        self._file = _create(path)
        _write_tokenizer(self._file, tokenizer)
        self._columns = _create_columns(self._file)
        checksums = self._columns["chunk_checksums"]
        self._tokens = _Column(self._file, "tokens", tokenizer.dtype, chunk_tokens, checksums)
        self._chunk_tokens = chunk_tokens

    @property
    def num_tokens(self) -> int:
        """Number of tokens written so far."""
        return self._tokens.size

    def add_document(self, name: str, tokens: Iterable[NDArray[Any]]) -> None:
        """Append a document, given as blocks of tokens."""
        names = self._columns["document_names"]
        self._columns["document_offsets"].append(self._tokens.size)
        self._columns["document_name_offsets"].append(names.size)
        names.extend(np.frombuffer(os.fsencode(name), dtype=np.uint8))
        for block in tokens:
            self._tokens.extend(block)
        self.num_documents += 1

    def close(self) -> None:
        """Finish the file and hand it to the disk.

        Raises
        ------
        OSError or RuntimeError
            If there is no space left.
        """
        self._tokens.flush()
        chunks = -(-self._tokens.size // self._chunk_tokens)
        starts = np.arange(chunks, dtype=np.int64) * self._chunk_tokens
        self._columns["chunk_starts"].extend(starts)
        _close_columns(self._columns, self._tokens.size)
        _finish(self._path, self._file, self._tokens.size, self.num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def join_shards(path: Path, shards: Sequence[Shard], partial: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Write the corpus file whose tokens are a virtual dataset over shards.

    Parameters
    ----------
    path : Path
        File to write.
    shards : sequence of Shard
        The shards in order.
    partial : sequence of Path
        Where each shard lies now; the virtual dataset refers to its final name.
    tokenizer : Tokenizer
        What made the tokens.
    """
    starts = [0, *accumulate(shard.num_tokens for shard in shards)]
    num_tokens = starts[-1]
    stored = [(shard.name, start) for shard, start in zip(shards, starts, strict=False) if shard.num_tokens]
    layout = h5py.VirtualLayout(shape=(num_tokens,), dtype=tokenizer.dtype)
    with _create(path) as file:
        _write_tokenizer(file, tokenizer)
        columns = _create_columns(file)
        for shard, source_path, start in zip(shards, partial, starts, strict=False):
            if shard.num_tokens:
                source = h5py.VirtualSource(shard.name, "tokens", shape=(shard.num_tokens,))
                layout[start : start + shard.num_tokens] = source
            with h5py.File(source_path, "r", locking=False) as written:
                name_start = columns["document_names"].size
                columns["chunk_checksums"].extend(written["chunk_checksums"][()])
                columns["chunk_starts"].extend(written["chunk_starts"][:-1] + start)
                columns["document_name_offsets"].extend(written["document_name_offsets"][:-1] + name_start)
                columns["document_offsets"].extend(written["document_offsets"][:-1] + start)
                columns["document_names"].extend(written["document_names"][()])
        _close_columns(columns, num_tokens)
        file.create_virtual_dataset("tokens", layout)
        file["shard_names"] = np.array([os.fsencode(name) for name, _ in stored])
        file["shard_starts"] = np.array([*(start for _, start in stored), num_tokens], dtype=np.int64)
        _finish(path, file, num_tokens, sum(shard.num_bytes for shard in shards))


class _Column:
    """A dataset of one dimension that grows; one chunk of it is held in memory."""

    def __init__(
        self, file: h5py.File, name: str, dtype: Any, chunk: int = _COLUMN_CHUNK, checksums: _Column | None = None
    ) -> None:
        self._dataset = file.create_dataset(name, shape=(0,), maxshape=(None,), dtype=dtype, chunks=(chunk,))
        self._buffer = np.empty(chunk, dtype=dtype)
        self._filled = 0
        self._checksums = checksums
        self.size = 0

    def append(self, value: int) -> None:
        self.extend(np.array([value], dtype=self._buffer.dtype))

    def extend(self, values: NDArray[Any]) -> None:
        taken = 0
        while taken < len(values):
            part = values[taken : taken + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            taken += len(part)
            self.size += len(part)
            if self._filled == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is held in memory; a chunk that is not full must be the last."""
        if self._filled:
            part = self._buffer[: self._filled]
            if self._checksums is not None:
                self._checksums.append(xxhash.xxh3_64_intdigest(part.data))
            self._dataset.resize((self.size,))
            self._dataset[self.size - self._filled :] = part
            self._filled = 0


def _create_columns(file: h5py.File) -> dict[str, _Column]:
    return {name: _Column(file, name, dtype) for name, dtype in _COLUMNS.items()}


def _close_columns(columns: dict[str, _Column], num_tokens: int) -> None:
    """Write the last offset of each column of offsets, and what is still in memory."""
    columns["chunk_starts"].append(num_tokens)
    columns["document_offsets"].append(num_tokens)
    columns["document_name_offsets"].append(columns["document_names"].size)
    for column in columns.values():
        column.flush()


def _create(path: Path) -> h5py.File:
    return h5py.File(path, "w", libver=_HDF5_VERSIONS, rdcc_nbytes=0, locking=False)


def _write_tokenizer(file: h5py.File, tokenizer: Tokenizer) -> None:
    file.attrs["tokenizer"] = np.bytes_(tokenizer.name.encode())
    file.attrs["vocab_size"] = tokenizer.vocab_size
    file["tokenizer_json"] = np.frombuffer(tokenizer.json.encode(), dtype=np.uint8)


def _finish(path: Path, file: h5py.File, num_tokens: int, num_bytes: int) -> None:
    file.attrs["num_tokens"] = num_tokens
    file.attrs["num_bytes"] = num_bytes
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["format"] = np.bytes_(FORMAT)
    file.close()
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())  # quotas and network file systems report a full disk only here
