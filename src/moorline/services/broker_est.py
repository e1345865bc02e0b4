"""The broker's HTTPS door: enrolment over secure transport (RFC 7030), and signatures for the attestation authority.

Devices authenticate with a one-time code (HTTP Basic) the first time, with their certificate afterwards. A code binds to
the key of the first request: a retry with the same key is answered again, another key is refused and raises an alarm. TLS
1.3 has no tls-unique, so the linking of RFC 7030 3.5 is not offered; proof of possession is the signature of the CSR. Key
generation on this side and full CMC are not offered.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.clock import Instant
from moorline.digest import tagged_hash
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.hsm.issuing import key_digest
from moorline.ledger.records import RevocationKind
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services import broker_audit_routes, broker_retire, http, metrics
from moorline.services.broker import Broker
from moorline.services.broker_revocation import Lists
from moorline.services.broker_revocation import add_routes as add_revocation_routes
from moorline.services.broker_role import issued, require_not_revoked, revocable_keys
from moorline.storage.steps import reached
from moorline.wire import keys, security_event
from moorline.wire.http import PROBLEM_TYPE

ROTATE_S: Final = 1500.0
"""The HTTPS server is restarted with a fresh certificate this often; a certificate lives twice as long."""
_BODY_CAP: Final = 128 * 1024
_CSR_CAP: Final = 16 * 1024
_EST: Final = "/.well-known/est"
_CSR_ATTRIBUTES: Final = bytes.fromhex(
    # SEQUENCE { SEQUENCE { id-ecPublicKey, SET { prime256v1 } }, ecdsa-with-SHA256 } (RFC 7030 4.5.2)
    "3021301506072a8648ce3d0201310a06082a8648ce3d03010706082a8648ce3d040302"
)
_JWS_HEADERS: Final = ({"alg": "ES256", "typ": "JWT"}, security_event.HEADER)
_JWS_CAP: Final = 96 * 1024


async def serve(broker: Broker, lists: Lists, bound: Callable[[str], None]) -> None:
    """Serve HTTPS until cancelled; the address stays, the certificate is replaced in time."""
    listen = broker.settings.listen_https

    def on_bound(address: str) -> None:
        nonlocal listen
        listen = address
        bound(address)

    app = application(broker, lists)
    while True:
        try:
            async with asyncio.timeout(ROTATE_S):
                await http.serve(
                    app,
                    listen=listen,
                    identity=broker.tls.for_https(),
                    client_roots_pem=broker.roots_pem,
                    ready=on_bound,
                )
        except TimeoutError:
            continue
        return


def application(broker: Broker, lists: Lists) -> FastAPI:
    """The routes. Public on purpose: cacerts, csrattrs, ca-bundle; the others authenticate as their docstrings say."""
    app = http.application("broker", body_cap=_BODY_CAP, ready=lambda: metrics.why_broker_not_ready(broker))
    _public_routes(app, broker)
    _enrolment_routes(app, broker)
    _refused_routes(app)
    broker_retire.add_routes(app, broker)
    broker_audit_routes.add_routes(app, broker)
    add_revocation_routes(app, lists)

    @app.post("/v1/sign")
    async def sign(request: Request) -> dict[str, str]:
        """The attestation authority only: a signature of the verifier key over a JWS signing input."""
        caller = http.require(request, Role.VERIFIER, trust_domain=broker.settings.trust_domain)
        if caller.segments != (broker.settings.verifier,):
            raise Refused("http.not_authorised", "this verifier is not the one of this broker", got=str(caller))
        message = _signing_input(await request.body())
        signature = await asyncio.to_thread(broker.verifier_signer.sign, message)
        return {"signature": base64.b64encode(signature).decode("ascii")}

    return app


def code_digest(device: str, code: str) -> bytes:
    """What the database keeps of an enrolment code."""
    return tagged_hash("enrolment-code", device.encode("ascii"), code.encode("utf-8"))


def _public_routes(app: FastAPI, broker: Broker) -> None:
    above = (*broker.ca.chain, *broker.roots)

    @app.get(f"{_EST}/cacerts")
    async def cacerts() -> Response:
        """RFC 7030 4.1: issuing CA, provider, authority, root."""
        return _certificates_only(above)

    @app.get(f"{_EST}/csrattrs")
    async def csrattrs() -> Response:
        """RFC 7030 4.5: P-256, signed with SHA-256."""
        return _base64(_CSR_ATTRIBUTES, "application/csrattrs")

    @app.get("/v1/ca-bundle")
    async def ca_bundle() -> Response:
        """The consortium roots, PEM."""
        return Response(broker.roots_pem, media_type="application/x-pem-file")


def _enrolment_routes(app: FastAPI, broker: Broker) -> None:
    @app.post(f"{_EST}/simpleenroll")
    async def simpleenroll(request: Request) -> Response:
        """RFC 7030 4.2.1, with a one-time code."""
        credentials = _basic(request.headers.get("authorization"))
        if credentials is None:
            return _unauthorised()
        public = _csr_key(request, await request.body())
        return await asyncio.to_thread(_enrol, broker, credentials, public)

    @app.post(f"{_EST}/simplereenroll")
    async def simplereenroll(request: Request) -> Response:
        """RFC 7030 4.2.2, with the device's current certificate; the name in the CSR is not looked at."""
        caller = http.require(request, Role.DEVICE, trust_domain=broker.settings.trust_domain)
        public = _csr_key(request, await request.body())
        device = caller.segments[0]
        revocable = ((RevocationKind.DEVICE, broker.settings.provider, device),)
        require_not_revoked(await broker.ledger.state(revocable_keys(revocable)), revocable)
        if not broker.store.device_known(device):
            raise Refused("est.device_unknown", "this device was not enrolled here", got=device)
        return await asyncio.to_thread(_reenrol, broker, caller, public)


