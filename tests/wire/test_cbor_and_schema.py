"""One meaning per byte string: what we did not write ourselves in exactly this form is not accepted."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed
from moorline.wire import cbor, schema
from moorline.wire.schema import Bytes32, Size

ITEMS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(ITEMS)
def test_every_plain_item_comes_back_as_it_was(item):
    assert cbor.decode(cbor.encode(item)) == item


@given(st.binary(max_size=64))
def test_any_bytes_give_an_item_that_encodes_back_to_them_or_malformed(data):
    try:
        item = cbor.decode(data)
    except Malformed:
        return
    assert cbor.encode(item) == data


@pytest.mark.parametrize(
    ("name", "data"),
    {
        "long integer": b"\x18\x01",
        "indefinite list": b"\x9f\x01\xff",
        "duplicate key": bytes.fromhex("a2616101616101"),
        "unsorted keys": bytes.fromhex("a2616201616101"),
        "trailing byte": b"\x01\x01",
        "float": bytes.fromhex("fb3ff8000000000000"),
        "undefined": b"\xf7",
        "date tag": bytes.fromhex("c11a514b67b0"),
        "mixed keys": bytes.fromhex("a20101616101"),
        "too deep": b"\x81" * 40 + b"\x01",
        "bad utf-8": b"\x61\xff",
        "empty": b"",
        "huge announced list": b"\x9b" + b"\xff" * 8,
    }.items(),
)
def test_odd_encodings_are_malformed(name, data):
    with pytest.raises(Malformed) as refusal:
        cbor.decode(data)
    assert refusal.value.code.startswith("cbor.")


def test_the_cap_holds_before_anything_is_decoded():
    with pytest.raises(Malformed, match="cbor.too_large"):
        cbor.decode(b"\x00" * 11, max_bytes=10)


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    number: int
    text: Annotated[str, Size(at_most=4)]
    maybe: bytes | None
    inner: Inner
    many: tuple[Inner, ...]
    named: dict[str, int]
    colour: Colour


GOOD = Message(
    number=7,
    text="abcd",
    maybe=None,
    inner=Inner(digest=b"d" * 32),
    many=(Inner(digest=b"e" * 32),),
    named={"x": 1},
    colour=Colour.RED,
)


def test_a_message_comes_back_as_it_was():
    assert schema.decode(Message, schema.encode(GOOD)) == GOOD


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"number": True}, "message.type"),
        ({"number": -1}, "message.type"),
        ({"text": "abcde"}, "message.size"),
        ({"maybe": "text"}, "message.type"),
        ({"inner": {"digest": b"short"}}, "message.size"),
        ({"inner": {}}, "message.fields"),
        ({"many": {}}, "message.type"),
        ({"named": {"x": "1"}}, "message.type"),
        ({"colour": "blue"}, "message.type"),
        ({"unknown": 1}, "message.fields"),
    ],
)
def test_one_wrong_field_refuses_the_message(change, code):
    item = schema.to_item(GOOD)
    assert isinstance(item, dict)
    with pytest.raises(Malformed) as refusal:
        schema.decode(Message, cbor.encode({**item, **change}))
    assert refusal.value.code == code


@pytest.mark.parametrize("field", list(Message.__slots__))
def test_leaving_any_field_out_refuses(field):
    item = schema.to_item(GOOD)
    assert isinstance(item, dict)
    del item[field]
    with pytest.raises(Malformed, match="message.fields"):
        schema.decode(Message, cbor.encode(item))
