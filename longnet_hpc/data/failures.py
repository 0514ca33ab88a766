"""Failures of files, told in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from longnet_hpc.errors import CorpusError

__all__ = ["HDF5_ERRORS", "corpus_errors"]

HDF5_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError)
"""What h5py raises for a damaged file or a failing disk."""


@contextmanager
def corpus_errors(what: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turn errors of the operating system and of file formats into a `CorpusError` of one line.

    Parameters
    ----------
    what : str
        What failed, for example ``cannot read a.txt``; the reason follows after a colon.
    kinds : tuple of type
        The errors that the body may meet; any other passes through as the defect it is.

    Raises
    ------
    CorpusError
        If the body raises one of ``kinds``.
    """
    try:
        yield
    except kinds as error:
        raise CorpusError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line; HDF5 hides the system's error among file descriptors and pointers."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    number = re.search(r"\berrno = (\d+)", reason)
    if number is not None:
        return os.strerror(int(number[1]))
    return " ".join(re.sub(r",? *\w+ = 0x[0-9a-f]+", "", reason).split())
