"""The quick way of reading and writing messages takes what the long way takes, means the same by it, and nothing else."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NewType

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed
from moorline.wire import cbor, ordered, schema
from moorline.wire.schema import Bytes32, Size

Name = NewType("Name", str)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    b: bytes
    a: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Empty:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    number: int
    flag: bool
    name: Name
    digest: Bytes32
    short: Annotated[str, Size(at_most=3)]
    few: Annotated[tuple[int, ...], Size(at_most=2)]
    inner: Inner
    several: tuple[Inner, ...]
    maybe: Annotated[bytes, Size(at_most=2)] | None
    nothing: Empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    inside: "Nested | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    named: dict[str, int]


def inner() -> st.SearchStrategy[Inner]:
    return st.builds(Inner, b=st.binary(max_size=4), a=st.sampled_from(Colour))


OUTER = st.builds(
    Outer,
    number=st.integers(0, 2**64 - 1),
    flag=st.booleans(),
    name=st.text(max_size=4),
    digest=st.binary(min_size=32, max_size=32),
    short=st.text(max_size=3),
    few=st.lists(st.integers(0, 300), max_size=2).map(tuple),
    inner=inner(),
    several=st.lists(inner(), max_size=3).map(tuple),
    maybe=st.none() | st.binary(max_size=2),
    nothing=st.just(Empty()),
)
ODD = st.sampled_from(
    [None, True, -1, 2**64, 2**70, 1.5, "red", "green", b"", bytes(32), bytes(33), [], [1, 2, 3], [[]], {}, {"a": 1}, {1: 2}]
)


def long_way(kind, data):
    return schema.from_item(kind, cbor.decode(data))


def either(read):
    """The value, or the whole refusal."""
    try:
        return read()
    except Malformed as error:
        return error.as_problem()


@given(OUTER)
def test_a_message_is_written_and_read_quickly_as_it_is_the_long_way(message):
    data = schema.encode(message)
    assert data == cbor.encode(schema.to_item(message)) == cbor2.dumps(ordered.written(message))
    read = ordered.reader(Outer)
    assert read is not None
    assert read(cbor2.loads(data)) == schema.decode(Outer, data) == long_way(Outer, data) == message


@settings(max_examples=400)
@given(OUTER, st.data())
def test_a_message_with_one_odd_value_gets_the_same_answer_either_way(message, data):
    item = schema.to_item(message)
    field = data.draw(st.sampled_from(sorted(item)))
    where = item if field != "inner" or data.draw(st.booleans()) else item["inner"]
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(ODD)
    encoded = cbor2.dumps(item)
    assert either(lambda: schema.decode(Outer, encoded)) == either(lambda: long_way(Outer, encoded))


@settings(max_examples=400)
@given(OUTER, st.data())
def test_a_message_with_a_byte_changed_gets_the_same_answer_either_way(message, data):
    encoded = bytearray(schema.encode(message))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    changed = bytes(encoded) + data.draw(st.sampled_from([b"", b"\x00"]))
    assert either(lambda: schema.decode(Outer, changed)) == either(lambda: long_way(Outer, changed))


@pytest.mark.parametrize("change", ["fields in another order", "a field twice", "a long integer", "a big number's tag"])
def test_what_is_not_in_its_one_encoding_is_refused_as_before(change):
    message = Inner(b=b"x", a=Colour.RED)
    data = {
        "fields in another order": cbor2.dumps({"b": b"x", "a": "red"}),
        "a field twice": b"\xa3\x61a\x63red\x61a\x63red\x61b\x41x",
        "a long integer": b"\xa2\x61a\x78\x03red\x61b\x41x",
        "a big number's tag": b"\xa2\x61a\x63red\x61b\xc2\x41x",
    }[change]
    assert schema.decode(Inner, schema.encode(message)) == message
    with pytest.raises(Malformed) as refusal:
        schema.decode(Inner, data)
    assert refusal.value.code.startswith("cbor.")


@pytest.mark.parametrize("value", [-1, 2**64, 1.5, object(), {1: "x"}, [[[[[[[[1]]]]]]]]])
def test_what_has_no_place_in_a_message_is_not_written_quickly(value):
    with pytest.raises(ordered.OddError):
        ordered.written(Inner(b=value, a=Colour.RED))


def test_what_can_hold_itself_or_a_map_is_read_the_long_way():
    assert ordered.reader(Nested) is None
    assert ordered.reader(Mapped) is None
    message = Mapped(named={"b": 1, "a": 2})
    assert schema.decode(Mapped, schema.encode(message)) == message
    deep = None
    for _ in range(40):
        deep = Nested(inside=deep)
    with pytest.raises(Malformed) as refusal:
        schema.encode(deep)
    assert refusal.value.code == "cbor.too_deep"


def test_the_messages_that_come_in_by_the_thousand_are_read_quickly():
    from moorline.ledger import records, transactions

    kinds = [*transactions.PROVIDER_BODIES.values(), *transactions.AUTHORITY_BODIES.values(), transactions.Payload]
    kinds += [kind for name, kind in vars(records).items() if name.endswith("Record")]
    assert len(kinds) > 30
    assert [kind.__name__ for kind in kinds if ordered.reader(kind) is None] == []
