"""Security Event Tokens: what is sent is what is read, and nothing else is."""

import base64
import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.wire import keys, security_event
from moorline.wire.security_event import SecurityEvent

KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER = "spiffe://alpha.test/verifier/v1"
LOST = SecurityEvent(
    verifier=ISSUER,
    host="h1",
    kind="verdict_lost",
    cursor=7,
    at=Instant(1_790_000_000),
    code="host.kernel_not_in_reference_values",
    result_expires=Instant(1_790_000_060),
)


def token(event=LOST, *, key=KEY, audience="siem.test"):
    message = security_event.signing_input(event, audience=audience, issued=Instant(1_790_000_001))
    return security_event.assemble(message, keys.KeySigner(key).sign(message))


def read(data, *, key=KEY, issuer=ISSUER, audience="siem.test"):
    return security_event.parse_verified(data, key.public_key(), issuer=issuer, audience=audience)


def forged(change, *, header=None):
    """A token of the right key over claims that `change` spoilt."""
    head, body, _ = token().split(b".")
    claims = json.loads(base64.urlsafe_b64decode(body + b"=="))
    change(claims)
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=")
    if header is not None:
        head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=")
    message = head + b"." + part
    return security_event.assemble(message, keys.KeySigner(KEY).sign(message))


def test_an_event_is_read_as_it_was_sent():
    assert read(token()) == LOST
    gained = dataclasses.replace(LOST, kind="verdict_gained", code="", cursor=8)
    assert read(token(gained)) == gained
    assert gained.jti == "spiffe://alpha.test/verifier/v1/events/8"


def test_it_is_a_security_event_token_of_the_standard():
    head, body, _ = (base64.urlsafe_b64decode(part + b"==") for part in token().split(b"."))
    claims = json.loads(body)
    assert json.loads(head) == {"alg": "ES256", "typ": "secevent+jwt"}
    assert {"iss", "iat", "jti", "aud", "events"} <= set(claims)
    assert "exp" not in claims  # RFC 8417 2.2: an event does not end
    assert list(claims["events"]) == ["urn:moorline:event:verdict-lost"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda: token(key=ec.generate_private_key(ec.SECP256R1())), "signature.invalid"),
        (lambda: token(audience="other.test"), "event.audience"),
        (lambda: token(dataclasses.replace(LOST, verifier="spiffe://beta.test/verifier/v1")), "event.issuer"),
        (lambda: forged(lambda c: None, header={"alg": "ES256", "typ": "JWT"}), "event.algorithm"),
        (lambda: forged(lambda c: None, header={"alg": "none", "typ": "secevent+jwt"}), "event.algorithm"),
        (lambda: forged(lambda c: c.update(exp=5)), "event.claim"),
        (lambda: forged(lambda c: c.pop("toe")), "event.claim"),
        (lambda: forged(lambda c: c.update(jti="another")), "event.claim"),
        (lambda: forged(lambda c: c["events"].update(more={})), "event.claim"),
        (lambda: forged(lambda c: c.update(events={"urn:moorline:event:verdict-shaken": {}})), "event.claim"),
        (lambda: forged(lambda c: c["events"]["urn:moorline:event:verdict-lost"].update(cursor=True)), "event.claim"),
        (lambda: forged(lambda c: c.update(iat="now")), "event.claim"),
        (lambda: token() + b"=", "event.base64"),
        (lambda: b"a.b", "event.not_a_token"),
        (lambda: token() + b"A" * security_event.MAX_TOKEN, "event.not_a_token"),
    ],
)
def test_anything_else_is_refused(data, code):
    with pytest.raises(MoorlineError) as refused:
        read(data())
    assert refused.value.code == code


@given(st.integers(min_value=0, max_value=len(token()) * 8 - 1))
@settings(deadline=None)
def test_no_bit_can_be_changed(position):
    data = bytearray(token())
    data[position // 8 % len(data)] ^= 1 << position % 8
    with pytest.raises((Malformed, NotAuthentic)):
        read(bytes(data))


@given(st.binary(max_size=300) | st.lists(st.binary(max_size=40), min_size=3, max_size=3).map(b".".join))
def test_any_bytes_are_refused_by_type(data):
    with pytest.raises((Malformed, NotAuthentic)):
        read(data)