def _refused_routes(app: FastAPI) -> None:
    async def not_offered(request: Request) -> Response:
        refusal = Refused(
            "est.not_offered",
            "this enrolment server does not offer that",
            got=request.url.path.rpartition("/")[2],
            remedy="make the key on the device and use simpleenroll",
        )
        return _problem(refusal, 501)

    for name in ("serverkeygen", "fullcmc"):
        app.add_api_route(f"{_EST}/{name}", not_offered, methods=["POST"])


def _enrol(broker: Broker, credentials: tuple[str, str], public: keys.PublicKey) -> Response:
    device, now = parse_name(credentials[0], "device"), broker.clock.now()
    spiffe_id = SpiffeId(trust_domain=broker.settings.trust_domain, role=Role.DEVICE, segments=(device,))
    leaf = broker.ca.issue(public, spiffe_id, now)
    # The certificate is recorded in the transaction that uses the code, and leaves only after it.
    broker.store.enrol(
        device=device,
        code_digest=code_digest(*credentials),
        key_digest=key_digest(public),
        issued=issued(leaf, spiffe_id, public),
        at=now,
    )
    reached("broker.device.enrolled")
    return _certificates_only((leaf.der,))


def _reenrol(broker: Broker, caller: SpiffeId, public: keys.PublicKey) -> Response:
    now: Instant = broker.clock.now()
    leaf = broker.ca.issue(public, caller, now)
    broker.store.record_certificate(issued(leaf, caller, public), kind="device-reenrolled", at=now)
    return _certificates_only((leaf.der,))


def _basic(header: str | None) -> tuple[str, str] | None:
    """Name and code of HTTP Basic (RFC 7617); None if there are none."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, separator, code = base64.b64decode(encoded, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise Malformed("est.credentials_malformed", "the HTTP Basic credentials cannot be read") from None
    return (name, code) if separator else None


def _csr_key(request: Request, body: bytes) -> keys.PublicKey:
    """The P-256 key of a CSR whose signature holds. Raises only Malformed and NotAuthentic (`est.*`)."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip()
    if media_type != "application/pkcs10":
        raise Malformed("est.media_type", "a CSR comes as application/pkcs10", got=media_type)
    if len(body) > _CSR_CAP:
        raise Malformed("est.csr_too_large", "the CSR is too large", expected=f"<= {_CSR_CAP} bytes", got=len(body))
    return csr_key(_der(body))


def csr_key(der: bytes) -> keys.PublicKey:
    """The key of a PKCS#10 request (DER), whose holder signed it. Names in it are not looked at."""
    try:
        csr = x509.load_der_x509_csr(der)
        public = csr.public_key()
        possessed = csr.is_signature_valid
    except Exception as error:  # the loader raises ValueError, UnsupportedAlgorithm and others on odd bytes
        raise Malformed("est.csr_malformed", "the bytes are not a PKCS#10 request", got=type(error).__name__) from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Malformed("est.key_kind", "only P-256 keys are certified", expected="P-256")
    if not possessed:
        raise NotAuthentic("est.possession", "the request is not signed by its own key")
    return public


def _der(body: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        raise Malformed("est.csr_malformed", "a CSR comes as base64 of DER") from None


def _signing_input(body: bytes) -> bytes:
    """The message of `POST /v1/sign`: that of an EAR or a security event, so that the key serves no other purpose."""
    try:
        asked = json.loads(body)
        message = base64.b64decode(asked["message"], validate=True)
        if set(asked) != {"key", "message"} or asked["key"] != "verifier" or len(message) > _JWS_CAP:
            raise _not_signed()
        header, _, payload = message.partition(b".")
        if json.loads(_base64url(header)) not in _JWS_HEADERS or not isinstance(json.loads(_base64url(payload)), dict):
            raise _not_signed()
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _not_signed() from None
    return message


def _not_signed() -> Refused:
    return Refused(
        "broker.sign_refused",
        "the verifier key signs Attestation Results and security events, and nothing else",
        expected='{"key": "verifier", "message": base64 of a JWS signing input, ES256}',
    )


def _base64url(text: bytes) -> bytes:
    return base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _certificates_only(ders: tuple[bytes, ...]) -> Response:
    loaded = [x509.load_der_x509_certificate(der) for der in ders]
    bag = pkcs7.serialize_certificates(loaded, serialization.Encoding.DER)
    return _base64(bag, "application/pkcs7-mime; smime-type=certs-only")


def _base64(der: bytes, media_type: str) -> Response:
    return Response(base64.encodebytes(der), headers={"content-type": media_type, "content-transfer-encoding": "base64"})


def _unauthorised() -> Response:
    error = NotAuthentic(
        "est.unauthorised", "enrolment needs the device's one-time code", remedy="HTTP Basic, device name and code"
    )
    response = _problem(error, error.http_status)
    response.headers["www-authenticate"] = 'Basic realm="moorline enrolment", charset="UTF-8"'
    return response


def _problem(error: MoorlineError, status: int) -> Response:
    problem = {"type": "about:blank", "status": status, "title": error.says, **error.as_problem()}
    return Response(json.dumps(problem), status_code=status, media_type=PROBLEM_TYPE)
