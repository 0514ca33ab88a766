"""The corpus file and its verified reading.

A corpus is one HDF5 file. All datasets have one dimension and no filter, integers are little-endian:

======================  ======  ==================  ===========================================================
tokens                  uint    num_tokens          the documents, one after the other with nothing between
document_offsets        int64   num_documents + 1   first token of each document, and the number of tokens
document_names          uint8   bytes of all names  names, one after the other, as the file system spells them
document_name_offsets   int64   num_documents + 1   first byte of each name, and the number of bytes
chunk_starts            int64   num_chunks + 1      first token of each verified chunk, and the number of tokens
chunk_checksums         uint64  num_chunks          XXH3-64 of the bytes of each chunk
tokenizer_json          uint8   bytes of the file   the tokenizer's file; empty for bytes
shard_names             bytes   num_shards          files that store the tokens; only if there are several
shard_starts            int64   num_shards + 1      first token of each shard, and the number of tokens
======================  ======  ==================  ===========================================================

Attributes of the root: format, format_version, tokenizer, vocab_size, num_tokens, num_bytes; integers, and strings of
fixed length. In a corpus written by several ranks, ``tokens`` is a virtual dataset over shards in the same folder; each
shard is itself a corpus. What no corpus has is refused before HDF5 is asked to read it: links to other files, filters,
strings of variable length, lengths beyond the size of the file.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from longnet_hpc.data.chunk_index import has_sound_index
from longnet_hpc.data.failures import HDF5_ERRORS, corpus_errors
from longnet_hpc.data.tokenizer import MAX_TOKENIZER_BYTES, BytesTokenizer, JsonTokenizer, Tokenizer
from longnet_hpc.errors import CorpusError
from longnet_hpc.words import one_line

__all__ = ["FORMAT", "FORMAT_VERSION", "MAX_CHUNK_TOKENS", "Corpus", "shard_names"]

FORMAT = "longnet_hpc corpus"
"""Marks an HDF5 file as a corpus."""

FORMAT_VERSION = 1
"""The version written, and the only one read."""

MAX_CHUNK_TOKENS = 1 << 28
"""Longest chunk with one checksum, in tokens; a chunk is read whole when first touched."""

MAX_OPEN_SHARDS = 64
"""Most shards that one process keeps open."""

_MOST_ATTRIBUTE_BYTES = 1 << 16


@dataclass(frozen=True)
class _Part:
    """Tokens ``[start, stop)`` of a corpus, and the file that stores them from its first token on."""

    start: int
    stop: int
    path: Path


class Corpus:
    """A corpus file, open for reading. Not collective: each rank opens the file for itself.

    Reads are verified, and may come from any thread of this process.

    Parameters
    ----------
    path : str or path
        A file that `prepare` wrote.

    Attributes
    ----------
    path : Path
        The file.
    format_version : int
        Version of the file's format.
    tokenizer : Tokenizer
        What made the tokens; its `json` is the content of the tokenizer's file.
    vocab_size : int
        Number of token values.
    num_tokens, num_documents : int
        Size of the corpus.
    num_bytes : int
        Size of the text that the tokens stand for, in bytes.
    chunk_starts : ndarray of int64, shape (num_chunks + 1,)
        First token of each chunk, and the number of tokens.
    chunk_checksums : ndarray of uint64, shape (num_chunks,)
        XXH3-64 of the stored bytes of each chunk.

    Raises
    ------
    CorpusError
        If the file is missing, empty, truncated, not a corpus, of another version, or inconsistent, or if one of its
        shards is missing or short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[Path, h5py.Dataset] = OrderedDict()
        self._file = _open(self.path)
        try:
            with corpus_errors(f"cannot read {self.path}", (*HDF5_ERRORS, KeyError)):
                self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        self.format_version = _version(self.path, self._file)
        self.vocab_size = self._count("vocab_size", limit=1 << 32)
        self.num_tokens = self._count("num_tokens", limit=1 << 62)
        self.num_bytes = self._count("num_bytes", limit=1 << 62)
        self._parts = self._find_parts()
        self.dtype = self._check_parts()
        chunks = self._column("chunk_checksums", np.uint64)
        if not 1 <= chunks.size <= self.num_tokens:
            raise CorpusError(f"{self.path}: {self.num_tokens} tokens in {chunks.size} chunks, must be 1 to as many")
        self.chunk_checksums = chunks[()]
        self.chunk_starts = self._read_offsets("chunk_starts", self.num_tokens, chunks.size)
        lengths = np.diff(self.chunk_starts)
        if lengths.min() < 1 or lengths.max() > MAX_CHUNK_TOKENS:
            raise CorpusError(
                f"{self.path}: chunks have {lengths.min()} to {lengths.max()} tokens, must have 1 to {MAX_CHUNK_TOKENS}"
            )
        self._verified = np.zeros(len(self.chunk_checksums), dtype=bool)
        self.num_documents = self._column("document_offsets", np.int64).size - 1
        self._name_bytes = self._column("document_names", np.uint8)
        self._name_offsets = self._column("document_name_offsets", np.int64, self.num_documents + 1)
        self.tokenizer = self._load_tokenizer()

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """First token of each document, and the number of tokens; shape (num_documents + 1,). Read at each access."""
        with corpus_errors(f"cannot read {self.path}", HDF5_ERRORS):
            return self._read_offsets("document_offsets", self.num_tokens, self.num_documents)

    @property
    def shards(self) -> list[Path]:
        """Files that store the tokens, in order; the corpus file itself if there are no others."""
        return [part.path for part in self._parts]

    def document_name(self, index: int) -> str:
        """Return the name of document ``index``, 0 to below `num_documents`: its path as it was given to `prepare`."""
        if not 0 <= index < self.num_documents:
            raise CorpusError(f"{self.path}: document {index} is outside [0, {self.num_documents})")
        with corpus_errors(f"cannot read {self.path}", HDF5_ERRORS):
            start, stop = (int(offset) for offset in self._name_offsets[index : index + 2])
            if not 0 <= start <= stop <= self._name_bytes.size:
                raise CorpusError(f"{self.path}: name {index} is [{start}, {stop}) of {self._name_bytes.size} bytes")
            return os.fsdecode(self._name_bytes[start:stop].tobytes())

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return tokens ``[start, stop)``.

        Parameters
        ----------
        start, stop : int
            Positions in the corpus, in tokens, ``0 <= start <= stop <= num_tokens``.

        Returns
        -------
        ndarray
            Shape ``(stop - start,)``, of the corpus's type `dtype`. Every chunk is verified when this object first
            touches it.

        Raises
        ------
        CorpusError
            If the range is outside the corpus, a chunk's checksum does not fit, or a token is not in the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise CorpusError(f"{self.path}: tokens [{start}, {stop}) are outside [0, {self.num_tokens})")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        first = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.chunk_starts, stop, side="left"))
        with self._lock, corpus_errors(f"cannot read {self.path}", HDF5_ERRORS):
            for chunk in first + np.flatnonzero(~self._verified[first:last]):
                self._verify(int(chunk))
            return self._read_parts(start, stop)

    def close(self) -> None:
        """Close the file and its shards. May be called more than once."""
        with self._lock:
            for tokens in self._open_shards.values():
                tokens.file.close()
            self._open_shards.clear()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _verify(self, chunk: int) -> None:
        start, stop = (int(position) for position in self.chunk_starts[chunk : chunk + 2])
        tokens = self._read_parts(start, stop)
        expected, found = int(self.chunk_checksums[chunk]), xxhash.xxh3_64_intdigest(tokens.data)
        if found != expected:
            raise CorpusError(
                f"{self.path}: chunk {chunk}, tokens [{start}, {stop}), is damaged: "
                f"its checksum is {found:016x}, not {expected:016x}"
            )
        if self.vocab_size <= np.iinfo(self.dtype).max and int(tokens.max()) >= self.vocab_size:
            position = int(tokens.argmax())
            raise CorpusError(
                f"{self.path}: token {tokens[position]} at {start + position} is outside the vocabulary "
                f"of {self.vocab_size}"
            )
        self._verified[chunk] = True

    def _read_parts(self, start: int, stop: int) -> NDArray[Any]:
        pieces = [
            self._tokens_of(part)[max(start, part.start) - part.start : min(stop, part.stop) - part.start]
            for part in self._parts
            if part.start < stop and start < part.stop
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _tokens_of(self, part: _Part) -> h5py.Dataset:
        """Return the tokens of a part, from its own file.

        The virtual dataset, which is for other programs, is slower, shows zeros where a shard is missing, and lies in
        the one part of an HDF5 file that has no checksum.
        """
        if part.path not in self._open_shards:
            if len(self._open_shards) >= MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)[1].file.close()
            self._open_shards[part.path] = _open(part.path)["tokens"]
        self._open_shards.move_to_end(part.path)
        return self._open_shards[part.path]

    def _find_parts(self) -> list[_Part]:
        """List the files that store the tokens; the virtual dataset is never opened (`_tokens_of` says why)."""
        names = _shard_names(self.path, self._file)
        if not names:
            return [_Part(0, self.num_tokens, self.path)]
        starts = self._read_offsets("shard_starts", self.num_tokens, len(names))
        folder = self.path.parent
        return [_Part(*ends, folder / name) for ends, name in zip(pairwise(starts.tolist()), names, strict=True)]

    def _check_parts(self) -> np.dtype[Any]:
        """Return the one type of all tokens; HDF5 itself shows zeros in place of a missing or short shard."""
        types: set[np.dtype[Any]] = set()
        for part in self._parts:
            with _open(part.path) as file, corpus_errors(f"cannot read {part.path}", HDF5_ERRORS):
                _version(part.path, file)
                types.add(_dataset(part.path, file, "tokens", np.unsignedinteger, part.stop - part.start).dtype)
        if len(types) != 1:
            raise CorpusError(f"{self.path}: tokens must have one type, have {len(types)}")
        return types.pop()

    def _load_tokenizer(self) -> Tokenizer:
        name = _text(self.path, self._file, "tokenizer")
        stored = self._column("tokenizer_json", np.uint8)
        if stored.size > MAX_TOKENIZER_BYTES:
            raise CorpusError(
                f"{self.path}: tokenizer_json has {stored.size} bytes, must be {MAX_TOKENIZER_BYTES} at most"
            )
        json = stored[()].tobytes().decode(errors="replace")
        tokenizer = JsonTokenizer(name, self.vocab_size, json) if json else BytesTokenizer()
        if (tokenizer.name, tokenizer.vocab_size) != (name, self.vocab_size):
            raise CorpusError(
                f"{self.path}: tokenizer {one_line(name)} of {self.vocab_size} tokens has no tokenizer_json"
            )
        return tokenizer

    def _count(self, name: str, limit: int) -> int:
        value = _integer(self.path, self._file, name)
        if not 0 < value <= limit:
            raise CorpusError(f"{self.path}: {name} is {value}, must be 1 to {limit}")
        return value

    def _column(self, name: str, kind: type[np.generic], size: int | None = None) -> h5py.Dataset:
        return _dataset(self.path, self._file, name, kind, size)

    def _read_column(self, name: str, kind: type[np.generic], size: int | None = None) -> NDArray[Any]:
        values: NDArray[Any] = self._column(name, kind, size)[()]
        return values

    def _read_offsets(self, name: str, total: int, count: int) -> NDArray[np.int64]:
        """Return a column of ``count + 1`` offsets that rise from 0 to ``total``."""
        offsets = self._read_column(name, np.int64, count + 1)
        if offsets[0] != 0 or offsets[-1] != total or np.any(offsets[:-1] > offsets[1:]):
            raise CorpusError(f"{self.path}: {name} do not rise from 0 to {total}")
        return offsets


