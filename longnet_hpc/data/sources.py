"""Where text comes from: files, folders, globs, compressed files, archives and standard input, as streams of blocks."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import sys
import sysconfig
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from longnet_hpc.data.failures import corpus_errors
from longnet_hpc.errors import CorpusError

__all__ = ["BLOCK_BYTES", "STANDARD_INPUT", "Document", "Unit", "default_sources", "find_units"]

BLOCK_BYTES = 1 << 20
"""Largest block of a document, in bytes."""

STANDARD_INPUT = "-"
"""The source that stands for standard input."""

_DECOMPRESSORS: dict[str, Callable[[io.BufferedReader], io.BufferedIOBase]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".xz": lzma.open,
    ".txz": lzma.open,
    ".bz2": bz2.open,
    ".tbz2": bz2.open,
}
_UNSUPPORTED = (".zip", ".zst", ".7z", ".rar")
_ARCHIVES = (".tar", ".tgz", ".txz", ".tbz2")
_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
_TAR_BUFFER_BYTES = 1 << 16  # tarfile copies what is left of its buffer at every read, so not a whole block


class Document(NamedTuple):
    """One text. Its blocks must be consumed before the next document of the same unit is asked for."""

    name: str
    """Path of the file, followed by the path within it for a member of an archive."""
    blocks: Iterator[bytes]
    """The content in order, in blocks of at most `BLOCK_BYTES` bytes."""


@dataclass(frozen=True)
class Unit:
    """What one rank reads from beginning to end: a file, an archive or standard input."""

    path: str
    """Path of the file, or `STANDARD_INPUT`."""
    size: int
    """Size in bytes as stored, by which work is shared out; 0 for standard input."""

    def documents(self, progress: Callable[[int], object] | None = None) -> Iterator[Document]:
        """Iterate over the documents of this unit in order, without holding a whole one in memory.

        Parameters
        ----------
        progress : callable, optional
            Called with the size, in bytes as stored, of every further piece that has been read; the sum is `size`.

        Raises
        ------
        CorpusError
            While iterating, if the file cannot be read, is truncated or is damaged.
        """
        if self.path == STANDARD_INPUT:
            stored = _counted(cast(io.BufferedReader, sys.stdin.buffer), progress)
            yield Document(self.path, _blocks_of(stored, self.path))
            return
        with (
            corpus_errors(f"cannot read {self.path}", _ERRORS),
            Path(self.path).open("rb", buffering=0) as file,
            _decompressed(_counted(file, progress), self.path) as stream,
        ):
            if _is_archive(self.path):
                yield from _members(stream, self.path)
            else:
                yield Document(self.path, _blocks_of(stream, self.path))


def find_units(sources: Iterable[str | os.PathLike[str]]) -> list[Unit]:
    """List what has to be read, in an order that depends on the names alone.

    Parameters
    ----------
    sources : iterable of str or path
        A file (decompressed if named .gz, .xz or .bz2, and read member by member if it is a .tar of any of these); a
        folder, which means all files below it sorted by path, symbolic links to folders not followed; a glob, which
        means the files it matches, sorted, ``**`` for any depth; or ``-`` for standard input.

        Within a folder, files and folders whose names begin with a dot are left out, and so are, with one warning,
        .zip, .zst, .7z and .rar, which cannot be read. A file is not judged by its content: binary files in a folder
        are taken too, as bytes are; choose text among them with a glob, for example ``folder/**/*.txt``.

    Returns
    -------
    list of Unit
        In the order of the sources.

    Raises
    ------
    CorpusError
        If there is no source, or one does not exist, cannot be listed, has no files, or is a second standard input;
        if a .zip, .zst, .7z or .rar is named, or matched by a glob.
    """
    names = [os.fspath(source) for source in sources]
    if not names:
        raise CorpusError("there are no sources; give files, folders, globs, or - for standard input")
    if names.count(STANDARD_INPUT) > 1:
        raise CorpusError(f"standard input (-) can be read once, got it {names.count(STANDARD_INPUT)} times")
    return [unit for name in names for unit in _units_of(name)]


def default_sources() -> list[str]:
    """Return the paths of the running Python's standard library modules, sorted: real text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages", "__pycache__"}
    with corpus_errors(f"cannot read the standard library in {root}"):
        return [str(path) for path in _files_below(root, installed) if path.suffix == ".py"]


