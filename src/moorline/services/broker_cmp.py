"""CMPv2 over HTTP (RFC 9480, RFC 6712), lightweight profile (RFC 9483): devices enrol, renew and revoke.

1. a request names its transaction and a nonce, is of version 2, and its time, if it tells one, is near ours; each
   transaction serves one request, so that a recorded one sent again gets no further certificate
2. its protection is a MAC under the device's one-time code (PasswordBasedMac; senderKID is the device's name), or a
   signature by the device's own certificate, which is not revoked. Only genm may come without
3. ir, cr, kur and p10cr go the way of every enrolment (broker_enrolment): proof of possession, then the applicant's
   right; rr revokes a certificate of the device itself
4. the answer is protected the way the request was; errors, and answers to unprotected requests, are signed by the
   issuing CA. Each carries the request's transaction, its nonce back, and a nonce of ours
5. without implicitConfirm the client confirms by hash; what it rejects, or does not confirm in time, is revoked. Nobody but
   the device of the certificate has a word in that

Messages are secret to nobody and protect themselves, so plain HTTP serves them too. Anything that goes wrong is a CMP error
message with its PKIFailureInfo; the reason stands in it in words, with our code.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Conflict, Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.hsm.issuing import Leaf
from moorline.nfv import Role, parse_name
from moorline.services import broker_enrolment
from moorline.services.broker import Broker
from moorline.services.broker_callers import require_recorded
from moorline.services.broker_enrolment import code_digest, code_of
from moorline.services.broker_est_access import Attempts
from moorline.storage.broker_cmp import CmpStore, CmpTransaction
from moorline.storage.broker_enrolments import Applicant
from moorline.verification.chains import verify_chain
from moorline.wire import cmp, cmp_mac, cmp_reply, der, est
from moorline.wire.cmp import Body, Failure, Message
from moorline.wire.cmp_elements import Algorithm
from moorline.wire.cmp_reply import Reply
from moorline.wire.keys import PublicKey, parse_public, public_bytes

CMP_TYPE: Final = "application/pkixcmp"
_ECDSA: Final[dict[str, hashes.HashAlgorithm]] = {
    "1.2.840.10045.4.3.2": hashes.SHA256(),
    "1.2.840.10045.4.3.3": hashes.SHA384(),
    "1.2.840.10045.4.3.4": hashes.SHA512(),
}
_SIGNED: Final = Algorithm(oid="1.2.840.10045.4.3.2", parameters=b"")
_NONCE_BYTES: Final = 16
_TRANSACTION_CAP: Final = 64
_CLOCK_S: Final = 600
_CONFIRM_S: Final = 300
_SWEEP_EVERY_S: Final = 30.0
_CA_CERTS: Final = "1.3.6.1.5.5.7.4.17"
_ROOT_UPDATE: Final = "1.3.6.1.5.5.7.4.18"
_TEMPLATE: Final = "1.3.6.1.5.5.7.4.19"
_ROOT_CERT: Final = "1.3.6.1.5.5.7.4.20"
_KINDS: Final = {Body.IR: Body.IP, Body.CR: Body.CP, Body.KUR: Body.KUP, Body.P10CR: Body.CP}
_REASONS: Final = {1: "key_compromise", 3: "affiliation_changed", 4: "superseded", 5: "cessation_of_operation"}
_LOG: Final = structlog.stdlib.get_logger("broker")

_FAILURES: Final[dict[str, Failure]] = {
    "cmp.version": Failure.UNSUPPORTED_VERSION,
    "cmp.time": Failure.BAD_TIME,
    "cmp.nonce": Failure.BAD_SENDER_NONCE,
    "cmp.recipient_nonce": Failure.BAD_RECIPIENT_NONCE,
    "cmp.algorithm": Failure.BAD_ALG,
    "cmp.protection": Failure.BAD_MESSAGE_CHECK,
    "cmp.possession": Failure.BAD_POP,
    "cmp.template": Failure.BAD_CERT_TEMPLATE,
    "cmp.transaction_in_use": Failure.TRANSACTION_ID_IN_USE,
    "cmp.other_certificate": Failure.BAD_CERT_ID,
    "revocation.unknown_certificate": Failure.BAD_CERT_ID,
    "cmp.already_revoked": Failure.CERT_REVOKED,
    "est.certificate_revoked": Failure.CERT_REVOKED,
    "est.certificate_unknown": Failure.SIGNER_NOT_TRUSTED,
    "est.further_certificate": Failure.NOT_AUTHORIZED,
    "cmp.signer": Failure.SIGNER_NOT_TRUSTED,
    "est.code_invalid": Failure.BAD_MESSAGE_CHECK,
    "est.possession": Failure.BAD_POP,
    "est.key_kind": Failure.BAD_CERT_TEMPLATE,
    "est.csr_malformed": Failure.BAD_DATA_FORMAT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sender:
    """Who sent a request, as its protection shows. `code` is the secret of a MAC, None for a signature.

    `serial` and `public` (SPKI) are those of the certificate that signed.
    """

    device: str
    code: str | None
    serial: str | None
    public: bytes = b""


class Cmp:
    """The CMP server of one broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._store = CmpStore(broker.store)
        self._attempts = Attempts()

    async def answer(self, data: bytes, *, address: str) -> bytes:
        """The PKIMessage (DER) that answers one. Never raises for what a client sent."""
        message, sender = None, None
        try:
            message = cmp.parse(data)
            self._require_fresh(message)  # 1
            sender = await asyncio.to_thread(self._authenticated, message, address)  # 2
            return await self._answered(message, sender)
        except MoorlineError as refusal:
            _LOG.info("CMP request refused", code=refusal.code)
            return await asyncio.to_thread(self._refused, message, sender, refusal)

    # -- 1, 2 ------------------------------------------------------------------------------------------------------------

    def _require_fresh(self, message: Message) -> None:
        header = message.header
        if header.version not in (2, 3):
            raise Refused("cmp.version", "only CMPv2 and v3 are spoken here", got=header.version)
        transaction, nonce = header.transaction or b"", header.sender_nonce or b""
        if not 0 < len(transaction) <= _TRANSACTION_CAP or len(nonce) < _NONCE_BYTES:
            expected = f"1 to {_TRANSACTION_CAP} bytes, and {_NONCE_BYTES} or more"
            got = f"{len(transaction)} and {len(nonce)}"
            raise Refused("cmp.nonce", "a request carries a transaction and a nonce", expected=expected, got=got)
        if header.message_time is not None:
            off = abs(_seconds(header.message_time) - self._broker.clock.now())
            if off > _CLOCK_S:
                raise Refused("cmp.time", "the message's time is far from ours", expected=f"within {_CLOCK_S} s", got=off)

    def _authenticated(self, message: Message, address: str) -> _Sender | None:
        if message.protection is None or message.header.algorithm is None:
            if message.body is Body.GENM:
                return None
            raise NotAuthentic("cmp.protection", "this message has to be protected")
        if message.header.algorithm.oid in cmp_mac.ALGORITHMS:
            return self._by_code(message, message.header.algorithm, message.protection, address)
        return self._by_signature(message, message.header.algorithm, message.protection)

    def _by_code(self, message: Message, algorithm: Algorithm, protection: bytes, address: str) -> _Sender:
        reference = message.header.reference or b""
        device = parse_name(reference.decode("ascii", errors="replace"), "device")
        who, now = (device, address), self._broker.clock.now()
        self._attempts.require_patience(who, now)
        try:
            code = code_of(self._broker, device)
            if not same(cmp_mac.mac(algorithm, code, message.protected), protection):
                raise NotAuthentic("cmp.protection", "the MAC is not by this device's code")
        except NotAuthentic:
            self._attempts.failed(who, now)
            raise
        return _Sender(device=device, code=code, serial=None)

    def _by_signature(self, message: Message, algorithm: Algorithm, protection: bytes) -> _Sender:
        broker = self._broker
        if not message.extra_certificates:
            raise NotAuthentic("cmp.signer", "a signed message brings its signer's certificate first")
        leaf, *others = message.extra_certificates
        between = tuple(dict.fromkeys((*broker.ca.bundle, *others)))[:8]
        try:
            chain = verify_chain(leaf, between, broker.roots, broker.clock.now())
        except MoorlineError as error:
            raise NotAuthentic("cmp.signer", "the signer's certificate does not hold", got=error.code) from None
        named = chain.spiffe_id
        if named.role is not Role.DEVICE or named.trust_domain != broker.settings.trust_domain:
            raise NotAuthentic("cmp.signer", "the signer is no device of this provider", got=str(named))
        _verify(chain.leaf.public_key(), algorithm, protection, message.protected, "cmp.protection")
        public = chain.leaf.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return _Sender(device=named.segments[0], code=None, serial=require_recorded(broker, leaf), public=public)

    # -- 3 ---------------------------------------------------------------------------------------------------------------

    async def _answered(self, message: Message, sender: _Sender | None) -> bytes:
        if message.body is Body.GENM:
            return await asyncio.to_thread(self._informed, message, sender)
        assert sender is not None
        if message.body in _KINDS:
            return await self._enrolled(message, sender)
        if message.body is Body.RR:
            return await asyncio.to_thread(self._revoked, message, sender)
        if message.body is Body.CERTCONF:
            return await asyncio.to_thread(self._confirmed, message, sender)
        raise Refused("cmp.not_offered", "this kind of message is not answered here", got=message.body.name.lower())

    async def _enrolled(self, message: Message, sender: _Sender) -> bytes:
        number, public = _wanted(message)
        if sender.code is None and message.body is Body.IR:
            raise Refused("cmp.template", "a device that has a certificate uses cr or kur, not ir")
        if sender.code is not None and message.body in (Body.CR, Body.KUR):
            raise Refused("cmp.template", "cr and kur are signed with the device's certificate")
        applicant = await asyncio.to_thread(self._applicant, message, sender, public_bytes(public))
        transaction, nonce = message.header.transaction or b"", self._broker.token.random(_NONCE_BYTES)
        await asyncio.to_thread(self._store.use, transaction, at=self._broker.clock.now())
        leaf = await broker_enrolment.enrol(self._broker, applicant, public)
        implicit = cmp.IMPLICIT_CONFIRM in message.header.info
        if not implicit:
            await asyncio.to_thread(self._store.expect, self._transaction(transaction, leaf, number, nonce))
        # caPubs only where the client could not know the root before: with a MAC (RFC 9483 4.1.1).
        above = (*self._broker.ca.bundle, *self._broker.roots) if sender.code is not None else ()
        content = cmp_reply.certificate_response(number, leaf.der, above)
        info = ((cmp.IMPLICIT_CONFIRM, b"\x05\x00"),) if implicit else ()
        reply = self._reply(message, _KINDS[message.body], content, nonce=nonce, info=info)
        return await asyncio.to_thread(self._protected, reply, message, sender)

    def _applicant(self, message: Message, sender: _Sender, public: bytes) -> Applicant:
        """Only kur puts a key in the place of the device's own; cr and p10cr ask for one beside it (RFC 9483 4.1.2)."""
        if sender.code is not None:
            return Applicant(device=sender.device, code_digest=code_digest(sender.device, sender.code))
        assert sender.serial is not None
        self._broker.enrolments.require_renews(sender.serial)
        further = message.body is not Body.KUR and public != sender.public
        return Applicant(device=sender.device, renews=sender.serial, further=further)

    def _transaction(self, transaction: bytes, leaf: Leaf, number: int, nonce: bytes) -> CmpTransaction:
        return CmpTransaction(
            transaction=transaction,
            serial=f"{leaf.serial:x}",
            certificate_hash=hashlib.sha256(leaf.der).digest(),
            number=number,
            nonce=nonce,
            at=self._broker.clock.now(),
        )

    def _confirmed(self, message: Message, sender: _Sender) -> bytes:
        waiting = self._store.waiting(message.header.transaction or b"")
        if not self._broker.enrolments.holds(sender.device, waiting.serial, self._broker.settings.trust_domain):
            raise Refused("cmp.other_certificate", "a device confirms its own certificates only", got=waiting.serial)
        if message.header.recipient_nonce != waiting.nonce:
            raise Refused("cmp.recipient_nonce", "the confirmation does not carry our nonce")
        found = cmp.confirmations(message.content)
        taken = [one for one in found if one.accepted and same(one.certificate_hash, waiting.certificate_hash)]
        now = self._broker.clock.now()
        if len(found) == 1 and len(taken) == 1:
            self._store.done(waiting.transaction)
        else:
            self._broker.revocations.revoke(waiting.serial, reason="superseded", at=now)
            self._store.done(waiting.transaction)
            self._broker.revoking.set()
        return self._protected(self._reply(message, Body.PKICONF, cmp_reply.confirmed()), message, sender)

    def _revoked(self, message: Message, sender: _Sender) -> bytes:
        serial, reason = cmp.revocation(message.content)
        broker, name = self._broker, f"{serial:x}"
        if sender.serial is None or not broker.enrolments.holds(sender.device, name, broker.settings.trust_domain):
            raise Refused("cmp.other_certificate", "a device revokes its own certificates, with one of them", got=name)
        _, revoked = broker.revocations.find(name)
        if revoked is not None:
            raise Conflict("cmp.already_revoked", "this certificate is revoked already", got=name)
        broker.revocations.revoke(name, reason=_REASONS.get(reason, "unspecified"), at=broker.clock.now())
        broker.revoking.set()
        return self._protected(self._reply(message, Body.RP, cmp_reply.revocation_response()), message, sender)

    def _informed(self, message: Message, sender: _Sender | None) -> bytes:
        above = der.sequence(*self._broker.ca.bundle, *self._broker.roots)
        update = b"" if self._broker.root_update is None else self._broker.root_update.content()
        known = {_CA_CERTS: above, _ROOT_UPDATE: update, _TEMPLATE: _template()}
        # A client that names its root (RFC 9483 4.3.2) is answered under the name of the update.
        asked = (_ROOT_UPDATE if name == _ROOT_CERT else name for name in cmp.info_types(message.content))
        content = cmp_reply.general_response(tuple((name, known[name]) for name in asked if name in known))
        return self._protected(self._reply(message, Body.GENP, content), message, sender)

    async def keep_sweeping(self) -> None:
        """5. Until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except MoorlineError as error:
                _LOG.info("unconfirmed certificates not looked at", code=error.code)
            await asyncio.sleep(_SWEEP_EVERY_S)

    def sweep(self) -> None:
        """5. What nobody confirmed in time is revoked."""
        now = self._broker.clock.now()
        for one in self._store.overdue(Instant(now - _CONFIRM_S)):
            self._broker.revocations.revoke(one.serial, reason="superseded", at=now)
            self._store.done(one.transaction)
            self._broker.revoking.set()

    # -- 4 ---------------------------------------------------------------------------------------------------------------

    def _refused(self, message: Message | None, sender: _Sender | None, refusal: MoorlineError) -> bytes:
        failure = _FAILURES.get(refusal.code, _by_kind(refusal))
        content = cmp_reply.error(failure, f"{refusal.says} [{refusal.code}]")
        return self._protected(self._reply(message, Body.ERROR, content), message, sender)

    def _reply(
        self,
        message: Message | None,
        body: Body,
        content: bytes,
        *,
        nonce: bytes | None = None,
        info: tuple[tuple[str, bytes], ...] = (),
    ) -> Reply:
        issuer = self._broker.ca.issuer.certificate
        header = None if message is None else message.header
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return Reply(
            sender=cmp_reply.directory_name(issuer.subject),
            recipient=cmp_reply.directory_name(x509.Name([])) if header is None else header.sender,
            time=datetime.fromtimestamp(self._broker.clock.now(), UTC).strftime("%Y%m%d%H%M%SZ"),
            algorithm=_SIGNED,
            reference=identifier.digest,
            transaction=None if header is None else header.transaction,
            sender_nonce=nonce or self._broker.token.random(_NONCE_BYTES),
            recipient_nonce=None if header is None else header.sender_nonce,
            body=body,
            content=content,
            info=info,
        )

    def _protected(self, reply: Reply, message: Message | None, sender: _Sender | None) -> bytes:
        chain = self._broker.ca.chain
        if sender is not None and sender.code is not None and message is not None:
            algorithm = message.header.algorithm
            assert algorithm is not None
            reply = replace(reply, algorithm=algorithm, reference=message.header.reference)
            mac = cmp_mac.mac(algorithm, sender.code, cmp_reply.protected_part(reply))
            return cmp_reply.encode(reply, mac, chain)
        key = self._broker.ca.issuer.key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cmp_reply.encode(reply, key.sign(cmp_reply.protected_part(reply), ec.ECDSA(hashes.SHA256())), chain)


def add_routes(app: FastAPI, server: Cmp) -> None:
    """CMP's well-known place (RFC 9480 3.3), also below the issuing CA's name."""

    @app.post("/.well-known/cmp")
    async def answered(request: Request) -> Response:
        """Public on purpose: each message is protected, or asks for what is public."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != CMP_TYPE:
            raise Malformed("cmp.media_type", "a CMP message comes as application/pkixcmp", expected=CMP_TYPE, got=kind)
        address = request.client.host if request.client is not None else ""
        return Response(await server.answer(await request.body(), address=address), media_type=CMP_TYPE)


