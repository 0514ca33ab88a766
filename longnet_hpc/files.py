"""Files that appear whole or not at all, and folders that are known to be writable before the work begins."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longnet_hpc.words import one_line

__all__ = [
    "check_writable",
    "make_partial",
    "naming_errors",
    "partial_of",
    "put_in_place",
    "replace_file",
    "system_errno",
]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make or replace a file in one step: ``write(partial)`` makes it beside its place, then it is renamed.

    Its mode follows the umask, even where the library that writes it would keep it from other users.

    Raises
    ------
    OSError
        If it cannot be written; the old file, if any, then stays.
    """
    make_partial(path, write)
    put_in_place(path)


def make_partial(path: Path, write: Callable[[Path], object]) -> None:
    """Make a file beside its place by ``write(partial)`` and flush it to the disk, for `put_in_place`.

    Raises
    ------
    OSError
        If it cannot be written; nothing is then left.
    """
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)  # left by a job that was killed
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def put_in_place(path: Path) -> None:
    """Rename what `make_partial` made, and flush the folder to the disk.

    Raises
    ------
    OSError
        If it cannot be renamed; it is then removed, and the old file, if any, stays.
    """
    partial = partial_of(path)
    try:
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def partial_of(path: Path) -> Path:
    """Return where a file lies until it is whole."""
    return path.with_name(f".{path.name}.partial")


def check_writable(folder: Path) -> None:
    """Make sure that files can be made in a folder, which need not exist; nothing is left behind.

    Raises
    ------
    OSError
        If they cannot.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in made:
            with suppress(OSError):  # it was not made after all, or another job put something into it
                path.rmdir()


@contextmanager
def naming_errors(
    failing: str, kinds: tuple[type[Exception], ...] = (OSError,), raised: type[Exception] = OSError
) -> Iterator[None]:
    """Turn errors of the operating system and of file formats into one line: ``failing: reason``.

    Parameters
    ----------
    failing : str
        What failed, for example ``cannot read a.txt``.
    kinds : tuple of type
        The errors that the body may meet; any other passes through as the defect it is.
    raised : type
        What is raised instead.
    """
    try:
        yield
    except kinds as error:
        raise raised(f"{failing}: {_reason(error)}") from error


def system_errno(error: BaseException) -> int | None:
    """Return the number of the system's error that is behind an error, None if there is none.

    HDF5 hides it among file descriptors and pointers, and h5py may raise a KeyError or RuntimeError that quotes that.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        number = re.search(r"\berrno = (\d+)", str(cause))
        if number is not None:
            return int(number[1])
        cause = cause.__cause__
    return None


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line; HDF5 and safetensors hide the system's error among others."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    number = re.search(r"\berrno = (\d+)|\(os error (\d+)\)", reason)
    if number is not None:
        return os.strerror(int(number[1] or number[2]))
    return one_line(re.sub(r",? *\w+ = 0x[0-9a-f]+", "", reason))
