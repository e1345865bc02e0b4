"""Whom an orchestrator talks to: verifier, host agents, launcher enclave; adapters for the ports of orchestration.launch."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from moorline.clock import Clock, Instant, rendered
from moorline.errors import Malformed, MoorlineError, Refused, Unavailable, from_problem
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.nfv import Role, SpiffeId
from moorline.orchestration.clean_up import Retired, Retirement
from moorline.orchestration.compliance import EventPage, Loss, parse_events
from moorline.orchestration.launch import GuestReport
from moorline.orchestration.placement import HostView, Platform
from moorline.policy import ear
from moorline.rats import AttestationResult, Tier
from moorline.wire import keys, schema
from moorline.wire.certificates import dns_name
from moorline.wire.frames import read_frame, write_frame
from moorline.wire.http import ClientIdentity, HttpClient
from moorline.wire.orchestration import LAUNCH_FRAME_CAP, GuestOrder

_LAUNCHER_DEADLINE_S: Final = 20.0
_MAX_AT_ONCE: Final = 16
_FRESH_S: Final = 15
_ANSWER_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server: dialled by `url`, checked by `server_name`."""

    url: str
    """Its HTTPS address."""
    server_name: str
    """The DNS name in its certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedHost:
    """A host and its agent."""

    id: str
    """The host's id on the ledger."""
    url: str
    """Its agent's HTTPS address."""
    server_name: str
    """The DNS name in its certificate."""


