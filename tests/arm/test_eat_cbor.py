"""Verifies that foreign CBOR is read as its standards say, and that any bytes give a value or Malformed."""

import contextlib

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Malformed
from moorline.evidence import corim, eat_cbor
from moorline.evidence.eat_cbor import Encoding, Tag

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=20) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers(-100, 100_000) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_what_a_standard_encoder_writes_is_read_back(item):
    assert eat_cbor.decode(cbor2.dumps(item), encoding=Encoding.PREFERRED, max_depth=20) == item


@given(st.binary(max_size=300), st.sampled_from(Encoding))
def test_any_bytes_give_a_value_or_malformed(data, encoding):
    try:
        eat_cbor.decode(data, encoding=encoding)
    except Malformed as error:
        assert error.code.startswith("eat.")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_corim_or_malformed(data):
    with contextlib.suppress(Malformed):
        corim.parse_endorsed_keys(data)


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("eat.cbor_truncated", b""),
        ("eat.cbor_truncated", b"\x42\x01"),
        ("eat.cbor_truncated", b"\x9b" + b"\x7f" * 8),
        ("eat.cbor_truncated", b"\xba\x7f\xff\xff\xff"),
        ("eat.cbor_trailing", b"\x01\x01"),
        ("eat.cbor_depth", b"\x81" * 9 + b"\x01"),
        ("eat.cbor_items", b"\x99\x10\x00" + b"\x01" * 0x1000),
        ("eat.cbor_too_large", bytes(65537)),
        ("eat.cbor_duplicate", b"\xa2\x01\x01\x01\x02"),
        ("eat.cbor_key", b"\xa1\xf5\x01"),
        ("eat.cbor_key", b"\xa1\x41\x00\x01"),
        ("eat.cbor_utf8", b"\x61\xff"),
        ("eat.cbor_type", b"\xf9\x3c\x00"),
        ("eat.cbor_type", b"\xf7"),
        ("eat.cbor_type", b"\xff"),
        ("eat.cbor_type", b"\xf8\x20"),
        ("eat.cbor_reserved", b"\x1c"),
        ("eat.cbor_indefinite", b"\x9f\x01\xff"),
        ("eat.cbor_indefinite", b"\x5f\x41\x01\xff"),
        ("eat.cbor_not_shortest", b"\x18\x17"),
        ("eat.cbor_not_shortest", b"\x59\x00\x01\x00"),
        ("eat.cbor_not_shortest", b"\x1b" + bytes(4) + b"\xff" * 4),
    ],
)
def test_each_rule_of_preferred_encoding(code, data):
    with pytest.raises(Malformed) as refused:
        eat_cbor.decode(data, encoding=Encoding.PREFERRED)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (b"\x9f\x01\x02\xff", [1, 2]),
        (b"\xbf\x61a\x01\xff", {"a": 1}),
        (b"\x5f\x41\x01\x42\x02\x03\xff", b"\x01\x02\x03"),
        (b"\x7f\x61a\x61b\xff", "ab"),
        (b"\x18\x01", 1),
    ],
)
def test_free_encoding_takes_what_aws_leaves_open(data, item):
    assert eat_cbor.decode(data, encoding=Encoding.ANY) == item


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("eat.cbor_chunk", b"\x5f\x61a\xff"),
        ("eat.cbor_chunk", b"\x5f\x5f\x41\x01\xff\xff"),
        ("eat.cbor_utf8", b"\x7f\x61\xc3\x61\xa9\xff"),
        ("eat.cbor_truncated", b"\x9f\x01"),
        ("eat.cbor_reserved", b"\x1f"),
        ("eat.cbor_reserved", b"\xdf\x01"),
        ("eat.cbor_duplicate", b"\xbf\x01\x01\x01\x02\xff"),
        ("eat.cbor_items", b"\x5f" + b"\x40" * 5000 + b"\xff"),
    ],
)
def test_free_encoding_has_its_rules_too(code, data):
    with pytest.raises(Malformed) as refused:
        eat_cbor.decode(data, encoding=Encoding.ANY)
    assert refused.value.code == code


def test_tags_are_shown_and_never_interpreted():
    assert eat_cbor.decode(b"\xc2\x41\x01", encoding=Encoding.PREFERRED) == Tag(2, b"\x01")


def test_members_of_a_map_come_with_the_bytes_they_were_read_from():
    parts = eat_cbor.map_with_bytes(cbor2.dumps({"a": [1, 2], 7: b"x"}), encoding=Encoding.PREFERRED)
    assert parts == {"a": ([1, 2], b"\x82\x01\x02"), 7: (b"x", b"\x41x")}


SIGN1 = frozenset({18})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("eat.cose_tag", [b"\xa1\x01\x26", {}, b"p", b"s"]),
        ("eat.cose_tag", cbor2.CBORTag(17, [b"\xa1\x01\x26", {}, b"p", b"s"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [b"\xa1\x01\x26", {}, b"p"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [b"\xa1\x01\x26", {}, None, b"s"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [{1: -7}, {}, b"p", b"s"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [b"\xa1\x01\x26", [], b"p", b"s"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [b"\x80", {}, b"p", b"s"])),
        ("eat.cose_shape", cbor2.CBORTag(18, [b"\xa2\x01\x26\x04\x41\x01", {4: b"k"}, b"p", b"s"])),
        ("eat.cose_critical", cbor2.CBORTag(18, [b"\xa2\x01\x26\x02\x81\x18\x64", {}, b"p", b"s"])),
        ("eat.algorithm_missing", cbor2.CBORTag(18, [b"", {}, b"p", b"s"])),
        ("eat.algorithm_missing", cbor2.CBORTag(18, [b"\xa0", {1: -7}, b"p", b"s"])),
        ("eat.algorithm_missing", cbor2.CBORTag(18, [b"\xa1\x01\x26", {1: -7}, b"p", b"s"])),
        ("eat.algorithm_missing", cbor2.CBORTag(18, [b"\xa1\x01\x65ES256", {}, b"p", b"s"])),
        ("eat.cbor_trailing", cbor2.CBORTag(18, [b"\xa1\x01\x26\x00", {}, b"p", b"s"])),
    ],
)
def test_each_rule_of_cose_headers(code, message):
    with pytest.raises(Malformed) as refused:
        eat_cbor.parse_cose(cbor2.dumps(message), encoding=Encoding.PREFERRED, tags=SIGN1)
    assert refused.value.code == code
