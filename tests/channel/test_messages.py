"""Frame bodies: the quick way of writing and reading one means what the long way means, on any bytes; running hashes too."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.channel.messages import RECORD_CAP, pack, reported, unpack, unpack_any
from moorline.digest import RunningHash, tagged_hash
from moorline.errors import MoorlineError
from moorline.wire import cbor, schema
from moorline.wire.session import KINDS, Activation, Confirm, Evidence, EvidenceFormat, Problem, Record

BYTES = st.binary(max_size=300)
MESSAGES = st.one_of(
    st.builds(
        Evidence,
        format=st.sampled_from(EvidenceFormat),
        evidence=BYTES,
        endorsements=BYTES,
        proof=st.none() | st.binary(max_size=64),
    ),
    st.builds(Confirm, mac=st.binary(min_size=32, max_size=32)),
    st.builds(Record, counter=st.integers(0, 2**64 - 1), sealed=BYTES),
    st.builds(
        Activation,
        spiffe_id=st.text(max_size=20),
        certificate=BYTES,
        chain=st.lists(BYTES, max_size=3).map(tuple),
        now=st.integers(0, 2**40),
        renew_after_s=st.integers(0, 2**16),
        body=BYTES,
    ),
)


def the_long_way(kind, body):
    name, item = unpack_any(body)
    if name == kind.__name__.lower():
        return schema.from_item(kind, item)
    if name == "problem":
        raise reported(schema.from_item(Problem, item).problem)
    return None


def outcome(read, *arguments):
    try:
        return read(*arguments)
    except MoorlineError as error:
        return error.code


@given(MESSAGES)
def test_a_message_is_packed_as_a_list_of_its_name_and_itself(message):
    assert pack(message) == cbor.encode([type(message).__name__.lower(), schema.to_item(message)])
    assert unpack(type(message), pack(message)) == message


@settings(max_examples=300)
@given(MESSAGES, st.data())
def test_whatever_was_done_to_a_body_is_read_the_same_both_ways(message, data):
    """verifies that: with a byte changed, put in or left out, or in another message's head, both ways say the same."""
    body = pack(message)
    at = data.draw(st.integers(0, len(body)))
    put = data.draw(st.binary(max_size=2))
    body = body[:at] + put + body[at + data.draw(st.integers(0, 2)) :]
    for kind in (type(message), *KINDS.values()):
        expected = outcome(the_long_way, kind, body)
        assert outcome(unpack, kind, body) == (expected if expected is not None else "session.unexpected_message")


def test_a_body_is_never_larger_than_its_reader_takes():
    body = pack(Record(counter=0, sealed=bytes(1 << 20)))
    assert len(unpack(Record, body, max_bytes=RECORD_CAP).sealed) == 1 << 20
    with pytest.raises(MoorlineError, match=r"cbor\.too_large"):
        unpack(Record, body)
    with pytest.raises(MoorlineError, match=r"message\.size"):
        unpack(Record, pack(Record(counter=0, sealed=bytes((1 << 20) + 1))), max_bytes=RECORD_CAP)


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_a_running_hash_is_the_hash_of_all_fields_so_far(fields):
    running = RunningHash("session-transcript")
    for number, field in enumerate(fields):
        assert running.digest() == tagged_hash("session-transcript", *fields[:number])
        running.add(field)
    assert running.digest() == tagged_hash("session-transcript", *fields)
    assert running.digest() != tagged_hash("session-message", *fields)
