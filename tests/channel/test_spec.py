"""The examples of docs/spec are what the code says, byte for byte."""

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from moorline.channel import signed
from moorline.channel.messages import pack, unpack
from moorline.channel.session import (
    Active,
    Collect,
    Initiator,
    JudgeBroker,
    KemKey,
    Responder,
    Send,
    SessionFacts,
    State,
    message_digest,
    transcript,
)
from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.evidence.snp import parse_report
from moorline.wire import cbor, keys, launch, schema
from moorline.wire.device import Request, Response, Status
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Call, Challenge, Evidence, FunctionFields, FunctionSecrets, Hello

SPEC = Path(__file__).parents[2] / "docs" / "spec"


@pytest.fixture(scope="module")
def example():
    return json.loads((SPEC / "examples" / "attested-session.json").read_text())


@pytest.fixture(scope="module")
def messages(example):
    return {name: bytes.fromhex(text) for name, text in example["messages"].items()}


def test_the_attester_says_every_byte_of_the_example(example, messages):
    hello = unpack(Hello, messages["hello"])
    fields = launch.parse_fields(schema.decode(FunctionFields, hello.fields).launch_fields)
    seeds = {name: bytes.fromhex(text) for name, text in example["attester"].items()}
    kem = KemKey.of(
        MLKEM768PrivateKey.from_seed_bytes(seeds["mlkem768_seed"]),
        X25519PrivateKey.from_private_bytes(seeds["x25519_private"]),
    )
    assert hello.kem_public == kem.public
    attester = Initiator(hello=hello, kem=kem, export=lambda _label, _context: bytes.fromhex(example["exporter"]))
    assert attester.start() == [Send(body=messages["hello"])]

    (judge,) = attester.receive(messages["challenge"])
    assert isinstance(judge, JudgeBroker)
    assert judge.digest.hex() == example["challenge_digest"]
    token = launch.token(bytes.fromhex(example["launch_key"]), fields)
    proof = launch.token_proof(token, judge.digest)
    assert proof.hex() == example["token_proof"]

    attester.judged(None)
    (collect,) = attester.proven(proof)
    assert isinstance(collect, Collect)
    assert collect.binding.hex() == example["binding"]
    shown = unpack(Evidence, messages["evidence"])
    report = parse_report(shown.evidence)
    assert report.report_data == collect.binding
    assert report.host_data == launch.commitment(fields) == bytes.fromhex(example["commitment"])
    assert attester.collected(shown.format, shown.evidence, shown.endorsements) == [Send(body=messages["evidence"])]

    assert attester.receive(messages["answer"]) == [Send(body=messages["confirm"])]
    secrets = schema.decode(FunctionSecrets, attester.secrets)
    assert (secrets.storage_key, secrets.generation) == (b"\xd0" * 32, 1)
    assert attester.receive(messages["activation"]) == [Active()]
    assert attester.activation.spiffe_id == "spiffe://alpha.test/svc/records/records-1"
    assert attester.seal(Call(id=0, operation="time", body=b"")) == messages["record"]


def test_the_broker_takes_every_byte_of_the_example(example, messages):
    asked = unpack(Challenge, messages["challenge"])
    facts = SessionFacts(ledger_id=asked.ledger_id, provider=asked.provider, hsm=asked.hsm)
    exporter = bytes.fromhex(example["exporter"])
    broker = Responder(facts=facts, export=lambda _label, _context: exporter, peer_address="")
    now = Instant(example["now"])
    broker.receive(messages["hello"], now)
    made = broker.challenged(nonce=asked.nonce, expires=Instant(asked.expires), bundle=asked.bundle)
    assert made == [Send(body=messages["challenge"])]
    (appraise,) = broker.receive(messages["evidence"], now)
    assert appraise.claim.binding.hex() == example["binding"]
    assert appraise.claim.proof.hex() == example["token_proof"]
    assert broker.state is State.APPRAISE


def test_the_page_shows_the_example(example, messages):
    page = (SPEC / "attested-session.md").read_text()
    mac = cbor.decode(messages["confirm"])[1]["mac"].hex()
    for value in (example["challenge_digest"], example["token_proof"], example["binding"], example["commitment"], mac):
        assert value in page
    for name, body in messages.items():
        assert re.search(rf"{name} +{len(body)} ", page), name
    for beginning in re.findall(r"h'([0-9a-f]{8})…'", page):
        assert any(bytes.fromhex(beginning) in body for body in messages.values()), beginning
    assert transcript(messages["hello"]) != transcript(messages["challenge"])


