"""The broker's HTTPS door: enrolment over secure transport (RFC 7030), and signatures for the attestation authority.

Operations: cacerts, csrattrs, simpleenroll, simplereenroll, serverkeygen; each also below the label of the issuing CA
(`/.well-known/est/<issuing CA>/...`, RFC 7030 3.2.2). fullcmc is answered 501. Who may is decided by broker_est_access, what
follows by broker_enrolment. TLS 1.3 has no tls-unique, so the linking of RFC 7030 3.5 is not offered; proof of possession is
the signature of the CSR.

Where a person has to approve, the answer is 202 with Retry-After (RFC 7030 4.2.3) and the client asks again with the same
request; over quota, or after too many wrong codes, it is 429 with Retry-After.

A second listener, the bootstrap door, asks for certificates under the manufacturers' roots and serves EST only. It is a port
of its own so that a manufacturer's certificate is never looked at where identities of the consortium are.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.errors import MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.hsm.issuers import name_of
from moorline.services import (
    broker_access,
    broker_audit_routes,
    broker_cmp,
    broker_device_keys,
    broker_enrolment,
    broker_retire,
    broker_sign,
    http,
    metrics,
)
from moorline.services.broker import Broker
from moorline.services.broker_cmp import Cmp
from moorline.services.broker_est_access import Attempts, Door
from moorline.services.broker_revocation import Lists
from moorline.services.broker_revocation import add_routes as add_revocation_routes
from moorline.services.callers import Callers
from moorline.services.http_connection import Receive, Scope, Send
from moorline.wire import est
from moorline.wire.http import PROBLEM_TYPE, load_identity

ROTATE_S: Final = 1500.0
"""The HTTPS server is restarted with a fresh certificate this often; a certificate lives twice as long."""
_BODY_CAP: Final = 128 * 1024
_EST: Final = "/.well-known/est"
_SLOW_DOWN: Final = frozenset({"est.quota", "est.too_many_attempts"})
_BASIC: Final = frozenset({"est.unauthorised", "est.credentials", "est.code_invalid"})


async def serve(broker: Broker, lists: Lists, cmp: Cmp, bound: Callable[[str], None]) -> None:
    """Serve HTTPS until cancelled; the address stays, the certificate is replaced in time."""
    app = application(broker, lists, cmp)

    def client_roots() -> bytes:
        # Our own CAs help clients that send their leaf alone; no anchors by that, for none of them signed itself.
        above = (x509.load_der_x509_certificate(der) for der in broker.ca.bundle)
        return broker.roots_pem + b"".join(one.public_bytes(serialization.Encoding.PEM) for one in above)

    await _kept_serving(broker, app, broker.settings.listen_https, client_roots, bound)


async def serve_bootstrap(broker: Broker, bound: Callable[[str], None]) -> None:
    """The bootstrap door, if there is one; ends only by cancellation."""
    listen = broker.settings.listen_bootstrap
    if listen is None or broker.manufacturer_roots is None:
        await asyncio.Event().wait()
        return
    roots = broker.manufacturer_roots
    app = http.application("broker-bootstrap", body_cap=_BODY_CAP, ready=lambda: metrics.why_broker_not_ready(broker))
    add_est_routes(app, broker, Door(broker, Attempts(), bootstrap=True))
    await _kept_serving(broker, app, listen, lambda: roots, bound)


async def _kept_serving(
    broker: Broker, app: FastAPI, listen: str, client_roots: Callable[[], bytes], bound: Callable[[str], None]
) -> None:
    def on_bound(address: str) -> None:
        nonlocal listen
        listen = address
        bound(address)

    def on_context(context: ssl.SSLContext) -> None:
        def renew() -> None:
            """New connections see the certificate of now, and are verified with the CAs of now."""
            identity = broker.tls.for_https()
            load_identity(context, identity.chain_pem, identity.key_pem)
            context.load_verify_locations(cadata=client_roots().decode("ascii"))

        broker.followed.renew[listen] = renew

    while True:
        try:
            async with asyncio.timeout(ROTATE_S):
                await http.serve(
                    app,
                    listen=listen,
                    identity=broker.tls.for_https(),
                    client_roots_pem=client_roots(),
                    ready=on_bound,
                    on_context=on_context,
                )
        except TimeoutError:
            continue
        return


def _callers(broker: Broker) -> Callers:
    own = broker.settings
    return Callers(broker.ledger, provider=own.provider, trust_domain=own.trust_domain, clock=broker.clock)


def application(broker: Broker, lists: Lists, cmp: Cmp) -> FastAPI:
    """The routes. Public on purpose: cacerts, csrattrs, ca-bundle; the others authenticate as their docstrings say."""
    app = http.application(
        "broker", guard=_callers(broker), body_cap=_BODY_CAP, ready=lambda: metrics.why_broker_not_ready(broker)
    )
    add_est_routes(app, broker, Door(broker, Attempts(), bootstrap=False))
    broker_retire.add_routes(app, broker)
    broker_audit_routes.add_routes(app, broker)
    add_revocation_routes(app, lists)
    broker_access.add_routes(app, broker)
    broker_device_keys.add_routes(app, broker)
    broker_cmp.add_routes(app, cmp)

    @app.get("/v1/ca-bundle")
    async def ca_bundle() -> Response:
        """The consortium roots, PEM."""
        return Response(broker.roots_pem, media_type="application/x-pem-file")

    broker_sign.add_routes(app, broker)
    return app


def add_est_routes(app: FastAPI, broker: Broker, door: Door) -> None:
    """EST at its well-known place, and again below the issuing CA's label."""
    _public_routes(app, broker)
    _enrolment_routes(app, broker, door)
    app.add_middleware(_Label, broker=broker)


