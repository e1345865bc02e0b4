"""CRL and OCSP of the issuing CAs, published: for TLS clients that do not ask the ledger themselves.

1. every `revocation_poll_s` the ledger is asked about each certificate that has not expired: its serial number, and the
   device, instance or host it names; what is revoked is kept
2. an answer is as old as the oldest proof it rests on (thisUpdate) and holds for `max_age` from there (nextUpdate)
3. without a proof that young there is no answer: OCSP says tryLater, the CRL's route is unavailable. Silence is never "good"
4. an issuing CA that retires answers for its own certificates until its key does; one that the ledger does not have as
   active any more (RevokeIssuingCa) answers nothing from the next look on, and signs nothing. Before the first look, and
   when the last one is older than max_age + revocation_poll_s, no certificate is signed (`issuing.not_seen`)

So a revocation is visible to whoever asks within commit + revocation_poll_s, and to whoever keeps an answer within commit +
max_age + revocation_poll_s: the bound of PROTOCOLS.md 7, printed by `moor hsm revocation`. Routes are public and the
same over HTTP and HTTPS: everything here is signed by a CA.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import ocsp
from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.clock import Instant, Validity
from moorline.digest import same
from moorline.errors import Malformed, MoorlineError, Refused, Unavailable
from moorline.hsm import revocation
from moorline.hsm.issuers import issued_by, name_of
from moorline.hsm.revocation import CertificateStatus, RevokedCertificate
from moorline.ledger import leaf_standing, records, standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import RevocationKind, RevocationRecord
from moorline.nfv import SpiffeId
from moorline.services import http
from moorline.services.broker import Broker
from moorline.storage.broker_revocations import Named, Revoked
from moorline.wire.certificates import Issuer

_LOG: Final = structlog.stdlib.get_logger("broker")
_KEYS_A_PROOF: Final = 64
_FIRST_AGAIN_S: Final = 1
_BODY_CAP: Final = 64 * 1024
CRL_TYPE: Final = "application/pkix-crl"
CERTIFICATE_TYPE: Final = "application/pkix-cert"
OCSP_TYPE: Final = "application/ocsp-response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How long a revoked certificate can pass for good, seconds after the ledger committed the revocation.

    `asked` for who asks each time, `kept` for who keeps an answer until it ends.
    """

    asked_s: int
    kept_s: int


