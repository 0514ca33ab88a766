"""Failures of files, told in one line."""

from __future__ import annotations

from contextlib import AbstractContextManager

from longnet_hpc.errors import CorpusError
from longnet_hpc.files import naming_errors

__all__ = ["HDF5_ERRORS", "corpus_errors"]

HDF5_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError)
"""What h5py raises for a damaged file or a failing disk."""


def corpus_errors(what: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> AbstractContextManager[None]:
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
    return naming_errors(what, kinds, CorpusError)
