"""The files that store a corpus's tokens: read with patience, and watched for being changed meanwhile.

A shared file system returns errors for a while when a server restarts or a network fails over. Such a read is tried
again, each time on a file that is opened anew, since a handle can be stale for good. Other errors do not pass.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from longnet_hpc.data.failures import HDF5_ERRORS, corpus_errors
from longnet_hpc.data.hdf5_file import dataset_of, open_file, version_of
from longnet_hpc.errors import CorpusError
from longnet_hpc.files import system_errno
from longnet_hpc.life import life

__all__ = ["MAX_OPEN_FILES", "FileState", "Part", "TokenFiles", "patiently"]

T = TypeVar("T")

MAX_OPEN_FILES = 64
"""Most files that one process keeps open."""

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENOLCK", "EPROTO", "ESHUTDOWN"),
        *("ENOTCONN", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
)
"""Errors that may pass. A disk that is broken says EIO, too, so that even these are not waited for without limit."""
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 15.0

_log = logging.getLogger("longnet_hpc")


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the same: its time of change, its size, and which file it is."""

    inode: int
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """Ask the file system."""
        state = path.stat()
        return cls(state.st_ino, state.st_size, state.st_mtime_ns)

    def difference(self, later: FileState) -> str:
        """Say what is different later; empty if nothing is."""
        said = []
        if later.inode != self.inode:
            said.append("it is another file now")
        if later.size != self.size:
            said.append(f"it has {later.size:,} bytes, not {self.size:,}")
        if later.modified != self.modified:
            said.append(f"it was modified at {_at(later.modified)}, before at {_at(self.modified)}")
        return ", ".join(said)


@dataclass(frozen=True)
class Part:
    """Tokens ``[start, stop)`` of a corpus, and the file that stores them from its first token on."""

    start: int
    stop: int
    path: Path


