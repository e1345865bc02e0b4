"""The broker's machine (channel.session)."""

from __future__ import annotations

from cryptography.hazmat.primitives import hpke

from moorline.channel import signed
from moorline.channel.effects import (
    Activate,
    Active,
    Appraise,
    Claim,
    Effect,
    MakeChallenge,
    Send,
    SessionFacts,
    Sign,
    State,
)
from moorline.channel.kem import KemPublic, suite_of
from moorline.channel.machine import PROOF_ROLES, VERSION, End, require_offered
from moorline.channel.messages import pack, unpack
from moorline.channel.transcripts import (
    ATTESTER,
    BROKER,
    Exporter,
    begun,
    binding,
    confirm_mac,
    exporter_label,
    message_digest,
    no_exporter,
)
from moorline.clock import Instant
from moorline.digest import Digest256, same
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.wire import schema
from moorline.wire.keys import parse_public
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


class Responder(End):
    """The broker's machine. Order: receive(1), `challenged`, receive(3), `accepted`, receive(5), `activated`."""

    def __init__(self, *, facts: SessionFacts, export: Exporter, peer_address: str) -> None:
        super().__init__()
        self.state = State.HELLO
        self._facts = facts
        self._export = export
        self._peer_address = peer_address
        self._heard = begun()
        self._greeting = self._challenge = self._so_far = Digest256(b"")  # not known yet
        self._confirm = self._activation = b""
        self._said: Hello | None = None
        self._sealing: tuple[hpke.Suite, KemPublic] | None = None
        self._asked: Challenge | None = None
        self._key = b""
        self._touched = False
        self.claim: Claim | None = None

    def receive(self, body: bytes, now: Instant) -> list[Effect]:
        """The next message of the attester. On any error the machine has ended."""
        try:
            if self.state is State.HELLO:
                return self._greeted(body)
            if self.state is State.EVIDENCE:
                return self._shown(body, now)
            if self.state is State.CONFIRM:
                return self._confirmed(body)
            if self.state is State.ACTIVE and body == self._confirm and not self._touched:
                return [Send(body=self._activation)]  # message 6 is repeatable: its sender may have lost the first
        except MoorlineError:
            self.end()
            raise
        raise self._out_of_turn()

    @property
    def hpke_only(self) -> bool:
        """Whether this session is of the HPKE-only profile; known from message 1 on."""
        return self._said is not None and self._said.profile is ChannelProfile.HPKE_ONLY

    def challenged(self, *, nonce: bytes, expires: Instant, bundle: bytes) -> list[Effect]:
        """Message 2, or in the HPKE-only profile what to sign for it."""
        self._go(State.MAKE_CHALLENGE)
        facts = self._facts
        self._asked = Challenge(
            nonce=nonce,
            expires=expires,
            ledger_id=facts.ledger_id,
            provider=facts.provider,
            hsm=facts.hsm,
            bundle=bundle,
        )
        if self.hpke_only:
            self.state = State.SIGN_CHALLENGE
            return [Sign(purpose=signed.CHALLENGE, payload=signed.payload(self._greeting, self._asked))]
        return self._challenging(pack(self._asked))

    def signed(self, signature: bytes) -> list[Effect]:
        """Message 2 or 4 of the HPKE-only profile, from its COSE_Sign1."""
        body = signed.framed(signature)
        if self.state is State.SIGN_CHALLENGE:
            return self._challenging(body)
        if self.state is State.SIGN_ANSWER:
            return self._answering(body)
        raise self._out_of_turn()

    def accepted(self, *, key: bytes, secrets: bytes) -> list[Effect]:
        """Message 4, or what to sign for it. `key` is K: 32 bytes drawn for this session alone."""
        self._go(State.APPRAISE)
        assert self.claim is not None
        assert self._sealing is not None
        self.claim = self.claim.judged()
        suite, public = self._sealing
        plaintext = schema.encode(Sealed(key=key, secrets=secrets))
        info = self._heard.digest()
        self._key, self._sealing = key, None
        answer = Answer(sealed=suite.encrypt(plaintext, public, info=info))
        if self.hpke_only:
            self.state = State.SIGN_ANSWER
            return [Sign(purpose=signed.ANSWER, payload=signed.payload(info, answer))]
        return self._answering(pack(answer))

    def activated(self, activation: Activation) -> list[Effect]:
        """Message 6."""
        self._go(State.ACTIVATE)
        self._keys(self._key, self._so_far, BROKER, ATTESTER)
        assert self._sending is not None
        self._activation = self._sending.seal(pack(activation)) if self.hpke_only else pack(activation)
        self._key, self._asked = b"", None
        self.state = State.ACTIVE
        return [Send(body=self._activation), Active()]

    def open(self, kind: type[Call | Reply], body: bytes) -> Call | Reply:
        """As the base; after the first record message 6 is no longer repeated."""
        opened = super().open(kind, body)
        self._confirm = self._activation = b""
        self._touched = True
        return opened

    def _greeted(self, body: bytes) -> list[Effect]:
        hello = unpack(Hello, body)
        if hello.version != VERSION:
            raise Refused("session.version", "another version of the session", expected=VERSION, got=hello.version)
        require_offered(hello)
        if not hello.formats:
            raise Refused("session.format", "the hello offers no evidence format")
        self._sealing = suite_of(hello.kem_public)
        parse_public(hello.signing_public)
        self._said, self._greeting = hello, message_digest(body)
        self._heard.add(body)
        self.state = State.MAKE_CHALLENGE
        return [MakeChallenge(role=hello.role)]

    def _shown(self, body: bytes, now: Instant) -> list[Effect]:
        assert self._said is not None
        assert self._asked is not None
        shown = unpack(Evidence, body)
        if now > self._asked.expires:
            raise Refused(
                "session.challenge_expired", "the evidence came too late", expected=f"by {self._asked.expires}", got=now
            )
        self._fits(shown, self._said)
        self._heard.add(body)
        export = no_exporter if self.hpke_only else self._export
        exporter = export(exporter_label(self._said.role), self._challenge)
        self.claim = Claim(
            role=self._said.role,
            profile=self._said.profile,
            fields=self._said.fields,
            kem_public=self._said.kem_public,
            signing_public=self._said.signing_public,
            format=shown.format,
            evidence=shown.evidence,
            endorsements=shown.endorsements,
            proof=shown.proof,
            binding=binding(self._said.role, exporter, self._greeting, self._challenge, shown.proof),
            nonce=self._asked.nonce,
            challenge_digest=self._challenge,
            peer_address=self._peer_address,
        )
        self.state = State.APPRAISE
        return [Appraise(claim=self.claim)]

    def _fits(self, shown: Evidence, said: Hello) -> None:
        """A missing field refuses, and so does one too many."""
        if shown.format not in said.formats or (shown.format is EvidenceFormat.NONE) != (said.role is SessionRole.PEER_HSM):
            raise Refused(
                "session.format",
                "this evidence format was not announced, or does not fit the role",
                expected=", ".join(said.formats),
                got=f"{shown.format} from {said.role}",
            )
        if said.role in PROOF_ROLES and not shown.proof:
            raise Refused("session.proof_missing", "this role owes a proof", got=said.role.value)
        if said.role not in PROOF_ROLES and shown.proof is not None:
            raise Refused("session.proof_unexpected", "this role has no proof to give", got=said.role.value)
        if shown.format is not EvidenceFormat.NONE and not shown.evidence:
            raise Refused("session.format", "the evidence is empty", expected=shown.format.value)

    def _confirmed(self, body: bytes) -> list[Effect]:
        assert self.claim is not None
        if not same(unpack(Confirm, body).mac, confirm_mac(self._key, self._so_far)):
            raise NotAuthentic("session.confirm_invalid", "the confirmation is not over this session")
        self._confirm = body
        self.state = State.ACTIVATE
        return [Activate(claim=self.claim)]

    def _challenging(self, body: bytes) -> list[Effect]:
        self._challenge, self.state = message_digest(body), State.EVIDENCE
        self._heard.add(body)
        return [Send(body=body)]

    def _answering(self, body: bytes) -> list[Effect]:
        self._heard.add(body)
        self._so_far, self.state = self._heard.digest(), State.CONFIRM
        return [Send(body=body)]