def _units_of(source: str) -> Iterator[Unit]:
    if source == STANDARD_INPUT:
        yield Unit(source, 0)
        return
    with corpus_errors(f"cannot read source {source}"):
        path = Path(source)
        if path.is_dir():
            paths = _supported(source, _files_below(path))
        elif path.exists():
            paths = [path]
        elif glob.has_magic(source):
            matches = glob.iglob(source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            paths = _sorted(path for path in map(Path, matches) if path.is_file())
        else:
            raise CorpusError(f"source {source} does not exist")
        if not paths:
            raise CorpusError(f"source {source} has no files; needs at least 1")
        for path in paths:
            if _is_unsupported(path):
                raise CorpusError(f"{path}: {path.suffix} is not supported; unpack it, or use .gz, .xz, .bz2 or .tar")
            yield Unit(str(path), path.stat().st_size)


def _files_below(folder: Path, but: Set[str] = frozenset()) -> list[Path]:
    """List the files below a folder, but not the hidden ones and those in folders of certain names."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in but and not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return _sorted(found)


def _supported(folder: str, paths: list[Path]) -> list[Path]:
    """Leave out, with one warning, files in formats that cannot be read: their bytes are noise."""
    skipped = [path for path in paths if _is_unsupported(path)]
    if skipped:
        formats = ", ".join(_UNSUPPORTED)
        warnings.warn(
            f"{folder}: skipped {len(skipped)} of {len(paths)} files, as {formats} are not supported", stacklevel=2
        )
    return [path for path in paths if not _is_unsupported(path)]


def _is_unsupported(path: Path) -> bool:
    return path.suffix.lower() in _UNSUPPORTED


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.parts)


class _Counted(io.RawIOBase):
    """Reports how many bytes are read from a stream, which it does not close."""

    def __init__(self, stream: io.FileIO | io.BufferedReader, progress: Callable[[int], object] | None) -> None:
        self._stream = stream
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self._stream.readinto(buffer)
        if self._progress is not None and count:
            self._progress(count)
        return count


def _counted(stream: io.FileIO | io.BufferedReader, progress: Callable[[int], object] | None) -> io.BufferedReader:
    return io.BufferedReader(_Counted(stream, progress), BLOCK_BYTES)


def _decompressed(stored: io.BufferedReader, path: str) -> io.BufferedIOBase:
    decompressor = _DECOMPRESSORS.get(Path(path).suffix.lower())
    return stored if decompressor is None else decompressor(stored)


def _is_archive(path: str) -> bool:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]] or [""]
    return suffixes[-1] in _ARCHIVES or (suffixes[0] == ".tar" and suffixes[-1] in _DECOMPRESSORS)


def _blocks_of(stream: io.BufferedIOBase | IO[bytes], name: str) -> Iterator[bytes]:
    with corpus_errors(f"cannot read {name}", _ERRORS):
        while block := stream.read(BLOCK_BYTES):
            yield block


def _members(stream: io.BufferedIOBase, path: str) -> Iterator[Document]:
    """Iterate over the regular files of an archive, read forward only."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER_BYTES, tarinfo=_StrictTarInfo) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member, millions of them
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                name = f"{path}/{member.name}"
                yield Document(name, _blocks_of(content, name))
    while stream.read(BLOCK_BYTES):  # what follows the archive: the decompressor compares its checksum at the end
        pass


class _StrictTarInfo(tarfile.TarInfo):
    """A header that must be whole: tarfile itself takes a damaged or missing one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        if len(buf) != tarfile.BLOCKSIZE:
            raise tarfile.ReadError("archive ends without its end mark")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header in archive: {error}") from error
