"""Frozen dataclasses to deterministic CBOR maps and back, strictly.

A message is a map whose keys are exactly the field names. A field typed `T | None` may be null but never absent. Unknown
or missing keys, a bool for an int, a wrong length of a fixed-size field: all `Malformed`. Supported field types: int (never
negative), str, bytes, bool, StrEnum, `T | None`, `tuple[T, ...]`, `dict[str, T]`, and dataclasses of these. A size in the
annotation (`Annotated[bytes, Size(32)]`) is enforced both ways.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from moorline.errors import Malformed
from moorline.wire import cbor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Size:
    """The exact length, or the greatest, of a bytes, str or tuple field."""

    exactly: int | None = None
    at_most: int | None = None


Bytes32 = Annotated[bytes, Size(32)]
Bytes48 = Annotated[bytes, Size(48)]
Bytes64 = Annotated[bytes, Size(64)]


def encode(message: object) -> bytes:
    """The deterministic CBOR of a message dataclass."""
    return cbor.encode(to_item(message))


def decode(kind: type[T], data: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> T:
    """The message of type `kind` that `data` encodes; raises Malformed (`cbor.*`, `message.*`) on anything else."""
    return from_item(kind, cbor.decode(data, max_bytes=max_bytes))


def to_item(message: object) -> object:
    """A message as plain CBOR items."""
    if dataclasses.is_dataclass(message) and not isinstance(message, type):
        return {field.name: to_item(getattr(message, field.name)) for field in dataclasses.fields(message)}
    if isinstance(message, tuple | list):
        return [to_item(element) for element in message]
    if isinstance(message, dict):
        return {key: to_item(value) for key, value in message.items()}
    if isinstance(message, StrEnum):
        return message.value
    return message


def from_item(kind: type[T], item: object) -> T:
    """A message of type `kind` from plain CBOR items; raises Malformed (`message.*`)."""
    return typing.cast("T", _convert(kind, item, kind.__name__))


@lru_cache(maxsize=512)  # bounded: one entry per message type
def _hints(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - as below
    return get_type_hints(kind, include_extras=True)


def _convert(kind: Any, item: object, where: str) -> object:  # noqa: ANN401 - annotations are objects of no common type
    origin = get_origin(kind)
    if origin is Annotated:
        return _annotated(kind, item, where)
    if origin in (typing.Union, types.UnionType):
        inner = next(option for option in get_args(kind) if option is not type(None))
        return None if item is None else _convert(inner, item, where)
    if origin in (tuple, dict):
        return _collection(kind, item, where)
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast("type[Any]", kind), item, where)
    return _scalar(kind, item, where)


def _annotated(kind: Any, item: object, where: str) -> object:  # noqa: ANN401 - as above
    base, *extras = get_args(kind)
    value = _convert(base, item, where)
    for extra in extras:
        if isinstance(extra, Size):
            _sized(extra, value, where)
    return value


def _collection(kind: Any, item: object, where: str) -> object:  # noqa: ANN401 - as above
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(item, list):
            raise _wrong(where, "a list", item)
        return tuple(_convert(arguments[0], value, f"{where}[{index}]") for index, value in enumerate(item))
    if not isinstance(item, dict) or any(not isinstance(key, str) for key in item):
        raise _wrong(where, "a map with text keys", item)
    return {key: _convert(arguments[1], value, f"{where}.{key}") for key, value in item.items()}


def _scalar(kind: Any, item: object, where: str) -> object:  # noqa: ANN401 - as above
    supertype = getattr(kind, "__supertype__", None)
    if supertype is not None:
        return _scalar(supertype, item, where)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if isinstance(item, str) and item in {member.value for member in kind}:
            return kind(item)
        raise _wrong(where, "one of " + ", ".join(member.value for member in kind), item)
    if kind is int:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            return item
        raise _wrong(where, "an unsigned integer", item)
    if kind in (str, bytes, bool):
        if type(item) is kind:
            return item
        raise _wrong(where, kind.__name__, item)
    message = f"wire.schema does not support a field of type {kind!r} at {where}"
    raise TypeError(message)


def _record(kind: type[Any], item: object, where: str) -> object:
    if not isinstance(item, dict):
        raise _wrong(where, "a map", item)
    hints = _hints(kind)  # type: ignore[arg-type]
    names = {field.name for field in dataclasses.fields(kind)}
    if set(item) != names:
        raise Malformed(
            "message.fields",
            f"{where} does not have exactly its fields",
            expected=sorted(names),
            got=sorted(str(key) for key in item),
        )
    return kind(**{name: _convert(hints[name], item[name], f"{where}.{name}") for name in names})


def _sized(size: Size, value: object, where: str) -> None:
    if value is None or not isinstance(value, bytes | str | tuple):
        return
    if size.exactly is not None and len(value) != size.exactly:
        raise Malformed("message.size", f"{where} has the wrong length", expected=size.exactly, got=len(value))
    if size.at_most is not None and len(value) > size.at_most:
        raise Malformed("message.size", f"{where} is too long", expected=f"<= {size.at_most}", got=len(value))


def _wrong(where: str, expected: str, item: object) -> Malformed:
    return Malformed("message.type", f"{where} has the wrong type", expected=expected, got=type(item).__name__)
