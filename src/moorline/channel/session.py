"""The attested session as two machines without I/O (PROTOCOLS.md 4; docs/spec/attested-session.md).

    1. attester -> broker   Hello       role, evidence formats, KEM key, signing key, profile, role fields
    2. broker -> attester   Challenge   nonce, expiry, ledger id, provider, HSM id, ledger proof of the broker
    3. attester -> broker   Evidence    over binding = SHA-512("session" | role | exporter | H(1) | H(2) | proof)
    4. broker -> attester   Answer      HPKE to the KEM key, info = H(1..3): 32 random bytes K and the role's secrets
    5. attester -> broker   Confirm     MAC under HKDF(K, "confirm", H(1..4))
    6. broker -> attester   Activation  what is active from now on

A machine takes frame bodies and what its driver found out, and returns effects: `Send`, questions for the driver, `Active`.
It holds no socket, clock or randomness. Rules that hold at every step:

- a message that is not the one awaited, or misses a field, ends the session; an ended machine never speaks again;
- hashes are over the bodies exactly as sent;
- nothing is active, and no record is sealed or opened, before message 5 was verified (broker) or message 6 came (attester);
- the binding holds the exporter of this very TLS connection, so evidence relayed from another connection does not bind;
- each direction has its own record key and counter, so nothing can be reflected, dropped, repeated or reordered.

In the HPKE-only profile the exporter is empty, messages 2 and 4 are signed by the HSM key (channel.signed), and message 6 is
the broker's first record: whoever ends TLS on the way sees ciphertext and public facts, and can change nothing unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from moorline.channel import signed
from moorline.channel.messages import RECORD_CAP, pack, require_no_problem, unpack
from moorline.channel.signed import SignedMessage
from moorline.clock import Instant
from moorline.digest import Digest256, Digest512, same, tagged, tagged_hash, tagged_hash512, tagged_mac
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.wire import schema
from moorline.wire.keys import PublicKey, parse_public
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
    Record,
    Reply,
    Sealed,
    SessionRole,
)

VERSION: Final = 1
HANDSHAKE_CAP: Final = 256 * 1024
_MLKEM_PUBLIC: Final = 1184
_HYBRID_PUBLIC: Final = _MLKEM_PUBLIC + 32
_P256_POINT: Final = 65
_COUNTER_LIMIT: Final = 1 << 32

PROOF_ROLES: Final = frozenset({SessionRole.FUNCTION, SessionRole.RESUME, SessionRole.PEER_HSM})
"""Roles that owe a proof (PROTOCOLS.md 4, table); the others must not send one."""

LAUNCH_ROLES: Final = frozenset({SessionRole.FUNCTION, SessionRole.RESUME})
"""Roles whose fields are launch fields."""

Exporter = Callable[[str, bytes], bytes]
"""(label, context) -> 32 bytes of keying material of this TLS connection."""


def message_digest(body: bytes) -> Digest256:
    """H(message): over the frame body exactly as sent."""
    return tagged_hash("session-message", body)


def transcript(*bodies: bytes) -> Digest256:
    """H(messages 1..n)."""
    return tagged_hash("session-transcript", *bodies)


def binding(role: SessionRole, exporter: bytes, hello: bytes, challenge: bytes, proof: bytes | None) -> Digest512:
    """What evidence must carry as its report data: this connection, these messages, this proof. 64 bytes."""
    return tagged_hash512(
        "session", role.value.encode(), exporter, message_digest(hello), message_digest(challenge), proof or b""
    )


def exporter_label(role: SessionRole) -> str:
    """The label under which the TLS exporter is asked."""
    return f"EXPORTER-moorline-{role.value}"


# Keys of the KEM -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KemKey:
    """An attester's MLKEM768_X25519 key pair; `public` is the raw form that `Hello.kem_public` carries (1216 bytes)."""

    private: hpke.MLKEM768X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> KemKey:
        """The pair of these two halves; made fresh for each session by the driver."""
        public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        return cls(private=hpke.MLKEM768X25519PrivateKey(mlkem, x25519), public=public)


