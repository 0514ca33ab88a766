"""From the words of the command line to a config: preset, then config file, then the command line's own values."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from longnet_hpc.config import EvalConfig, LongNetConfig, PrepareConfig, TrainConfig
from longnet_hpc.config_file import CONFIG_NAME, from_table, read_toml
from longnet_hpc.errors import CheckpointError, ConfigError

__all__ = ["parse"]

_PROGRAM = "python -m longnet_hpc.run"
_COMMANDS: dict[str, Any] = {"main": TrainConfig, "prepare": PrepareConfig, "train": TrainConfig, "eval": EvalConfig}
_MAIN_HELP = f"""LongNet over sequences that span MPI ranks: alone, under mpirun, or under srun.

Without a command it runs the main job: prepare Python's standard library as a corpus, train, evaluate, and say where
the results lie. The commands are

    {_PROGRAM} prepare: turn text into a corpus file

    {_PROGRAM} train: train a model, with the options below

    {_PROGRAM} eval: measure a trained model

Each explains its options with --help. The main job has the options of train:"""


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
        With code 0, after the help.
    """
    command = words[0] if words and words[0] in _COMMANDS else "main"
    rest = list(words[1:] if words and words[0] == command else words)
    if rest and not rest[0].startswith("-") and command != "prepare":
        raise ConfigError(f"command {rest[0]!r} does not exist, must be prepare, train, eval or none")
    default = _COMMANDS[command]()
    asks_help = "-h" in rest or "--help" in rest
    if not asks_help:
        base, _ = _tyro(_Base, rest, show=False, return_unknown_args=True, add_help=False)
        default = _start_from(base, default)
    config = _tyro(
        type(default),
        rest,
        default=default,
        prog=_PROGRAM if command == "main" else f"{_PROGRAM} {command}",
        description=_MAIN_HELP if command == "main" else None,
        show=console and asks_help,
    )
    return command, config


def _start_from(base: _Base, default: Any) -> Any:
    """Return the default config that the command line's own values are laid over."""
    if not isinstance(default, TrainConfig):
        return from_table(read_toml(base.config), default) if base.config else default
    path = base.config
    if base.resume is not None and path is None:
        path = base.resume / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"{base.resume} is not the folder of a run: it has no {CONFIG_NAME}")
    table = read_toml(path) if path else {}
    preset: Any = base.preset or table.get("preset", default.preset)
    if base.preset is not None:
        table = {key: value for key, value in table.items() if key != "model"} | {"preset": preset}
    return from_table(table, replace(default, preset=preset, model=LongNetConfig.preset(preset)))


def _tyro(config: Any, words: Sequence[str], *, show: bool, **options: Any) -> Any:
    """Parse by tyro, whose message in a box becomes one line.

    Standard output is hidden unless help is to be shown: tyro colours its messages if that is a terminal.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box), nullcontext() if show else redirect_stdout(io.StringIO()):
            return tyro.cli(config, args=words, **options)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ConfigError(_one_line(box.getvalue())) from None


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
