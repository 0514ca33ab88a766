"""``plan``: what a run will need and take, before any node is asked for, as a table or records."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from longnet_hpc.config_file import to_table
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.record import make_record, where
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import Machine, load_machine, machine_names
from longnet_hpc.scaling.memory import IN_HOST_MEMORY
from longnet_hpc.scaling.model import Forecast, forecast
from longnet_hpc.words import bytes_in_words, plural, seconds_in_words

__all__ = ["in_words", "plan", "record_of", "suggestions"]

_MOST_RANKS = 1 << 13
"""How far more ranks are looked for that would be enough."""
_SHORT_CHUNK = 1 << 15
"""A chunk that is as short as makes sense, in tokens."""
_SURE = 0.95
"""Share of the memory that a forecast may reach and still be sure to fit."""
_CHECK = "memory and time are sums of parts that are not negative"


def plan(config: PlanConfig) -> None:
    """Forecast a run on each number of ranks, and print a table or write records. Not collective.

    Parameters
    ----------
    config : PlanConfig
        What to run, and where.

    Raises
    ------
    ConfigError
        If the machine does not exist, or its file is wrong.
    OSError
        If the output cannot be written.
    """
    if config.machine == "list":
        for name in machine_names():
            print(f"{name:>12}  {load_machine(name).name}")
        return
    machine = load_machine(config.machine)
    forecasts = [forecast(config, machine, ranks) for ranks in sorted(set(config.ranks))]
    lines = "".join(json.dumps(record_of("plan", config, one)) + "\n" for one in forecasts)
    if config.output is None:
        print("\n".join(in_words(config, machine, forecasts)))
    elif str(config.output) == "-":
        sys.stdout.write(lines)
    else:
        with naming_errors(f"cannot write {config.output}"):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            replace_file(config.output, lambda partial: partial.write_text(lines))
        print(f"{config.output}: {plural(len(forecasts), 'record')}")


def record_of(name: str, config: PlanConfig, one: Forecast, **results: Any) -> dict[str, Any]:
    """Return the record of a forecast, with more results if there are."""
    point = {"ranks": one.ranks, "tokens": one.tokens}
    return make_record(
        name,
        config={**to_table(config), "point": point},
        results={**one.results(config.steps), **results},
        place=where(),
        check=(_CHECK, min(one.memory.table().values()) >= 0 and one.wait_seconds >= 0),
        kind="modelled",
    )


def in_words(config: PlanConfig, machine: Machine, forecasts: list[Forecast]) -> list[str]:
    """Return the lines of a table, and what to change where a run does not fit."""
    model = config.model
    what = "training step" if config.task == "train" else "forward pass"
    walked = ", walked through in chunks" if config.stream else ""
    numbers = "measured" if machine.numbers == "measured" else "partly from data sheets"
    lines = [
        f"forecast of a {what} of {model.parameter_count:,} parameters over {config.batch_size} x {config.seq_len:,} "
        f"tokens{walked}",
        f"on {machine.name} (numbers {numbers})",
        "",
        "  ranks  nodes      memory a rank  fits     step       tokens/s compute  waits grad sum efficiency   received"
        " node hours",
    ]
    for one in forecasts:
        share = [
            f"{100 * part / one.seconds:.0f}%" for part in (one.compute_seconds, one.wait_seconds, one.gradient_seconds)
        ]
        lines.append(
            f"{one.ranks:7,}{one.nodes:7,}{bytes_in_words(one.memory.total):>9} of "
            f"{bytes_in_words(one.capacity_bytes):>6}{_fits(one):>6}"
            f"{seconds_in_words(one.seconds):>9}{one.tokens / one.seconds:15,.0f}"
            f"{share[0]:>8}{share[1]:>7}{share[2]:>9}{one.efficiency:11.1%}"
            f"{bytes_in_words(one.bytes_received):>11}{one.nodes * one.seconds * config.steps / 3600:11,.1f}"
        )
    if any(_fits(one) == "tight" for one in forecasts):
        lines.append("tight: it fits by less than forecasts of memory may be wrong, a twentieth")
    if len(forecasts) > 1 or forecasts[0].ranks > 1:
        lines.append("received: a rank, of others, in a step; node hours: of all steps")
        lines.append("efficiency: the arithmetic of a step, spread evenly and with nothing besides, over its time")
    last = forecasts[-1]
    its = {name: size for name, size in last.memory.table().items() if size and name not in ("total", *IN_HOST_MEMORY)}
    parts = ", ".join(f"{name} {bytes_in_words(size)}" for name, size in its.items())
    lines += ["", f"memory of a rank, at {last.ranks:,}: {parts}"]
    if last.memory.host:
        lines.append(f"besides, in host memory or a file, a rank: {bytes_in_words(last.memory.host)}")
    if last.memory.host_checkpoint:
        copied = bytes_in_words(last.memory.host_checkpoint)
        lines.append(f"besides, in host memory while a checkpoint is written, rank 0: {copied}")
    if last.chunk_len is not None:
        chosen = f"; give --chunk-len {last.chunk_len} to the run, which chooses so for its own memory"
        lines.append(
            f"chunks of a stream, at {last.ranks:,}: {last.chunk_len:,} tokens over all ranks"
            f"{chosen if config.chunk_len is None else ''}"
        )
    too_few = [one.ranks for one in forecasts if not one.fits]
    if too_few:
        lines.append(f"what would fit on {too_few[-1]:,}:")
        lines += [f"  {line}" for line in suggestions(config, machine, too_few[-1])]
    return lines


def _fits(one: Forecast) -> str:
    if not one.fits:
        return "NO"
    return "tight" if one.memory.total > _SURE * one.capacity_bytes else "yes"


def suggestions(config: PlanConfig, machine: Machine, ranks: int) -> list[str]:
    """Return what to change so that a run fits on a number of ranks, from what costs the least time; each forecast."""
    found = []
    one = forecast(config, machine, ranks)
    for words, changed in _changes(config, ranks, on_gpu=machine.device == "cuda"):
        one = forecast(changed, machine, ranks)
        if one.fits:
            found.append(f"{words}: {_what_it_takes(one)}")
    with_least = one  # all changes made
    more, most = ranks, min(config.chunk_len or config.seq_len, config.seq_len, _MOST_RANKS)
    while more < most:
        more = min(2 * more, most)
        one = forecast(config, machine, more)
        if one.fits:
            found.append(f"{more:,} ranks: {_what_it_takes(one)}")
            break
    if not found:
        one = min(with_least, one, key=lambda one: one.memory.total)
        memory = one.memory
        whole = memory.weights + memory.optimizer + memory.gradients
        found.append(
            f"nothing of this kind: still {bytes_in_words(memory.total)} of {bytes_in_words(one.capacity_bytes)}, of "
            f"which weights, gradients and optimizer are {bytes_in_words(whole)}, the former two whole on every rank"
        )
    return found


def _what_it_takes(one: Forecast) -> str:
    return f"{bytes_in_words(one.memory.total)} a rank, {seconds_in_words(one.seconds)} a step"


def _changes(config: PlanConfig, ranks: int, *, on_gpu: bool) -> Iterator[tuple[str, PlanConfig]]:
    """Yield what costs memory and can be left out."""
    words = ""
    if not config.half_residual and on_gpu:
        config, words = replace(config, half_residual=True), " --half-residual"
        yield words[1:], config
    if config.task == "train":
        if not config.shard_optimizer and ranks > 1:
            config, words = replace(config, shard_optimizer=True), words + " --shard-optimizer"
            yield words.strip(), config
        if not config.activation_checkpointing:
            config, words = replace(config, activation_checkpointing=True), words + " --activation-checkpointing"
            yield words[1:], config
        if config.keep_attention:
            words += " --no-keep-attention"
            config = replace(config, keep_attention=False)
            yield words[1:], config
    if not config.stream and config.batch_size == 1:
        yield f"{words} --stream".strip(), replace(config, stream=True)
    shorter = max(_SHORT_CHUNK, ranks)
    if config.stream and config.chunk_len is not None and config.chunk_len > shorter:
        yield f"{words} --chunk-len {shorter}".strip(), replace(config, chunk_len=shorter)