def _suite(kem_public: bytes) -> tuple[hpke.Suite, hpke.MLKEM768X25519PublicKey | ec.EllipticCurvePublicKey]:
    try:
        if len(kem_public) == _HYBRID_PUBLIC:
            hybrid = hpke.MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(kem_public[:_MLKEM_PUBLIC]),
                X25519PublicKey.from_public_bytes(kem_public[_MLKEM_PUBLIC:]),
            )
            return hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM), hybrid
        if len(kem_public) == _P256_POINT:
            point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), kem_public)
            return hpke.Suite(hpke.KEM.P256, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM), point
    except Exception as error:  # the key loaders raise several kinds on bytes that are not a key
        raise Malformed("session.kem", "the KEM public key is not one", got=type(error).__name__) from None
    raise Malformed("session.kem", "no KEM has public keys of this length", expected=f"{_HYBRID_PUBLIC} or {_P256_POINT}")


def seal_to(kem_public: bytes, plaintext: bytes, *, info: bytes) -> bytes:
    """HPKE base mode to a KEM public key as `Hello` carries it. Raises Malformed("session.kem")."""
    suite, public = _suite(kem_public)
    return suite.encrypt(plaintext, public, info=info)


def open_sealed(kem: KemKey, sealed: bytes, *, info: bytes) -> bytes:
    """What `seal_to` sealed to this key with this info. Raises NotAuthentic("session.sealed_not_authentic")."""
    suite, _ = _suite(kem.public)
    try:
        return suite.decrypt(sealed, kem.private, info=info)
    except Exception:  # InvalidTag, and ValueError for ciphertexts of another length; both mean the same
        raise NotAuthentic("session.sealed_not_authentic", "this was not sealed for this key and purpose") from None