class HostAgents:
    """The hosts of this orchestrator: results from the verifier, guests through their agents."""

    def __init__(
        self,
        *,
        hosts: tuple[NamedHost, ...],
        verifier: Peer,
        verifier_keys: Callable[[], tuple[keys.PublicKey, ...]],
        roots_pem: bytes,
        identity: Callable[[], ClientIdentity],
        provider: str,
        trust_domain: str,
        clock: Clock,
    ) -> None:
        self._hosts = {host.id: host for host in hosts}
        self._verifier = verifier
        self._verifier_keys = verifier_keys
        self._roots_pem = roots_pem
        self._identity = identity
        self._provider = provider
        self._trust_domain = trust_domain
        self._clock = clock
        self._kept: dict[Peer, tuple[ClientIdentity, HttpClient]] = {}

    def names(self) -> tuple[str, ...]:
        """All configured hosts."""
        return tuple(sorted(self._hosts))

    async def aclose(self) -> None:
        """Close connections."""
        while self._kept:
            _, (_, client) = self._kept.popitem()
            await client.aclose()

    async def views(self, state: ProvenState, load: dict[str, int], now: Instant) -> tuple[HostView, ...]:
        """What is known about each host. A host whose result cannot be had or believed has the reason instead."""
        results = await self._results(now, self.names())
        views = []
        for host in self.names():
            result, problem = results[host]
            platform = None
            try:
                record = standing.active_platform(state, self._provider, host)
                platform = Platform(chip_id=record.chip_id, location=record.location, simulated=record.simulated)
            except Refused as error:
                problem = (error.code, error.says)
            views.append(
                HostView(
                    host=host,
                    platform=platform,
                    result=result,
                    reachable=True,
                    functions=load.get(host, 0),
                    problem=problem,
                )
            )
        return tuple(views)

    async def standing_results(self) -> list[dict[str, Any]]:
        """The standing result of each host, for people."""
        found = await self._results(self._clock.now(), self.names())
        return [_result_json(host, *found[host]) for host in self.names()]

    async def events(self, after: int, wait_s: int) -> EventPage:
        """The verifier's events after a cursor; the connection waits with it."""
        client = self._client(self._verifier)
        answer = await client.get_json("/v1/events", {"after": str(after), "wait_s": str(wait_s)})
        return parse_events(answer, after=after)

    async def lost(self, hosts: frozenset[str]) -> tuple[Loss, ...]:
        """Those of `hosts` of which the verifier says that they have no verdict. Answers that cannot be had say nothing."""
        found = await self._results(self._clock.now(), tuple(sorted(hosts)))
        judged = ((host, _loss_code(host, *told)) for host, told in found.items())
        return tuple(Loss(host=host, code=code) for host, code in judged if code is not None)

    async def fresh(self, host: str, says: str) -> None:
        """Have a host attest now, and believe what the verifier signs about it."""
        asked = {"reason": "change_of_use", "says": says, "wait_s": _FRESH_S}
        answer = await self._client(self._verifier).post_json(f"/v1/hosts/{host}/ask", asked)
        result = self._believed(answer, self._clock.now())
        if result.subject != f"host/{host}" or result.status is not Tier.AFFIRMING:
            raise Refused("result.not_affirming", "the host's fresh result does not affirm it", got=result.status.word)

    async def start(self, host: str, order: GuestOrder) -> GuestReport:
        """Start a guest there."""
        client = self._client(self._agent(host))
        return _report(_json(await client.post_cbor("/v1/guests", schema.encode(order))))

    async def report(self, host: str, instance: str, wait_s: int) -> GuestReport:
        """How a guest is there, as soon as it is active or will never be, or after `wait_s`."""
        client = self._client(self._agent(host))
        return _report(await client.get_json(f"/v1/guests/{instance}", {"wait_s": str(wait_s)}))

    async def reports(self, host: str) -> dict[str, GuestReport]:
        """How every guest there is, in one answer."""
        answer = await self._client(self._agent(host)).get_json("/v1/guests")
        guests = answer.get("guests") if isinstance(answer, dict) else None
        if not isinstance(guests, list) or not all(isinstance(one, dict) for one in guests):
            raise Malformed("peer.answer_malformed", "the host agent's answer is no list of guests")
        return {str(one.get("instance")): _report(one) for one in guests}

    async def stop(self, host: str, instance: str) -> None:
        """End a guest there; fine if it is not there."""
        client = self._client(self._agent(host))
        try:
            await client.send("DELETE", f"/v1/guests/{instance}", headers={"accept": "application/json"})
        except Refused as error:
            if error.code != "host.no_such_guest":
                raise

    async def _results(
        self, now: Instant, names: tuple[str, ...]
    ) -> dict[str, tuple[AttestationResult | None, tuple[str, str] | None]]:
        turn = asyncio.Semaphore(_MAX_AT_ONCE)

        client = self._client(self._verifier)

        async def one(host: str) -> tuple[AttestationResult | None, tuple[str, str] | None]:
            async with turn:
                try:
                    return await self._result(client, host, now), None
                except MoorlineError as error:
                    return None, (error.code, error.says)

        return dict(zip(names, await asyncio.gather(*(one(host) for host in names)), strict=True))

    async def _result(self, client: HttpClient, host: str, now: Instant) -> AttestationResult:
        return self._believed(await client.get_json(f"/v1/results/{host}"), now)

    def _believed(self, answer: object, now: Instant) -> AttestationResult:
        token = answer.get("ear") if isinstance(answer, dict) else None
        if not isinstance(token, str):
            raise Malformed("peer.answer_malformed", "the verifier's answer holds no EAR", got=type(token).__name__)
        return ear.parse_verified(token, self._verifier_keys(), now=now, audience=self._trust_domain)

    def _agent(self, host: str) -> Peer:
        found = self._hosts.get(host)
        if found is None:
            raise Refused("placement.no_agent", "this orchestrator knows no such host", got=host)
        return Peer(url=found.url, server_name=found.server_name)

    def _client(self, peer: Peer) -> HttpClient:
        """A client that is kept while the orchestrator's own certificate is the same; that is replaced within the hour."""
        identity = self._identity()
        kept = self._kept.get(peer)
        if kept is not None and kept[0] == identity:
            return kept[1]
        made = HttpClient(
            peer.url, server_name=peer.server_name, roots_pem=self._roots_pem, identity=identity, timeout_s=_ANSWER_S
        )
        # The one before may be in use just now; its idle connections are closed by the peer within seconds.
        self._kept[peer] = (identity, made)
        return made


class Brokers:
    """The provider's brokers, by the names their HSMs have in this trust domain."""

    def __init__(self, *, roots_pem: bytes, identity: Callable[[], ClientIdentity], trust_domain: str) -> None:
        self._roots_pem, self._identity, self._trust_domain = roots_pem, identity, trust_domain

    async def retire(self, asked: Retirement) -> Retired:
        """The broker's answer. Raises what it answers, and Malformed("peer.answer_malformed")."""
        hsm = SpiffeId(trust_domain=self._trust_domain, role=Role.HSM, segments=(asked.hsm,))
        async with HttpClient(
            asked.url,
            server_name=dns_name(hsm),
            roots_pem=self._roots_pem,
            identity=await asyncio.to_thread(self._identity),
            timeout_s=30.0,
        ) as client:
            answer = await client.post_json(
                f"/v1/instances/{asked.instance}/retire", {"generation": asked.generation, "reason": asked.reason}
            )
        return _retired(answer, asked)


