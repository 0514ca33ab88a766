"""Signs of life of this rank, so cheap that they are always given, and where its threads are; for the watchdog."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from typing import Self

__all__ = ["Life", "life", "main_place", "stacks"]


class Life:
    """What this rank's work last showed of itself.

    Attributes
    ----------
    progress : int
        Grows where work advances; only that it changes has a meaning.
    at : str
        How far the job is, for people; empty before the first step.
    waits_for : str or None
        What only other ranks can bring to its end, while nothing but waiting for it is done.
    """

    __slots__ = ("at", "progress", "waits_for")

    def __init__(self) -> None:
        self.progress = 0
        self.at = ""
        self.waits_for: str | None = None

    def waiting_for(self, what: str) -> Self:
        """Return a context in which this rank waits for others; not to be nested."""
        self.progress += 1
        self.waits_for = what
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.waits_for = None
        self.progress += 1


life = Life()
"""That of this process."""


def main_place() -> str:
    """Return the innermost function of this package that the main thread is in, with file and line."""
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith("longnet_hpc"):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def stacks() -> str:
    """Return the Python stacks of all threads but the one that asks, the main one first."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    order = sorted(frames.keys() - {threading.get_ident()}, key=lambda its: its != threading.main_thread().ident)
    return "".join(f"{names.get(its, 'a thread')}:\n{''.join(traceback.format_stack(frames[its]))}" for its in order)