# Effects ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send this frame body."""

    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeBroker:
    """Attester: judge TLS certificates and `challenge.bundle`, then `judged()`; make the proof over `digest`; `proven()`.

    In the HPKE-only profile there is no TLS certificate of the broker: the bundle says its HSM key.
    """

    challenge: Challenge
    digest: Digest256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """Broker, HPKE-only profile: sign `payload` for `purpose` with the HSM key; then `signed()`."""

    purpose: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Attester: collect evidence over `binding`; then `collected()`."""

    binding: Digest512


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeChallenge:
    """Broker: draw a nonce, fetch a ledger proof; then `challenged()`."""

    role: SessionRole


@dataclass(frozen=True, slots=True, kw_only=True)
class Appraise:
    """Broker: appraise the claim; then `accepted()`, or end the session with the reason."""

    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """Broker: the attester confirmed. Make what it gets; then `activated()`."""

    claim: Claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """The session carries records from now on."""


Effect = Send | JudgeBroker | Sign | Collect | MakeChallenge | Appraise | Activate | Active


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an attester claims, all of it untrusted, and what its evidence must be bound to.

    `binding` (64 bytes), `challenge_digest` (H(message 2), 32 bytes) and `nonce` were computed here. For functions the proof
    must be `wire.launch.token_proof(token, challenge_digest)`; for a TPM the qualifying data is H(binding).
    """

    role: SessionRole
    profile: ChannelProfile
    fields: bytes
    kem_public: bytes
    signing_public: bytes
    format: EvidenceFormat
    evidence: bytes
    endorsements: bytes
    proof: bytes | None
    binding: bytes
    nonce: bytes
    challenge_digest: bytes
    peer_address: str

    def judged(self) -> Claim:
        """The same without what was only there to be appraised: a session keeps this for as long as it is open."""
        return replace(self, evidence=b"", endorsements=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFacts:
    """Who the broker is; stands in every challenge."""

    ledger_id: bytes
    provider: str
    hsm: str


class State(Enum):
    """What a machine awaits: a message of the peer, or a word of its own driver. ENDED is final."""

    START = "start"  # attester: start()
    HELLO = "hello"  # broker: message 1
    MAKE_CHALLENGE = "make-challenge"  # broker: challenged()
    SIGN_CHALLENGE = "sign-challenge"  # broker, HPKE-only: signed()
    CHALLENGE = "challenge"  # attester: message 2
    JUDGE_BROKER = "judge-broker"  # attester: judged()
    PROVE = "prove"  # attester: proven()
    COLLECT = "collect"  # attester: collected()
    EVIDENCE = "evidence"  # broker: message 3
    APPRAISE = "appraise"  # broker: accepted()
    SIGN_ANSWER = "sign-answer"  # broker, HPKE-only: signed()
    ANSWER = "answer"  # attester: message 4
    CONFIRM = "confirm"  # broker: message 5
    ACTIVATE = "activate"  # broker: activated()
    ACTIVATION = "activation"  # attester: message 6
    ACTIVE = "active"
    ENDED = "ended"


# Records ---------------------------------------------------------------------------------------------------------------


class _Direction:
    """One direction of an active session: its key and its counter, from 0 without gaps."""

    def __init__(self, key: bytes, name: bytes) -> None:
        self._aead = AESGCM(key)
        self._name = name
        self._counter = 0

    def seal(self, plaintext: bytes) -> bytes:
        counter = self._next()
        sealed = self._aead.encrypt(counter.to_bytes(12, "big"), plaintext, tagged("session-record", self._name))
        return pack(Record(counter=counter, sealed=sealed))

    def open(self, body: bytes) -> bytes:
        record = unpack(Record, body, max_bytes=RECORD_CAP)
        if record.counter != self._counter:
            raise NotAuthentic(
                "session.record_invalid", "a record is not the next one", expected=self._counter, got=record.counter
            )
        counter = self._next()
        try:
            return self._aead.decrypt(counter.to_bytes(12, "big"), record.sealed, tagged("session-record", self._name))
        except InvalidTag:
            raise NotAuthentic("session.record_invalid", "a record does not open under this session's key") from None

    def _next(self) -> int:
        if self._counter >= _COUNTER_LIMIT:
            raise Refused("session.record_invalid", "this session has carried all records it may", expected="a new one")
        self._counter += 1
        return self._counter - 1


def _derive(key: bytes, *info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=tagged("session-keys", *info)).derive(key)


def _confirm_mac(key: bytes, digest: bytes) -> Digest256:
    return tagged_mac(_derive(key, b"confirm", digest), "session-confirm", digest)


class _End:
    """What both machines share: a state, an end, and records."""

    def __init__(self) -> None:
        self.state = State.START
        self._sending: _Direction | None = None
        self._receiving: _Direction | None = None

    def end(self) -> None:
        """Never active again; keys are forgotten."""
        self.state = State.ENDED
        self._sending = self._receiving = None

    def seal(self, message: Call | Reply) -> bytes:
        """The frame body of a record. Raises Refused("session.not_active") before activation and after the end."""
        if self.state is not State.ACTIVE or self._sending is None:
            raise _not_active()
        return self._sending.seal(schema.encode(message))

    def open(self, kind: type[Call | Reply], body: bytes) -> Call | Reply:
        """The message in a record. Any doubt ends the session: NotAuthentic("session.record_invalid") or Malformed."""
        if self.state is not State.ACTIVE or self._receiving is None:
            raise _not_active()
        try:
            return schema.decode(kind, self._receiving.open(body))
        except MoorlineError:
            self.end()
            raise

    def _go(self, awaited: State) -> None:
        if self.state is not awaited:
            raise self._out_of_turn()

    def _out_of_turn(self) -> Refused:
        awaited = self.state.value
        self.end()
        return Refused("session.unexpected_message", "a step of the session came out of turn", expected=awaited)

    def _keys(self, key: bytes, digest: bytes, mine: bytes, theirs: bytes) -> None:
        self._sending = _Direction(_derive(key, mine, digest), mine)
        self._receiving = _Direction(_derive(key, theirs, digest), theirs)


_ATTESTER: Final = b"attester"
_BROKER: Final = b"broker"


def _not_active() -> Refused:
    return Refused("session.not_active", "this session is not active, so it carries no records")


class Initiator(_End):
    """The attester's machine. Order: `start`, receive(2), `proven`, `collected`, receive(4), receive(6)."""

    def __init__(self, *, hello: Hello, kem: KemKey, export: Exporter) -> None:
        super().__init__()
        _require_offered(hello)
        self._hello = pack(hello)
        self._role = hello.role
        self._kem = kem
        self._export = _no_exporter if hello.profile is ChannelProfile.HPKE_ONLY else export
        self._hpke_only = hello.profile is ChannelProfile.HPKE_ONLY
        self._shown: SignedMessage | None = None
        self._hsm_key: PublicKey | None = None
        self._challenge = self._evidence = self._answer = b""
        self._proof: bytes | None = None
        self._key = b""
        self.secrets = b""
        self.challenge: Challenge | None = None
        self.activation: Activation | None = None

    @property
    def hpke_only(self) -> bool:
        """Whether this session is of the HPKE-only profile."""
        return self._hpke_only

    def start(self) -> list[Effect]:
        """Message 1."""
        self._go(State.START)
        self.state = State.CHALLENGE
        return [Send(body=self._hello)]

    def receive(self, body: bytes) -> list[Effect]:
        """The next message of the broker. On any error the machine has ended."""
        try:
            if self._hpke_only and self.state is not State.ACTIVE:
                require_no_problem(body)
            if self.state is State.CHALLENGE:
                return self._challenged(body)
            if self.state is State.ANSWER:
                return self._answered(body)
            if self.state is State.ACTIVATION:
                return self._activated(body)
        except MoorlineError:
            self.end()
            raise
        raise self._out_of_turn()

    def judged(self, hsm_key: PublicKey | None) -> None:
        """The broker was judged: its ledger proof holds, and `hsm_key` is what the ledger has for it.

        In the HPKE-only profile message 2 must be signed by that key, for this message 1, before anything of ours is made
        over it. Raises NotAuthentic (`session.not_signed_by_hsm`, `session.signed_for_another`).
        """
        self._go(State.JUDGE_BROKER)
        self.state = State.PROVE
        if not self._hpke_only:
            return
        assert self._shown is not None
        try:
            if hsm_key is None:
                raise NotAuthentic("session.not_signed_by_hsm", "nothing says which key the broker signs with")
            self._shown.require_signed(hsm_key, message_digest(self._hello))
        except MoorlineError:
            self.end()
            raise
        self._hsm_key = hsm_key

    def proven(self, proof: bytes | None) -> list[Effect]:
        """The proof was made: the binding follows."""
        self._go(State.PROVE)
        if (proof is not None) != (self._role in PROOF_ROLES):
            self.end()
            raise Refused("session.proof_missing", "the proof does not fit the role", got=self._role.value)
        self._proof = proof
        exporter = self._export(exporter_label(self._role), message_digest(self._challenge))
        self.state = State.COLLECT
        return [Collect(binding=binding(self._role, exporter, self._hello, self._challenge, proof))]

    def collected(self, form: EvidenceFormat, evidence: bytes, endorsements: bytes) -> list[Effect]:
        """Message 3."""
        self._go(State.COLLECT)
        message = Evidence(format=form, evidence=evidence, endorsements=endorsements, proof=self._proof)
        self._evidence = pack(message)
        self.state = State.ANSWER
        return [Send(body=self._evidence)]

    def _challenged(self, body: bytes) -> list[Effect]:
        if self._hpke_only:
            self._shown = SignedMessage(signed.CHALLENGE, body)
            self.challenge = self._shown.challenge()
        else:
            self.challenge = unpack(Challenge, body)
        self._challenge = body
        self.state = State.JUDGE_BROKER
        return [JudgeBroker(challenge=self.challenge, digest=message_digest(body))]

    def _answered(self, body: bytes) -> list[Effect]:
        info = transcript(self._hello, self._challenge, self._evidence)
        answer = self._signed_answer(body, info) if self._hpke_only else unpack(Answer, body)
        suite, _ = _suite(self._kem.public)
        try:
            plaintext = suite.decrypt(answer.sealed, self._kem.private, info=info)
        except Exception:  # HPKE raises InvalidTag and, on short input, ValueError: neither is this session's answer
            raise NotAuthentic("session.answer_not_authentic", "the answer was not sealed for this session") from None
        sealed = schema.decode(Sealed, plaintext)
        self._answer = body
        self._key, self.secrets = sealed.key, sealed.secrets
        self.state = State.ACTIVATION
        return [Send(body=pack(Confirm(mac=_confirm_mac(self._key, self._so_far()))))]

    def _signed_answer(self, body: bytes, info: Digest256) -> Answer:
        assert self._hsm_key is not None
        shown = SignedMessage(signed.ANSWER, body)
        shown.require_signed(self._hsm_key, info)
        return shown.answer()

    def _activated(self, body: bytes) -> list[Effect]:
        self._keys(self._key, self._so_far(), _ATTESTER, _BROKER)
        assert self._receiving is not None
        # Without TLS the activation (time, above all) is only as good as what K protects: it is the broker's record 0.
        self.activation = unpack(Activation, self._receiving.open(body) if self._hpke_only else body)
        self._key = b""
        self.state = State.ACTIVE
        return [Active()]

    def _so_far(self) -> Digest256:
        return transcript(self._hello, self._challenge, self._evidence, self._answer)


class Responder(_End):
    """The broker's machine. Order: receive(1), `challenged`, receive(3), `accepted`, receive(5), `activated`."""

    def __init__(self, *, facts: SessionFacts, export: Exporter, peer_address: str) -> None:
        super().__init__()
        self.state = State.HELLO
        self._facts = facts
        self._export = export
        self._peer_address = peer_address
        self._hello = self._challenge = self._evidence = self._answer = self._confirm = self._activation = b""
        self._said: Hello | None = None
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
            return [
                Sign(purpose=signed.CHALLENGE, payload=signed.payload(message_digest(self._hello), self._asked)),
            ]
        self._challenge = pack(self._asked)
        self.state = State.EVIDENCE
        return [Send(body=self._challenge)]

    def signed(self, signature: bytes) -> list[Effect]:
        """Message 2 or 4 of the HPKE-only profile, from its COSE_Sign1."""
        body = signed.framed(signature)
        if self.state is State.SIGN_CHALLENGE:
            self._challenge, self.state = body, State.EVIDENCE
        elif self.state is State.SIGN_ANSWER:
            self._answer, self.state = body, State.CONFIRM
        else:
            raise self._out_of_turn()
        return [Send(body=body)]

    def accepted(self, *, key: bytes, secrets: bytes) -> list[Effect]:
        """Message 4, or what to sign for it. `key` is K: 32 bytes drawn for this session alone."""
        self._go(State.APPRAISE)
        assert self._said is not None
        suite, public = _suite(self._said.kem_public)
        plaintext = schema.encode(Sealed(key=key, secrets=secrets))
        info = transcript(self._hello, self._challenge, self._evidence)
        self._key = key
        answer = Answer(sealed=suite.encrypt(plaintext, public, info=info))
        if self.hpke_only:
            self.state = State.SIGN_ANSWER
            return [Sign(purpose=signed.ANSWER, payload=signed.payload(info, answer))]
        self._answer = pack(answer)
        self.state = State.CONFIRM
        return [Send(body=self._answer)]

    def activated(self, activation: Activation) -> list[Effect]:
        """Message 6."""
        self._go(State.ACTIVATE)
        self._keys(self._key, self._so_far(), _BROKER, _ATTESTER)
        assert self._sending is not None
        self._activation = self._sending.seal(pack(activation)) if self.hpke_only else pack(activation)
        self._key = self._hello = self._challenge = self._evidence = self._answer = b""
        self.claim, self._asked = (None if self.claim is None else self.claim.judged()), None
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
        _require_offered(hello)
        if not hello.formats:
            raise Refused("session.format", "the hello offers no evidence format")
        _suite(hello.kem_public)
        parse_public(hello.signing_public)
        self._said, self._hello = hello, body
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
        self._evidence = body
        digest = message_digest(self._challenge)
        export = _no_exporter if self.hpke_only else self._export
        exporter = export(exporter_label(self._said.role), digest)
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
            binding=binding(self._said.role, exporter, self._hello, self._challenge, shown.proof),
            nonce=self._asked.nonce,
            challenge_digest=digest,
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
        if not same(unpack(Confirm, body).mac, _confirm_mac(self._key, self._so_far())):
            raise NotAuthentic("session.confirm_invalid", "the confirmation is not over this session")
        self._confirm = body
        self.state = State.ACTIVATE
        return [Activate(claim=self.claim)]

    def _so_far(self) -> Digest256:
        return transcript(self._hello, self._challenge, self._evidence, self._answer)


def _require_offered(hello: Hello) -> None:
    # Only launch fields can permit the HPKE-only profile (PROTOCOLS.md 4), and only functions have some.
    if hello.profile is ChannelProfile.HPKE_ONLY and hello.role not in LAUNCH_ROLES:
        raise Refused(
            "session.profile_not_offered",
            "this role has no launch fields that could permit a session without TLS of the broker",
            expected=ChannelProfile.TLS.value,
            got=f"{hello.profile.value} from {hello.role.value}",
        )


def _no_exporter(_label: str, _context: bytes) -> bytes:
    return b""  # TLS ends at a proxy: there is no connection that both ends share


def p256_raw(public: ec.EllipticCurvePublicKey) -> bytes:
    """A P-256 public key in the raw form of `Hello.kem_public`; 65 bytes."""
    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
