"""The life of a function, inside its enclave (ARCHITECTURE.md, walk 2; PROTOCOLS.md 3, 4 and 7).

1. read what the host handed over; refuse a package or configuration that is not the launch's
2. attest to the broker, which is authenticated by chain and ledger proof first
3. take the identity, open sealed storage, load the application
4. serve devices on the inbound socket; say "active"
5. keep time, renew the identity; come back to a broker that was away
6. end when the broker says so (revoked, host not standing), or when it was away for too long: close every connection,
   forget the keys

Each device is judged by its chain, its ledger proof and the decisions of both HSMs under a contract, again every max_age.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.attesters.reports import ReportSource
from moorline.channel import device, nopfs, tls
from moorline.channel.tls import PlainStream
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.ledger import access, peers, records, standing
from moorline.ledger.light_client import ProvenState
from moorline.nfv import Role
from moorline.verification.chains import VerifiedChain
from moorline.wire import guest
from moorline.wire.access import PROFILE_TLS, Connection, Side, parse_statement
from moorline.wire.device import Status
from moorline.wire.nopfs import NONCE, PROFILE, FunctionKeyCall, NoPfsHello, NoPfsOffer
from moorline.wire.session import AuthoriseDeviceCall, AuthoriseDeviceReply
from moorline.workload_agent.broker import TIME_INTERVAL_S, BrokerLink, attest, is_verdict
from moorline.workload_agent.function import Context, Function, load_function
from moorline.workload_agent.launch import Launch, read_launch
from moorline.workload_agent.storage import SealedStorage

STORAGE_DIRECTORY: Final = "storage"
MAX_CONTRACTS: Final = 16
_LOG: Final = logging.getLogger("moorline.workload_agent")
_RETRY_MIN_S: Final = 0.25
_RETRY_MAX_S: Final = 5.0


class StatusFile:
    """What the function says to its host, one JSON line an event. Nothing in it is secret."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.active = False

    def say(self, event: str, **facts: object) -> None:
        """Append one event."""
        self.active = self.active or event == "active"
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **facts}) + "\n")


async def run(directory: Path, reports: Callable[[], ReportSource], status: StatusFile | None = None) -> None:
    """The function's whole life; ends by cancellation, or by the error that ended it. Numbers are those above."""
    launch = read_launch(directory)  # 1
    status = status or StatusFile(directory / guest.STATUS_FILE)
    broker = f"unix:{directory / guest.BROKER_SOCKET}"
    source = reports()
    link = await attest(broker, launch, source)  # 2
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
            await keep(link, lambda: link.resume(broker, source), status)  # 5
    finally:  # 6
        await link.aclose()
        link.forget()


async def keep(link: BrokerLink, resume: Callable[[], Awaitable[None]], status: StatusFile) -> None:
    """Keep session, time and identity fresh, for ever. Raises the broker's verdict, or Unavailable("workload.no_time")."""
    while True:
        why = await _attend(link, status)
        if is_verdict(why):
            raise why
        _LOG.warning("session lost", extra={"code": why.code})
        await _resumed(link, resume)
        status.say("reconnected", not_after=int(link.chain.leaf.not_valid_after_utc.timestamp()))


async def _attend(link: BrokerLink, status: StatusFile) -> MoorlineError:
    """Use the session as long as it lasts; why it ended. Raises what refused a renewal."""
    ended = asyncio.ensure_future(link.ended())
    renew_at = time.monotonic() + link.renew_after_s
    try:
        while not ended.done():
            await asyncio.wait({ended}, timeout=min(TIME_INTERVAL_S, max(0.0, renew_at - time.monotonic())))
            if ended.done():
                break
            try:
                await link.synchronise()
                if time.monotonic() >= renew_at:
                    await link.renew()
                    renew_at = time.monotonic() + link.renew_after_s
                    status.say("renewed", not_after=int(link.chain.leaf.not_valid_after_utc.timestamp()))
            except MoorlineError as error:
                await _tolerated(link, error)
        return ended.result()
    finally:
        ended.cancel()


