"""The quick way of `wire.schema`: messages whose fields stand in order and are all of the types they should have.

Almost every message is such a one, and none of the checks can be left out, so they are made together: reading compares a
map's keys with the field names in order, which says at once that they are the right ones and sorted; writing puts them in
that order. Whatever is not as it should be is an `OddError`, and `wire.schema` goes the long way, which takes the same
messages and has the words for the others. What is taken here is a part of what is taken there; the tests compare the two.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

_LIMIT: Final = 1 << 64
_MOST: Final = 1 << 62
_LEVELS: Final = 6
"""Levels of messages and lists in one another; fewer than cbor.MAX_DEPTH, so that no message read here is too deep."""
_AS_THEY_ARE: Final = frozenset({bytes, str, bool, type(None)})
_WORDS: Final = frozenset({bytes, str})


class OddError(Exception):
    """Not for here. Never leaves wire."""


@dataclass(frozen=True, slots=True)
class Size:
    """The exact length, or the greatest, of a bytes, str or tuple field."""

    exactly: int | None = None
    at_most: int | None = None


@lru_cache(maxsize=512)  # bounded: one entry per message type
def sorted_names(kind: type) -> tuple[str, ...]:
    """Field names in the order of their encodings, so that `cbor.encode` need not sort."""
    names = [field.name for field in dataclasses.fields(kind)]
    return tuple(sorted(names, key=lambda name: (len(name.encode()), name.encode())))


# Writing ---------------------------------------------------------------------------------------------------------------


def written(message: object, levels: int = _LEVELS) -> object:
    """A message as plain CBOR items, its maps in order; raises OddError."""
    kind = type(message)
    if kind in _AS_THEY_ARE:
        return message
    if kind is int:
        if 0 <= typing.cast("int", message) < _LIMIT:
            return message
        raise OddError
    if levels == 0:
        raise OddError
    if kind is tuple or kind is list:
        if _WORDS.issuperset(map(type, typing.cast("tuple[object, ...]", message))):
            return list(typing.cast("tuple[object, ...]", message))
        return [written(element, levels - 1) for element in typing.cast("tuple[object, ...]", message)]
    fields = _fields(typing.cast("Hashable", kind))
    if fields is None:
        return _member(message)
    return _written_fields(*fields, message, levels)


def _written_fields(
    names: tuple[str, ...], values: Callable[[object], tuple[object, ...]], message: object, levels: int
) -> dict[str, object]:
    item: dict[str, object] = {}
    for name, value in zip(names, values(message), strict=True):
        of = type(value)
        if of in _AS_THEY_ARE or (of is int and 0 <= typing.cast("int", value) < _LIMIT):
            item[name] = value
        elif isinstance(value, StrEnum):
            item[name] = value.value
        else:
            item[name] = written(value, levels - 1)
    return item


def _member(message: object) -> str:
    if isinstance(message, StrEnum):
        return message.value
    raise OddError


@lru_cache(maxsize=512)  # bounded: one entry per type of a value in a message
def _fields(kind: type) -> tuple[tuple[str, ...], Callable[[object], tuple[object, ...]]] | None:
    """Names in order, and what takes their values from a message; None for what is no message."""
    if not dataclasses.is_dataclass(kind) or issubclass(kind, StrEnum):
        return None
    names = sorted_names(kind)
    if not names:
        return names, lambda _: ()
    if len(names) == 1:
        get = attrgetter(names[0])
        return names, lambda message: (get(message),)
    return names, attrgetter(*names)


# Reading ---------------------------------------------------------------------------------------------------------------

Reader = Callable[[object], Any]
"""Takes an item and returns the value, or raises OddError."""


def reader(kind: Any) -> Reader | None:  # noqa: ANN401 - annotations are objects of no common type
    """What reads an item of this annotation; None if it has parts that are read the long way only."""
    try:
        return _READERS[kind]
    except KeyError:
        return _READERS.setdefault(kind, _reader(kind, _LEVELS))


_READERS: Final[dict[Any, Reader | None]] = {}  # one entry per message type, of which the code has so many


def _reader(kind: Any, levels: int) -> Reader | None:  # noqa: ANN401, PLR0911 - one return a kind of annotation
    if levels == 0:  # also what holds itself
        return None
    origin = get_origin(kind)
    if origin is Annotated:
        base, *extras = get_args(kind)
        inner = _reader(base, levels)
        sizes = [extra for extra in extras if isinstance(extra, Size)]
        return inner if not sizes else _measured(base, inner, sizes)
    if origin in (typing.Union, types.UnionType):
        return _optional(_reader(next(option for option in get_args(kind) if option is not type(None)), levels))
    if origin is tuple:
        return _elements(_reader(get_args(kind)[0], levels - 1))
    if dataclasses.is_dataclass(kind):
        return _message(typing.cast("type[Any]", kind), levels - 1)
    supertype = getattr(kind, "__supertype__", None)
    if supertype is not None:
        return _reader(supertype, levels)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _enumerated(kind)
    if kind is int:
        return _unsigned
    return _exact(kind) if kind in (str, bytes, bool) else None


def _unsigned(item: object) -> object:
    if type(item) is int and 0 <= item < _LIMIT:
        return item
    raise OddError


def _exact(kind: type) -> Reader:
    def exact(item: object) -> object:
        if type(item) is not kind:
            raise OddError
        return item

    return exact


def _measured(base: object, inner: Reader | None, sizes: list[Size]) -> Reader | None:
    """Length and type at once where that is all there is to it."""
    if inner is None or len(sizes) != 1:
        return None
    least, most = _limits(sizes[0])

    def plain(item: object) -> object:
        if type(item) is not base or not least <= len(typing.cast("bytes", item)) <= most:
            raise OddError
        return item

    def within(item: object) -> object:
        value = inner(item)
        if isinstance(value, (bytes, str, tuple)) and not least <= len(value) <= most:
            raise OddError
        return value

    return plain if base in (bytes, str) else within


def _optional(inner: Reader | None) -> Reader | None:
    return None if inner is None else lambda item: None if item is None else inner(item)


def _elements(inner: Reader | None) -> Reader | None:
    if inner is None:
        return None

    def elements(item: object) -> object:
        if type(item) is not list:
            raise OddError
        return tuple([inner(value) for value in item])

    return elements


def _enumerated(kind: type[StrEnum]) -> Reader:
    members = {member.value: member for member in kind}

    def member(item: object) -> object:
        found = members.get(item) if type(item) is str else None
        if found is None:
            raise OddError
        return found

    return member


def _message(kind: type[Any], levels: int) -> Reader | None:
    hints = get_type_hints(kind, include_extras=True)
    names = list(sorted_names(typing.cast("Hashable", kind)))
    readers: list[Reader] = []
    for name in names:
        found = _reader(hints[name], levels)
        if found is None:
            return None
        readers.append(found)
    seen_as = [_seen_as(hints[name]) for name in names]
    if None not in seen_as:
        return _uniform(kind, names, typing.cast("list[type]", seen_as), [hints[name] for name in names], readers)

    def message(item: object) -> object:
        if type(item) is not dict or list(item) != names:
            raise OddError
        return kind(**{name: read(value) for (name, value), read in zip(item.items(), readers, strict=True)})

    return message


def _uniform(kind: type[Any], names: list[str], seen_as: list[type], hints: list[Any], readers: list[Reader]) -> Reader:
    """A message whose fields have one type of item each: all types are compared at once, then what is left of each field.

    The item that is read becomes the message's; nobody else has it.
    """
    bounds: list[tuple[str, int, int]] = []
    left: list[tuple[str, Reader]] = []
    for name, hint, read in zip(names, hints, readers, strict=True):
        found = _bounds(hint)
        if found is not None:
            bounds.append((name, *found))
        elif hint not in (bytes, str, bool):
            left.append((name, read))

    def message(item: object) -> object:
        if type(item) is not dict or list(item) != names or list(map(type, item.values())) != seen_as:
            raise OddError
        for name, least, most in bounds:
            if not least <= len(item[name]) <= most:
                raise OddError
        for name, read in left:
            item[name] = read(item[name])
        return kind(**item)

    return message


def _bounds(kind: Any) -> tuple[int, int] | None:  # noqa: ANN401 - as above
    """The least and the greatest length of a bytes or str field that has a size, and nothing else to look at."""
    if get_origin(kind) is not Annotated:
        return None
    base, *extras = get_args(kind)
    sizes = [extra for extra in extras if isinstance(extra, Size)]
    return _limits(sizes[0]) if base in (bytes, str) and len(sizes) == 1 else None


def _limits(size: Size) -> tuple[int, int]:
    least = size.exactly or 0
    most = _MOST if size.at_most is None else size.at_most
    return least, most if size.exactly is None else min(most, least)


def _seen_as(kind: Any) -> type | None:  # noqa: ANN401 - as above
    """The one type that an item of this annotation has; None if it has several."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _seen_as(get_args(kind)[0])
    if origin is tuple:
        return list
    if dataclasses.is_dataclass(kind):
        return dict
    supertype = getattr(kind, "__supertype__", None)
    if supertype is not None:
        return _seen_as(supertype)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return str
    return kind if kind in (bytes, str, bool, int) else None
