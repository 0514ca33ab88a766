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

import logging
import os
import threading
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from longnet_hpc.data.failures import HDF5_ERRORS, corpus_errors
from longnet_hpc.data.hdf5_file import dataset_of, integer_of, open_file, text_of, version_of
from longnet_hpc.data.token_files import Part, TokenFiles, patiently
from longnet_hpc.data.tokenizer import MAX_TOKENIZER_BYTES, BytesTokenizer, JsonTokenizer, Tokenizer
from longnet_hpc.errors import CorpusError
from longnet_hpc.words import one_line

__all__ = ["MAX_CHUNK_TOKENS", "Corpus", "shard_names"]

MAX_CHUNK_TOKENS = 1 << 28
"""Longest chunk with one checksum, in tokens; a chunk is read whole when first touched."""

_MOST_TOUCHED = 4
"""How often a file may be modified while one read goes on."""

RETRY_SECONDS = 60.0
"""How long reads that fail for a while are tried again, in seconds, unless something else is said."""


class Corpus:
    """A corpus file, open for reading. Not collective: each rank opens the file for itself.

    Reads of tokens are verified, and may come from any thread of this process. Those that fail with an error that may
    pass are tried again. Files that are replaced or change their size meanwhile are refused; those that are only
    touched are verified again, so that no others than the tokens of the beginning are ever returned.

    Parameters
    ----------
    path : str or path
        A file that `prepare` wrote.
    retry_seconds : float
        Time for which a read that fails for a while is tried again, in seconds; 0 means not at all.

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

    def __init__(self, path: str | os.PathLike[str], retry_seconds: float = RETRY_SECONDS) -> None:
        self.path = Path(path)
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        patiently(self.path, retry_seconds, self._load, lambda: None)

    def _load(self) -> None:
        with open_file(self.path) as file, corpus_errors(f"cannot read {self.path}", (*HDF5_ERRORS, KeyError)):
            self.format_version = version_of(self.path, file)
            self.vocab_size = self._count(file, "vocab_size", limit=1 << 32)
            self.num_tokens = self._count(file, "num_tokens", limit=1 << 62)
            self.num_bytes = self._count(file, "num_bytes", limit=1 << 62)
            self._files = TokenFiles(self._find_parts(file))
            types = self._files.types()
            if len(types) != 1:
                raise CorpusError(f"{self.path}: tokens must have one type, have {len(types)}")
            self.dtype = types.pop()
            self._load_chunks(file)
            self.num_documents = self._column(file, "document_offsets", np.int64).size - 1
            self._column(file, "document_names", np.uint8)
            self._column(file, "document_name_offsets", np.int64, self.num_documents + 1)
            self.tokenizer = self._load_tokenizer(file)

    def _load_chunks(self, file: h5py.File) -> None:
        chunks = self._column(file, "chunk_checksums", np.uint64)
        if not 1 <= chunks.size <= self.num_tokens:
            raise CorpusError(f"{self.path}: {self.num_tokens} tokens in {chunks.size} chunks, must be 1 to as many")
        self.chunk_checksums = chunks[()]
        self.chunk_starts = self._read_offsets(file, "chunk_starts", self.num_tokens, chunks.size)
        lengths = np.diff(self.chunk_starts)
        if lengths.min() < 1 or lengths.max() > MAX_CHUNK_TOKENS:
            raise CorpusError(
                f"{self.path}: chunks have {lengths.min()} to {lengths.max()} tokens, must have 1 to {MAX_CHUNK_TOKENS}"
            )
        self._verified = np.zeros(len(self.chunk_checksums), dtype=bool)

    @property
    def document_offsets(self) -> NDArray[np.int64]:
        """First token of each document, and the number of tokens; shape (num_documents + 1,). Read at each access."""
        with open_file(self.path) as file, corpus_errors(f"cannot read {self.path}", HDF5_ERRORS):
            return self._read_offsets(file, "document_offsets", self.num_tokens, self.num_documents)

    @property
    def shards(self) -> list[Path]:
        """Files that store the tokens, in order; the corpus file itself if there are no others."""
        return [part.path for part in self._files.parts]

    def document_name(self, index: int) -> str:
        """Return the name of document ``index``, 0 to below `num_documents`: its path as it was given to `prepare`."""
        if not 0 <= index < self.num_documents:
            raise CorpusError(f"{self.path}: document {index} is outside [0, {self.num_documents})")
        with open_file(self.path) as file, corpus_errors(f"cannot read {self.path}", HDF5_ERRORS):
            names = self._column(file, "document_names", np.uint8)
            offsets = self._column(file, "document_name_offsets", np.int64, self.num_documents + 1)
            start, stop = (int(offset) for offset in offsets[index : index + 2])
            if not 0 <= start <= stop <= names.size:
                raise CorpusError(f"{self.path}: name {index} is [{start}, {stop}) of {names.size} bytes")
            return os.fsdecode(names[start:stop].tobytes())

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
            touches it, and again after its file was modified.

        Raises
        ------
        CorpusError
            If the range is outside the corpus, a chunk's checksum does not fit, a token is not in the vocabulary, or
            the file was replaced, cut or made longer.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise CorpusError(f"{self.path}: tokens [{start}, {stop}) are outside [0, {self.num_tokens})")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        with self._lock:
            return patiently(self.path, self._retry_seconds, lambda: self._read(start, stop), self._files.close)

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Read verified tokens from files that are what they were, once more if these were touched meanwhile."""
        first = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.chunk_starts, stop, side="left"))
        for _ in range(_MOST_TOUCHED):
            for chunk in first + np.flatnonzero(~self._verified[first:last]):
                self._verify(int(chunk))
            tokens = self._files.read(start, stop)
            if not self._files.touched(start, stop):
                return tokens
            self._verified[:] = False
        raise CorpusError(f"{self.path} is modified again and again while it is read")

    def close(self) -> None:
        """Close the files. May be called more than once."""
        with self._lock:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _verify(self, chunk: int) -> None:
        start, stop = (int(position) for position in self.chunk_starts[chunk : chunk + 2])
        tokens = self._files.read(start, stop)
        expected, found = int(self.chunk_checksums[chunk]), xxhash.xxh3_64_intdigest(tokens.data)
        what = f"chunk {chunk}, tokens [{start}, {stop})"
        if found != expected:
            # What was damaged may be only what this host keeps of the file in its memory.
            logging.getLogger("longnet_hpc").warning(
                "warning: %s: the checksum of %s does not fit; it is read once more", self.path, what
            )
            self._files.forget(start, stop)
            tokens = self._files.read(start, stop)
            found = xxhash.xxh3_64_intdigest(tokens.data)
        if found != expected:
            changes = self._files.changes(start, stop)
            raise CorpusError(
                f"{self.path}: {what}, is damaged: its checksum is {found:016x}, not {expected:016x}"
                + (f"; {changes}" if changes else "")
            )
        if self.vocab_size <= np.iinfo(self.dtype).max and int(tokens.max()) >= self.vocab_size:
            position = int(tokens.argmax())
            raise CorpusError(
                f"{self.path}: token {tokens[position]} at {start + position} is outside the vocabulary "
                f"of {self.vocab_size}"
            )
        self._verified[chunk] = True

    def _find_parts(self, file: h5py.File) -> list[Part]:
        """List the files that store the tokens; the virtual dataset is never opened (`_tokens_of` says why)."""
        names = _shard_names(self.path, file)
        if not names:
            return [Part(0, self.num_tokens, self.path)]
        starts = self._read_offsets(file, "shard_starts", self.num_tokens, len(names))
        folder = self.path.parent
        return [Part(*ends, folder / name) for ends, name in zip(pairwise(starts.tolist()), names, strict=True)]

    def _load_tokenizer(self, file: h5py.File) -> Tokenizer:
        name = text_of(self.path, file, "tokenizer")
        stored = self._column(file, "tokenizer_json", np.uint8)
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

    def _count(self, file: h5py.File, name: str, limit: int) -> int:
        value = integer_of(self.path, file, name)
        if not 0 < value <= limit:
            raise CorpusError(f"{self.path}: {name} is {value}, must be 1 to {limit}")
        return value

    def _column(self, file: h5py.File, name: str, kind: type[np.generic], size: int | None = None) -> h5py.Dataset:
        return dataset_of(self.path, file, name, kind, size)

    def _read_offsets(self, file: h5py.File, name: str, total: int, count: int) -> NDArray[np.int64]:
        """Return a column of ``count + 1`` offsets that rise from 0 to ``total``."""
        offsets: NDArray[np.int64] = self._column(file, name, np.int64, count + 1)[()]
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
    with open_file(path) as file, corpus_errors(f"cannot read {path}", HDF5_ERRORS):
        version_of(path, file)
        return _shard_names(path, file)


def _shard_names(path: Path, file: h5py.File) -> list[str]:
    if not file.id.links.exists(b"shard_names"):
        return []
    names = [os.fsdecode(name) for name in dataset_of(path, file, "shard_names", np.bytes_, None)[()]]
    for name in names:
        if Path(name).name != name:
            raise CorpusError(f"{path}: shard {name!r} is not the name of a file in the same folder")
    return names
