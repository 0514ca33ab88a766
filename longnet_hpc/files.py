"""Files that appear whole or not at all, and folders that are known to be writable before the work begins."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["check_writable", "naming_errors", "replace_file"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make or replace a file in one step: ``write(partial)`` makes it beside its place, then it is renamed.

    Its mode follows the umask, even where the library that writes it would keep it from other users.

    Raises
    ------
    OSError
        If it cannot be written; the old file, if any, then stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # left by a job that was killed
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
def naming_errors(failing: str) -> Iterator[None]:
    """Give an OSError of the body the words of what fails: ``failing: reason``."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{failing}: {error.strerror or error}") from error
