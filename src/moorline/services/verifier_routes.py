"""The HTTPS interface of an attestation authority: what hosts say to it, and what its readers may ask.

Hosts prove themselves by their TPM and need no client certificate. Everything else is for those of `READERS`, by mutual TLS.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Collection
from typing import Annotated, Any, Final

from fastapi import Body, FastAPI, Request, Response

from moorline.clock import Clock, Instant
from moorline.errors import Malformed
from moorline.evidence.snp import parse_report
from moorline.nfv import SpiffeId, parse_name
from moorline.services import (
    http,
    http_connection,
    metrics,
    verifier_asking,
    verifier_events,
    verifier_results,
)
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.http_short import Answering, ShortWay
from moorline.services.verifier_anchors import Anchors
from moorline.services.verifier_results import READERS
from moorline.verification.snp import endorsements_from_table, verify_snp
from moorline.wire import host as wire
from moorline.wire import schema
from moorline.wire.http import CBOR_TYPE

_HOSTS: Final = "/v1/hosts/"


def application(
    authority: AttestationAuthority,
    anchors: Anchors,
    *,
    trust_domain: str,
    clock: Clock,
    guard: http.Guard,
    may_ask: Collection[SpiffeId] = (),
) -> FastAPI:
    """The verifier's interface. `may_ask` are those of other trust domains who may read results about hosts.

    `guard` judges the certificates of callers; hosts need none, and the short way serves hosts only.
    """
    streams = {
        verifier_events.STREAM_PATH: verifier_events.STREAM_S + http_connection.REQUEST_DEADLINE_S,
        verifier_results.WAIT_PATH: verifier_asking.HELD_S + http_connection.REQUEST_DEADLINE_S,
    }
    short = ShortWay(functools.partial(_short_way, authority), CBOR_TYPE)
    app = http.application("attestation authority", body_cap=wire.MAX_EVIDENCE, streams=streams, short=short, guard=guard)
    metrics.of_verifier(app, authority.overview)
    _add_hosts_routes(app, authority)
    _add_readers_routes(app, authority, anchors, trust_domain=trust_domain, clock=clock)
    verifier_results.add_routes(app, authority, trust_domain=trust_domain, clock=clock, may_ask=may_ask)
    verifier_events.add_routes(app, authority, trust_domain=trust_domain, guard=guard)
    return app


def _add_hosts_routes(app: FastAPI, authority: AttestationAuthority) -> None:
    """What hosts ask, who have no certificate."""

    @app.post("/v1/hosts/{host}/enrol")
    async def begin(request: Request, host: str) -> Response:
        asked = schema.decode(wire.EnrolRequest, await request.body())
        return _cbor(await authority.begin_enrolment(parse_name(host, "host"), asked))

    @app.post("/v1/hosts/{host}/enrol/finish")
    async def finish(request: Request, host: str) -> Response:
        proof = schema.decode(wire.EnrolProof, await request.body())
        return _cbor(await authority.finish_enrolment(parse_name(host, "host"), proof))

    @app.post("/v1/hosts/{host}/challenge")
    async def challenge(request: Request, host: str) -> Response:
        return _cbor(await _challenge(authority, host, await request.body()))

    @app.post("/v1/hosts/{host}/evidence")
    async def evidence(request: Request, host: str) -> Response:
        return _cbor(await authority.appraise(parse_name(host, "host"), wire.decode_evidence(await request.body())))


def _add_readers_routes(
    app: FastAPI, authority: AttestationAuthority, anchors: Anchors, *, trust_domain: str, clock: Clock
) -> None:
    @app.get("/v1/hosts")
    async def hosts(request: Request) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        return {"hosts": authority.overview()}

    @app.get("/v1/hosts/{host}/enrolment")
    async def enrolment(request: Request, host: str) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        known = authority.enrolled(host)
        return {
            "host": known.host,
            "ak_public": base64.b64encode(known.ak_public).decode("ascii"),
            "ek_digest": known.ek_digest.hex(),
            "root": known.root.value,
        }

    @app.post("/v1/appraise")
    async def appraise(request: Request, body: Annotated[dict[str, Any], Body()]) -> dict[str, object]:
        http.require(request, *READERS, trust_domain=trust_domain)
        return appraise_evidence(body, anchors, now=clock.now())


def _short_way(authority: AttestationAuthority, target: str) -> Answering | None:
    """The two routes of hosts that stand, which are nearly all that a verifier is asked."""
    name, _, verb = target.removeprefix(_HOSTS).partition("/")
    if not target.startswith(_HOSTS):
        return None

    async def evidence(body: bytes) -> bytes:
        return schema.encode(await authority.appraise(parse_name(name, "host"), wire.decode_evidence(body)))

    async def challenge(body: bytes) -> bytes:
        return schema.encode(await _challenge(authority, name, body))

    return {"evidence": evidence, "challenge": challenge}.get(verb)


async def _challenge(authority: AttestationAuthority, host: str, body: bytes) -> wire.HostChallenge:
    asked = schema.decode(wire.ChallengeRequest, body)
    if asked.host != host:
        raise Malformed("host.name_mismatch", "path and message name different hosts", expected=host, got=asked.host)
    return await authority.ask(host)


def appraise_evidence(body: dict[str, Any], anchors: Anchors, *, now: Instant) -> dict[str, object]:
    """Evidence appraised for somebody who holds it: authentic, and bound to `report_data`. Facts come back, not a lease.

    Raises Malformed("appraise.*"), and what `verify_snp` raises: a simulated root under vendor anchors is
    `snp.anchor_unknown`.
    """
    if set(body) != {"format", "evidence", "endorsements", "report_data"} or body["format"] != "snp":
        raise Malformed(
            "appraise.request", "not a request to appraise", expected="format snp, evidence, endorsements, report_data"
        )
    try:
        evidence, endorsements = (base64.b64decode(body[name], validate=True) for name in ("evidence", "endorsements"))
        report_data = bytes.fromhex(body["report_data"])
    except (TypeError, ValueError, binascii.Error):
        raise Malformed(
            "appraise.request", "a field is not encoded as it must be", expected="base64, base64, hexadecimal"
        ) from None
    verified = verify_snp(
        parse_report(evidence),
        endorsements_from_table(endorsements),
        report_data=report_data,
        anchors=anchors.snp,
        now=now,
    )
    claims = verified.value
    return {
        "format": "snp",
        "root": verified.root.value,
        "simulated_allowed": anchors.simulated_allowed,
        "product": claims.product.value,
        "measurement": claims.report.measurement.hex(),
        "host_data": claims.report.host_data.hex(),
        "chip_id": None if claims.chip_id is None else claims.chip_id.hex(),
        "debug": claims.report.policy.debug,
        "collateral": verified.collateral_digest.hex(),
    }


def _cbor(message: object) -> Response:
    return Response(schema.encode(message), media_type=CBOR_TYPE)
