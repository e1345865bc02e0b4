"""What a verifier says about hosts, and to whom: stored results with their age, and answers to a question asked now.

Results are for those of the verifier's own trust domain who act on them, and for whoever its settings name from another
(SEC009 5.0.3: only authorised parties may ask). Questions that make a host attest are for the first alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final

from fastapi import Body, FastAPI, Request, Response

from moorline.clock import Clock
from moorline.errors import Malformed, Refused
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.services import http
from moorline.services.attestation_authority import AttestationAuthority
from moorline.services.verifier_asking import HELD_S, Asking
from moorline.storage.verifier_asks import Reason
from moorline.storage.verifier_rounds import StoredResult
from moorline.wire import host as wire
from moorline.wire import schema
from moorline.wire.http import CBOR_TYPE

READERS: Final = (Role.ORCHESTRATOR, Role.HSM, Role.VERIFIER, Role.OPERATOR)
WAIT_PATH: Final = "/v1/wait"
_ANSWER_MAX_S: Final = 20
_REASONS: Final = (Reason.SUSPICION, Reason.CHANGE_OF_USE)


def add_routes(
    app: FastAPI,
    authority: AttestationAuthority,
    *,
    trust_domain: str,
    clock: Clock,
    may_ask: Collection[SpiffeId] = (),
) -> None:
    """Results as they are stored."""

    @app.get("/v1/results/{host}")
    async def result(request: Request, host: str, max_age_s: int | None = None) -> dict[str, object]:
        """The result that stands, and its age; refused if it is older than `max_age_s`."""
        if http.peer(request) not in may_ask:
            http.require(request, *READERS, trust_domain=trust_domain)
        shown = _aged(authority.standing(host), clock)
        if max_age_s is not None and shown["age_s"] > max_age_s:
            raise Refused(
                "result.too_old",
                "the standing result is older than was asked for",
                expected=f"<= {max_age_s} s",
                got=shown["age_s"],
                remedy="ask the host (POST /v1/hosts/{host}/ask)",
            )
        return shown


def add_asking(app: FastAPI, authority: AttestationAuthority, asking: Asking, *, trust_domain: str, clock: Clock) -> None:
    """Questions to hosts, and the requests that hosts keep open for them."""
    http.before_it_stops(app, asking.release)

    @app.post(WAIT_PATH)
    async def wait(request: Request) -> Response:
        """A host waits to be asked. Nothing is told here but that somebody asked: what it answers is for the verifier."""
        body = schema.decode(wire.AskWait, await request.body())
        number = await asking.wait(parse_name(body.host, "host"), known=body.known, wait_s=min(body.wait_s, HELD_S))
        return Response(schema.encode(wire.Asked(number=number)), media_type=CBOR_TYPE)

    @app.post("/v1/hosts/{host}/ask")
    async def ask(request: Request, host: str, body: Annotated[dict[str, Any], Body()]) -> dict[str, object]:
        """Make a host attest now; with `wait_s`, its result, which answers a challenge given after this question."""
        caller = http.require(request, *READERS, trust_domain=trust_domain)
        reason, says, wait_s = _question(body)
        number = await asking.ask(host, reason, says, asked_by=str(caller))
        if wait_s == 0:
            return {"host": host, "ask": number}
        await asking.answered(number, wait_s=wait_s)
        return {"ask": number, **_aged(authority.standing(host), clock)}


def _aged(held: StoredResult, clock: Clock) -> dict[str, Any]:
    age_s = max(0, clock.now() - held.issued)
    return {
        "host": held.host,
        "ear": held.ear,
        "status": held.status,
        "code": held.code,
        "issued": held.issued,
        "expires": held.expires,
        "age_s": age_s,
    }


def _question(body: dict[str, Any]) -> tuple[Reason, str, float]:
    says, wait_s = body.get("says", ""), body.get("wait_s", 0)
    known = set(body) <= {"reason", "says", "wait_s"} and body.get("reason") in _REASONS
    if not known or not isinstance(says, str) or type(wait_s) not in (int, float) or not 0 <= wait_s <= _ANSWER_MAX_S:
        raise Malformed(
            "host.question",
            "not a question to a host",
            expected=f"reason ({' or '.join(_REASONS)}), says, wait_s 0..{_ANSWER_MAX_S}",
        )
    return Reason(body["reason"]), says, float(wait_s)
