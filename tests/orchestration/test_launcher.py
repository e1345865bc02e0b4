"""The launcher's judgement, with real keys: what it grants, what it refuses, and that no number is used twice."""

import asyncio
import dataclasses
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import records
from moorline.ledger.records import RevocationKind, Status
from moorline.orchestration import grant as grants
from moorline.orchestration import intent as intents
from moorline.orchestration.launcher import TIME_LIFE_S, launcher_id
from moorline.wire import cose, keys, launch, schema
from moorline.wire.launch import ChannelProfile
from moorline.wire.orchestration import LaunchIntent, LaunchReply, LaunchRequest, open_token

from .conftest import CHIP, MEASUREMENT, NOW, Provider, enclave_of

DIGEST = b"p" * 32
REPLY = x25519.X25519PrivateKey.generate()


@pytest.fixture
def provider():
    made = Provider()
    made.service(DIGEST)
    return made


def intended(**changes):
    fields = {
        "ledger_id": b"L" * 32,
        "provider": "alpha",
        "orchestrator": "o1",
        "tenant": "tenant-1",
        "service": "records",
        "package_digest": DIGEST,
        "configuration_digest": b"c" * 32,
        "measurement": MEASUREMENT,
        "instance": "records-1",
        "generation": 1,
        "host": "h1",
        "chip": CHIP,
        "hsm": "hsm-1",
        "profile": ChannelProfile.TLS,
        "not_after": NOW + 300,
        "reply_key": REPLY.public_key().public_bytes_raw(),
    }
    return LaunchIntent(**(fields | changes))


def asked(provider, intent=None, *, signer=None, bundle=None):
    intent = intent or intended()
    return LaunchRequest(
        intent=intents.sign(intent, signer or provider.intent_signer),
        bundle=bundle or provider.ledger.bundle(intents.keys_to_prove(intent)),
    )


def verified(provider, reply, request, intent=None):
    return grants.verify_reply(
        reply,
        request.intent,
        intent or intended(),
        REPLY,
        roots=provider.trust.roots,
        trust_domain="alpha.test",
        now=NOW,
    )


async def test_a_permitted_intent_is_granted(provider, enclave):
    request = asked(provider)
    granted = verified(provider, await enclave.launcher.answer(schema.encode(request)), request)
    fields = granted.fields
    assert (fields.epoch, fields.sequence, fields.not_after) == (7, 0, NOW + 300)
    assert fields.launcher == launcher_id(keys.public_bytes(enclave.signer.public_key())) == enclave.launcher.id
    assert granted.token == launch.token(bytes([7]) * 32, fields)
    assert granted.chain.issuer_name == "ca-1"
    asked_of_ledger = grants.keys_to_prove(granted, "alpha")
    state = intents.verify_bundle(provider.ledger.bundle(asked_of_ledger), provider.trust, now=NOW)
    grants.judge_issuer(granted, state, "alpha")


async def test_the_same_intent_has_the_same_grant_and_another_the_next_number(provider, enclave):
    request = asked(provider)
    first = await enclave.launcher.grant(request)
    assert await enclave.launcher.grant(request) == first
    other = asked(provider, intended(instance="records-2"))
    fields = verified(provider, await enclave.exchange(schema.encode(other)), other, intended(instance="records-2")).fields
    assert fields.sequence == 1
    assert enclave.session.calls == []


async def refusal(enclave, request):
    with pytest.raises(MoorlineError) as caught:
        await enclave.launcher.grant(request)
    return caught.value.code


async def test_a_stranger_signs(provider, enclave):
    stranger = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    assert await refusal(enclave, asked(provider, signer=stranger)) == "cose.key_id"


