"""``simulate``: a step replayed on a simulated cluster by SimGrid, beside the forecast of the analytic model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from longnet_hpc.errors import ConfigError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.partition import Partition
from longnet_hpc.scaling.config import SimulateConfig
from longnet_hpc.scaling.machine import Machine, load_machine
from longnet_hpc.scaling.model import Forecast, forecast
from longnet_hpc.scaling.plan import in_words, plan, record_of
from longnet_hpc.scaling.platforms import write_hostfile, write_platform
from longnet_hpc.scaling.traces import count_messages, rank_trace
from longnet_hpc.words import plural

__all__ = ["Simulated", "replay", "simulate", "why_not"]

_MOST_MESSAGES = 1_500_000
"""Messages of a step that are replayed; SimGrid takes some 15 to 150 microseconds for each, more on many ranks."""
_MOST_RANKS = 512
"""Ranks that are replayed; the platform has a route for each pair of them."""
_MOST_SECONDS = 1800
"""Time that a replay may take before it is given up, in seconds."""
_SETTINGS = (
    # Latency and rate of the machine file as they are: no factors that were fitted to Ethernet, no limit by TCP's
    # windows, no acknowledgements on the way back. Messages share links evenly.
    *("network/model:CM02", "network/TCP-gamma:0", "network/crosstraffic:0"),
    *("network/latency-factor:1", "network/bandwidth-factor:1", "network/weight-S:0"),
    # Messages of any size travel as soon as both sides have named them, as those of a non-blocking exchange do.
    *("smpi/async-small-thresh:0", "smpi/send-is-detached-thresh:0"),
    # All messages of a collective at once, as MPICH and Open MPI do it without blocking.
    "smpi/alltoallv:ompi_basic_linear",
    # Nothing is measured on this machine.
    "smpi/host-speed:1Gf",
)


@dataclass(frozen=True)
class Simulated:
    """What a replay of a step came to."""

    seconds: float
    """Of the step."""
    compute_seconds: float
    """Computing of the rank that computes most."""
    wait_seconds: float
    """Of that rank, posting messages of exchanges of attention, and waiting for them."""
    gradient_seconds: float
    """Of that rank, the sum of the gradients; waiting for slower ranks included."""
    replay_seconds: float
    """What the replay itself took."""
    messages: int
    """Messages that were sent, of all ranks."""


def simulate(config: SimulateConfig) -> None:
    """Replay a step on each number of ranks, and print a table or write records. Not collective.

    Parameters
    ----------
    config : SimulateConfig
        What to run, and where.

    Raises
    ------
    ConfigError
        If SimGrid is not installed or fails, or the machine does not exist, or its file is wrong.
    OSError
        If a file cannot be written.
    """
    if config.machine == "list":
        plan(config)
        return
    machine = load_machine(config.machine)
    smpirun = find_smpirun()
    to_stdout = str(config.output) == "-"
    points, records = [], []
    for ranks in sorted(set(config.ranks)):
        one = forecast(config, machine, ranks)
        reason = why_not(config, ranks)
        simulated = None
        if reason is None:
            simulated = replay(config, machine, ranks, smpirun)
            records.append(_record(config, one, simulated))
        else:
            print(f"{ranks:,} ranks: {reason}; the forecast stands alone", file=sys.stderr, flush=True)
        points.append((one, simulated))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if to_stdout:
        sys.stdout.write(lines)
        return
    print("\n".join(_in_words(config, machine, points)))
    if config.output is not None and records:
        with naming_errors(f"cannot write {config.output}"):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(config.output, lambda partial: partial.write_text(lines))
        print(f"{config.output}: {plural(len(records), 'record')}")


def find_smpirun() -> str:
    """Return the path of SimGrid's smpirun.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found = shutil.which("smpirun")
    if found is None:
        raise ConfigError("simulate needs SimGrid's smpirun, which is not on the PATH: apt-get install libsimgrid-dev")
    return found


def why_not(config: SimulateConfig, ranks: int) -> str | None:
    """Return why a step is not replayed, in a few words, or None."""
    if config.stream:
        return "a stream, chunk by chunk, is not replayed"
    if ranks > _MOST_RANKS:
        return f"at most {_MOST_RANKS:,} ranks are replayed"
    messages = count_messages(config, ranks)
    if messages > _MOST_MESSAGES:
        return f"a step has {messages:,} messages, and at most {_MOST_MESSAGES:,} are replayed"
    return None


def replay(config: SimulateConfig, machine: Machine, ranks: int, smpirun: str) -> Simulated:
    """Replay a step on a simulated cluster.

    Parameters
    ----------
    config : SimulateConfig
        Model and step; no stream.
    machine : Machine
        Where it runs.
    ranks : int
        Number of ranks.
    smpirun : str
        SimGrid's program.

    Raises
    ------
    ConfigError
        If SimGrid fails.
    OSError
        If a file cannot be written.
    """
    per_node = min(ranks, config.ranks_per_node or machine.devices_per_node)
    topology: Literal["fat-tree", "dragonfly"] = machine.topology if config.topology == "auto" else config.topology
    partition = Partition.even(config.seq_len, ranks)
    with _folder(config.keep_files, ranks) as folder:
        with naming_errors(f"cannot write {folder}"):
            write_platform(folder / "platform.xml", machine, ranks, per_node, topology)
            write_hostfile(folder / "hosts", ranks)
            for rank in range(ranks):
                with (folder / f"trace{rank}").open("w", encoding="utf-8") as stream:
                    stream.writelines(rank_trace(config, machine, partition, rank, per_node))
            (folder / "traces").write_text("".join(f"trace{rank}\n" for rank in range(ranks)))
        return replace(run_smpirun(smpirun, folder, ranks), messages=count_messages(config, ranks))


