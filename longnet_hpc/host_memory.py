"""What host memory a process may still take: of the node, and of the job that a scheduler has put it in."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_host_memory"]

_ROOT = Path("/")


def free_host_memory() -> int:
    """Return the bytes that this node can give to a process. Not collective.

    What Linux has cached of files counts as free; a job's limit (control groups, versions 1 and 2) counts, too, since
    schedulers kill a job for what is beyond it.
    """
    meminfo = _ROOT / "proc/meminfo"
    if meminfo.is_file():
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(sizes["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    groups = _ROOT / "proc/self/cgroup"
    if not groups.is_file():
        return free
    for line in groups.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            top, names = _ROOT / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = _ROOT / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):  # a limit of any group around it holds as well
            if (folder / names[0]).is_file():
                free = min(free, _left_in(folder, *names))
            if folder == top:
                break
    return max(0, free)


def _left_in(folder: Path, limit_name: str, used_name: str, cached_name: str) -> int:
    """Return what a control group has left, in bytes."""
    limit = (folder / limit_name).read_text().strip()
    if limit == "max":
        return 1 << 63
    cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(cached_name, "0")
    return int(limit) - int((folder / used_name).read_text()) + int(cached)