async def test_a_grant_is_not_an_intent(provider, enclave):
    request = asked(provider)
    grant = await enclave.launcher.grant(request)
    assert await refusal(enclave, dataclasses.replace(request, intent=grant)) == "cose.purpose"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ledger_id": b"M" * 32}, "launch.other_ledger"),
        ({"provider": "beta"}, "launch.other_provider"),
        ({"orchestrator": "o2"}, "ledger.orchestrator_not_active"),
        ({"service": "other"}, "ledger.service_not_active"),
        ({"package_digest": b"q" * 32}, "launch.package_not_registered"),
        ({"measurement": bytes(48)}, "launch.measurement_not_registered"),
        ({"profile": ChannelProfile.HPKE_ONLY}, "launch.profile_not_registered"),
        ({"host": "h9"}, "ledger.platform_not_active"),
        ({"chip": bytes(64)}, "launch.chip_not_registered"),
        ({"not_after": NOW}, "launch.intent_expired"),
        ({"not_after": NOW + 3601}, "launch.intent_expired"),
        ({"not_after": (1 << 64) - 1}, "launch.intent_expired"),
    ],
)
async def test_one_thing_wrong(provider, enclave, changes, code):
    assert await refusal(enclave, asked(provider, intended(**changes))) == code
    assert await enclave.launcher.grant(asked(provider))  # the same without the change


async def test_records_that_stopped_counting(provider, enclave):
    provider.orchestrator(status=Status.REVOKED)
    assert await refusal(enclave, asked(provider)) == "ledger.orchestrator_not_active"
    provider.orchestrator()
    provider.service(DIGEST, status=Status.REMOVED)
    assert await refusal(enclave, asked(provider)) == "ledger.service_not_active"
    provider.service(DIGEST)
    provider.platform("h1", status=Status.REVOKED)
    assert await refusal(enclave, asked(provider)) == "ledger.platform_not_active"


@pytest.mark.parametrize("registrant", ["alpha", "consortium"])
@pytest.mark.parametrize(
    ("kind", "identifier"),
    [(RevocationKind.HOST, "h1"), (RevocationKind.CHIP, CHIP.hex()), (RevocationKind.MEASUREMENT, MEASUREMENT.hex())],
)
async def test_revocations(provider, enclave, registrant, kind, identifier):
    record = records.RevocationRecord(kind=kind, registrant=registrant, id=identifier, time_ms=NOW * 1000)
    provider.ledger.put(records.revocation_key(kind, registrant, identifier), record)
    assert await refusal(enclave, asked(provider)) == "ledger.revoked"


async def test_leaving_any_key_out_of_the_proof_refuses(provider, enclave):
    wanted = intents.keys_to_prove(intended())
    for missing in wanted:
        bundle = provider.ledger.bundle([key for key in wanted if key != missing])
        assert await refusal(enclave, asked(provider, bundle=bundle)) == "ledger.not_proven", missing


async def test_proofs_must_be_fresh_and_signed_by_a_quorum_and_never_go_back(provider, enclave):
    wanted = intents.keys_to_prove(intended())
    stale = provider.ledger.bundle(wanted, time=NOW - 31)
    assert await refusal(enclave, asked(provider, bundle=stale)) == "ledger.proof_stale"
    few = provider.ledger.bundle(wanted, signers=2)
    assert await refusal(enclave, asked(provider, bundle=few)) == "ledger.quorum_missing"
    old = asked(provider)
    provider.service(DIGEST, status=Status.REMOVED)
    assert await refusal(enclave, asked(provider)) == "ledger.service_not_active"
    provider.service(DIGEST)
    assert await enclave.launcher.grant(asked(provider))
    assert await refusal(enclave, old) == "ledger.rollback"


async def test_of_two_proofs_that_came_together_the_older_is_no_rollback(provider, enclave):
    """verifies that: a launcher compares with what it had seen when it was asked, not with what it saw since."""
    older = asked(provider, intended(instance="records-1"))
    provider.ledger.height += 1
    newer = asked(provider, intended(instance="records-2"))
    async with enclave.launcher._turn:
        waiting = [asyncio.ensure_future(enclave.launcher.grant(one)) for one in (newer, older)]
        await asyncio.sleep(0)
    grants_made = await asyncio.gather(*waiting)
    assert all(grants_made)
    assert await refusal(enclave, older) == "ledger.rollback"  # who comes now with it is behind
    assert await enclave.launcher.grant(newer) == grants_made[0]


