"""The attester's machine (channel.session)."""

from __future__ import annotations

from moorline.channel import signed
from moorline.channel.effects import Active, Collect, Effect, JudgeBroker, Send, State
from moorline.channel.kem import KemKey, suite_of
from moorline.channel.machine import PROOF_ROLES, End, require_offered
from moorline.channel.messages import pack, require_no_problem, unpack
from moorline.channel.signed import SignedMessage
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
from moorline.digest import Digest256
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.wire import schema
from moorline.wire.keys import PublicKey
from moorline.wire.launch import ChannelProfile
from moorline.wire.session import Activation, Answer, Challenge, Confirm, Evidence, EvidenceFormat, Hello, Sealed


class Initiator(End):
    """The attester's machine. Order: `start`, receive(2), `proven`, `collected`, receive(4), receive(6)."""

    def __init__(self, *, hello: Hello, kem: KemKey, export: Exporter) -> None:
        super().__init__()
        require_offered(hello)
        self._hello = pack(hello)
        self._role = hello.role
        self._kem = kem
        self._export = no_exporter if hello.profile is ChannelProfile.HPKE_ONLY else export
        self._hpke_only = hello.profile is ChannelProfile.HPKE_ONLY
        self._shown: SignedMessage | None = None
        self._hsm_key: PublicKey | None = None
        self._heard = begun()
        self._heard.add(self._hello)
        self._greeting = message_digest(self._hello)
        self._challenged_by = self._so_far = Digest256(b"")  # not known yet
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
            self._shown.require_signed(hsm_key, self._greeting)
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
        exporter = self._export(exporter_label(self._role), self._challenged_by)
        self.state = State.COLLECT
        return [Collect(binding=binding(self._role, exporter, self._greeting, self._challenged_by, proof))]

    def collected(self, form: EvidenceFormat, evidence: bytes, endorsements: bytes) -> list[Effect]:
        """Message 3."""
        self._go(State.COLLECT)
        message = Evidence(format=form, evidence=evidence, endorsements=endorsements, proof=self._proof)
        body = pack(message)
        self._heard.add(body)
        self.state = State.ANSWER
        return [Send(body=body)]

    def _challenged(self, body: bytes) -> list[Effect]:
        if self._hpke_only:
            self._shown = SignedMessage(signed.CHALLENGE, body)
            self.challenge = self._shown.challenge()
        else:
            self.challenge = unpack(Challenge, body)
        self._heard.add(body)
        self._challenged_by, self.state = message_digest(body), State.JUDGE_BROKER
        return [JudgeBroker(challenge=self.challenge, digest=self._challenged_by)]

    def _answered(self, body: bytes) -> list[Effect]:
        info = self._heard.digest()
        answer = self._signed_answer(body, info) if self._hpke_only else unpack(Answer, body)
        suite, _ = suite_of(self._kem.public)
        try:
            plaintext = suite.decrypt(answer.sealed, self._kem.private, info=info)
        except Exception:  # HPKE raises InvalidTag and, on short input, ValueError: neither is this session's answer
            raise NotAuthentic("session.answer_not_authentic", "the answer was not sealed for this session") from None
        sealed = schema.decode(Sealed, plaintext)
        self._heard.add(body)
        self._so_far = self._heard.digest()
        self._key, self.secrets = sealed.key, sealed.secrets
        self.state = State.ACTIVATION
        return [Send(body=pack(Confirm(mac=confirm_mac(self._key, self._so_far))))]

    def _signed_answer(self, body: bytes, info: Digest256) -> Answer:
        assert self._hsm_key is not None
        shown = SignedMessage(signed.ANSWER, body)
        shown.require_signed(self._hsm_key, info)
        return shown.answer()

    def _activated(self, body: bytes) -> list[Effect]:
        self._keys(self._key, self._so_far, ATTESTER, BROKER)
        assert self._receiving is not None
        # Without TLS the activation (time, above all) is only as good as what K protects: it is the broker's record 0.
        self.activation = unpack(Activation, self._receiving.open(body) if self._hpke_only else body)
        self._key = b""
        self.state = State.ACTIVE
        return [Active()]