class Lists:
    """What this broker knows about revoked certificates, as young as its newest look at the ledger."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._seen: Instant | None = None
        self._made: dict[str, tuple[tuple[Instant, int], bytes]] = {}

    @property
    def bound(self) -> Bound:
        """The revocation bound (PROTOCOLS.md 7)."""
        poll = self._broker.settings.revocation_poll_s
        return Bound(asked_s=poll, kept_s=poll + self._broker.trust.max_age_s)

    async def keep_watching(self) -> None:
        """Look at the ledger until cancelled; until the first look nothing is signed, so the next one comes soon."""
        while True:
            try:
                await self.look()
            except MoorlineError as error:
                _LOG.warning("revocations not seen", code=error.code)
            poll_s = self._broker.settings.revocation_poll_s
            await asyncio.sleep(poll_s if self._seen is not None else min(poll_s, _FIRST_AGAIN_S))

    async def look(self) -> None:
        """Ask the ledger about everything that could still be used. Raises what the ledger says; nothing is younger then."""
        broker = self._broker
        now = broker.clock.now()
        oldest = await self.look_at_cas()
        for page in await asyncio.to_thread(lambda: list(broker.revocations.unexpired(now))):
            for part in _parts(page, broker.settings.provider):
                state = await broker.ledger.state(tuple(key for _, keys in part for key in keys))
                oldest = min(oldest, state.time)
                await asyncio.to_thread(broker.revocations.learn, tuple(_revoked(part, state)))
        self._seen = oldest

    async def look_at_cas(self) -> Instant:
        """4. How old the proof about the issuing CAs is; from now on the active one signs, if it counts."""
        broker, provider = self._broker, self._broker.settings.provider
        held = {name_of(one.certificate): one for one in broker.ca.issuers.held()}
        wanted = (key for name in held for key in standing.issuing_ca_keys(provider, name))
        state = await broker.ledger.state(tuple(dict.fromkeys(wanted)))
        ended = {name: one.der for name, one in held.items() if not _counts(state, provider, name, one.der)}
        for name, certificate in ended.items():
            if certificate in broker.ca.living:
                _LOG.error("issuing CA does not count any more", name=name)
        broker.ca.issuers.looked(frozenset(ended.values()), at=state.time)
        return state.time

    def validity(self) -> Validity:
        """ThisUpdate and nextUpdate of an answer given now. Raises Unavailable("revocation.not_fresh")."""
        seen, life = self._seen, self._broker.trust.max_age_s
        if seen is None or self._broker.clock.now() >= seen + life:
            raise Unavailable(
                "revocation.not_fresh",
                "the ledger was not seen lately, so nobody can be said to be good",
                expected=f"within {life} s",
                retry_after_s=self._broker.settings.revocation_poll_s,
            )
        return Validity(not_before=seen, not_after=Instant(seen + life))

    def crl(self, name: str) -> bytes:
        """The CRL (DER) of the issuing CA or the HSM of this name. Raises Refused("revocation.no_such_ca")."""
        issuer = self._issuer(name)
        validity = self.validity()
        listed = self._listed(issuer, validity)
        version = (validity.not_before, len(listed))
        kept = self._made.get(name)
        if kept is not None and kept[0] == version:
            return kept[1]
        number = self._broker.revocations.next_crl_number(self._broker.clock.now())
        url = self._broker.settings.revocation_url
        made = revocation.crl(
            issuer,
            tuple(_entry(one) for one in listed),
            number=number,
            validity=validity,
            url=None if url is None else f"{url.rstrip('/')}/crl/{name}.crl",
        )
        self._made[name] = (version, made)
        return made

    def ocsp(self, request: bytes) -> bytes:
        """The response (DER) to an OCSP request (DER); a request that cannot be answered gets a response that says why."""
        try:
            question = revocation.parse_ocsp(request)
            issuer = revocation.asked_of(self._broker.ca.issuers.standing(), question)
            validity = self.validity()
            issued, revoked = self._broker.revocations.find(f"{question.serial:x}", of=lambda der: _of(der, issuer))
            status = CertificateStatus(issued=issued, revoked=None if revoked is None else _entry(revoked))
            return revocation.ocsp_answer(issuer, question, status, validity=validity)
        except Malformed:
            return revocation.ocsp_refusal(ocsp.OCSPResponseStatus.MALFORMED_REQUEST)
        except Refused:
            return revocation.ocsp_refusal(ocsp.OCSPResponseStatus.UNAUTHORIZED)
        except Unavailable:
            return revocation.ocsp_refusal(ocsp.OCSPResponseStatus.TRY_LATER)

    def certificate(self, name: str) -> bytes:
        """The CA certificate (DER) by its name on the ledger."""
        return self._issuer(name).certificate.public_bytes(serialization.Encoding.DER)

    def above(self) -> bytes:
        """The CRLs of provider, authorities and root (PEM) that were given to this broker. Raises Refused."""
        path = self._broker.settings.crls_above
        try:
            return path.read_bytes() if path is not None else b""
        except OSError as error:
            raise Unavailable("revocation.no_crls_above", "the CRLs above cannot be read", got=error.strerror) from None

    def facts(self) -> dict[str, object]:
        """What `moor hsm revocation` prints."""
        seen = self._seen
        return {
            "seen_at": seen,
            "next_update": None if seen is None else seen + self._broker.trust.max_age_s,
            "revoked": len(self._broker.revocations.listed(expired_after=self._broker.clock.now())),
            "not_on_ledger_yet": len(self._broker.revocations.pending()),
            "bound_asked_s": self.bound.asked_s,
            "bound_kept_s": self.bound.kept_s,
            "url": self._broker.settings.revocation_url,
        }

    def _listed(self, issuer: Issuer, validity: Validity) -> tuple[Revoked, ...]:
        """What the CRL names. RFC 5280 3.3: also on one list after the certificate's own end."""
        if issuer is self._broker.identity.issuer:
            return ()  # TLS keys of brokers live under an hour; who loses one revokes the HSM (ledger)
        life = validity.not_after - validity.not_before
        return self._broker.revocations.listed(
            expired_after=Instant(validity.not_before - life), of=lambda der: _of(der, issuer)
        )

    def _issuer(self, name: str) -> Issuer:
        broker = self._broker
        if name == broker.settings.hsm:
            return broker.identity.issuer
        return broker.ca.issuers.named(name)