def shard_names(path: Path) -> list[str]:
    """Return the names of the files that a corpus joins, which need not exist; none if it stores its tokens itself.

    Raises
    ------
    CorpusError
        If there is no such file, or it is not a corpus.
    """
    with _open(path) as file, corpus_errors(f"cannot read {path}", HDF5_ERRORS):
        _version(path, file)
        return _shard_names(path, file)


def _shard_names(path: Path, file: h5py.File) -> list[str]:
    if not file.id.links.exists(b"shard_names"):
        return []
    names = [os.fsdecode(name) for name in _dataset(path, file, "shard_names", np.bytes_, None)[()]]
    for name in names:
        if Path(name).name != name:
            raise CorpusError(f"{path}: shard {name!r} is not the name of a file in the same folder")
    return names


def _open(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, without a chunk cache (chunks are not compressed) and without a lock."""
    with corpus_errors(f"cannot read {path}"):
        if path.is_dir():
            raise CorpusError(f"{path} is a folder, not a corpus file")
        if path.stat().st_size == 0:
            raise CorpusError(f"{path} is empty; a corpus is an HDF5 file")
        return h5py.File(path, "r", rdcc_nbytes=0, locking=False)


def _version(path: Path, file: h5py.File) -> int:
    if _attribute(file, "format") != FORMAT.encode():
        raise CorpusError(f"{path} is an HDF5 file but not a corpus: it has no attribute format = {FORMAT!r}")
    version = _integer(path, file, "format_version")
    if version != FORMAT_VERSION:
        raise CorpusError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    return version


def _attribute(file: h5py.File, name: str) -> Any:
    """Return an attribute, None if there is none of a kind that a corpus has.

    Others are not read: HDF5 can loop without end over a damaged heap of strings of variable length.
    """
    if name not in file.attrs:
        return None
    its = h5py.h5a.open(file.id, name.encode())
    kind = its.get_type()
    is_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not (is_text or isinstance(kind, h5py.h5t.TypeIntegerID)) or its.shape != ():
        return None
    return file.attrs[name] if its.get_storage_size() <= _MOST_ATTRIBUTE_BYTES else None


def _text(path: Path, file: h5py.File, attribute: str) -> str:
    value = _attribute(file, attribute)
    if not isinstance(value, bytes):
        raise CorpusError(f"{path}: attribute {attribute} must be a string of fixed length")
    return value.decode(errors="replace")


def _integer(path: Path, file: h5py.File, attribute: str) -> int:
    value = _attribute(file, attribute)
    if not isinstance(value, np.integer):
        raise CorpusError(f"{path}: attribute {attribute} must be an integer")
    return int(value)


def _dataset(path: Path, file: h5py.File, name: str, kind: type[np.generic], size: int | None) -> h5py.Dataset:
    """Return a dataset of this file that is no longer than the file, so that it is safe to allocate."""
    links = file.id.links
    link = links.get_info(name.encode()) if links.exists(name.encode()) else None
    if link is None or link.type != h5py.h5l.TYPE_HARD:  # others may lead to other files
        raise CorpusError(f"{path}: dataset {name} is missing")
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
        raise CorpusError(f"{path}: dataset {name} is missing")
    made = dataset.id.get_create_plist()
    if made.get_nfilters() or made.get_external_count() or made.get_layout() == h5py.h5d.VIRTUAL:
        raise CorpusError(f"{path}: dataset {name} has a filter, or lies in another file")
    if made.get_layout() == h5py.h5d.CHUNKED:
        with path.open("rb") as stream:
            if not has_sound_index(stream, link.u):
                raise CorpusError(f"{path}: dataset {name} has an index of its chunks that no corpus has")
    try:
        _ = dataset.dtype
    except (TypeError, ValueError) as error:  # a type that NumPy does not have
        raise CorpusError(f"{path}: dataset {name} has no type that can be read: {one_line(str(error))}") from error
    if not np.issubdtype(dataset.dtype, kind):
        raise CorpusError(f"{path}: dataset {name} has type {dataset.dtype}, not {kind.__name__}")
    if size is not None and dataset.size != size:
        raise CorpusError(f"{path}: dataset {name} has {dataset.size} values, must have {size}")
    # How much of that is stored is not asked: for an answer HDF5 counts the chunks, and a damaged file can state 2**62.
    # What is not stored would be zeros, and tokens that are none of the corpus fail their checksum.
    chunk_bytes = dataset.chunks[0] * dataset.dtype.itemsize if dataset.chunks else 0
    stated, there = dataset.nbytes, path.stat().st_size
    if stated and max(stated, chunk_bytes) > there:
        raise CorpusError(
            f"{path}: dataset {name} states {stated} bytes in chunks of {chunk_bytes}, the file has {there}"
        )
    return dataset