def run_smpirun(smpirun: str, folder: Path, ranks: int) -> Simulated:
    """Replay the traces of a folder, ``traces`` on ``hosts`` of ``platform.xml``; leaves ``output`` in it.

    Raises
    ------
    ConfigError
        If SimGrid fails, or takes too long.
    """
    command = [
        # Names without a folder, in which there may be blanks.
        *(smpirun, "-np", str(ranks), "-platform", "platform.xml", "-hostfile", "hosts", "-replay", "traces"),
        *(f"--cfg={setting}" for setting in _SETTINGS),
        *("--log=smpi_replay.thres:verbose", "--log=xbt_cfg.thres:warning", "--log=root.fmt:%m%n"),
    ]
    started = time.monotonic()
    output = folder / "output"
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, process_group=0
        )
        try:
            status = process.wait(_MOST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"smpirun was given up after {_MOST_SECONDS} seconds, {ranks} ranks") from error
        finally:
            if process.returncode is None:  # given up or interrupted; it is a script, and the simulator is its child
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds, kinds = _read(output)
    if status != 0 or seconds is None:
        with output.open(encoding="utf-8", errors="replace") as stream:
            said = [line.strip() for line in stream if not _ACTION.match(line)]
        words = next((line for line in said if "CRITICAL" in line or "rror" in line), said[-1] if said else "nothing")
        raise ConfigError(f"smpirun failed with status {status} on {ranks} ranks and said: {words[:200]}")
    most = max(kinds.values(), key=lambda kind: kind["compute"])
    return Simulated(seconds, most["compute"], most["wait"], most["alltoallv"], time.monotonic() - started, messages=0)


_ACTION = re.compile(r"(\d+) (compute|wait|alltoallv|sleep|isend|irecv)\b.* ([0-9.]+)$")
"""A line of the output: rank, action, what it was told, and the simulated seconds that it took."""
_TOTAL = re.compile(r"Simulation time ([0-9.]+)")


def _read(output: Path) -> tuple[float | None, dict[int, dict[str, float]]]:
    """Return the simulated seconds of a step, and of each rank by action; posting belongs to what is posted."""
    total: float | None = None
    kinds: dict[int, dict[str, float]] = {}
    posting: dict[int, float] = {}
    with output.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if found := _ACTION.match(line):
                rank, action, seconds = int(found[1]), found[2], float(found[3])
                kind = kinds.setdefault(rank, dict.fromkeys(("compute", "wait", "alltoallv"), 0.0))
                if action == "sleep":
                    posting[rank] = seconds
                else:
                    action = "wait" if action in ("isend", "irecv") else action
                    kind[action] += seconds + posting.pop(rank, 0.0)
            elif found := _TOTAL.search(line):
                total = float(found[1])
    return total, kinds


@contextmanager
def _folder(keep: Path | None, ranks: int) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="simulate-") as name:
            yield Path(name)
    else:
        folder = (keep / f"{ranks}-ranks").absolute()
        with naming_errors(f"cannot make {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _record(config: SimulateConfig, one: Forecast, simulated: Simulated) -> dict[str, Any]:
    seconds = max(simulated.seconds, one.input_seconds)  # reading goes on beside
    replayed = replace(
        one,
        seconds=seconds,
        compute_seconds=simulated.compute_seconds,
        wait_seconds=simulated.wait_seconds,
        gradient_seconds=simulated.gradient_seconds,
        efficiency=one.efficiency * one.seconds / seconds,
    )
    record = record_of(
        "simulate",
        config,
        replayed,
        forecast_seconds=one.seconds,
        simulated_over_forecast=seconds / one.seconds,
        messages=simulated.messages,
        replay_seconds=simulated.replay_seconds,
    )
    del record["results"]["exchange_seconds"]  # a replay does not tell it
    return record


def _in_words(config: SimulateConfig, machine: Machine, points: list[tuple[Forecast, Simulated | None]]) -> list[str]:
    topology = machine.topology if config.topology == "auto" else config.topology
    lines = in_words(config, machine, [one for one, _ in points])
    lines += [
        "",
        f"replayed by SimGrid on a {topology}, and this forecast:",
        "  ranks   messages                  step   ratio               compute                 waits"
        "              grad sum  replay took",
    ]
    for one, simulated in points:
        if simulated is None:
            lines.append(f"{one.ranks:7,}{'-':>11}{_both(math.nan, one.seconds)}")
            continue
        seconds = max(simulated.seconds, one.input_seconds)
        lines.append(
            f"{one.ranks:7,}{simulated.messages:11,}{_both(seconds, one.seconds)}{seconds / one.seconds:8.3f}"
            f"{_both(simulated.compute_seconds, one.compute_seconds)}{_both(simulated.wait_seconds, one.wait_seconds)}"
            f"{_both(simulated.gradient_seconds, one.gradient_seconds)}{simulated.replay_seconds:11.1f} s"
        )
    if machine.overlap < 1 and any(simulated is not None for _, simulated in points):
        lines.append(
            "The replay's compute includes driving exchanges that it hides, which the forecast counts as waits."
        )
    return lines


def _both(simulated: float, predicted: float) -> str:
    unit, scale = ("s", 1.0) if predicted >= 1 else ("ms", 1e3)
    first = "-" if math.isnan(simulated) else f"{simulated * scale:.4g}"
    return f"{f'{first} / {predicted * scale:.4g} {unit}':>22}"
