"""The examples of docs/spec/pair-key.md and no-pfs-channel.md are what the code says, computed again from their numbers."""

import hmac
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel.messages import pack, unpack
from moorline.channel.records import Direct
from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.wire import access, cbor, cmp, cmp_reply, cose, keys, pair, schema
from moorline.wire.device import Request, Response
from moorline.wire.nopfs import DeviceKeyRequest, Direction, KeyContext, NoPfsHello, NoPfsOffer, NoPfsRecord
from moorline.wire.pair import PairOffer, PairStatement

EXAMPLES = Path(__file__).parents[2] / "docs" / "spec" / "examples"


@pytest.fixture(scope="module")
def agreed():
    return json.loads((EXAMPLES / "pair-key.json").read_text())


@pytest.fixture(scope="module")
def channel():
    return json.loads((EXAMPLES / "no-pfs-channel.json").read_text())


def scalar(text):
    return ec.derive_private_key(int(text, 16), ec.SECP256R1())


def test_the_access_statements_are_signed_and_the_second_answers_the_first():
    shown = json.loads((EXAMPLES / "access-statement.json").read_text())
    home, function = (bytes.fromhex(shown[side]) for side in ("home", "function"))
    yes = access.verify_statement(home, keys.parse_public(bytes.fromhex(shown["home_hsm_key"])))
    no = access.verify_statement(function, keys.parse_public(bytes.fromhex(shown["function_hsm_key"])))
    assert (yes.side, yes.provider, yes.allowed, yes.rule, yes.answers) == ("home", "beta", True, "office-hours", b"")
    assert (no.side, no.provider, no.allowed, no.rule) == ("function", "alpha", False, "no rule permits")
    assert no.answers == access.statement_digest(home) == bytes.fromhex(shown["home_digest"])
    assert yes.connection == no.connection
    assert yes.not_after - yes.issued == 30
    with pytest.raises(NotAuthentic):
        access.verify_statement(home, keys.parse_public(bytes.fromhex(shown["function_hsm_key"])))


def test_the_pair_key_is_what_both_scalars_give(agreed):
    ours, theirs = scalar(agreed["initiator_ephemeral"]), scalar(agreed["responder_ephemeral"])
    key = ours.exchange(ec.ECDH(), theirs.public_key())
    assert key == theirs.exchange(ec.ECDH(), ours.public_key()) == bytes.fromhex(agreed["pair_key"])
    statement = schema.decode(PairStatement, bytes.fromhex(agreed["statement"]))
    transcript = pair.transcript(statement)
    assert transcript.hex() == agreed["transcript"]
    for who, initiator in (("initiator", True), ("responder", False)):
        public = scalar(agreed[f"{who}_hsm_key"]).public_key()
        signed = cose.parse(pair.PAIR_PURPOSE, bytes.fromhex(agreed[f"signed_by_{who}"]))
        assert cose.verify(signed, public) == bytes.fromhex(agreed["statement"])
        mac = hmac.digest(key, pair.confirmation(transcript, initiator=initiator), "sha256")
        assert mac.hex() == agreed[f"mac_of_{who}"]
    offer = schema.decode(PairOffer, bytes.fromhex(agreed["offer"]))
    assert (offer.epoch, offer.point) == (statement.epoch, statement.initiator_point)
    assert pair.anchor_name(("alpha", "hsm-1"), ("beta", "hsm-1")) == agreed["anchor_of_alpha"]
    assert pair.anchor_name(("beta", "hsm-1"), ("alpha", "hsm-1")) == agreed["anchor_of_beta"]


def test_the_records_open_under_the_keys_derived(agreed, channel):
    raw = {name: bytes.fromhex(text) for name, text in channel.items()}
    assert channel["pair_key"] == agreed["pair_key"]
    hello, offer = unpack(NoPfsHello, raw["hello"]), unpack(NoPfsOffer, raw["offer"])
    assert (pack(hello), pack(offer)) == (raw["hello"], raw["offer"])
    context = KeyContext(
        ledger_id=raw["ledger_id"],
        device_provider=hello.home_provider,
        device_hsm=hello.home_hsm,
        function_provider=offer.provider,
        function_hsm=offer.hsm,
        pair_epoch=offer.pair_epoch,
        device=hello.device,
        service=offer.service,
        device_nonce=hello.nonce,
        function_nonce=offer.nonce,
    )
    assert context.key_id() == raw["key_id"]
    opened = {}
    for direction, name in ((Direction.TO_FUNCTION, "request"), (Direction.TO_DEVICE, "response")):
        key = hmac.digest(raw["pair_key"], context.message(direction), "sha256")
        assert key == raw[direction.value.replace("-", "_")]
        reading = Direct(key, raw["key_id"], direction, count=1, not_after=Instant(offer.not_after))
        opened[name] = reading.open(unpack(NoPfsRecord, raw[name]), now=Instant(offer.not_after - 1))
    request, response = schema.decode(Request, opened["request"]), schema.decode(Response, opened["response"])
    assert cbor.decode(request.body) == {"op": "get", "name": "r1"}
    assert cbor.decode(response.body) == {"data": b"one"}
    asked = schema.decode(DeviceKeyRequest, raw["device_key_request"])
    assert (asked.device_nonce, asked.function_nonce) == (hello.nonce, offer.nonce)


def test_the_error_message_of_the_enrolment_page_reads():
    page = (EXAMPLES.parent / "enrolment.md").read_text("utf-8")
    data = bytes.fromhex("".join(line for line in page.splitlines() if line.startswith("    ")).replace(" ", ""))
    message = cmp.parse(data)
    assert (message.body, message.header.transaction) == (cmp.Body.ERROR, b"t" * 16)
    assert cmp_reply.failure_info(cmp.Failure.BAD_POP) in message.content.der