# The HPKE-only profile -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind():
    return json.loads((SPEC / "examples" / "attested-session-hpke-only.json").read_text())


@pytest.fixture(scope="module")
def carried(behind):
    return {name: bytes.fromhex(text) for name, text in behind["messages"].items()}


def test_the_attester_behind_a_proxy_says_every_byte_of_the_example(behind, carried):
    hello = unpack(Hello, carried["hello"])
    assert hello.profile is ChannelProfile.HPKE_ONLY
    fields = launch.parse_fields(schema.decode(FunctionFields, hello.fields).launch_fields)
    seeds = {name: bytes.fromhex(text) for name, text in behind["attester"].items()}
    kem = KemKey.of(
        MLKEM768PrivateKey.from_seed_bytes(seeds["mlkem768_seed"]),
        X25519PrivateKey.from_private_bytes(seeds["x25519_private"]),
    )
    attester = Initiator(hello=hello, kem=kem, export=lambda _label, _context: b"of some proxy")
    assert attester.start() == [Send(body=carried["hello"])]
    (judge,) = attester.receive(carried["challenge"])
    assert judge.digest.hex() == behind["challenge_digest"]
    attester.judged(keys.parse_public(bytes.fromhex(behind["hsm_key"])))
    proof = launch.token_proof(launch.token(bytes.fromhex(behind["launch_key"]), fields), judge.digest)
    assert proof.hex() == behind["token_proof"]
    (collect,) = attester.proven(proof)
    assert collect.binding.hex() == behind["binding"]
    shown = unpack(Evidence, carried["evidence"])
    report = parse_report(shown.evidence)
    assert (report.report_data, report.host_data.hex()) == (collect.binding, behind["commitment"])
    assert report.host_data == launch.commitment(fields)
    assert attester.collected(shown.format, shown.evidence, shown.endorsements) == [Send(body=carried["evidence"])]
    assert attester.receive(carried["answer"]) == [Send(body=carried["confirm"])]
    assert schema.decode(FunctionSecrets, attester.secrets).storage_key == b"\xd0" * 32
    assert attester.receive(carried["activation"]) == [Active()]
    assert attester.activation.spiffe_id == "spiffe://alpha.test/svc/records/records-1"
    assert attester.seal(Call(id=0, operation="time", body=b"")) == carried["record"]


@pytest.mark.parametrize("name", ["challenge", "answer"])
def test_what_the_broker_signs_counts_for_this_session_and_key_only(behind, carried, name):
    """verifies that: messages 2 and 4 are COSE_Sign1 by the HSM key over everything before them, and by no other key."""
    purpose = {"challenge": signed.CHALLENGE, "answer": signed.ANSWER}[name]
    before = {
        "challenge": message_digest(carried["hello"]),
        "answer": transcript(carried["hello"], carried["challenge"], carried["evidence"]),
    }[name]
    hsm_key = keys.parse_public(bytes.fromhex(behind["hsm_key"]))
    shown = signed.SignedMessage(purpose, carried[name])
    shown.require_signed(hsm_key, before)
    with pytest.raises(NotAuthentic, match=r"session\.signed_for_another"):
        shown.require_signed(hsm_key, transcript(carried["hello"]))
    with pytest.raises(NotAuthentic, match=r"session\.not_signed_by_hsm"):
        shown.require_signed(ec.generate_private_key(ec.SECP256R1()).public_key(), before)


def test_the_page_shows_the_example_behind_a_proxy(behind, carried):
    page = (SPEC / "attested-session.md").read_text()
    for value in (behind["challenge_digest"], behind["token_proof"], behind["binding"]):
        assert value in page
    for name, body in carried.items():
        assert re.search(rf"{name} +{len(body)} ", page), name
        assert f'["{cbor.decode(body)[0]}", ' in page


def test_the_device_page_shows_what_the_code_says():
    page = (SPEC / "device-channel.md").read_text()
    request = cbor.encode({"op": "get", "name": "r1"})
    answer = cbor.encode({"data": b"one"})
    said = [
        pack(Status(bundle=b"", access=b"")),
        pack(Status(bundle=b"", access=b"")),
        pack(Request(id=0, body=request)),
        pack(Response(id=0, body=answer, problem=None)),
    ]
    shown = [bytes.fromhex(text) for text in re.findall(r"-> (?:device|function) +([0-9a-f]+)\n", page)]
    assert shown == said
    assert unpack(Request, shown[2]).body == request
    assert unpack(Response, shown[3]).body == answer
