"""From the words of the command line to a config: preset, then config file, then the command line's own values."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from longnet_hpc import __version__
from longnet_hpc.config import OPTIMIZERS, EvalConfig, GenerateConfig, PrepareConfig, TrainConfig
from longnet_hpc.config_file import CONFIG_NAME, from_table, read_toml
from longnet_hpc.errors import CheckpointError, ConfigError
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.scaling.config import BenchConfig, CalibrateConfig, PlanConfig, ReportConfig, SimulateConfig

__all__ = ["parse"]

_PROGRAM = "python -m longnet_hpc.run"
_COMMANDS: dict[str, Any] = {
    "main": TrainConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "generate": GenerateConfig,
    "plan": PlanConfig,
    "simulate": SimulateConfig,
    "calibrate": CalibrateConfig,
    "bench": BenchConfig,
    "report": ReportConfig,
}
_TAKE_WORDS = ("prepare", "report")
"""Commands whose words may be more than options."""
_MAIN_HELP = f"""LongNet over sequences that span MPI ranks: alone, under mpirun, or under srun.

Without a command it runs the main job: prepare Python's standard library as a corpus, train, evaluate on the files that
the training left out (or, with --corpus, on that same corpus), and say where the results lie. The commands are

    {_PROGRAM} prepare: turn text into a corpus file

    {_PROGRAM} train: train a model, with the options below

    {_PROGRAM} eval: measure a trained model

    {_PROGRAM} generate: go on with a text by a trained model

    {_PROGRAM} plan: forecast memory, time and traffic of a run on a machine that need not be here

    {_PROGRAM} simulate: replay a step on a simulated cluster

    {_PROGRAM} calibrate: measure this machine for plan and simulate

    {_PROGRAM} bench: measure how runs scale

    {_PROGRAM} report: make a page of records

Each explains its options with --help; --version tells the version. The main job has the options of train:"""
_PATTERN_LISTS = ("--model.segment-lengths", "--model.dilation-rates")
_GOING_ON = {"train": "--resume", "eval": "--checkpoint", "generate": "--checkpoint"}
"""The option by which a command takes the folder of a run."""


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The options that decide what the others start from."""

    config: Path | None = None
    resume: Path | None = None
    preset: str | None = None


def parse(words: Sequence[str], *, console: bool) -> tuple[str, Any]:
    """Return the command and its config.

    Parameters
    ----------
    words : sequence of str
        The command line without the program.
    console : bool
        Whether this process prints help.

    Returns
    -------
    tuple of str and dataclass
        The command, ``main`` if there is none, and its config.

    Raises
    ------
    ConfigError
        If a word, key or value is wrong.
    CheckpointError
        If the run to go on with has no config.
    SystemExit
        With code 0, after the help or the version.
    """
    if "--version" in words:
        if console:
            print(f"longnet_hpc {__version__}")
        raise SystemExit(0)
    command = words[0] if words and words[0] in _COMMANDS else "main"
    rest = list(words[1:] if words and words[0] == command else words)
    if rest and not rest[0].startswith("-") and command not in _TAKE_WORDS:
        raise ConfigError(_stray_word(command, rest[0]))
    base, _ = _tyro(_Base, rest, show=False, return_unknown_args=True, add_help=False)
    default = _start_from(base, _COMMANDS[command]())
    asks_help = "-h" in rest or "--help" in rest
    config = _tyro(
        type(default),
        rest,
        default=default,
        prog=_PROGRAM if command == "main" else f"{_PROGRAM} {command}",
        description=_MAIN_HELP if command == "main" else None,
        show=console and asks_help,
    )
    lists = {word.partition("=")[0].replace("_", "-") for word in rest} & set(_PATTERN_LISTS)
    if lists and getattr(config, "geometric", None) is not None:
        raise ConfigError(
            f"geometric makes the pattern, so {min(lists)} has no say; give one of both, "
            "or --geometric None against that of a config file"
        )
    return command, config


def _stray_word(command: str, word: str) -> str:
    """Say what is wrong with a first word that is neither a command nor an option."""
    there = Path(word).exists()
    if command == "main":
        hint = f"; did you mean train --resume {word} or eval --checkpoint {word}?" if there else ""
        commands = ", ".join(name for name in _COMMANDS if name != "main")
        return f"command {word!r} does not exist, must be one of {commands}, or none{hint}"
    hint = f"; did you mean {_GOING_ON[command]} {word}?" if there and command in _GOING_ON else ""
    return f"{command} takes options only, got {word!r}{hint}"


def _start_from(base: _Base, default: Any) -> Any:
    """Return the default config that the command line's own values are laid over."""
    if not hasattr(default, "preset"):
        return from_table(read_toml(base.config), default) if base.config else default
    path = base.config
    if base.resume is not None and path is None:
        path = base.resume / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"{base.resume} is not the folder of a run: it has no {CONFIG_NAME}")
    table = read_toml(path) if path else {}
    preset: Any = base.preset
    if preset is None:
        preset = from_table({key: table[key] for key in ("preset",) if key in table}, default).preset
    else:
        table = {key: value for key, value in table.items() if key not in ("model", "preset", "geometric")}
    start: dict[str, Any] = {"preset": preset, "model": LongNetConfig.preset(preset)}
    if isinstance(default, TrainConfig):
        start["optimizer"] = OPTIMIZERS[preset]
    return from_table(table, replace(default, **start))


def _tyro(config: Any, words: Sequence[str], *, show: bool, **options: Any) -> Any:
    """Parse by tyro, whose message in a box becomes one line.

    Standard output is hidden unless help is to be shown: tyro colours its messages if that is a terminal.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box), nullcontext() if show else redirect_stdout(io.StringIO()):
            return tyro.cli(config, args=words, **options)
    except BrokenPipeError:  # the reader of the help has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as end:
        if end.code in (0, None):
            raise
        message = _one_line(box.getvalue())
        raise ConfigError(message.removeprefix(f"{getattr(config, '__name__', '')}: ")) from None


def _one_line(box: str) -> str:
    """Return what tyro's box of an error says between its title and the next rule."""
    said: list[str] = []
    for line in box.splitlines()[1:]:
        content = line.strip(" │|")
        if content.strip("─-╰╯"):
            said.append(content)
        elif said:
            break
    return " ".join(said).removeprefix("Error parsing ") or "the command line is wrong; try --help"
