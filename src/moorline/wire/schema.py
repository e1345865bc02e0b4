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
from collections.abc import Callable, Hashable
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

from moorline.errors import Malformed
from moorline.wire import cbor, ordered

T = TypeVar("T")
Size = ordered.Size


Bytes32 = Annotated[bytes, Size(32)]
Bytes48 = Annotated[bytes, Size(48)]
Bytes64 = Annotated[bytes, Size(64)]


def encode(message: object) -> bytes:
    """The deterministic CBOR of a message dataclass."""
    try:
        return cbor.encode_ordered(ordered.written(message))
    except ordered.OddError:
        return cbor.encode(to_item(message))


def decode(kind: type[T], data: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> T:
    """The message of type `kind` that `data` encodes; raises Malformed (`cbor.*`, `message.*`) on anything else."""
    found = usual(kind, data, max_bytes=max_bytes)
    return from_item(kind, cbor.decode(data, max_bytes=max_bytes)) if found is None else found


def usual(kind: type[T], data: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> T | None:
    """The message of type `kind` that `data` encodes, as it almost always does; else None, for `decode` to judge."""
    read = ordered.reader(kind)
    if read is None:
        return None
    try:
        found: T = read(cbor.decode_unordered(data, max_bytes=max_bytes))
    except ordered.OddError:
        return None
    return found


def to_item(message: object) -> object:
    """A message as plain CBOR items."""
    if isinstance(message, tuple | list):
        return [to_item(element) for element in message]
    if isinstance(message, dict):
        return {key: to_item(value) for key, value in message.items()}
    if isinstance(message, StrEnum):
        return message.value
    if dataclasses.is_dataclass(message) and not isinstance(message, type):
        return _written(message)
    return message


def _written(message: object) -> dict[str, object]:
    item: dict[str, object] = {}
    for name in ordered.sorted_names(typing.cast("Hashable", type(message))):
        value = getattr(message, name)
        item[name] = value if type(value) in _PLAIN else to_item(value)
    return item


_PLAIN: Final = frozenset({bytes, str, int, bool, type(None)})


def from_item(kind: type[T], item: object) -> T:
    """A message of type `kind` from plain CBOR items; raises Malformed (`message.*`)."""
    return typing.cast("T", _reader(typing.cast("Hashable", kind))(item, kind.__name__))


_Reader = Callable[[object, str], object]
"""Takes an item and where it stands; returns the value or raises Malformed."""


@lru_cache(maxsize=1024)  # bounded: one entry per annotation of a message type
def _reader(kind: Any) -> _Reader:  # noqa: ANN401 - annotations are objects of no common type
    """What reads an item of this annotation: built once, since every message of the system passes here."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _annotated(kind)
    if origin in (typing.Union, types.UnionType):
        inner = _reader(next(option for option in get_args(kind) if option is not type(None)))
        return lambda item, where: None if item is None else inner(item, where)
    if origin is tuple:
        return _tuple(_reader(get_args(kind)[0]))
    if origin is dict:
        return _map(_reader(get_args(kind)[1]))
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast("type[Any]", kind))
    return _scalar(kind)


def _annotated(kind: Any) -> _Reader:  # noqa: ANN401 - as above
    base, *extras = get_args(kind)
    read = _reader(base)
    for extra in extras:
        if isinstance(extra, Size):
            read = _measured(read, extra)
    return read


def _measured(read: _Reader, size: Size) -> _Reader:
    exactly, at_most = size.exactly, size.at_most

    def measured(item: object, where: str) -> object:
        value = read(item, where)
        if not isinstance(value, (bytes, str, tuple)):  # null, where that is allowed
            return value
        length = len(value)
        if exactly is not None and length != exactly:
            raise Malformed("message.size", f"{where} has the wrong length", expected=exactly, got=length)
        if at_most is not None and length > at_most:
            raise Malformed("message.size", f"{where} is too long", expected=f"<= {at_most}", got=length)
        return value

    return measured


def _tuple(read: _Reader) -> _Reader:
    def elements(item: object, where: str) -> object:
        if not isinstance(item, list):
            raise _wrong(where, "a list", item)
        return tuple([read(value, f"{where}[{index}]") for index, value in enumerate(item)])

    return elements


def _map(read: _Reader) -> _Reader:
    def entries(item: object, where: str) -> object:
        if not isinstance(item, dict) or any(not isinstance(key, str) for key in item):
            raise _wrong(where, "a map with text keys", item)
        return {key: read(value, f"{where}.{key}") for key, value in item.items()}

    return entries


def _scalar(kind: Any) -> _Reader:  # noqa: ANN401 - as above
    supertype = getattr(kind, "__supertype__", None)
    if supertype is not None:
        return _reader(supertype)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _enumerated(kind)
    if kind is int:
        return _unsigned
    if kind in (str, bytes, bool):
        name = kind.__name__

        def exact(item: object, where: str) -> object:
            if type(item) is not kind:
                raise _wrong(where, name, item)
            return item

        return exact

    def unsupported(item: object, where: str) -> object:
        del item
        message = f"wire.schema does not support a field of type {kind!r} at {where}"
        raise TypeError(message)

    return unsupported


def _enumerated(kind: type[StrEnum]) -> _Reader:
    members = {member.value: member for member in kind}

    def member(item: object, where: str) -> object:
        found = members.get(item) if isinstance(item, str) else None
        if found is None:
            raise _wrong(where, "one of " + ", ".join(members), item)
        return found

    return member


def _unsigned(item: object, where: str) -> object:
    if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
        return item
    raise _wrong(where, "an unsigned integer", item)


def _record(kind: type[Any]) -> _Reader:
    hints = get_type_hints(kind, include_extras=True)
    names = frozenset(field.name for field in dataclasses.fields(kind))
    readers: list[tuple[str, str, _Reader]] = []

    def record(item: object, where: str) -> object:
        if not isinstance(item, dict):
            raise _wrong(where, "a map", item)
        if item.keys() != names:
            raise Malformed(
                "message.fields",
                f"{where} does not have exactly its fields",
                expected=sorted(names),
                got=sorted(str(key) for key in item),
            )
        if not readers:  # on first use: a message may hold messages of its own kind
            readers.extend(
                (name, f".{name}", _reader(hints[name])) for name in ordered.sorted_names(typing.cast("Hashable", kind))
            )
        return kind(**{name: read(item[name], where + suffix) for name, suffix, read in readers})

    return record


def _wrong(where: str, expected: str, item: object) -> Malformed:
    return Malformed("message.type", f"{where} has the wrong type", expected=expected, got=type(item).__name__)
