"""One TOML file a service, read once into a frozen dataclass; nothing is guessed and nothing unknown is ignored.

Field types: str, int, bool, float, Path (relative to the file), `tuple[str, ...]`, `dict[str, str]`, nested dataclasses
(tables), tuples of dataclasses (arrays of tables), and `T | None` (may be left out).
A field with a default may be left out too.
"""

from __future__ import annotations

import dataclasses
import difflib
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
