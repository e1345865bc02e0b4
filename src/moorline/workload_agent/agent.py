"""The life of a function, inside its enclave (ARCHITECTURE.md, walk 2; PROTOCOLS.md 3, 4 and 7).

1. read what the host handed over; refuse a package or configuration that is not the launch's
2. attest to the broker, which is authenticated by chain and ledger proof first
3. take the identity, open sealed storage, load the application
4. serve devices on the inbound socket; say "active"
5. keep time, renew the identity; when the broker is gone, stop

Each device is judged by its chain, its ledger proof and the broker's decision under a contract, again every max_age.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.attesters.reports import ReportSource
from moorline.channel import device
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.ledger import peers, records, standing
from moorline.nfv import Role
from moorline.verification.chains import VerifiedChain
from moorline.wire import guest
from moorline.workload_agent.broker import TIME_INTERVAL_S, BrokerLink, attest
from moorline.workload_agent.function import Context, Function, load_function
from moorline.workload_agent.launch import Launch, read_launch
from moorline.workload_agent.storage import SealedStorage

STORAGE_DIRECTORY: Final = "storage"
MAX_CONTRACTS: Final = 16
_LOG: Final = logging.getLogger("moorline.workload_agent")
_LOST: Final = frozenset({"session.closed", "peer.gone", "frame.truncated", "workload.no_time"})


class StatusFile:
    """What the function says to its host, one JSON line an event. Nothing in it is secret."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, event: str, **facts: object) -> None:
        """Append one event."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **facts}) + "\n")


async def run(directory: Path, reports: Callable[[], ReportSource]) -> None:
    """The function's whole life; ends by cancellation, or by the error that ended it. Numbers are those above."""
    launch = read_launch(directory)  # 1
    status = StatusFile(directory / guest.STATUS_FILE)
    link = await attest(f"unix:{directory / guest.BROKER_SOCKET}", launch, reports())  # 2
    try:
        storage = SealedStorage(directory / STORAGE_DIRECTORY, link.storage_key)  # 3
        context = Context(
            service=launch.fields.service,
            instance=launch.fields.instance,
            settings=dict(launch.configuration.settings),
            storage=storage,
        )
        service = Service(link=link, launch=launch, function=load_function(launch.package, context))
        inbound = f"unix:{directory / guest.INBOUND_SOCKET}"
        async with await service.listen(inbound):  # 4
            status.say("active", spiffe_id=str(link.chain.spiffe_id), address=inbound)
            await keep(link)  # 5
    finally:
        await link.aclose()


async def keep(link: BrokerLink) -> None:
    """Keep time and identity fresh, for ever. Raises when the broker is gone for good."""
    renew_at = time.monotonic() + link.renew_after_s
    while True:
        await asyncio.sleep(min(TIME_INTERVAL_S, max(0.0, renew_at - time.monotonic())))
        try:
            await link.synchronise()
            if time.monotonic() >= renew_at:
                await link.renew()
                renew_at = time.monotonic() + link.renew_after_s
        except Unavailable as error:
            if error.code in _LOST:
                raise
            # The broker is there and cannot answer now; the clock runs out by itself if that lasts.
            _LOG.warning("broker did not answer", extra={"code": error.code})
            link.clock.now()
            await asyncio.sleep(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cached:
    until: float
    bundle: bytes


class Service:
    """The function's port: who may enter, and what the application answers."""

    def __init__(self, *, link: BrokerLink, launch: Launch, function: Function) -> None:
        self._link = link
        self._launch = launch
        self._function = function
        self._max_age_s = min(launch.configuration.max_age_s, launch.trust.max_age_s)
        self._contracts = launch.configuration.contracts[:MAX_CONTRACTS]
        self._grantees: dict[str, str] = {}
        self._status: _Cached | None = None
        self._proving = asyncio.Lock()

    async def listen(self, address: str) -> device.DeviceServer:
        """The running port."""
        return await device.serve(
            address,
            identity=lambda: self._link.identity,
            roots=self._launch.trust.roots,
            clock=self._link.clock,
            bundle=self.own_status,
            judge=self.judge,
            answer=self.answer,
            max_age_s=self._max_age_s,
        )

    async def own_status(self) -> bytes:
        """A proof of this instance's standing and of its contracts, a fraction of max_age old at most."""
        async with self._proving:
            now = asyncio.get_running_loop().time()
            if self._status is None or self._status.until < now:
                bundle, _ = await self._link.prove(await self._status_keys())
                self._status = _Cached(until=now + self._max_age_s / 4, bundle=bundle)
            return self._status.bundle

    async def judge(self, chain: VerifiedChain, bundle: bytes) -> None:
        """Raises unless the peer is a device in good standing that a contract lets in, by the broker's decision.

        Raises Refused("workload.device_not_authorised"), `ledger.*`, and Unavailable when the broker cannot be asked.
        """
        if chain.spiffe_id.role is not Role.DEVICE:
            raise Refused("workload.device_not_authorised", "only devices are served here", got=str(chain.spiffe_id))
        grantee = peers.device_peer(self._link.verify(bundle), chain)
        reasons: list[str] = []
        for contract in self._contracts:
            reason = await self._reason_against(chain, contract, grantee)
            if reason is None:
                return
            reasons.append(f"{contract}: {reason}")
        raise Refused(
            "workload.device_not_authorised",
            "no contract lets this device use this service",
            expected=f"an accepted contract of {grantee} about {self._launch.fields.service}",
            got="; ".join(reasons) or "no contract is configured",
            remedy="the two providers agree on a contract on the ledger",
        )

    async def answer(self, chain: VerifiedChain, request: bytes) -> bytes:
        """The application's answer; whatever goes wrong inside it is logged there and not told."""
        try:
            return await self._function.handle(request, str(chain.spiffe_id))
        except MoorlineError:
            raise
        except Exception:  # the application's own code: its fault is not this connection's
            _LOG.exception("the application failed")
            raise Unavailable("workload.function_failed", "the application failed on this request") from None

    async def _reason_against(self, chain: VerifiedChain, contract: str, grantee: str) -> str | None:
        """None if the contract lets the device in; the broker's word counts only with the proof it rests on."""
        fields = self._launch.fields
        try:
            reply = await self._link.authorise(str(chain.spiffe_id), contract)
            if not reply.allowed:
                return reply.rule
            state = self._link.verify(reply.bundle)
            peers.contract_between(state, contract, provider=fields.provider, service=fields.service, grantee=grantee)
        except Refused as error:
            return error.code
        return None

    async def _status_keys(self) -> tuple[str, ...]:
        fields = self._launch.fields
        await self._learn_grantees()
        wanted = list(peers.instance_keys(self._link.chain))
        for contract, grantee in self._grantees.items():
            wanted += standing.contract_keys(contract, provider=fields.provider, service=fields.service, grantee=grantee)
        return tuple(dict.fromkeys(wanted))

    async def _learn_grantees(self) -> None:
        """A contract's record says whose devices it is about; one that is not there yet is asked for again."""
        unknown = [contract for contract in self._contracts if contract not in self._grantees]
        if not unknown:
            return
        _, state = await self._link.prove(tuple(records.contract_key(contract) for contract in unknown))
        for contract in unknown:
            with suppress(Refused):
                record = records.parse(records.ContractRecord, state.record(records.contract_key(contract)))
                self._grantees[contract] = record.grantee
