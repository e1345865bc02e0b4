"""The machines of the attested session under hostile schedules.

Invariants: neither end is ever active unless both saw every message as it was sent; evidence of one connection never binds
to another; no record is accepted out of its place. Machines are driven by hand, so every schedule is exact and repeatable.
"""

import hashlib
import random

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.channel.kem import suite_of
from moorline.channel.messages import pack, problem_frame, unpack
from moorline.channel.session import (
    Appraise,
    Collect,
    Initiator,
    JudgeBroker,
    KemKey,
    MakeChallenge,
    Responder,
    Send,
    SessionFacts,
    State,
    p256_raw,
    transcript,
)
from moorline.channel.transcripts import binding
from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.wire import cbor, keys, schema
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import (
    Activation,
    Answer,
    Call,
    Challenge,
    Confirm,
    Evidence,
    EvidenceFormat,
    Hello,
    Reply,
    Sealed,
    SessionRole,
)

NOW = Instant(1_800_000_000)
FACTS = SessionFacts(ledger_id=bytes(32), provider="alpha", hsm="hsm-1")
SIGNING = keys.public_bytes(ec.derive_private_key(7, ec.SECP256R1()).public_key())
ACTIVATION = Activation(
    spiffe_id="spiffe://alpha.test/svc/records/i-1", certificate=b"", chain=(), now=NOW, renew_after_s=60, body=b""
)
STEPS = ("hello", "challenge", "evidence", "answer", "confirm", "activation")


def exporter(connection):
    def export(label, context):
        return hashlib.sha256(b"|".join((connection, label.encode(), context))).digest()

    return export


def kem(seed=1):
    return KemKey.of(
        MLKEM768PrivateKey.from_seed_bytes(bytes([seed]) * 64), X25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    )


KEM = kem()


def hello(**changes):
    fields = {
        "version": 1,
        "role": SessionRole.FUNCTION,
        "formats": (EvidenceFormat.SNP,),
        "kem_public": KEM.public,
        "signing_public": SIGNING,
        "profile": ChannelProfile.TLS,
        "fields": b"fields",
    }
    return Hello(**{**fields, **changes})


class Pair:
    """Both ends and a wire between them; `deliver` may do anything to a message."""

    def __init__(self, *, role=SessionRole.FUNCTION, left=b"c1", right=b"c1", proof=b"p" * 32):
        self.proof = proof
        self.attester = Initiator(hello=hello(role=role), kem=KEM, export=exporter(left))
        self.broker = Responder(facts=FACTS, export=exporter(right), peer_address="test")
        self.collected_over = None
        self.sent = {}

    def bound(self):
        """An honest broker accepts evidence only over the binding it computed itself."""
        return self.collected_over == self.broker.claim.binding

    def attester_does(self, effects):
        for effect in effects:
            if isinstance(effect, Send):
                return effect.body
            if isinstance(effect, JudgeBroker):
                self.attester.judged(None)
                return self.attester_does(self.attester.proven(self.proof))
            if isinstance(effect, Collect):
                self.collected_over = effect.binding
                return self.attester_does(self.attester.collected(EvidenceFormat.SNP, effect.binding, b""))
        return None

    def broker_does(self, effects):
        for effect in effects:
            if isinstance(effect, Send):
                return effect.body
            if isinstance(effect, MakeChallenge):
                made = self.broker.challenged(nonce=bytes(32), expires=Instant(NOW + 60), bundle=b"bundle")
                return self.broker_does(made)
            if isinstance(effect, Appraise):
                if effect.claim.evidence != effect.claim.binding:
                    self.broker.end()
                    raise NotAuthentic("test.unbound", "the evidence is over something else")
                return self.broker_does(self.broker.accepted(key=b"k" * 32, secrets=b"secrets"))
            return self.broker_does(self.broker.activated(ACTIVATION))
        return None

    def run(self, deliver=lambda _step, body: body):
        body = self.attester_does(self.attester.start())
        for step in STEPS:
            self.sent[step] = body
            arrived = deliver(step, body)
            if step in ("hello", "evidence", "confirm"):
                body = self.broker_does(self.broker.receive(arrived, NOW))
            else:
                body = self.attester_does(self.attester.receive(arrived))
        return self

    def states(self):
        return self.attester.state, self.broker.state


