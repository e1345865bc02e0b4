"""A signature counts for one purpose, one key, one payload; a flipped bit anywhere never verifies."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.wire import cbor, cose, keys

KEYS = {
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
}


@pytest.mark.parametrize("name", KEYS)
def test_what_a_key_signed_verifies_under_that_key(name):
    signer = keys.KeySigner(KEYS[name])
    message = cose.sign("intent", b"payload", signer, x5chain=(b"leaf", b"ca"))
    parsed = cose.parse("intent", message)
    assert parsed.x5chain == (b"leaf", b"ca")
    assert cose.verify(parsed, signer.public_key()) == b"payload"


def test_a_signature_for_another_purpose_is_refused():
    message = cose.sign("intent", b"payload", keys.KeySigner(KEYS["P-256"]))
    with pytest.raises(Malformed, match="cose.purpose"):
        cose.parse("ticket", message)


def test_another_key_is_refused_even_if_it_is_of_the_same_kind():
    message = cose.sign("intent", b"payload", keys.KeySigner(KEYS["P-256"]))
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(NotAuthentic, match="cose.key_id"):
        cose.verify(cose.parse("intent", message), other)


@settings(max_examples=300)
@given(st.data())
def test_flipping_any_bit_never_verifies(data):
    signer = keys.KeySigner(KEYS["P-256"])
    message = bytearray(cose.sign("intent", b"payload", signer))
    position = data.draw(st.integers(0, len(message) * 8 - 1))
    message[position // 8] ^= 1 << position % 8
    with pytest.raises(MoorlineError):
        cose.verify(cose.parse("intent", bytes(message)), signer.public_key())


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_malformed(data):
    try:
        cose.parse("intent", data)
    except Malformed:
        return


def test_a_key_that_is_not_p256_p384_or_ed25519_is_not_used_here():
    from cryptography.hazmat.primitives.asymmetric import rsa

    der = keys.public_bytes(rsa.generate_private_key(65537, 2048).public_key())
    with pytest.raises(Malformed, match="key.unsupported"):
        keys.parse_public(der)


@settings(max_examples=400)
@given(
    payload=st.integers(0, 700),
    at=st.integers(0, 900),
    cut=st.integers(0, 2),
    put=st.binary(max_size=2),
    name=st.sampled_from(sorted(KEYS)),
)
def test_a_message_that_is_split_by_its_lengths_is_split_as_cbor_is(payload, at, cut, put, name):
    """verifies that: whatever is read the short way is CBOR in its one encoding, with these very parts."""
    message = cose.sign("intent", bytes(payload), keys.KeySigner(KEYS[name]))
    changed = message[:at] + put + message[at + cut :]
    for one in (message, changed):
        parts = cose._split(one)
        if parts is not None and one.startswith(b"\xd2"):
            assert cbor.decode(one[1:]) == [parts[0], {}, parts[1], parts[2]]
    assert payload < 24 or cose._split(message) is not None
