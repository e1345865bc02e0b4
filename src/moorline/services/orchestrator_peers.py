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
from moorline.orchestration.launch import GuestReport
from moorline.orchestration.placement import HostView, Platform
from moorline.policy import ear
from moorline.rats import AttestationResult
from moorline.wire import keys, schema
from moorline.wire.frames import read_frame, write_frame
from moorline.wire.http import ClientIdentity, HttpClient
from moorline.wire.orchestration import LAUNCH_FRAME_CAP, GuestOrder

_LAUNCHER_DEADLINE_S: Final = 20.0
_MAX_AT_ONCE: Final = 16


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
        verifier_key: keys.PublicKey,
        roots_pem: bytes,
        identity: Callable[[], ClientIdentity],
        provider: str,
        trust_domain: str,
        clock: Clock,
    ) -> None:
        self._hosts = {host.id: host for host in hosts}
        self._verifier = verifier
        self._verifier_key = verifier_key
        self._roots_pem = roots_pem
        self._identity = identity
        self._provider = provider
        self._trust_domain = trust_domain
        self._clock = clock

    def names(self) -> tuple[str, ...]:
        """All configured hosts."""
        return tuple(sorted(self._hosts))

    async def views(self, state: ProvenState, load: dict[str, int], now: Instant) -> tuple[HostView, ...]:
        """What is known about each host. A host whose result cannot be had or believed has the reason instead."""
        results = await self._results(now)
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
        found = await self._results(self._clock.now())
        return [_result_json(host, *found[host]) for host in self.names()]

    async def start(self, host: str, order: GuestOrder) -> GuestReport:
        """Start a guest there."""
        async with self._client(self._agent(host)) as client:
            return _report(await client.post_cbor("/v1/guests", schema.encode(order)))

    async def report(self, host: str, instance: str) -> GuestReport:
        """How a guest is there."""
        async with self._client(self._agent(host)) as client:
            return _report(await client.get_bytes(f"/v1/guests/{instance}"))

    async def stop(self, host: str, instance: str) -> None:
        """End a guest there; fine if it is not there."""
        async with self._client(self._agent(host)) as client:
            try:
                await client.send("DELETE", f"/v1/guests/{instance}", headers={"accept": "application/json"})
            except Refused as error:
                if error.code != "host.no_such_guest":
                    raise

    async def _results(self, now: Instant) -> dict[str, tuple[AttestationResult | None, tuple[str, str] | None]]:
        turn = asyncio.Semaphore(_MAX_AT_ONCE)

        async with self._client(self._verifier) as client:

            async def one(host: str) -> tuple[AttestationResult | None, tuple[str, str] | None]:
                async with turn:
                    try:
                        return await self._result(client, host, now), None
                    except MoorlineError as error:
                        return None, (error.code, error.says)

            names = self.names()
            return dict(zip(names, await asyncio.gather(*(one(host) for host in names)), strict=True))

    async def _result(self, client: HttpClient, host: str, now: Instant) -> AttestationResult:
        answer = await client.get_json(f"/v1/results/{host}")
        token = answer.get("ear") if isinstance(answer, dict) else None
        if not isinstance(token, str):
            raise Malformed("peer.answer_malformed", "the verifier's answer holds no EAR", got=type(token).__name__)
        return ear.parse_verified(token, self._verifier_key, now=now, audience=self._trust_domain)

    def _agent(self, host: str) -> Peer:
        found = self._hosts.get(host)
        if found is None:
            raise Refused("placement.no_agent", "this orchestrator knows no such host", got=host)
        return Peer(url=found.url, server_name=found.server_name)

    def _client(self, peer: Peer) -> HttpClient:
        return HttpClient(
            peer.url, server_name=peer.server_name, roots_pem=self._roots_pem, identity=self._identity(), timeout_s=30.0
        )


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


def _report(answer: bytes) -> GuestReport:
    try:
        state = json.loads(answer)
        events = [event for event in state["events"] if isinstance(event, dict)]
        refusal = next((event.get("problem") for event in reversed(events) if event.get("event") == "refused"), None)
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