def test_both_ends_become_active_and_share_secrets():
    pair = Pair().run()
    assert pair.states() == (State.ACTIVE, State.ACTIVE)
    assert pair.attester.secrets == b"secrets"
    assert pair.attester.activation == ACTIVATION
    assert pair.bound()
    call = Call(id=0, operation="time", body=b"x")
    assert pair.broker.open(Call, pair.attester.seal(call)) == call
    reply = Reply(id=0, body=b"y", problem=None)
    assert pair.attester.open(Reply, pair.broker.seal(reply)) == reply


@pytest.mark.parametrize("role", [SessionRole.LAUNCHER, SessionRole.HOST])
def test_roles_without_proof(role):
    assert Pair(role=role, proof=None).run().states() == (State.ACTIVE, State.ACTIVE)


@pytest.mark.parametrize("step", STEPS)
def test_no_flipped_bit_leaves_both_ends_active(step):
    """Message 6 is protected by TLS alone: there a flip is either refused or seen by the attester in what it got."""
    rng = random.Random(step)
    for _ in range(40):
        pair = Pair()

        def flip(at, body):
            if at != step:
                return body
            bad = bytearray(body)
            bit = rng.randrange(len(bad) * 8)
            bad[bit // 8] ^= 1 << (bit % 8)
            return bytes(bad)

        if step == "activation":
            with_error = None
            try:
                pair.run(flip)
            except MoorlineError as error:
                with_error = error
            assert with_error is not None or pair.attester.activation != ACTIVATION
            continue
        with pytest.raises(MoorlineError):
            pair.run(flip)
        assert State.ACTIVE not in pair.states()


@pytest.mark.parametrize("step", STEPS)
def test_no_truncated_message_is_taken(step):
    for keep in (0, 1, 5, -1):
        pair = Pair()
        with pytest.raises(MoorlineError):
            pair.run(lambda at, body, keep=keep: body[:keep] if at == step else body)
        assert pair.attester.state is not State.ACTIVE


def spoiler(pair, other, victim, kind, rng):
    """A wire that does one thing to one message."""

    def spoil(step, body):
        if step != victim:
            return body
        if kind == "other-session":
            return other[step]
        if kind == "reflect":
            return pair.sent[rng.choice([name for name in pair.sent if name != step] or [step])]
        if kind == "earlier":
            return pair.sent[STEPS[max(0, STEPS.index(step) - 2)]]
        if kind == "twice":
            if step in ("hello", "evidence", "confirm"):
                pair.broker.receive(body, NOW)
            else:
                pair.attester.receive(body)
            return body
        return b""

    return spoil


def test_seeded_schedules_never_activate_an_end_that_did_not_see_everything():
    """Drop, duplicate, reorder, reflect, replay from another session: whichever way, a machine that erred has ended."""
    other = Pair(left=b"c2", right=b"c2").run().sent
    for seed in range(300):
        rng = random.Random(seed)
        pair = Pair()
        victim = rng.choice(STEPS)
        kind = rng.choice(("other-session", "reflect", "earlier", "twice", "nothing"))
        # What is byte for byte the same in both sessions is no attack: fixed keys and nonce make Hello and Challenge equal,
        # and the activation of the other session is message 6 itself.
        harmless = kind == "other-session" and victim in ("hello", "challenge", "activation")
        harmless |= kind in ("earlier", "reflect") and victim == "hello"
        if harmless:
            pair.run(spoiler(pair, other, victim, kind, rng))
            assert pair.states() == (State.ACTIVE, State.ACTIVE)
            continue
        with pytest.raises(MoorlineError):
            pair.run(spoiler(pair, other, victim, kind, rng))
        assert pair.attester.state is not State.ACTIVE, (seed, victim, kind)
        if victim != "activation":
            assert pair.broker.state is not State.ACTIVE, (seed, victim, kind)


def test_evidence_of_another_connection_does_not_bind():
    """A relay gives its own challenge to a victim and passes the victim's evidence on: the exporters differ."""
    with pytest.raises(NotAuthentic) as caught:
        Pair(left=b"victim-relay", right=b"relay-broker").run()
    assert caught.value.code == "test.unbound"


def test_every_input_of_the_binding_counts():
    one, same = Pair().run(), Pair().run()
    assert one.collected_over == same.collected_over
    assert Pair(left=b"c2", right=b"c2").run().collected_over != one.collected_over
    assert Pair(proof=b"q" * 32).run().collected_over != one.collected_over
    assert Pair(role=SessionRole.RESUME).run().collected_over != one.collected_over
    parts = {"exporter": b"e", "hello": b"h", "challenge": b"c", "proof": b"p"}
    bound = {binding(SessionRole.FUNCTION, **{**parts, name: b"other"}) for name in parts}
    bound |= {binding(role, **parts) for role in SessionRole}
    assert len(bound) == len(parts) + len(SessionRole)


def test_a_repeated_confirmation_gets_the_same_activation_until_the_first_record():
    pair = Pair().run()
    assert pair.broker.receive(pair.sent["confirm"], NOW) == [Send(body=pair.sent["activation"])]
    pair.broker.open(Call, pair.attester.seal(Call(id=0, operation="time", body=b"")))
    with pytest.raises(Refused):
        pair.broker.receive(pair.sent["confirm"], NOW)


def test_nothing_is_sealed_or_opened_before_activation():
    pair = Pair()
    for machine in (pair.attester, pair.broker):
        with pytest.raises(Refused) as caught:
            machine.seal(Call(id=0, operation="x", body=b""))
        assert caught.value.code == "session.not_active"
        with pytest.raises(Refused):
            machine.open(Call, b"")


def test_records_are_taken_in_their_one_order():
    for spoil in ("twice", "skip", "reflect", "flip"):
        pair = Pair().run()
        records = [pair.attester.seal(Call(id=n, operation="x", body=b"")) for n in range(3)]
        assert pair.broker.open(Call, records[0]).id == 0
        bad = {"twice": records[0], "skip": records[2], "reflect": pair.broker.seal(Reply(id=1, body=b"", problem=None))}
        bad["flip"] = records[1][:-1] + bytes([records[1][-1] ^ 1])
        with pytest.raises(NotAuthentic) as caught:
            pair.broker.open(Call, bad[spoil])
        assert caught.value.code == "session.record_invalid"
        assert pair.broker.state is State.ENDED
        with pytest.raises(Refused):
            pair.broker.open(Call, records[1])


def test_the_challenge_is_good_for_its_time():
    pair = Pair()
    body = pair.attester_does(pair.attester.start())
    body = pair.broker_does(pair.broker.receive(body, NOW))
    body = pair.attester_does(pair.attester.receive(body))
    with pytest.raises(Refused) as caught:
        pair.broker.receive(body, Instant(NOW + 61))
    assert caught.value.code == "session.challenge_expired"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"version": 2}, "session.version"),
        ({"profile": ChannelProfile.HPKE_ONLY, "role": SessionRole.LAUNCHER}, "session.profile_not_offered"),
        ({"formats": ()}, "session.format"),
        ({"kem_public": b""}, "session.kem"),
        ({"kem_public": b"\4" + bytes(64)}, "session.kem"),
        ({"kem_public": b"\xff" * 1216}, "session.kem"),
        ({"signing_public": b"nothing"}, "key.undecodable"),
    ],
)
def test_a_hello_is_refused(change, code):
    broker = Responder(facts=FACTS, export=exporter(b"c"), peer_address="test")
    with pytest.raises(MoorlineError) as caught:
        broker.receive(pack(hello(**change)), NOW)
    assert caught.value.code == code
    assert broker.state is State.ENDED


