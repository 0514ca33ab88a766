"""A rank's process, as the other ranks know it."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Process"]


@dataclass(frozen=True)
class Process:
    """A process on some host."""

    host: str
    pid: int
    birth: str
    """When it began, which tells it from a later one of the same pid; empty where the system does not say."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Return the one of this host that has a pid."""
        return cls(socket.gethostname(), pid, _birth(pid))

    def kill(self) -> None:
        """Send SIGKILL, which also ends a process that is stopped; nothing happens if it is gone or on another host."""
        if self.host == socket.gethostname() and self.birth and self.birth == _birth(self.pid):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _birth(pid: int) -> str:
    """Return when a process began, in ticks since the system did; empty if there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