class TokenFiles:
    """The files of a corpus, opened when they are needed. One thread at a time.

    Each file is taken to be what it was when this object was made; it is made before any of them is looked at.

    Parameters
    ----------
    parts : sequence of Part
        The files in order.

    Raises
    ------
    CorpusError
        If a file is missing.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._open: OrderedDict[Path, h5py.Dataset] = OrderedDict()
        self._first: dict[Path, FileState] = {}
        for part in parts:
            with corpus_errors(f"cannot read {part.path}"):
                self._first[part.path] = FileState.of(part.path)
        self._last = dict(self._first)
        self._gone: set[Path] = set()

    def types(self) -> set[np.dtype[Any]]:
        """Look at all files and return the types of their tokens, of which there should be one.

        Raises
        ------
        CorpusError
            If a file is no corpus, or has another number of tokens: HDF5 itself would show zeros in their place.
        """
        types: set[np.dtype[Any]] = set()
        for part in self.parts:
            with open_file(part.path) as file, corpus_errors(f"cannot read {part.path}", HDF5_ERRORS):
                version_of(part.path, file)
                types.add(dataset_of(part.path, file, "tokens", np.unsignedinteger, part.stop - part.start).dtype)
        return types

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return tokens ``[start, stop)`` as the files have them, unverified; at least one."""
        pieces = []
        for part in self._parts_of(start, stop):
            with corpus_errors(f"cannot read {part.path}", HDF5_ERRORS):
                tokens = self._tokens_of(part)
                pieces.append(tokens[max(start, part.start) - part.start : min(stop, part.stop) - part.start])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def touched(self, start: int, stop: int) -> bool:
        """Ask the file system whether the files of some tokens are what they were; to be called after each read.

        A file that is gone is told of once: it can be read as long as it stays open.

        Returns
        -------
        bool
            Whether one has been modified since this was asked before, its size being the same. Its content may be,
            too: the time alone changes where files are touched so that they are not cleared away.

        Raises
        ------
        CorpusError
            If one has another size, or is another file.
        """
        touched = False
        for part in self._parts_of(start, stop):
            try:
                now, last = FileState.of(part.path), self._last[part.path]
            except FileNotFoundError:
                if part.path not in self._gone:
                    self._gone.add(part.path)
                    _log.warning(
                        "warning: %s was removed or renamed while %s reads it: it is read on as long as it stays open, "
                        "but whoever opens it next, as to resume, will not find it",
                        *(part.path, socket.gethostname()),
                    )
                continue
            if now != last:
                self._refuse_other(part.path, now)
                self._last[part.path] = now
                touched = True
                _log.warning(
                    "warning: %s was modified while %s reads it: %s; its tokens are compared with their checksums anew",
                    *(part.path, socket.gethostname(), last.difference(now)),
                )
        return touched

    def changes(self, start: int, stop: int) -> str:
        """Say how the files of some tokens differ from what they were at first; empty if they do not."""
        said = []
        for part in self._parts_of(start, stop):
            try:
                difference = self._first[part.path].difference(FileState.of(part.path))
            except OSError as error:
                difference = "it is gone" if isinstance(error, FileNotFoundError) else ""
            if difference:
                said.append(f"{part.path} was changed while it was read: {difference}")
        return "; ".join(said)

    def forget(self, start: int, stop: int) -> None:
        """Close the files of some tokens, and drop what this host has cached of them, which may be what is damaged."""
        for part in self._parts_of(start, stop):
            if not part.path.exists():  # what is open is all there is
                continue
            if part.path in self._open:
                self._open.pop(part.path).file.close()
            if hasattr(os, "posix_fadvise"):
                with part.path.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all files; those that are read again are opened again."""
        while self._open:
            self._open.popitem()[1].file.close()

    def _parts_of(self, start: int, stop: int) -> list[Part]:
        return [part for part in self.parts if part.start < stop and start < part.stop]

    def _tokens_of(self, part: Part) -> h5py.Dataset:
        """Return the tokens of a part, from its own file.

        The virtual dataset, which is for other programs, is slower, shows zeros where a file is missing, and lies in
        the one part of an HDF5 file that has no checksum.
        """
        if part.path not in self._open:
            while len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].file.close()
            try:
                self._refuse_other(part.path, FileState.of(part.path))
            except FileNotFoundError as error:
                raise CorpusError(f"{part.path} was removed or renamed while it was read") from error
            file = open_file(part.path)
            try:
                self._open[part.path] = dataset_of(
                    part.path, file, "tokens", np.unsignedinteger, part.stop - part.start
                )
            except BaseException:
                file.close()
                raise
        self._open.move_to_end(part.path)
        return self._open[part.path]

    def _refuse_other(self, path: Path, now: FileState) -> None:
        first = self._first[path]
        if (now.inode, now.size) != (first.inode, first.size):
            raise CorpusError(f"{path} was changed while it was read: {first.difference(now)}")


def patiently(path: Path, seconds: float, read: Callable[[], T], close: Callable[[], object]) -> T:
    """Read, and try again while the system says what may pass.

    Parameters
    ----------
    path : Path
        What is read, for what is told of it: a line a failure.
    seconds : float
        Time after the first failure until which it is tried again; 0 means not at all.
    read : callable
        Reads; raises `HDF5_ERRORS`, or a CorpusError that one of them caused.
    close : callable
        Lets go of what may be stale; called before each further try.

    Raises
    ------
    CorpusError
        That of ``read``, with the number of tries if it may still pass.
    """
    wait, deadline, tries = _FIRST_WAIT_SECONDS, 0.0, 0
    while True:
        try:
            with corpus_errors(f"cannot read {path}", HDF5_ERRORS):
                return read()
        except CorpusError as error:
            number, now = system_errno(error), time.monotonic()
            tries += 1
            deadline = deadline or now + seconds
            if number not in _PASSING or seconds == 0.0:
                raise
            if now >= deadline:
                spent = seconds - (deadline - now)
                raise CorpusError(f"{error}; it was tried {tries} times in {spent:.0f} s") from error
            wait_now = min(wait, deadline - now)
            _log.warning(
                "warning: %s, on %s; failure %d, tried again in %.1f s and for %.0f s in all",
                *(error, socket.gethostname(), tries, wait_now, seconds),
            )
        close()
        life.progress += 1  # it is not stuck
        time.sleep(wait_now)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


def _at(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9).isoformat(sep=" ", timespec="milliseconds")
