"""Config dataclasses as TOML: read strictly, written so that the file can be read back."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from longnet_hpc.errors import ConfigError
from longnet_hpc.words import one_line, short

__all__ = ["CONFIG_NAME", "flat_table", "from_table", "read_toml", "to_table", "write_toml"]

CONFIG_NAME = "config.toml"
"""Name of the resolved config in the folder of a run."""

MAX_TOML_BYTES = 1 << 20
"""Longest TOML file that is read."""

_LONGEST_VALUE = 100

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises
    ------
    ConfigError
        If the file cannot be read or is not TOML; names the line.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise ConfigError(f"config file {path} is longer than {MAX_TOML_BYTES} bytes")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except ConfigError:
        raise
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"config file {path} is not TOML: {one_line(str(error))}") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply") from error


def from_table(table: Mapping[str, Any], default: T, where: str = "") -> T:
    """Return ``default`` with the fields that a table names replaced, nested tables included.

    Parameters
    ----------
    table : mapping
        Keys are field names; values have exactly the field's type (an int may stand for a float, a list for a tuple, a
        string for a path).
    default : dataclass instance
        Where the other fields come from.
    where : str
        Prefix of keys in messages.

    Raises
    ------
    ConfigError
        If a key does not exist, a value has the wrong type, or the dataclass refuses a value.
    """
    assert is_dataclass(default)
    assert not isinstance(default, type)
    known = {field.name for field in fields(default) if _in_files(field)}
    hints = get_type_hints(type(default))
    changes = {}
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(short(key, _LONGEST_VALUE), known, n=1)
            hint = f", did you mean {where}{close[0]}?" if close else f", must be one of {', '.join(sorted(known))}"
            raise ConfigError(f"config key {where}{one_line(key, _LONGEST_VALUE)} does not exist{hint}")
        old = getattr(default, key)
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            changes[key] = from_table(value, old, f"{where}{key}.")
        else:
            changes[key] = _checked(value, hints[key], f"{where}{key}")
    return replace(default, **changes)


def to_table(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as TOML and JSON know them; `from_table` reads it. None is left out."""
    assert is_dataclass(config)
    assert not isinstance(config, type)
    values = {field.name: getattr(config, field.name) for field in fields(config) if _in_files(field)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def flat_table(config: Any) -> dict[str, Any]:
    """Return what `to_table` does, with keys as on the command line: ``model.layers``."""

    def flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(flat(to_table(config), ""))


def write_toml(path: Path, config: Any, heading: str) -> None:
    """Write a config dataclass as a TOML file that begins with a comment."""
    path.write_text(f"# {heading}\n" + "\n".join(_lines(to_table(config))) + "\n", encoding="utf-8")


def _in_files(field: Field) -> bool:
    return "this_call_only" not in field.metadata


def _checked(value: Any, kind: Any, key: str) -> Any:
    """Return a value of TOML as the type of its field."""
    if type(value) is int and not -(2**63) <= value < 2**63:  # TOML's own limit, which Python's reader does not keep
        raise ConfigError(f"config key {key} must be -2**63 to 2**63 - 1, got {_shown(value)}")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # None cannot be written in TOML, so an optional field holds the other type.
        return _checked(value, next(option for option in arguments if option is not type(None)), key)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"config key {key} must be one of {', '.join(map(str, arguments))}, got {_shown(value)}")
    if origin is tuple and isinstance(value, list) and (Ellipsis in arguments or len(value) == len(arguments)):
        return tuple(_checked(item, arguments[0], key) for item in value)
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise ConfigError(f"config key {key} must be {_name_of(kind)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    try:
        return short(repr(value), _LONGEST_VALUE)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return "a number too long to show"
    except RecursionError:
        return "tables nested too deeply"


def _name_of(kind: Any) -> str:
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        length = "" if Ellipsis in others else f" of {1 + len(others)}"
        return f"a list{length}, each {_name_of(first)}"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", Path: "a path"}
    return names.get(kind, "a table")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_table(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _lines(table: Mapping[str, Any], name: str = "") -> list[str]:
    simple = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    lines = [f"\n[{name}]", *simple] if name else simple
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{name}.{key}" if name else key)
    return lines


def _toml(value: Any) -> str:
    # JSON writes booleans, numbers, strings and lists as TOML does, if letters beyond ASCII stay as they are.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
