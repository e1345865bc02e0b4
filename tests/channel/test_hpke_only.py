"""The HPKE-only profile: whoever ends TLS on the way carries messages, and can neither make nor replay nor change one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.channel import signed
from moorline.channel.kem import suite_of
from moorline.channel.messages import pack, problem_frame
from moorline.channel.session import Initiator, Responder, Sign, State
from moorline.errors import MoorlineError, Refused
from moorline.wire import cose, keys, schema
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, Answer, Call, Challenge, Reply, Sealed

sys.path.insert(0, str(Path(__file__).parent))
from test_session import ACTIVATION, FACTS, KEM, Pair, exporter, hello

HSM = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())


class Proxied(Pair):
    """Both ends over two TLS connections: the exporters differ, as behind a proxy."""

    def __init__(self, *, signer=HSM, known=HSM):
        super().__init__()
        self.signer, self.known = signer, known
        self.attester = Initiator(hello=hello(profile=ChannelProfile.HPKE_ONLY), kem=KEM, export=exporter(b"to the proxy"))
        self.broker = Responder(facts=FACTS, export=exporter(b"from the proxy"), peer_address="proxy")

    def attester_does(self, effects):
        for effect in effects:
            if type(effect).__name__ == "JudgeBroker":
                self.attester.judged(None if self.known is None else self.known.public_key())
                return super().attester_does(self.attester.proven(self.proof))
        return super().attester_does(effects)

    def broker_does(self, effects):
        for effect in effects:
            if isinstance(effect, Sign):
                made = cose.sign(effect.purpose, effect.payload, keys.KeySigner(self.signer))
                return super().broker_does(self.broker.signed(made))
        return super().broker_does(effects)


def refused(pair, deliver):
    """The code that ends the session; nothing is active at either end that the attack touched."""
    with pytest.raises(MoorlineError) as caught:
        pair.run(deliver)
    assert pair.attester.state is not State.ACTIVE
    return caught.value.code


def at(step, change):
    return lambda now, body: change(body) if now == step else body


def test_a_session_behind_a_proxy_is_active_and_carries_records():
    """verifies that: with different TLS connections at both ends the session stands, and records go both ways."""
    pair = Proxied()
    pair.run()
    assert (pair.attester.state, pair.broker.state) == (State.ACTIVE, State.ACTIVE)
    assert pair.bound()
    assert pair.attester.secrets == b"secrets"
    assert pair.attester.activation == ACTIVATION
    call = Call(id=0, operation="time", body=b"")
    assert pair.broker.open(Call, pair.attester.seal(call)) == call
    reply = Reply(id=0, body=b"now", problem=None)
    assert pair.attester.open(Reply, pair.broker.seal(reply)) == reply


def test_what_the_proxy_carries_it_cannot_read():
    """verifies that: neither secrets, nor the key they are under, nor the activation stand in what was sent."""
    pair = Proxied()
    pair.run()
    carried = b"".join(pair.sent.values())
    for needle in (b"secrets", b"k" * 32, schema.encode(ACTIVATION)):
        assert needle not in carried


def test_the_tls_profile_does_not_stand_behind_a_proxy():
    """verifies that: without the profile, two connections are a relay, and the binding says so."""
    assert refused(Pair(left=b"to the proxy", right=b"from the proxy"), lambda _, body: body) == "test.unbound"


@pytest.mark.parametrize("step", ["challenge", "answer"])
def test_an_unsigned_message_is_none(step):
    """verifies that: message 2 or 4 as the TLS profile sends them is not taken, so there is no way down from signatures."""
    plain = {
        "challenge": pack(
            Challenge(nonce=bytes(32), expires=1, ledger_id=bytes(32), provider="alpha", hsm="hsm-1", bundle=b"bundle")
        ),
        "answer": pack(Answer(sealed=b"sealed")),
    }
    assert refused(Proxied(), at(step, lambda _: plain[step])) == "session.unexpected_message"


@pytest.mark.parametrize("known", [OTHER, None])
def test_only_the_hsm_on_the_ledger_signs(known):
    """verifies that: a proxy with a key of its own, or a broker nobody vouches for, gets neither proof nor evidence."""
    pair = Proxied(known=known)
    assert refused(pair, lambda _, body: body) == "session.not_signed_by_hsm"
    assert "evidence" not in pair.sent


def test_a_message_2_of_another_session_is_noticed_before_evidence_leaves():
    """verifies that: a recorded challenge, signed by the right HSM, is for another message 1 and gets no evidence."""
    before = Proxied()
    before.attester = Initiator(
        hello=hello(profile=ChannelProfile.HPKE_ONLY, fields=b"another"), kem=KEM, export=exporter(b"x")
    )
    before.run()
    pair = Proxied()
    assert refused(pair, at("challenge", lambda _: before.sent["challenge"])) == "session.signed_for_another"
    assert "evidence" not in pair.sent


def test_a_message_4_of_another_session_is_noticed():
    """verifies that: an answer recorded for the same keys does not open a session for whoever recorded it."""
    before = Proxied()
    before.run()
    pair = Proxied()
    assert refused(pair, at("answer", lambda _: before.sent["answer"])) == "session.signed_for_another"


def test_an_answer_the_proxy_sealed_itself_is_noticed():
    """verifies that: the KEM key stands in message 1, so anybody can seal to it; what counts is the signature."""

    def forged(_):
        suite, public = suite_of(KEM.public)
        sealed = suite.encrypt(schema.encode(Sealed(key=b"e" * 32, secrets=b"evil")), public, info=bytes(32))
        made = signed.payload(bytes(32), Answer(sealed=sealed))
        return signed.framed(cose.sign(signed.ANSWER, made, keys.KeySigner(OTHER)))

    assert refused(Proxied(), at("answer", forged)) == "session.not_signed_by_hsm"


def test_a_signature_for_one_message_serves_no_other():
    """verifies that: a signed challenge is not taken as an answer, though the key is right."""
    before = Proxied()
    before.run()
    assert refused(Proxied(), at("answer", lambda _: before.sent["challenge"])).startswith("cose.")


def test_the_proxy_cannot_tell_the_time():
    """verifies that: message 6 (the broker's time in it) is a record under K; a plain or changed one ends."""
    late = Activation(
        spiffe_id="spiffe://alpha.test/svc/records/r-1",
        certificate=b"c",
        chain=(),
        now=1,
        renew_after_s=1 << 30,
        body=b"",
    )
    assert refused(Proxied(), at("activation", lambda _: pack(late))) == "session.unexpected_message"
    flipped = at("activation", lambda body: body[:-1] + bytes([body[-1] ^ 1]))
    assert refused(Proxied(), flipped) == "session.record_invalid"


@pytest.mark.parametrize("step", ["challenge", "answer", "activation"])
def test_a_refusal_on_the_way_is_not_the_brokers_word(step):
    """verifies that: a Problem that anybody could have made ends the attempt under a code that ends no identity."""
    verdict = Refused("renewal.instance_revoked", "you were revoked")
    assert refused(Proxied(), at(step, lambda _: problem_frame(verdict))) == "session.unsigned_problem"


def test_a_broker_signs_in_turn_only():
    """verifies that: a signature out of turn ends the broker's machine."""
    broker = Responder(facts=FACTS, export=exporter(b"c"), peer_address="test")
    with pytest.raises(MoorlineError) as caught:
        broker.signed(b"signature")
    assert caught.value.code == "session.unexpected_message"
    assert broker.state is State.ENDED