class _Label:
    """Takes the issuing CA's label out of the path (RFC 7030 3.2.2); another label is a route that is not there.

    Labels are the active issuing CA and those before it that still count: a client configured with one goes on with it.
    """

    def __init__(self, app: http.Application, *, broker: Broker) -> None:
        self._app, self._broker = app, broker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        label, _, rest = scope.get("path", "").removeprefix(f"{_EST}/").partition("/")
        if rest and label in self._labels():
            scope = {**scope, "path": f"{_EST}/{rest}"}
        await self._app(scope, receive, send)

    def _labels(self) -> set[str]:
        standing = self._broker.ca.issuers.standing()
        return {self._broker.settings.issuing_ca, *(name_of(one.certificate) for one in standing)}


def _public_routes(app: FastAPI, broker: Broker) -> None:
    @app.get(f"{_EST}/cacerts")
    async def cacerts() -> Response:
        """RFC 7030 4.1: issuing CA, provider, authority, root."""
        return _certificates((*broker.ca.bundle, *broker.roots))

    @app.get(f"{_EST}/csrattrs")
    async def csrattrs() -> Response:
        """RFC 7030 4.5: P-256, signed with SHA-256."""
        return _base64(est.encoded(est.CSR_ATTRIBUTES), "application/csrattrs")

    @app.post(f"{_EST}/fullcmc")
    async def fullcmc() -> Response:
        """RFC 7030 4.3 is not offered: 501."""
        return _problem(
            Refused("est.not_offered", "this enrolment server speaks no Full CMC", remedy="use simpleenroll"), 501
        )


def _enrolment_routes(app: FastAPI, broker: Broker, door: Door) -> None:
    @app.post(f"{_EST}/simpleenroll")
    async def simpleenroll(request: Request) -> Response:
        """RFC 7030 4.2.1, with a one-time code, an installer's account or (bootstrap door) a manufacturer's certificate."""

        async def answer() -> Response:
            csr = await _csr(request)
            applicant, who = await door.applicant(request, csr.common_name)
            with _told(door, who):
                leaf = await broker_enrolment.enrol(broker, applicant, csr.public)
            return _certificates((leaf.der,))

        return await _spoken(answer)

    @app.post(f"{_EST}/simplereenroll")
    async def simplereenroll(request: Request) -> Response:
        """RFC 7030 4.2.2, with the device's current certificate; the name in the CSR is not looked at."""

        async def answer() -> Response:
            applicant = await door.holder(request)
            csr = await _csr(request)
            leaf = await broker_enrolment.enrol(broker, applicant, csr.public)
            return _certificates((leaf.der,))

        return await _spoken(answer)

    @app.post(f"{_EST}/serverkeygen")
    async def serverkeygen(request: Request) -> Response:
        """RFC 7030 4.4: a key made here, for whoever could (re-)enrol; PKCS#8 within TLS, or in CMS to a key named."""

        async def answer() -> Response:
            csr = await _csr(request, possession=False)
            shown = None if http.peer_der(request) is None else http.peer_certificate(request)
            reader = est.recipient(csr, shown)
            if not door.bootstrap and http.peer_der(request) is not None and "authorization" not in request.headers:
                applicant, who = await door.holder(request), None
            else:
                applicant, who = await door.applicant(request, csr.common_name)
            with _told(door, who):
                made = await broker_enrolment.enrol_with_new_key(broker, applicant, csr.public)
            key = made.private_key
            if reader is not None:
                key = await asyncio.to_thread(broker_enrolment.enveloped, broker, key, reader)
            body = est.key_and_certificate(key, made.leaf.der, enveloped=reader is not None)
            return Response(body, headers={"content-type": est.MULTIPART, "cache-control": "no-store"})

        return await _spoken(answer)


async def _csr(request: Request, *, possession: bool = True) -> est.Csr:
    der = est.decoded(request.headers.get("content-type", ""), await request.body())
    return est.parse_csr(der, possession=possession)


class _told:  # noqa: N801 - a context manager that reads as a word
    """Tells the door how the attempt ended."""

    def __init__(self, door: Door, who: tuple[str, str] | None) -> None:
        self._door, self._who = door, who

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, MoorlineError):
            self._door.tell(self._who, error)


async def _spoken(answer: Callable[[], Awaitable[Response]]) -> Response:
    """The answer, or what EST's status codes say instead of our own: 202 while waiting, 401 with a challenge, 429."""
    try:
        return await answer()
    except Unavailable as error:
        if error.code == "est.waiting":
            return _later(error, 202)
        if error.code in _SLOW_DOWN:
            return _later(error, 429)
        raise
    except NotAuthentic as error:
        if error.code not in _BASIC:
            raise
        response = _problem(error, error.http_status)
        response.headers["www-authenticate"] = 'Basic realm="moorline enrolment", charset="UTF-8"'
        return response


def _later(error: Unavailable, status: int) -> Response:
    response = _problem(error, status)
    response.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    return response


def _certificates(ders: tuple[bytes, ...]) -> Response:
    return _base64(est.encoded(est.certs_only(ders)), est.CERTS_ONLY)


def _base64(body: bytes, media_type: str) -> Response:
    return Response(body, headers={"content-type": media_type, "content-transfer-encoding": "base64"})


def _problem(error: MoorlineError, status: int) -> Response:
    problem = {"type": "about:blank", "status": status, "title": error.says, **error.as_problem()}
    return Response(json.dumps(problem), status_code=status, media_type=PROBLEM_TYPE)
