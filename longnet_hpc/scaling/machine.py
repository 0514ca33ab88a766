"""Machines that runs are forecast for, as small TOML files: measured by ``calibrate``, or from data sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_type_hints

from longnet_hpc.config_file import from_table, read_toml
from longnet_hpc.errors import ConfigError
from longnet_hpc.words import short

__all__ = ["Attention", "Blocks", "Link", "Machine", "load_machine", "machine_names"]


_LONGEST_TEXT = 500


@dataclass(frozen=True)
class Blocks:
    """Speed of everything in a block but attention, counted as the FLOP of its matrix products."""

    embed_dims: tuple[int, ...]
    """Widths at which it is known, ascending; between them it is interpolated."""
    forward_flop_per_second: tuple[float, ...]
    """Rate at each width."""
    backward_flop_per_second: tuple[float, ...]
    """Rate at each width; twice the FLOP of the forward pass."""


@dataclass(frozen=True)
class Attention:
    """Speed of attention, counted as `Pattern.flop` does, plus some keys for each query."""

    head_dims: tuple[int, ...]
    """Features of a head at which it is known, ascending."""
    forward_flop_per_second: tuple[float, ...]
    """Causal rate at each of them."""
    backward_flop_per_second: tuple[float, ...]
    """The same; twice the FLOP of the forward pass."""
    wasted_keys: float
    """Keys that each query costs besides those that it sees: tiles at the diagonal, starting, merging."""


@dataclass(frozen=True)
class Link:
    """How ranks exchange: time is latency plus bytes over the rate (alpha-beta model)."""

    latency_seconds: float
    """Of each message."""
    bytes_per_second: float
    """Of each rank, in one direction."""


@dataclass(frozen=True)
class Machine:
    """A machine, as the performance model knows it. Rates are those of one device that one rank has to itself."""

    name: str
    """In a few words."""
    source: str
    """Where the numbers come from."""
    numbers: Literal["measured", "estimated"]
    """Whether all of them were measured on this machine."""
    device: Literal["cpu", "cuda"]
    """What ranks compute on."""
    devices_per_node: int
    """GPUs, or cores, of a node; more ranks than these share them."""
    memory_bytes: int
    """Of a device."""
    process_bytes: int
    """What a rank takes of it before it has any tensor."""
    blocks: Blocks
    """Everything in a block but attention."""
    attention: Attention
    """Attention."""
    logit_seconds: float
    """Loss and its gradient, for each logit."""
    parameter_seconds: float
    """Flat gradient and update, for each parameter."""
    step_seconds: float
    """What a step costs besides, however small."""
    within: Link
    """Between ranks of a node."""
    between: Link
    """Between nodes."""
    overlap: float
    """Share of an exchange that goes on while the rank computes, 0 to 1."""
    input_bytes_per_second: float
    """Reading of tokens, by a rank."""
    topology: Literal["fat-tree", "dragonfly"] = "fat-tree"
    """Network between nodes."""

    def __post_init__(self) -> None:
        for key in ("name", "source"):
            if not getattr(self, key).isprintable() or len(getattr(self, key)) > _LONGEST_TEXT:
                raise ConfigError(f"machine: {key} must be one line of up to {_LONGEST_TEXT} letters")
        for table, of in (("blocks", self.blocks), ("attention", self.attention)):
            keys, *rates = (getattr(of, field.name) for field in fields(of) if field.name != "wasted_keys")
            if not keys or list(keys) != sorted(set(keys)) or min(keys) < 1:
                raise ConfigError(
                    f"machine {self.name!r}: sizes of {table} must ascend from 1, got {short(str(list(keys)), 100)}"
                )
            for rate in rates:
                if len(rate) != len(keys):
                    raise ConfigError(f"machine {self.name!r}: {table} needs {len(keys)} rates each, got {len(rate)}")
        for name, value in _numbers(self):
            may_be_zero = name.rpartition(".")[2] in (
                *("wasted_keys", "step_seconds", "logit_seconds", "parameter_seconds"),
                *("process_bytes", "overlap", "latency_seconds"),
            )
            if not (0 if may_be_zero else math.ulp(0)) <= value < math.inf:
                limit = "at least 0" if may_be_zero else "above 0"
                raise ConfigError(f"machine {self.name!r}: {name} must be {limit} and finite, got {value}")
        if self.overlap > 1:
            raise ConfigError(f"machine {self.name!r}: overlap must be 0 to 1, got {self.overlap}")

    @property
    def itemsize(self) -> int:
        """Bytes of a number in matrix products: bfloat16 on GPUs, float32 on CPUs."""
        return 2 if self.device == "cuda" else 4


def _numbers(of: Any, prefix: str = "") -> list[tuple[str, float]]:
    """Return all numbers of a description, by name."""
    found: list[tuple[str, float]] = []
    for field in fields(of):
        value = getattr(of, field.name)
        if is_dataclass(value):
            found += _numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            found += [(f"{prefix}{field.name}", item) for item in value]
        elif isinstance(value, int | float):
            found.append((f"{prefix}{field.name}", value))
    return found


def machine_names() -> list[str]:
    """Return the names of the machines that come with the library."""
    folder = files("longnet_hpc.scaling") / "machines"
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def load_machine(name: str) -> Machine:
    """Return a machine that comes with the library, by name, or that of a TOML file.

    Raises
    ------
    ConfigError
        If there is neither, or the file lacks a field, has a foreign one, or a value that cannot be.
    """
    if name in machine_names():
        path = Path(str(files("longnet_hpc.scaling") / "machines" / f"{name}.toml"))
    else:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(
                f"machine must be one of {', '.join(machine_names())}, or a file that calibrate wrote, got {name!r}"
            )
    table = read_toml(path)
    try:
        _check_complete(table, Machine)
        return from_table(table, _TEMPLATE)
    except ConfigError as error:
        raise ConfigError(f"machine file {path}: {error}") from error


def _check_complete(table: Mapping[str, Any], kind: type, where: str = "") -> None:
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name == "topology":
            continue
        if field.name not in table:
            raise ConfigError(f"no {where}{field.name}")
        if is_dataclass(hints[field.name]):
            if not isinstance(table[field.name], Mapping):
                raise ConfigError(f"no table {where}{field.name}")
            _check_complete(table[field.name], hints[field.name], f"{where}{field.name}.")


_ONES = (1.0,)
_TEMPLATE = Machine(
    name="", source="", numbers="estimated", device="cpu", devices_per_node=1, memory_bytes=1, process_bytes=0,
    blocks=Blocks((1,), _ONES, _ONES), attention=Attention((1,), _ONES, _ONES, 0.0),
    logit_seconds=0.0, parameter_seconds=0.0, step_seconds=0.0,
    within=Link(0.0, 1.0), between=Link(0.0, 1.0), overlap=0.0, input_bytes_per_second=1.0,
)  # fmt: skip
