"""One TOML file a service, read once into a frozen dataclass; nothing is guessed and nothing unknown is ignored.

Field types: str, int, bool, float, Path (relative to the file), `tuple[str, ...]`, `dict[str, str]`, nested dataclasses
(tables), tuples of dataclasses (arrays of tables), and `T | None` (may be left out).
A field with a default may be left out too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moorline.errors import Misconfigured

T = TypeVar("T")


def load(kind: type[T], path: Path) -> T:
    """The settings in `path`. Raises Misconfigured (`settings.*`) naming the key, and the nearest known one."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Misconfigured("settings.no_file", "there is no such settings file", got=path) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured("settings.not_toml", "the settings file is not TOML", got=f"{path}: {error}") from None
    return typing.cast("T", _table(kind, table, path.name, path.parent))


def write(settings: object, path: Path) -> None:
    """Write a settings dataclass as the TOML file that `load` reads back, mode 0600. Fields that are None are left out."""
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{field.name}]", *_pairs(value)]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for element in value:
                tables += ["", f"[[{field.name}]]", *_pairs(element)]
        else:
            lines.append(f"{field.name} = {_toml(value)}")
    path.touch(mode=0o600)
    path.write_text("\n".join([*lines, *tables]) + "\n", "utf-8")


def _pairs(table: Any) -> list[str]:  # noqa: ANN401 - any dataclass
    named = ((field.name, getattr(table, field.name)) for field in dataclasses.fields(table))
    return [f"{name} = {_toml(value)}" for name, value in named if value is not None]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value))  # a JSON string is a TOML basic string
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(element) for element in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(element)}" for key, element in value.items()) + " }"
    raise Misconfigured("settings.wrong_type", "this type has no place in a settings file", got=type(value).__name__)


def _table(kind: Any, table: dict[str, Any], where: str, base: Path) -> object:  # noqa: ANN401 - any dataclass type
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, 1)
            raise Misconfigured(
                "settings.unknown_key",
                f"{where} has an unknown key",
                got=key,
                remedy=f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(fields))}",
            )
    values: dict[str, object] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}: {name}", base)
        elif type(None) in get_args(hints[name]):
            values[name] = None
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Misconfigured("settings.missing_key", f"{where} lacks a key", expected=name, remedy=f"add {name} = ...")
    return kind(**values)


def _value(kind: Any, value: Any, where: str, base: Path) -> object:  # noqa: ANN401, PLR0911 - one return a TOML type
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _value(next(option for option in get_args(kind) if option is not type(None)), value, where, base)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], element, f"{where}[{i}]", base) for i, element in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(get_args(kind)[1], element, f"{where}.{key}", base) for key, element in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _table(kind, value, where, base)
    if kind is Path and isinstance(value, str):
        return base / value
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise Misconfigured(
        "settings.wrong_type",
        f"{where} has the wrong type",
        expected=getattr(kind, "__name__", kind),
        got=type(value).__name__,
    )
