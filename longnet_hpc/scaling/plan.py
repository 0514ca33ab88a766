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
from longnet_hpc.scaling.model import Forecast, forecast

__all__ = ["in_words", "plan", "record_of", "suggestions"]

_MOST_RANKS = 1 << 13
"""How far more ranks are looked for that would be enough."""
_SHORT_CHUNK = 1 << 15
"""A chunk that is as short as makes sense, in tokens."""
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
        print(f"{config.output}: {len(forecasts)} records")


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
        "  ranks  nodes     memory a rank      fits        step      tokens/s   compute   waits  grad sum  efficiency"
        "   received a rank  node hours",
    ]
    for one in forecasts:
        share = [
            f"{100 * part / one.seconds:.0f}%" for part in (one.compute_seconds, one.wait_seconds, one.gradient_seconds)
        ]
        lines.append(
            f"{one.ranks:7,}{one.nodes:7,}{_bytes(one.memory.total):>10} of {_bytes(one.capacity_bytes):>7}"
            f"{'yes' if one.fits else 'NO':>6}{_seconds(one.seconds):>12}{one.tokens / one.seconds:14,.0f}"
            f"{share[0]:>10}{share[1]:>8}{share[2]:>10}{one.efficiency:12.1%}{_bytes(one.bytes_received):>18}"
            f"{one.nodes * one.seconds * config.steps / 3600:12,.1f}"
        )
    last = forecasts[-1]
    parts = (f"{name} {_bytes(size)}" for name, size in last.memory.table().items() if size and name != "total")
    lines += ["", f"memory of a rank, at {last.ranks:,}: {', '.join(parts)}"]
    if last.chunk_len is not None:
        lines.append(f"chunks of {last.chunk_len:,} tokens over all ranks")
    too_few = [one.ranks for one in forecasts if not one.fits]
    if too_few:
        lines.append(f"what would fit on {too_few[-1]:,}:")
        lines += [f"  {line}" for line in suggestions(config, machine, too_few[-1])]
    return lines


def suggestions(config: PlanConfig, machine: Machine, ranks: int) -> list[str]:
    """Return what to change so that a run fits on a number of ranks, from what costs the least time; each forecast."""
    found = []
    for words, changed in _changes(config):
        one = forecast(changed, machine, ranks)
        if one.fits:
            found.append(f"{words}: {_bytes(one.memory.total)} a rank, {_seconds(one.seconds)} a step")
    more = ranks
    while more < min(config.seq_len, _MOST_RANKS):
        more = min(2 * more, config.seq_len)
        one = forecast(config, machine, more)
        if one.fits:
            found.append(f"{more:,} ranks: {_bytes(one.memory.total)} a rank, {_seconds(one.seconds)} a step")
            break
    if not found:
        memory = one.memory
        whole = memory.weights + memory.optimizer + memory.gradients
        found.append(
            f"nothing of this kind: still {_bytes(memory.total)} of {_bytes(one.capacity_bytes)}, of which weights, "
            f"gradients and optimizer, whole on every rank, are {_bytes(whole)}"
        )
    return found


def _changes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Yield what costs memory and can be left out."""
    words = ""
    if not config.half_residual:
        config, words = replace(config, half_residual=True), " --half-residual"
        yield words[1:], config
    if config.task == "train":
        if not config.activation_checkpointing:
            config, words = replace(config, activation_checkpointing=True), words + " --activation-checkpointing"
            yield words[1:], config
        if config.keep_attention:
            words += " --no-keep-attention"
            config = replace(config, keep_attention=False)
            yield words[1:], config
    if not config.stream and config.batch_size == 1:
        yield f"{words} --stream".strip(), replace(config, stream=True)
    elif config.stream and config.chunk_len is not None and config.chunk_len > _SHORT_CHUNK:
        yield f"{words} --chunk-len {_SHORT_CHUNK}".strip(), replace(config, chunk_len=_SHORT_CHUNK)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def _seconds(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:,.1f} min"
