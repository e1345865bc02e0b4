"""CMP messages by themselves: what any bytes are, what is written reads back, and MACs against openssl's."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, Refused
from moorline.wire import cmp, cmp_mac, cmp_reply
from moorline.wire.cmp import Body
from moorline.wire.cmp_elements import single
from moorline.wire.der import INTEGER, OCTET_STRING, OID, SEQUENCE, TIME, tlv

sys.path.insert(0, str(Path(__file__).parent))
from cmp_samples import by_openssl, pbmac1, sample


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_malformed(data):
    try:
        cmp.parse(data)
    except Malformed:
        return


def test_what_is_written_reads_back():
    reply, data = sample()
    message = cmp.parse(data)
    assert (message.header.transaction, message.header.sender_nonce) == (reply.transaction, reply.sender_nonce)
    assert (message.body, message.protection) == (Body.ERROR, b"signature")
    assert message.protected == cmp_reply.protected_part(reply)
    assert message.extra_certificates == (b"\x30\x00",)


LEAVES = st.tuples(st.sampled_from([INTEGER, OCTET_STRING, OID, TIME, 0x03, 0x05, 0x0C]), st.binary(max_size=4))
TREES = st.recursive(
    LEAVES.map(lambda one: tlv(*one)),
    lambda inner: st.tuples(st.sampled_from([SEQUENCE, 0xA0, 0xA1]), st.lists(inner, max_size=3)).map(
        lambda one: tlv(one[0], b"".join(one[1]))
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(TREES, max_size=3))
def test_a_body_of_any_shape_is_read_or_malformed(parts):
    """verifies that: sequences that are empty where something belongs end nobody's process, in either direction."""
    body = single(tlv(SEQUENCE, b"".join(parts)), SEQUENCE)
    for read in (
        cmp.cert_requests,
        cmp.confirmations,
        cmp.revocation,
        cmp.info_types,
        cmp.issued_certificate,
        cmp.error_text,
    ):
        with contextlib.suppress(Malformed):
            read(body)


@pytest.mark.parametrize("status", [b"", tlv(SEQUENCE, b"")])
def test_a_confirmation_with_an_empty_status_is_malformed(status):
    one = tlv(OCTET_STRING, bytes(32)) + tlv(INTEGER, b"\0") + tlv(SEQUENCE, status)
    with pytest.raises(Malformed):
        cmp.confirmations(single(tlv(SEQUENCE, tlv(SEQUENCE, one)), SEQUENCE))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_message_is_another_message_or_malformed(data):
    _, good = sample()
    changed = bytearray(good)
    changed[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message = cmp.parse(bytes(changed))
        for read in (cmp.cert_requests, cmp.confirmations, cmp.revocation, cmp.info_types):
            try:
                read(message.content)
            except Malformed:
                continue
    except Malformed:
        return


@pytest.mark.parametrize("failure", list(cmp.Failure))
def test_failure_bits_are_where_openssl_looks_for_them(failure):
    made = cmp_reply.failure_info(failure)
    unused, value = made[2], made[3:]
    assert unused == 7 - failure % 8
    assert int.from_bytes(value, "big") >> unused & 1
    assert len(value) == failure // 8 + 1


# PBMAC1 (RFC 9481 6.1.2): OpenSSL 3.0 does not speak it within CMP, but computes PBKDF2 and HMAC by themselves -----------


@pytest.mark.parametrize(
    ("prf", "scheme", "length"), [("sha256", "sha256", 32), ("sha512", "sha384", 20), ("sha384", "sha512", 64)]
)
def test_pbmac1_is_what_openssl_computes(tmp_path, prf, scheme, length):
    """verifies that: PBKDF2 and HMAC with each hash give what openssl gives; without keyLength the MAC's own size counts."""
    chosen = {"prf": prf, "scheme": scheme, "salt": b"\x00salt\xff", "iterations": 1234, "length": length}
    ours = cmp_mac.mac(pbmac1(**chosen), "one-time", b"header and body")
    assert ours == by_openssl(tmp_path, "one-time", b"header and body", **chosen)
    own = hashlib.new(scheme).digest_size
    without = cmp_mac.mac(pbmac1(**{**chosen, "length": None}), "one-time", b"header and body")
    assert without == by_openssl(tmp_path, "one-time", b"header and body", **{**chosen, "length": own})


@pytest.mark.parametrize(
    "weak",
    [
        {"iterations": 99},
        {"iterations": 100_001},
        {"prf": None},  # the default is SHA-1
        {"prf": "1.2.840.113549.2.7"},
        {"scheme": "1.2.840.113549.2.7"},
        {"length": 15},
        {"length": 65},
        {"salt": b"s" * 129},
        {"derivation": "1.3.6.1.4.1.11591.4.11"},
    ],
)
def test_pbmac1_that_is_weak_or_unknown_is_refused(weak):
    """verifies that: few or too many iterations, SHA-1, short keys, long salts and other derivations compute nothing."""
    with pytest.raises(Refused, match=r"cmp\.algorithm"):
        cmp_mac.mac(pbmac1(**weak), "one-time", b"data")


@given(st.binary(max_size=80))
def test_any_parameters_are_pbmac1s_or_malformed(data):
    """verifies that: parameters nobody ever wrote raise what a parser raises, and nothing else."""
    with contextlib.suppress(Malformed, Refused):
        cmp_mac.mac(cmp.Algorithm(oid=cmp_mac.PBMAC1, parameters=data), "one-time", b"data")
