"""One TOML file a service, read once into a frozen dataclass; nothing is guessed and nothing unknown is ignored.

Field types: str, int, bool, float, Path (relative to the file), `tuple[str, ...]`, `dict[str, str]`, nested dataclasses
(tables), tuples of dataclasses (arrays of tables), and `T | None` (may be left out).
A field with a default may be left out too. A string literal below a field says what it is for; it becomes the comment in a
file that `moor init` writes and the row in docs/reference/settings.md.

A variable MOOR_<SERVICE>_<KEY> of the environment takes the place of a key of the file: MOOR_BROKER_LISTEN_HTTPS,
MOOR_HOST_ATTESTATION_PERIOD_S (a key of a table). Text and paths are taken as they are (paths relative to the file),
everything else is written as in TOML. No setting holds a secret: secrets are in files that settings name.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import os
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from moorline.errors import Misconfigured

T = TypeVar("T")


_COMMENT_WIDTH: Final = 100


def load(kind: type[T], path: Path, *, service: str | None = None, environment: Mapping[str, str] | None = None) -> T:
    """The settings in `path`, and with `service` those of the environment in their place.

    Raises Misconfigured (`settings.*`) naming the key or variable, and the nearest known one.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise Misconfigured(
            "settings.no_file", "there is no such settings file", got=path, remedy="check the path, or write one: moor init"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(
            "settings.not_toml",
            "the settings file is not TOML",
            got=f"{path}: {error}",
            remedy="correct it there; moor init writes one with comments",
        ) from None
    if service is not None:
        _override(kind, table, service, os.environ if environment is None else environment)
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


def write_commented(settings: object, path: Path, *, head: str) -> None:
    """A new file that `load` reads back, for people: every key under a comment, defaults commented out, mode 0600.

    Raises Misconfigured("settings.exists") rather than overwrite a file.
    """
    text = "\n".join([*_comment(head), "", *_commented(settings, path.parent.absolute())])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Misconfigured(
            "settings.exists",
            "there is a settings file already",
            got=path,
            remedy="edit it, or choose another --dir",
        ) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")


def descriptions(kind: type) -> dict[str, str]:
    """What each field is for: the string literal below it in the class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            value = after.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[field.target.id] = " ".join(value.value.split())
    return found


def variables(kind: Any, service: str) -> dict[str, tuple[str, ...]]:  # noqa: ANN401 - any dataclass type
    """The environment's name of every key, and where the key is: ("attestation", "period_s")."""
    return {f"MOOR_{'_'.join((service, *keys))}".upper().replace("-", "_"): keys for keys in _keys(kind)}


def _keys(kind: Any) -> list[tuple[str, ...]]:  # noqa: ANN401 - any dataclass type
    found: list[tuple[str, ...]] = []
    for name, hint in get_type_hints(kind).items():
        inner = _present(hint)
        found += [(name, *keys) for keys in _keys(inner)] if dataclasses.is_dataclass(inner) else [(name,)]
    return found


def _present(hint: Any) -> Any:  # noqa: ANN401 - a type, or what stands for one
    """The type of a value that is there: T of `T | None`."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _override(kind: Any, table: dict[str, Any], service: str, environment: Mapping[str, str]) -> None:  # noqa: ANN401
    known = variables(kind, service)
    prefix = f"MOOR_{service}_".upper().replace("-", "_")
    for name, text in environment.items():
        if not name.startswith(prefix):
            continue
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            raise Misconfigured(
                "settings.unknown_variable",
                f"the environment sets something {service} does not know",
                got=name,
                remedy=f"did you mean {nearest[0]}?" if nearest else "unset it; docs/reference/settings.md has the keys",
            )
        *tables, key = known[name]
        inner, hint = table, kind
        for one in tables:
            inner, hint = inner.setdefault(one, {}), _present(get_type_hints(hint)[one])
        inner[key] = _of_text(_present(get_type_hints(hint)[key]), name, text)


def _of_text(hint: Any, name: str, text: str) -> object:  # noqa: ANN401 - a type, or what stands for one
    if hint in (str, Path):
        return text
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        table = {}
    if set(table) != {"value"}:
        raise Misconfigured("settings.variable_not_toml", f"{name} is not a value as TOML writes it", expected=hint)
    return typing.cast("object", table["value"])


def _commented(settings: Any, base: Path) -> list[str]:  # noqa: ANN401 - any dataclass
    says = descriptions(type(settings))
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        comment = _comment(says.get(field.name, ""))
        if dataclasses.is_dataclass(value):
            tables += [*comment, f"[{field.name}]", *_commented(value, base)]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for element in value:
                tables += [*comment, f"[[{field.name}]]", *_commented(element, base)]
        else:
            lines += [*comment, _line(field, value, base), ""]
    return [*lines, *tables]


def _line(field: Any, value: object, base: Path) -> str:  # noqa: ANN401 - dataclasses.Field
    if value is None:
        return f"# {field.name} ="
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"{'# ' if value == default else ''}{field.name} = {_toml(_relative(value, base))}"


def _relative(value: object, base: Path) -> object:
    """A path as seen from the file, where the two have more than the root in common."""
    if isinstance(value, tuple):
        return tuple(_relative(element, base) for element in value)
    if not isinstance(value, Path):
        return value
    path = value.absolute()
    shared = len(os.path.commonpath([path, base])) > 1
    return os.path.relpath(path, base) if shared else str(path)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _COMMENT_WIDTH, break_long_words=False, break_on_hyphens=False)]


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