class LauncherLink:
    """One connection a request to the launcher's published port. Nothing on the way is trusted, nor needs to be."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def exchange(self, request: bytes) -> bytes:
        """The launcher's reply frame. Raises Unavailable(`peer.*`) or Malformed(`frame.*`)."""
        reader, writer = await self._connect()
        try:
            await write_frame(writer, request, deadline_s=_LAUNCHER_DEADLINE_S)
            return await read_frame(reader, cap=LAUNCH_FRAME_CAP, deadline_s=_LAUNCHER_DEADLINE_S)
        except Malformed as error:
            if error.code != "frame.truncated":
                raise
            raise Unavailable("launcher.gone", "the launcher hung up without an answer", remedy="look at its log") from None
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(_LAUNCHER_DEADLINE_S):
                if self._address.startswith("unix:"):
                    return await asyncio.open_unix_connection(self._address.removeprefix("unix:"))
                host, _, port = self._address.rpartition(":")
                return await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError) as error:
            raise Unavailable(
                "peer.unreachable", f"no launcher at {self._address}", got=type(error).__name__, remedy="start a launcher"
            ) from None


def _json(answer: bytes) -> object:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise Malformed("peer.answer_malformed", "the host agent's answer is not JSON") from None


def _report(state: Any) -> GuestReport:  # noqa: ANN401 - JSON of a stranger
    try:
        events = [event for event in state["events"] if isinstance(event, dict)]
        given_up = (event.get("problem") for event in reversed(events) if event.get("event") in ("refused", "halted"))
        refusal = next(given_up, None)
        active = next((event for event in reversed(events) if event.get("event") == "active"), {})
        spiffe_id = active.get("spiffe_id")
        return GuestReport(
            running=state["state"] == "running",
            address=str(state["address"]),
            spiffe_id=spiffe_id if isinstance(spiffe_id, str) else None,
            refusal=None if refusal is None else from_problem(refusal),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(
            "peer.answer_malformed", "the host agent's answer is not a guest's state", got=type(error).__name__
        ) from None


def _retired(answer: object, asked: Retirement) -> Retired:
    try:
        assert isinstance(answer, dict)
        destroyed, not_proven, height = answer["destroyed"], answer["not_proven"], answer["revoked_at_height"]
        assert (answer["instance"], answer["generation"]) == (asked.instance, asked.generation)
        assert isinstance(destroyed, list)
        assert isinstance(not_proven, list)
        assert all(isinstance(item, str) for item in (*destroyed, *not_proven))
        assert height is None or type(height) is int
        return Retired(destroyed=tuple(destroyed), not_proven=tuple(not_proven), revoked_at_height=height)
    except (AssertionError, KeyError, TypeError):
        raise Malformed("peer.answer_malformed", "the broker's answer does not say what it destroyed") from None


def _loss_code(host: str, result: AttestationResult | None, problem: tuple[str, str] | None) -> str | None:
    """The rule by which a host has no verdict; None if it has one, or if nobody could say."""
    if result is None:
        return problem[0] if problem is not None and problem[0].startswith("result.") else None
    refusal = result.first_refusal()
    if result.subject != f"host/{host}":
        return "result.other_subject"
    if result.status is Tier.AFFIRMING:
        return None
    return "result.not_affirming" if refusal is None else refusal.code


def _result_json(host: str, result: AttestationResult | None, problem: tuple[str, str] | None) -> dict[str, Any]:
    if result is None:
        code, says = problem or ("result.none", "no result")
        return {"host": host, "status": "none", "code": code, "says": says}
    refusal = result.first_refusal()
    return {
        "host": host,
        "status": result.status.word,
        "code": None if refusal is None else refusal.code,
        "says": f"until {rendered(result.expires)}" if refusal is None else refusal.says,
        "root": result.root.value,
        "issued": result.issued,
        "expires": result.expires,
        "location": result.bound.get("location"),
        "capabilities": {item.capability: item.level.word for item in result.capabilities},
        "not_met": [
            {"code": finding.code, "says": finding.says} for finding in result.findings if finding.outcome.value == "not_met"
        ],
    }
