"""The progress bar of a job: on rank 0, on standard error."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from longnet_hpc.life import life

__all__ = ["bytes_bar", "steps_bar"]


_SECONDS_ON_A_TERMINAL, _SECONDS_IN_A_FILE = 0.5, 10.0
"""Least time between two refreshments: where they overwrite each other, and where each may stay as a line of a log."""


@contextmanager
def steps_bar(rank: int, what: str, total: int, done: int = 0, unit: str = "step") -> Iterator[Callable[[str], None]]:
    """Show steps done, time left, and a word about the last step.

    Parameters
    ----------
    rank : int
        This rank; only rank 0 shows anything.
    what : str
        Name of the job.
    total, done : int
        Steps in all, and those that were done before.
    unit : str
        What one step is called.

    Yields
    ------
    callable
        Call it after each step with the word about it.
    """
    around = life.at
    with tqdm(total=total, initial=done, desc=what, unit=unit, disable=rank != 0, **_terminal()) as bar:

        def update(word: str) -> None:
            nonlocal done
            done += 1
            life.at = f"{what}, {unit} {done + 1}"
            bar.set_postfix_str(word, refresh=False)
            bar.update()

        life.at = f"{what}, {unit} {done + 1}"
        try:
            yield update
        finally:
            life.at = around


@contextmanager
def bytes_bar(rank: int, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show bytes done and time left on rank 0; yields what to call with the number of further bytes.

    The bar appears with the first bytes, so that none is in the way of a refusal.
    """
    bar: Any = None

    def update(count: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=rank != 0, **_terminal())
        bar.update(count)

    try:
        yield update
        if bar is not None:
            bar.update(max(0, (total or 0) - bar.n))  # the count of rank 0 was an estimate
    finally:
        if bar is not None:
            bar.close()


def _terminal() -> dict[str, Any]:
    # Under mpirun standard error is a pipe, whose width tqdm cannot ask for.
    return {
        "file": sys.stderr,
        "ncols": min(120, shutil.get_terminal_size((100, 24)).columns),
        "mininterval": _SECONDS_ON_A_TERMINAL if sys.stderr.isatty() else _SECONDS_IN_A_FILE,
    }