@pytest.mark.parametrize("field", [f.name for f in Hello.__dataclass_fields__.values()])
def test_a_missing_field_refuses(field):
    item = schema.to_item(hello())
    del item[field]
    broker = Responder(facts=FACTS, export=exporter(b"c"), peer_address="test")
    with pytest.raises(Malformed) as caught:
        broker.receive(cbor.encode(["hello", item]), NOW)
    assert caught.value.code == "message.fields"


@pytest.mark.parametrize(
    ("role", "shown", "code"),
    [
        (SessionRole.FUNCTION, {"proof": None}, "session.proof_missing"),
        (SessionRole.FUNCTION, {"proof": b""}, "session.proof_missing"),
        (SessionRole.LAUNCHER, {"proof": b"x"}, "session.proof_unexpected"),
        (SessionRole.FUNCTION, {"proof": b"x", "format": EvidenceFormat.TPM}, "session.format"),
        (SessionRole.FUNCTION, {"proof": b"x", "format": EvidenceFormat.NONE}, "session.format"),
        (SessionRole.FUNCTION, {"proof": b"x", "evidence": b""}, "session.format"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(role, shown, code):
    broker = Responder(facts=FACTS, export=exporter(b"c"), peer_address="test")
    formats = (EvidenceFormat.SNP, EvidenceFormat.NONE)
    broker.receive(pack(hello(role=role, formats=formats)), NOW)
    broker.challenged(nonce=bytes(32), expires=Instant(NOW + 60), bundle=b"")
    fields = {"format": EvidenceFormat.SNP, "evidence": b"e", "endorsements": b"", "proof": None}
    with pytest.raises(Refused) as caught:
        broker.receive(pack(Evidence(**{**fields, **shown})), NOW)
    assert caught.value.code == code


def test_an_answer_for_another_key_or_transcript_is_refused():
    for seal_to, info in ((kem(2), "right"), (KEM, "wrong")):
        pair = Pair()
        body = pair.attester_does(pair.attester.start())
        body = pair.broker_does(pair.broker.receive(body, NOW))
        evidence = pair.attester_does(pair.attester.receive(body))
        digest = transcript(pack(hello()), body, evidence) if info == "right" else bytes(32)
        suite, public = suite_of(seal_to.public)
        sealed = suite.encrypt(schema.encode(Sealed(key=bytes(32), secrets=b"")), public, info=digest)
        with pytest.raises(NotAuthentic) as caught:
            pair.attester.receive(pack(Answer(sealed=sealed)))
        assert caught.value.code == "session.answer_not_authentic"
        assert pair.attester.state is State.ENDED


def test_a_p256_kem_key_is_served_too():
    private = ec.generate_private_key(ec.SECP256R1())
    broker = Responder(facts=FACTS, export=exporter(b"c"), peer_address="test")
    broker.receive(pack(hello(kem_public=p256_raw(private.public_key()))), NOW)
    broker.challenged(nonce=bytes(32), expires=Instant(NOW + 60), bundle=b"")
    shown = pack(Evidence(format=EvidenceFormat.SNP, evidence=b"e", endorsements=b"", proof=b"p"))
    broker.receive(shown, NOW)
    assert isinstance(broker.accepted(key=bytes(32), secrets=b"s")[0], Send)


def test_an_attester_that_owes_a_proof_cannot_go_on_without():
    pair = Pair(proof=None)
    body = pair.broker_does(pair.broker.receive(pair.attester_does(pair.attester.start()), NOW))
    with pytest.raises(Refused):
        pair.attester_does(pair.attester.receive(body))
    assert pair.attester.state is State.ENDED


@pytest.mark.parametrize("role", [SessionRole.LAUNCHER, SessionRole.HOST, SessionRole.PEER_HSM])
def test_who_has_no_launch_fields_offers_no_hpke_only_profile(role):
    with pytest.raises(Refused) as caught:
        Initiator(hello=hello(profile=ChannelProfile.HPKE_ONLY, role=role), kem=KEM, export=exporter(b"c"))
    assert caught.value.code == "session.profile_not_offered"


def test_a_problem_ends_the_session_as_the_error_the_peer_reported():
    pair = Pair()
    pair.attester.start()
    with pytest.raises(Refused) as caught:
        pair.attester.receive(
            problem_frame(Refused("test.no", "no", expected="x" * 9000, got="y" * 9000, remedy="z" * 9000))
        )
    assert caught.value.code == "test.no"
    assert pair.attester.state is State.ENDED


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([Hello, Challenge, Evidence, Answer, Confirm, Activation]))
def test_any_bytes_are_a_message_or_malformed(body, kind):
    with pytest.raises(Malformed):
        unpack(kind, body)