async def test_lease_used_up_is_renewed_and_numbers_never_repeat(provider):
    enclave = enclave_of(provider, count=2)
    seen = set()
    for number in range(5):
        intent = intended(instance=f"records-{number}")
        request = asked(provider, intent)
        fields = verified(provider, await enclave.exchange(schema.encode(request)), request, intent).fields
        seen.add((fields.epoch, fields.sequence))
    assert seen == {(7, number) for number in range(5)}
    assert enclave.session.calls == ["launcher.lease", "launcher.lease"]


async def test_lease_used_up_and_no_other_to_have(provider):
    enclave = enclave_of(provider, count=1)
    assert await enclave.launcher.grant(asked(provider))
    other = asked(provider, intended(instance="records-2"))
    enclave.session.count = 0
    assert await refusal(enclave, other) == "launcher.lease_exhausted"
    enclave.session.refuse = Refused("launch.launcher_not_admitted", "revoked")
    assert await refusal(enclave, other) == "launch.launcher_not_admitted"
    enclave.session.refuse = Unavailable("session.closed", "gone")
    assert await refusal(enclave, other) == "session.closed"


async def test_the_epoch_ends_a_token_and_the_next_epoch_has_its_own_key(provider, enclave):
    enclave.session.epoch_not_after = NOW + 100
    enclave.launcher._lease.secrets = dataclasses.replace(enclave.launcher._lease.secrets, epoch_not_after=NOW + 100)
    request = asked(provider)
    assert verified(provider, await enclave.exchange(schema.encode(request)), request).fields.not_after == NOW + 100
    # The broker's clock says the epoch is over: a lease of the next is asked for, and its key is used.
    enclave.monotonic.at += TIME_LIFE_S
    enclave.session.now_told, enclave.session.epoch, enclave.session.epoch_not_after = NOW + 100, 8, NOW + 3600
    provider.ledger.now, provider.ledger.height = Instant(NOW + 100), provider.ledger.height + 1
    intent = intended(instance="records-2")
    request = asked(provider, intent)
    granted = verified(provider, await enclave.exchange(schema.encode(request)), request, intent)
    assert granted.fields.epoch == 8
    assert granted.token == launch.token(bytes([8]) * 32, granted.fields)


async def test_without_the_brokers_time_nothing_is_minted(provider, enclave):
    enclave.monotonic.at += TIME_LIFE_S
    enclave.session.refuse = Unavailable("session.closed", "gone")
    assert await refusal(enclave, asked(provider)) == "session.closed"
    enclave.session.refuse = None
    assert await enclave.launcher.grant(asked(provider))


async def test_a_monotonic_clock_that_goes_back_is_not_believed(provider, enclave):
    enclave.monotonic.at -= 1
    await enclave.launcher.grant(asked(provider))
    assert enclave.session.calls == ["time"]


# What the orchestrator makes of an answer ---------------------------------------------------------------------------------


async def test_the_launchers_refusal_arrives_as_the_error_it_was(provider, enclave):
    request = asked(provider, intended(host="h9"))
    with pytest.raises(Refused) as caught:
        verified(provider, await enclave.exchange(schema.encode(request)), request, intended(host="h9"))
    assert caught.value.code == "ledger.platform_not_active"


async def test_grants_by_others_than_our_launchers(provider, enclave):
    request = asked(provider)
    as_host = enclave_of(provider, path="host/h1")
    with pytest.raises(NotAuthentic) as caught:
        verified(provider, await as_host.exchange(schema.encode(request)), request)
    assert caught.value.code == "launch.not_a_launcher"
    elsewhere = Provider()  # another root altogether, with everything registered the same
    elsewhere.ledger, elsewhere.trust = provider.ledger, provider.trust
    with pytest.raises(NotAuthentic) as caught:
        verified(provider, await enclave_of(elsewhere).exchange(schema.encode(request)), request)
    assert caught.value.code.startswith("chain.")


