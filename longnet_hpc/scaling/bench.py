"""Scaling runs: points of a sweep over ranks, lengths or sizes, timed, checked, and kept as records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from longnet_hpc.comm import agreed, broadcast_object
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import memory_there
from longnet_hpc.config_file import to_table
from longnet_hpc.errors import ConfigError, StoppedError
from longnet_hpc.files import naming_errors
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record, check_record, make_record, read_records, where
from longnet_hpc.scaling.bench_attention import AttentionPoint
from longnet_hpc.scaling.bench_exchange import ExchangePoint, exchange_points
from longnet_hpc.scaling.bench_steps import Steps, StepsPoint, point_model, tolerance
from longnet_hpc.scaling.bench_table import show
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.rounds import rest_until_all, some_ranks
from longnet_hpc.stopping import StopRequest
from longnet_hpc.trace import Trace, current, use

__all__ = ["bench", "points_of"]

_SHORTEST_TOKENS = 8192
"""Shortest sequence of the sweeps over lengths, unless the longest is shorter."""
_OF_THE_SWEEP = ("ranks", "tokens", "max_bytes", "output")
"""Fields that say which points there are, on which none of them depends."""
_OF_THE_PLACE = ("cpu", "cpu_count", "threads", "gpu", "mpi_library", "transport", "ranks_per_node", "versions")
"""What of the ``where`` of a record must be as it is here, that the point need not be measured again."""

Point = dict[str, Any]


class Measured(Protocol):
    """What is timed at a point, on one of its ranks; all methods are collective over these."""

    def take(self, *, timed: bool) -> None:
        """Do a round."""

    def results(self) -> dict[str, Any]:
        """Return what the record says of all rounds, the same on all ranks."""

    def check(self) -> tuple[str, bool]:
        """Return what was checked, and whether it holds on all ranks."""


def bench(config: BenchConfig, launch: Launch) -> list[dict[str, Any]]:
    """Measure all points of a sweep that have no record yet, write their records, and show a table. Collective.

    A point is measured on the first ranks of the launch, while the others rest.

    Parameters
    ----------
    config : BenchConfig
        What to measure.
    launch : Launch
        All ranks.

    Returns
    -------
    list of dict
        The records of all points, those that were there before too, on rank 0; none elsewhere.

    Raises
    ------
    StoppedError
        If SIGTERM or SIGUSR1 came: points that have records are not measured again by another call.
    ConfigError
        If a point cannot be, or if a check failed, after all records have been written.
    LongNetError or OSError
        If something else is wrong; the same on all ranks.
    """
    path = config.output / f"{config.sweep}.jsonl"
    found: list[dict[str, Any]] = []
    points: list[Point] = []
    with agreed(launch.comm), naming_errors(f"cannot write records to {config.output}"):
        points = points_of(config, launch)
        if launch.rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            found = _found(path, config, launch, points)
    done = broadcast_object(launch.comm, [record["what"]["config"]["point"] for record in found])
    missing = [point for point in points if point not in done]
    if launch.rank == 0 and done:
        logging.getLogger("longnet_hpc").info(
            "%s has %s of %s points of this config: they are not measured again", path, len(done), len(points)
        )
    sweep = _Sweep(config, launch, path, found)
    if missing:
        sweep.run(missing)
    records = sorted(sweep.records, key=lambda record: points.index(record["what"]["config"]["point"]))
    failed = broadcast_object(launch.comm, [record["what"]["config"]["point"] for record in sweep.failed])
    if launch.rank == 0:
        show(config.sweep, records, path)
    if failed:
        raise ConfigError(
            "results are wrong, so their times mean nothing: " + "; ".join(_in_words(point) for point in failed)
        )
    return records


def points_of(config: BenchConfig, launch: Launch) -> list[Point]:
    """Return the points of a sweep, in the order in which they are shown; not collective.

    Raises
    ------
    ConfigError
        If there are none, or one has more ranks than run, fewer tokens than ranks, or no memory for its tokens.
    """
    powers = [1 << power for power in range(launch.size.bit_length()) if 1 << power < launch.size]
    every = [*powers, launch.size] if config.sweep in ("strong", "weak", "exchange") else [launch.size]
    counts = sorted(set(config.ranks or every))
    if counts[-1] > launch.size:
        raise ConfigError(f"ranks must be at most the {launch.size} that run, got {counts[-1]}")
    if config.sweep == "exchange":
        counts = [count for count in counts if count > 1]
        if not counts:
            raise ConfigError("an exchange needs at least 2 ranks: use mpirun or srun")
        return exchange_points(counts, config.max_bytes, launch)
    if config.sweep == "strong":
        points = [{"ranks": count, "tokens": config.tokens} for count in counts]
    elif config.sweep == "weak":
        points = [{"ranks": count, "tokens": count * config.tokens} for count in counts]
    else:
        shortest = min(_SHORTEST_TOKENS, config.tokens)
        lengths = [shortest << power for power in range((config.tokens // shortest).bit_length())]
        lengths += [config.tokens] * (lengths[-1] < config.tokens)
        points = [{"ranks": count, "tokens": length} for count in counts for length in lengths]
    for point in points:
        if point["tokens"] < point["ranks"]:
            raise ConfigError(f"tokens must be at least 1 a rank, got {point['tokens']} on {point['ranks']} ranks")
        _check_memory(config, launch, point)
    return points


def _check_memory(config: BenchConfig, launch: Launch, point: Point) -> None:
    """Raise ConfigError if the input of each layer alone exceeds all memory of the device, before any of it is made."""
    kept = config.model.layers if config.task == "train" and config.sweep != "attention" else 1
    itemsize = 2 if config.half_residual else 4
    needed = point["tokens"] // point["ranks"] * config.batch_size * config.model.embed_dim * kept * itemsize
    there = memory_there(launch.device)
    if needed > there:
        raise ConfigError(
            f"{_in_words(point)} need more than {needed / 1e9:,.0f} GB a rank, "
            f"{launch.device.type} has {there / 1e9:,.0f} GB"
        )


@dataclass
class _Sweep:
    """A sweep under way."""

    config: BenchConfig
    launch: Launch
    path: Path
    records: list[dict[str, Any]]
    """On rank 0."""

    def __post_init__(self) -> None:
        self.failed: list[dict[str, Any]] = []
        self._steps = Steps(self.config, self.launch.device)

    def run(self, points: Sequence[Point]) -> None:
        """Measure points and write their records. Collective over all ranks."""
        config, launch = self.config, self.launch
        with ExitStack() as stack:
            if current() is None:
                stack.enter_context(use(Trace(on_gpu=launch.device.type == "cuda")))
            rounds = len(points) * (config.warmup + config.repeats)
            self._update = stack.enter_context(steps_bar(launch.rank, f"bench {config.sweep}", rounds, unit="round"))
            self._stop = stack.enter_context(StopRequest())
            self._launch_of = stack.enter_context(some_ranks(launch, [point["ranks"] for point in points]))
            together = config.interleave and config.sweep in ("strong", "weak")
            for group in [points] if together else [[point] for point in points]:
                self._measure(group)

    def _measure(self, points: Sequence[Point]) -> None:
        """Measure some points, their rounds in turn, and write their records. Collective over all ranks.

        Raises
        ------
        StoppedError
            If a rank was told to stop; these points then have no records.
        """
        config, launch = self.config, self.launch
        its: list[Measured | None] = []
        for point in points:
            some = self._launch_of(point["ranks"])
            measured: Measured | None = None
            with agreed(launch.comm):
                measured = None if some is None else self._make(point, some)
            its.append(measured)
        for number in range(config.warmup + config.repeats):
            for point, measured in zip(points, its, strict=True):
                if self._stop.asked(launch.comm):
                    raise StoppedError(f"left before {_in_words(point)}; the same command goes on with {self.path}")
                if measured is not None:
                    measured.take(timed=number >= config.warmup)
                rest_until_all(launch)
                self._update(_in_words(point))
        for point, measured in zip(points, its, strict=True):
            record = None
            if measured is not None:
                results, check = measured.results(), measured.check()
                if launch.rank == 0:
                    record = self._record(point, results, check)
            rest_until_all(launch)
            with agreed(launch.comm), naming_errors(f"cannot write records to {self.path}"):
                if record is not None:
                    append_record(self.path, record)
                    self.records.append(record)
                    self.failed += [] if record["check"]["passed"] else [record]

    def _make(self, point: Point, launch: Launch) -> Measured:
        if self.config.sweep == "exchange":
            return ExchangePoint(launch, point)
        if self.config.sweep == "attention":
            return AttentionPoint(self.config, launch, point["tokens"])
        return StepsPoint(self._steps, launch, point["tokens"])

    def _record(self, point: Point, results: dict[str, Any], check: tuple[str, bool]) -> dict[str, Any]:
        config, (said, passed) = self.config, check
        first = min(self.records, key=_ranks_of, default=None)
        if config.sweep == "strong" and first is not None:
            ours, theirs = (its["loss_nats_per_token"] for its in (results, first["results"]))
            said += f", and that of {_in_words(first['what']['config']['point'])}"
            passed = passed and abs(ours - theirs) <= _tolerance(config, self.launch) * theirs
        return make_record(
            f"bench {config.sweep}",
            config=_table(config, point),
            results=results,
            place=_place(self.launch, point),
            check=(said, passed),
            warmup=config.warmup,
            repeats=config.repeats,
            statistic="median of the slowest rank, and its 95% confidence interval",
        )


def _ranks_of(record: dict[str, Any]) -> int:
    ranks: int = record["what"]["config"]["point"]["ranks"]
    return ranks


def _tolerance(config: BenchConfig, launch: Launch) -> float:
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and launch.device.type == "cuda")
    return tolerance(torch.bfloat16 if half else torch.float32)


def _table(config: BenchConfig, point: Point) -> dict[str, Any]:
    """Return all that was chosen for a point, with the model that it has."""
    model: LongNetConfig = config.model
    if "tokens" in point:
        model = point_model(config, point["tokens"])
    return to_table(config) | {"model": to_table(model), "point": point}


def _place(launch: Launch, point: Point) -> dict[str, Any]:
    """Return where a point is measured, as the ``where`` of its record."""
    ranks = {"ranks": point["ranks"], "ranks_per_node": min(point["ranks"], launch.node_size)}
    return {**where(launch), **ranks, "threads": torch.get_num_threads()}


def _found(path: Path, config: BenchConfig, launch: Launch, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the records of points that were measured before, of the same config on the same kind of machine."""
    found: dict[int, dict[str, Any]] = {}
    for record in read_records(path) if path.exists() else []:
        try:
            check_record(record)
        except ConfigError:
            continue  # it is not ours, and nothing is lost if it stays
        its, place = record["what"]["config"], record["where"]
        point = its.get("point")
        if point not in points or not record["check"]["passed"]:
            continue
        wanted, here = _table(config, point), _place(launch, point)
        fields = (its.keys() | wanted.keys()).difference(_OF_THE_SWEEP)
        if all(its.get(key) == wanted.get(key) for key in fields) and all(
            place.get(key) == here[key] for key in _OF_THE_PLACE
        ):
            found[points.index(point)] = record
    return [found[number] for number in sorted(found)]


def _in_words(point: Point) -> str:
    """Return a point in a few words."""
    parts = [f"{point['ranks']} rank{'s' if point['ranks'] > 1 else ''}"]
    if "tokens" in point:
        parts.append(f"{point['tokens']:,} tokens")
    if "operation" in point:
        parts.append(f"{point['operation']} ({point['transport']}) of {point['bytes']:,} bytes")
    return ", ".join(parts)
