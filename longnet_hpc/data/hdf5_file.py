"""One HDF5 file of a corpus: opened, and looked at before HDF5 is trusted with what is in it.

What no corpus has is refused first: links to other files, filters, strings of variable length, lengths beyond the size
of the file. Every function raises CorpusError, in one line that names the file, or what HDF5 raises for a failing disk.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from longnet_hpc.data.chunk_index import has_sound_index
from longnet_hpc.data.failures import corpus_errors
from longnet_hpc.errors import CorpusError
from longnet_hpc.files import system_errno
from longnet_hpc.words import one_line

__all__ = ["FORMAT", "FORMAT_VERSION", "dataset_of", "integer_of", "open_file", "text_of", "version_of"]

FORMAT = "longnet_hpc corpus"
"""Marks an HDF5 file as a corpus."""

FORMAT_VERSION = 1
"""The version written, and the only one read."""

_MOST_ATTRIBUTE_BYTES = 1 << 16


def open_file(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, without a chunk cache (chunks are not compressed) and without a lock."""
    with corpus_errors(f"cannot read {path}"):
        if path.is_dir():
            raise CorpusError(f"{path} is a folder, not a corpus file")
        if path.stat().st_size == 0:
            raise CorpusError(f"{path} is empty; a corpus is an HDF5 file")
        return h5py.File(path, "r", rdcc_nbytes=0, locking=False)


def version_of(path: Path, file: h5py.File) -> int:
    """Return the version of the format, having made sure that the file is a corpus of the one that is read."""
    if _attribute(file, "format") != FORMAT.encode():
        raise CorpusError(f"{path} is an HDF5 file but not a corpus: it has no attribute format = {FORMAT!r}")
    version = integer_of(path, file, "format_version")
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


def text_of(path: Path, file: h5py.File, attribute: str) -> str:
    """Return an attribute that must be a string."""
    value = _attribute(file, attribute)
    if not isinstance(value, bytes):
        raise CorpusError(f"{path}: attribute {attribute} must be a string of fixed length")
    return value.decode(errors="replace")


def integer_of(path: Path, file: h5py.File, attribute: str) -> int:
    """Return an attribute that must be an integer."""
    value = _attribute(file, attribute)
    if not isinstance(value, np.integer):
        raise CorpusError(f"{path}: attribute {attribute} must be an integer")
    return int(value)


def dataset_of(path: Path, file: h5py.File, name: str, kind: type[np.generic], size: int | None) -> h5py.Dataset:
    """Return a dataset of this file that is no longer than the file, so that it is safe to allocate."""
    links = file.id.links
    link = links.get_info(name.encode()) if links.exists(name.encode()) else None
    if link is None or link.type != h5py.h5l.TYPE_HARD:  # others may lead to other files
        raise CorpusError(f"{path}: dataset {name} is missing")
    try:
        dataset = file[name]
    except KeyError as error:  # what h5py makes of a disk that fails, too
        number = system_errno(error)
        if number is not None:
            raise OSError(number, os.strerror(number)) from error
        raise CorpusError(f"{path}: dataset {name} is missing") from error
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