async def test_a_grant_for_another_intent(provider, enclave):
    request = asked(provider)
    reply = await enclave.exchange(schema.encode(request))
    other = intended(host="h2")
    with pytest.raises(NotAuthentic) as caught:
        verified(provider, reply, asked(provider, other), other)
    assert caught.value.code == "launch.grant_differs"
    again = asked(provider)  # ECDSA: the same intent signed again is another message
    assert again.intent != request.intent
    with pytest.raises(NotAuthentic) as caught:
        verified(provider, reply, again)
    assert caught.value.code == "launch.grant_differs"


async def test_only_the_intents_reply_key_opens_the_token(provider, enclave):
    request = asked(provider)
    reply = schema.decode(LaunchReply, await enclave.exchange(schema.encode(request)))
    payload = cose.parse("launch-grant", reply.grant).payload
    sealed = schema.decode(grants.LaunchGrant, payload).sealed_token
    assert len(open_token(sealed, REPLY, request.intent)) == 32
    for key, signed in ((x25519.X25519PrivateKey.generate(), request.intent), (REPLY, request.intent + b"x")):
        with pytest.raises(NotAuthentic) as caught:
            open_token(sealed, key, signed)
        assert caught.value.code == "launch.token_sealed"


async def test_issuer_must_be_the_registered_one(provider, enclave):
    request = asked(provider)
    granted = verified(provider, await enclave.exchange(schema.encode(request)), request)
    wanted = grants.keys_to_prove(granted, "alpha")
    revoked = records.IssuingCaRecord(provider="alpha", id="ca-1", status=Status.REVOKED, certificate=provider.above[0])
    provider.ledger.put("issuing-ca/alpha/ca-1", revoked)
    state = intents.verify_bundle(provider.ledger.bundle(wanted), provider.trust, now=NOW)
    with pytest.raises(Refused) as caught:
        grants.judge_issuer(granted, state, "alpha")
    assert caught.value.code == "ledger.issuing_ca_not_active"


@pytest.mark.parametrize("kind", [RevocationKind.LAUNCHER, RevocationKind.CERTIFICATE])
async def test_a_revoked_launcher_grants_nothing_that_counts(provider, enclave, kind):
    request = asked(provider)
    granted = verified(provider, await enclave.exchange(schema.encode(request)), request)
    identifier = enclave.launcher.id.hex() if kind is RevocationKind.LAUNCHER else f"{granted.chain.serial:x}"
    record = records.RevocationRecord(kind=kind, registrant="alpha", id=identifier, time_ms=NOW * 1000)
    provider.ledger.put(records.revocation_key(kind, "alpha", identifier), record)
    wanted = grants.keys_to_prove(granted, "alpha")
    state = intents.verify_bundle(provider.ledger.bundle(wanted), provider.trust, now=NOW)
    with pytest.raises(Refused) as caught:
        grants.judge_issuer(granted, state, "alpha")
    assert caught.value.code == "ledger.revoked"


async def test_any_frame_gets_a_reply(enclave):
    for frame in (b"", b"\xa0", os.urandom(200), schema.encode(LaunchRequest(intent=b"x", bundle=b""))):
        reply = schema.decode(LaunchReply, await enclave.exchange(frame))
        assert reply.grant is None
        assert reply.problem


@given(st.binary(max_size=300))
@settings(max_examples=60)
def test_any_bytes_as_an_intent(data):
    with pytest.raises(Malformed):
        intents.parse(data)


async def test_a_flipped_bit_in_intent_or_proof_is_never_granted(provider, enclave):
    # Just a quorum of cosignatures: with one to spare, a flip in its name only makes it a stranger's, which is passed over.
    request = asked(provider, bundle=provider.ledger.bundle(intents.keys_to_prove(intended()), signers=3))
    for name in ("intent", "bundle"):
        whole = getattr(request, name)
        for position in range(0, len(whole) * 8, 1 + len(whole) // 12):
            flipped = bytearray(whole)
            flipped[position // 8] ^= 1 << (position % 8)
            with pytest.raises(MoorlineError):
                await enclave.launcher.grant(dataclasses.replace(request, **{name: bytes(flipped)}))