async def _tolerated(link: BrokerLink, error: MoorlineError) -> None:
    """Returns if the session is gone, or the broker just cannot answer now; raises what was a refusal."""
    if link.closed and not is_verdict(error):
        await link.ended()
    elif isinstance(error, Unavailable):
        _LOG.warning("broker did not answer", extra={"code": error.code})
        link.clock.now()  # this runs out by itself if it lasts
        await asyncio.sleep(_RETRY_MIN_S)
    else:
        raise error


async def _resumed(link: BrokerLink, resume: Callable[[], Awaitable[None]]) -> None:
    """Come back to the broker. Raises its verdict, or Unavailable("workload.no_time") when it was away for too long."""
    pause = _RETRY_MIN_S
    while True:
        link.clock.now()
        try:
            await resume()
        except MoorlineError as error:
            if is_verdict(error):
                raise
            _LOG.warning("session not resumed", extra={"code": error.code})
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, _RETRY_MAX_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cached:
    at: float
    bundle: bytes
    state: ProvenState
    chain: VerifiedChain


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

    async def listen(self, address: str) -> tls.TlsServer:
        """The running port."""
        return await device.serve(
            address,
            identity=lambda: self._link.identity,
            roots=self._launch.trust.roots,
            clock=self._link.clock,
            bundle=self.own_status,
            admit=self.admit,
            answer=self.answer,
            plain=self.plain,
            max_age_s=self._max_age_s,
        )

    async def own_status(self) -> bytes:
        """A proof of this instance's standing and contracts, a quarter of max_age old, or half while nobody answers."""
        async with self._proving:
            now = asyncio.get_running_loop().time()
            # A proof is about certificates: one that was made before a renewal says nothing about the new one.
            kept = self._status if self._status is not None and self._status.chain is self._link.chain else None
            if kept is not None and now <= kept.at + self._max_age_s / 4:
                return kept.bundle
            chain = self._link.chain
            try:
                bundle, state = await self._link.prove(await self._status_keys())
            except Unavailable:
                # The broker is away: the last proof serves as long as a peer would take it, and peers judge that again.
                if kept is None or now > kept.at + self._max_age_s / 2:
                    raise
                return kept.bundle
            self._status = _Cached(at=now, bundle=bundle, state=state, chain=chain)
            return bundle

    async def admit(self, chain: VerifiedChain, status: Status, secured: device.Secured) -> device.Word:
        """The HSMs' word about a device in good standing: both must let it in by a contract that is configured here.

        Raises Refused("workload.device_not_authorised" | "access.*" | `ledger.*`), and Unavailable when the broker cannot be
        asked.
        """
        if chain.spiffe_id.role is not Role.DEVICE:
            raise Refused("workload.device_not_authorised", "only devices are served here", got=str(chain.spiffe_id))
        grantee = peers.device_peer(self._link.verify(status.bundle), chain)
        connection = self._connection(chain, status, secured, grantee)
        reply = await self._link.authorise(AuthoriseDeviceCall(connection=connection, home=status.access))
        if not reply.allowed:
            refusal = Refused(
                "workload.device_not_authorised",
                f"the {reply.refused_by} HSM does not let this device use this service",
                expected=f"contract {connection.contract} to allow it",
                got=reply.rule,
                remedy="the two providers agree on a contract on the ledger",
            )
            return device.Word(statement=reply.statement, refusal=refusal)
        self._require_allowed_by_home(status.access, connection, reply)
        self._grantees[connection.contract] = grantee
        if self._status is not None and not _proves_contract(self._status.state, connection):
            self._status = None  # it was made before the contract was in force, and the device would not take it
        return device.Word(statement=reply.statement)

    async def plain(self, stream: PlainStream) -> None:
        """One device of the profile without forward secrecy (channel.nopfs)."""
        await nopfs.serve(stream, offer=self.offer, answer=self._answered, clock=self._link.clock)

    async def offer(self, hello: NoPfsHello) -> nopfs.Offered:
        """Keys for a device, if the broker gives some and the ledger shows the contract to allow the profile.

        Raises Refused("workload.device_not_authorised" | "nopfs.*"), `ledger.*`, and what the broker reports.
        """
        fields = self._launch.fields
        if hello.contract not in self._contracts:
            raise Refused("workload.device_not_authorised", "this contract is not configured here", got=hello.contract)
        nonce = secrets.token_bytes(NONCE)
        call = FunctionKeyCall(
            service=fields.service,
            device=hello.device,
            home_provider=hello.home_provider,
            home_hsm=hello.home_hsm,
            contract=hello.contract,
            device_nonce=hello.nonce,
            function_nonce=nonce,
        )
        keys = await self._link.device_key(call)
        state = self._link.verify(keys.bundle)
        contract = peers.contract_between(
            state, hello.contract, provider=fields.provider, service=fields.service, grantee=hello.home_provider
        )
        if PROFILE not in contract.profiles:
            raise Refused("nopfs.not_allowed", "the contract does not allow this profile", got=hello.contract)
        _LOG.info("keys without forward secrecy", extra={"device": hello.device, "key_id": keys.key_id.hex()})
        offer = NoPfsOffer(
            provider=fields.provider,
            hsm=fields.hsm,
            service=fields.service,
            pair_epoch=keys.pair_epoch,
            nonce=nonce,
            not_after=keys.not_after,
        )
        return nopfs.Offered(offer=offer, keys=keys)

    async def answer(self, chain: VerifiedChain, request: bytes) -> bytes:
        """The application's answer; whatever goes wrong inside it is logged there and not told."""
        return await self._answered(str(chain.spiffe_id), request)

    async def _answered(self, device: str, request: bytes) -> bytes:
        try:
            return await self._function.handle(request, device)
        except MoorlineError:
            raise
        except Exception:  # the application's own code: its fault is not this connection's
            _LOG.exception("the application failed")
            raise Unavailable("workload.function_failed", "the application failed on this request") from None

    def _connection(self, chain: VerifiedChain, status: Status, secured: device.Secured, grantee: str) -> Connection:
        """The connection as this end knows it; only which contract it goes by is the device's to say."""
        if not status.access:
            raise Refused(
                "access.no_home_statement",
                "the device brings no word of its home HSM about this connection",
                remedy="it asks its home HSM, POST /v1/access",
            )
        contract = parse_statement(status.access).connection.contract
        if contract not in self._contracts:
            raise Refused(
                "workload.device_not_authorised",
                "this contract is not configured here",
                expected=", ".join(self._contracts) or "no contract is configured",
                got=contract,
            )
        fields = self._launch.fields
        return Connection(
            device=str(chain.spiffe_id),
            device_provider=grantee,
            function=str(self._link.chain.spiffe_id),
            function_provider=fields.provider,
            service=fields.service,
            contract=contract,
            profile=PROFILE_TLS,
            post_quantum=secured.post_quantum,
            binding=secured.binding,
        )

    def _require_allowed_by_home(self, home: bytes, connection: Connection, reply: AuthoriseDeviceReply) -> None:
        """The broker's yes counts only with the proof it rests on, and with the home HSM's yes."""
        state = self._link.verify(reply.bundle)
        _require_contract(state, connection)
        expected = access.Expected(side=Side.HOME, connection=connection, max_age_s=self._max_age_s)
        access.require_allowed(access.require_about(state, home, expected, now=self._link.clock.now()))

    async def _status_keys(self) -> tuple[str, ...]:
        fields = self._launch.fields
        await self._learn_grantees()
        # Also of the certificates before: a connection that was opened with one is judged by it as long as it lasts.
        wanted = [key for chain in self._link.chains for key in peers.instance_keys(chain)]
        wanted += standing.hsm_keys(fields.provider, fields.hsm)
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


def _require_contract(state: ProvenState, connection: Connection) -> None:
    peers.contract_between(
        state,
        connection.contract,
        provider=connection.function_provider,
        service=connection.service,
        grantee=connection.device_provider,
    )


def _proves_contract(state: ProvenState, connection: Connection) -> bool:
    try:
        _require_contract(state, connection)
    except Refused:
        return False
    return True
