"""The progress bar of a job: on rank 0, on standard error."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

__all__ = ["bytes_bar", "steps_bar"]


@contextmanager
def steps_bar(rank: int, what: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show steps done, time left, and a word about the last step.

    Parameters
    ----------
    rank : int
        This rank; only rank 0 shows anything.
    what : str
        Name of the job.
    total, done : int
        Steps in all, and those that were done before.

    Yields
    ------
    callable
        Call it after each step with the word about it.
    """
    with tqdm(
        total=total, initial=done, desc=what, unit="step", disable=rank != 0, mininterval=0.5, **_terminal()
    ) as bar:

        def update(word: str) -> None:
            bar.set_postfix_str(word, refresh=False)
            bar.update()

        yield update


@contextmanager
def bytes_bar(rank: int, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show bytes done and time left on rank 0; yields what to call with the number of further bytes."""
    with tqdm(
        total=total, desc=what, unit="B", unit_scale=True, disable=rank != 0, mininterval=0.5, **_terminal()
    ) as bar:

        def update(count: int) -> None:
            bar.update(count)

        yield update
        bar.update(max(0, (total or 0) - bar.n))  # the count of rank 0 was an estimate


def _terminal() -> dict[str, object]:
    # Under mpirun standard error is a pipe, whose width tqdm cannot ask for.
    return {"file": sys.stderr, "ncols": min(120, shutil.get_terminal_size((100, 24)).columns)}