async def serve(lists: Lists, also: Callable[[FastAPI], None], bound: Callable[[str], None]) -> None:
    """The plain HTTP door, if there is one; ends only by cancellation."""
    listen = lists._broker.settings.listen_revocation  # noqa: SLF001 - of the same module
    if listen is None:
        await asyncio.Event().wait()
        return
    app = http.application("broker-revocation", body_cap=_BODY_CAP)
    add_routes(app, lists)
    also(app)
    await http.serve(app, listen=listen, identity=None, client_roots_pem=None, ready=bound, without_tls=True)


def add_routes(app: FastAPI, lists: Lists) -> None:
    """All public on purpose: what is served is signed."""

    @app.get("/crl/above.pem")
    async def above() -> Response:
        """The CRLs of the CAs above, PEM, as they were given to this broker."""
        return Response(await asyncio.to_thread(lists.above), media_type="application/x-pem-file")

    @app.get("/crl/{name}.crl")
    async def crl(name: str) -> Response:
        """The newest CRL (RFC 5280) of the issuing CA or the HSM, DER."""
        made = await asyncio.to_thread(lists.crl, name)
        return Response(made, media_type=CRL_TYPE, headers={"cache-control": f"max-age={lists.bound.asked_s}"})

    @app.get("/ca/{name}.cer")
    async def certificate(name: str) -> Response:
        """The certificate of the issuing CA or the HSM, DER (RFC 5280 4.2.2.1)."""
        return Response(lists.certificate(name), media_type=CERTIFICATE_TYPE)

    @app.post("/ocsp")
    async def ocsp_post(request: Request) -> Response:
        """RFC 6960 A.1, POST."""
        return await _answered(lists, await request.body())

    @app.get("/ocsp/{encoded:path}")
    async def ocsp_get(encoded: str) -> Response:
        """RFC 6960 A.1, GET: the request in base64, URL-encoded."""
        try:
            der = base64.b64decode(unquote_to_bytes(encoded), validate=True)
        except binascii.Error:
            der = b""
        return await _answered(lists, der)


async def _answered(lists: Lists, der: bytes) -> Response:
    made = await asyncio.to_thread(lists.ocsp, der)
    return Response(made, media_type=OCSP_TYPE, headers={"cache-control": "no-store"})


_Part = tuple[tuple[Named, tuple[str, ...]], ...]


def _parts(page: tuple[Named, ...], provider: str) -> Iterator[_Part]:
    """Certificates with the ledger keys that could revoke them, as many together as one proof holds."""
    part: list[tuple[Named, tuple[str, ...]]] = []
    held = 0
    for one in page:
        keys = revocation_keys(one.serial, one.spiffe_id, provider)
        if held + len(keys) > _KEYS_A_PROOF:
            yield tuple(part)
            part, held = [], 0
        part.append((one, keys))
        held += len(keys)
    if part:
        yield tuple(part)


def revocation_keys(serial: str, spiffe_id: str, provider: str) -> tuple[str, ...]:
    """As `leaf_standing.revoking_keys`, by what is stored of a certificate."""
    return leaf_standing.revoking_keys(provider, serial, SpiffeId.parse(spiffe_id))


def _revoked(part: _Part, state: ProvenState) -> Iterator[Revoked]:
    for one, keys in part:
        for key in keys:
            try:
                record = records.parse(RevocationRecord, state.record(key))
            except Refused as error:
                if error.code != "ledger.absent":
                    raise
                continue
            yield Revoked(
                serial=one.serial,
                spiffe_id=one.spiffe_id,
                not_after=one.not_after,
                at=Instant(record.time_ms // 1000),
                reason=_reason(record.kind),
                data=None,
                height=state.height,
            )
            break


def _reason(kind: RevocationKind) -> str:
    certificate = kind is RevocationKind.CERTIFICATE
    return (x509.ReasonFlags.unspecified if certificate else x509.ReasonFlags.cessation_of_operation).name


def _counts(state: ProvenState, provider: str, name: str, certificate: bytes) -> bool:
    """Whether the ledger has exactly this issuing CA as active. Raises Refused("ledger.not_proven")."""
    try:
        return same(standing.active_issuing_ca(state, provider, name).certificate, certificate)
    except Refused as error:
        if error.code == "ledger.not_proven":
            raise
        return False


def _of(der: bytes, issuer: Issuer) -> bool:
    """Whether a certificate (DER) that was made here was made under this issuing CA."""
    return issued_by(x509.load_der_x509_certificate(der), issuer.certificate)


def _entry(one: Revoked) -> RevokedCertificate:
    return RevokedCertificate(serial=int(one.serial, 16), at=one.at, reason=x509.ReasonFlags[one.reason])