def _wanted(message: Message) -> tuple[int, PublicKey]:
    """Number and key of the one certificate asked for, with proof of possession. Raises Malformed, NotAuthentic, Refused."""
    if message.body is Body.P10CR:
        return -1, est.csr_key(cmp.certification_request(message.content))
    requests = cmp.cert_requests(message.content)
    if len(requests) != 1:
        raise Refused("cmp.template", "one certificate a request", got=len(requests))
    one = requests[0]
    if one.public_key is None:
        raise Refused("cmp.template", "the request names no public key")
    public = parse_public(one.public_key)
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Refused("cmp.template", "only P-256 keys are certified", expected="P-256")
    if one.algorithm is None or one.signature is None:
        raise NotAuthentic("cmp.possession", "the request does not prove that its sender has the key")
    _verify(public, one.algorithm, one.signature, one.proven, "cmp.possession")
    return one.number, public


def _verify(public: object, algorithm: Algorithm, signature: bytes, data: bytes, code: str) -> None:
    chosen = _ECDSA.get(algorithm.oid)
    if chosen is None or not isinstance(public, ec.EllipticCurvePublicKey):
        raise Refused("cmp.algorithm", "signatures are ECDSA with SHA-2", got=algorithm.oid)
    try:
        public.verify(signature, data, ec.ECDSA(chosen))
    except InvalidSignature:
        if code == "cmp.possession":
            raise NotAuthentic("cmp.possession", "the request is not signed by its own key") from None
        raise NotAuthentic("cmp.protection", "the message is not signed by its signer's key") from None


def _seconds(time: str) -> int:
    try:
        return int(datetime.strptime(time, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise Malformed("cmp.malformed", "the message's time cannot be read", got=time[:20]) from None


def _template() -> bytes:
    """CertReqTemplateContent (RFC 9480 2.16): an empty template, and that keys are on P-256."""
    curve = cmp_reply.encode_algorithm(Algorithm(oid="1.2.840.10045.2.1", parameters=der.oid("1.2.840.10045.3.1.7")))
    key_spec = der.sequence(der.sequence(der.oid("1.3.6.1.5.5.7.5.1.11"), curve))
    return der.sequence(der.sequence(), key_spec)


def _by_kind(error: MoorlineError) -> Failure:
    kinds = {
        Malformed: Failure.BAD_DATA_FORMAT,
        NotAuthentic: Failure.BAD_MESSAGE_CHECK,
        Refused: Failure.NOT_AUTHORIZED,
        Conflict: Failure.BAD_REQUEST,
        Unavailable: Failure.SYSTEM_UNAVAIL,
        Misconfigured: Failure.SYSTEM_UNAVAIL,
    }
    return kinds.get(type(error), Failure.SYSTEM_UNAVAIL)
