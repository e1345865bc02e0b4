"""The launch of a function as a saga: every step is recorded, and a crash anywhere is followed by a resume (ADR 0004).

    requested -> intended   place it, write its configuration, sign the intent: reads only, then one record
    intended  -> granted    the launcher answers the intent; the same intent has the same answer while the launcher lives
    granted   -> started    the host agent accepts the order; the same order twice is one guest
    started   -> active     the function says that it has its identity; from here on it serves
    any       -> failed     a refusal ends it: secrets are erased, the reason is kept
    any on a host -> halting ...   what may already have an identity is ended by the clean-up saga (orchestration.clean_up)

No effect happens before the intent is durable. Each step reads the row, does one thing outside that may be repeated without
harm, and saves the row from the revision it read; so a process killed between effect and save repeats the effect, and two
processes that resume one launch cannot both move it. What is only unavailable is tried again until the intent ends. A later
generation also waits for a host that fits: the others may just be renewing their results.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import x25519

from moorline.clock import Clock, Instant
from moorline.errors import Conflict, MoorlineError, Refused, Unavailable
from moorline.ledger import standing
from moorline.ledger.checkpoint import Checkpoint
from moorline.ledger.fetching import not_overtaken
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.ledger.records import PackageRule, ServiceRecord
from moorline.orchestration import grant as grants
from moorline.orchestration import intent as intents
from moorline.orchestration.clean_up import LAUNCH_FAILED, OPERATOR, Broker, CleanUps
from moorline.orchestration.placement import Demand, HostView, Placement, place
from moorline.storage.orchestrator_store import (
    CLEANING,
    TERMINAL,
    Afterwards,
    FunctionRow,
    Halt,
    LaunchState,
    OrchestratorStore,
    PackageRow,
)
from moorline.wire import keys, launch, schema
from moorline.wire.guest import FunctionConfiguration, FunctionLaunch
from moorline.wire.launch import ChannelProfile
from moorline.wire.orchestration import GuestOrder, LaunchIntent, LaunchRequest

FUNCTION_ENTRY: Final = "moorline.workload_agent"
POLL_S: Final = 0.1
REPORT_WAIT_S: Final = 2
"""How long a host agent may keep a question about a guest; an operator who ends the function waits as long."""
RETRY_S: Final = 0.5
CLEAN_UP_RETRY_S: Final = 2.0
REQUEST_LIFE_S: Final = 60
_OVER: Final = (LaunchState.CLEANED, LaunchState.FAILED, LaunchState.ENDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestReport:
    """What a host agent says about a guest. `spiffe_id` is set once the guest said it is active; all of it is hearsay."""

    running: bool
    address: str
    spiffe_id: str | None
    refusal: MoorlineError | None


class Ledger(Protocol):
    """Where proofs come from; what they are worth is decided by `verify_bundle`."""

    async def prove(self, keys: tuple[str, ...], /, *, height: int = 0) -> bytes:
        """A bundle for these keys; at this height, if anybody has it."""
        ...


class Hosts(Protocol):
    """The hosts this orchestrator may use, through verifier and host agents."""

    def names(self) -> tuple[str, ...]:
        """All configured hosts."""
        ...

    async def views(self, state: ProvenState, load: dict[str, int], now: Instant, /) -> tuple[HostView, ...]:
        """What is known about each, results verified."""
        ...

    async def fresh(self, host: str, says: str, /) -> None:
        """Have a host attest now. Raises Refused if it does not stand, Unavailable if it does not answer in time."""
        ...

    async def start(self, host: str, order: GuestOrder, /) -> GuestReport:
        """Start a guest; the same order twice is one guest."""
        ...

    async def report(self, host: str, instance: str, wait_s: int, /) -> GuestReport:
        """How a guest is, as soon as it is active or will never be, or after `wait_s`."""
        ...

    async def stop(self, host: str, instance: str, /) -> None:
        """End a guest; fine if it is not there."""
        ...


class LauncherPort(Protocol):
    """The way to the launcher enclave."""

    async def exchange(self, request: bytes, /) -> bytes:
        """The reply frame to a request frame."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this orchestrator is and what it signs with. `signer` is the key the ledger lists for it."""

    provider: str
    trust_domain: str
    id: str
    signer: keys.Signer
    trust: LedgerTrust
    max_age_s: int
    launch_life_s: int


class Launches:
    """Drives functions through launch and clean-up. Any number may be under way; each is moved by one task at a time."""

    def __init__(
        self,
        *,
        me: Identity,
        store: OrchestratorStore,
        ledger: Ledger,
        hosts: Hosts,
        launcher: LauncherPort,
        broker: Broker,
        clock: Clock,
        new_reply_key: Callable[[], x25519.X25519PrivateKey] = x25519.X25519PrivateKey.generate,
    ) -> None:
        self._me = me
        self._store = store
        self._ledger = ledger
        self._hosts = hosts
        self._launcher = launcher
        self._clock = clock
        self._new_reply_key = new_reply_key
        self._proving = asyncio.Lock()
        self.clean_ups = CleanUps(store=store, broker=broker, hosts=hosts, clock=clock, locate=self.locate)
        self.waiting: dict[str, MoorlineError] = {}
        self._steps = {
            LaunchState.REQUESTED: self._intend,
            LaunchState.INTENDED: self._obtain_grant,
            LaunchState.GRANTED: self._start,
            LaunchState.STARTED: self._await_active,
            **self.clean_ups.steps,
        }

    async def drive(self, instance: str) -> FunctionRow:
        """Move a function on until it is active, failed or ended. Refusals become its problem; none is raised.

        Cancelling this leaves the function at its last recorded step, as a crash would; `waiting` says what holds it up.
        """
        try:
            while True:
                row = await self._read(instance)
                if row.state in TERMINAL:
                    return row
                await self._step(row)
        finally:
            self.waiting.pop(instance, None)

    async def advance(self, instance: str) -> FunctionRow:
        """Exactly one step; raises what it meets. For resuming by hand, and for tests of each step."""
        row = await self._read(instance)
        if row.state not in TERMINAL:
            await self._steps[row.state](row)
        return await self._read(instance)

    async def end(self, instance: str) -> FunctionRow:
        """Record that a function is to end; `drive` does the rest, and cleans up what is on a host. Idempotent."""
        while True:
            row = await self._read(instance)
            try:
                if row.state in (LaunchState.ACTIVE, LaunchState.GRANTED, LaunchState.STARTED):
                    await self.clean_ups.begin(row, self._ended(), says="to be ended by an operator")
                elif row.state in CLEANING and row.halt is not None and row.halt.afterwards is not Afterwards.END:
                    halt = dataclasses.replace(row.halt, afterwards=Afterwards.END)
                    await self._save(dataclasses.replace(row, halt=halt), "not to be launched again, says an operator")
                elif row.state not in CLEANING and row.state is not LaunchState.ENDED:
                    ended = _without_secrets(dataclasses.replace(row, state=LaunchState.ENDED))
                    await self._save(ended, "ended by an operator")
                else:
                    return row
            except Conflict:
                continue

    async def explain(self, demand: Demand) -> Placement:
        """Where a function with this demand would go now, and why."""
        now = self._clock.now()
        state = await self.proven(self._platform_keys())
        load = await asyncio.to_thread(self._store.load)
        return place(await self._hosts.views(state, load, now), demand, now=now)

    async def proven(self, asked: tuple[str, ...]) -> ProvenState:
        """A proven ledger state with these keys, never older than one seen before."""
        known = await asyncio.to_thread(self._store.checkpoint)
        highest = None if known is None else schema.decode(Checkpoint, known)

        async def fetched(height: int) -> ProvenState:
            bundle = await self._ledger.prove(asked, height=height)
            return verify_bundle(bundle, self._me.trust, now=self._clock.now(), highest=highest)

        state = await not_overtaken(fetched)
        async with self._proving:  # launches prove side by side, and the newest state seen must not go back
            known = await asyncio.to_thread(self._store.checkpoint)
            if known is None or state.height > schema.decode(Checkpoint, known).height:
                await asyncio.to_thread(self._store.remember_checkpoint, schema.encode(state.checkpoint))
        return state

    async def _step(self, row: FunctionRow) -> None:
        """One step, with everything that can happen to it settled: moved on, waited for, or failed."""
        try:
            await self._steps[row.state](row)
            self.waiting.pop(row.instance, None)
        except Conflict as error:
            if error.code == "launch.moved_on":
                await self._undo_if_ended(row)
            else:
                await self._fail(row, error)
        except Unavailable as error:
            self.waiting[row.instance] = error
            await self._wait_or_fail(row, error)
        except MoorlineError as error:
            if row.state in CLEANING:  # a clean-up never gives up: its own steps record what is refused to them
                self.waiting[row.instance] = error
                await asyncio.sleep(CLEAN_UP_RETRY_S)
            else:
                await self._fail(row, error)

    async def _undo_if_ended(self, row: FunctionRow) -> None:
        """The row was moved on while its step did the effect: end the guest that may have started after all."""
        current = await self._read(row.instance)
        replaced = current.generation > row.generation and current.host != row.host
        if row.state is LaunchState.GRANTED and (current.state in _OVER or replaced):
            await self._stop_quietly(row)

    # -- the steps ----------------------------------------------------------------------------------------------------

    async def _intend(self, row: FunctionRow) -> None:
        me, now = self._me, self._clock.now()
        package, _ = await asyncio.to_thread(self._store.package, row.package)
        state = await self.proven(
            tuple(
                dict.fromkeys(
                    (
                        *standing.service_keys(me.provider, row.service),
                        *standing.hsm_keys(me.provider, row.hsm),
                        *self._platform_keys(),
                    )
                )
            )
        )
        service = standing.active_service(state, me.provider, row.service)
        rule = permitted_package(service, package)
        broker = standing.active_hsm(state, me.provider, row.hsm)
        demand = Demand(
            use_case=package.use_case, jurisdiction=package.jurisdiction, simulated_allowed=me.trust.simulated_allowed
        )
        placement = place(await self._views(row, state, now), demand, now=now)
        if placement.chosen is None:
            raise await self._nowhere(row, placement)
        await self._change_of_use(placement.chosen, package.use_case)
        platform = standing.active_platform(state, me.provider, placement.chosen)
        configuration = schema.encode(self._configuration(row))
        reply_key = self._new_reply_key()
        intent = LaunchIntent(
            ledger_id=me.trust.ledger_id,
            provider=me.provider,
            orchestrator=me.id,
            tenant=row.tenant,
            service=row.service,
            package_digest=row.package,
            configuration_digest=hashlib.sha256(configuration).digest(),
            measurement=rule.measurement,
            instance=row.instance,
            generation=row.generation,
            host=placement.chosen,
            chip=platform.chip_id,
            hsm=row.hsm,
            profile=channel_profile(service),
            not_after=now + me.launch_life_s,
            reply_key=reply_key.public_key().public_bytes_raw(),
        )
        intended = dataclasses.replace(
            row,
            state=LaunchState.INTENDED,
            placement=placement.as_json(),
            host=placement.chosen,
            placed=now,
            configuration=configuration,
            intent=intents.sign(intent, me.signer),
            reply_key=reply_key.private_bytes_raw(),
            broker=broker.address,
            broker_url=origin_of(broker.est_url),
        )
        await self._save(intended, placement.says)

    async def _obtain_grant(self, row: FunctionRow) -> None:
        assert row.intent is not None
        assert row.reply_key is not None
        intent, now = intents.parse(row.intent), self._clock.now()
        _not_expired(intent, now)
        reply_key = x25519.X25519PrivateKey.from_private_bytes(row.reply_key)
        signed = row.intent

        async def answered(height: int) -> grants.Granted:
            bundle = await self._ledger.prove(intents.keys_to_prove(intent), height=height)
            reply = await self._launcher.exchange(schema.encode(LaunchRequest(intent=signed, bundle=bundle)))
            roots, domain = self._me.trust.roots, self._me.trust_domain
            return grants.verify_reply(reply, signed, intent, reply_key, roots=roots, trust_domain=domain, now=now)

        # Another launch, asked for beside this one, may show the launcher a newer proof in between.
        granted = await not_overtaken(answered)
        state = await self.proven(grants.keys_to_prove(granted, self._me.provider))
        grants.judge_issuer(granted, state, self._me.provider)
        saved = dataclasses.replace(
            row,
            state=LaunchState.GRANTED,
            launch_fields=launch.encode_fields(granted.fields),
            token=granted.token,
            launcher=granted.launcher,
        )
        await self._save(saved, f"token {granted.fields.epoch}/{granted.fields.sequence} by {granted.launcher}")

    async def _start(self, row: FunctionRow) -> None:
        assert row.host is not None
        report = await self._hosts.start(row.host, await asyncio.to_thread(self._order, row))
        saved = dataclasses.replace(row, state=LaunchState.STARTED, address=report.address)
        await self._save(saved, f"started on {row.host}, reachable at {report.address}")

    async def _await_active(self, row: FunctionRow) -> None:
        assert row.host is not None
        report = await self._hosts.report(row.host, row.instance, REPORT_WAIT_S)
        if report.refusal is not None:
            raise report.refusal
        if report.spiffe_id is None and report.running:
            raise Unavailable("launch.not_active_yet", "the function has not attested yet", retry_after_s=POLL_S)
        if report.spiffe_id is None:
            raise Refused("launch.guest_ended", "the guest ended before it had its identity", remedy="read its guest.log")
        active = dataclasses.replace(row, state=LaunchState.ACTIVE, address=report.address, spiffe_id=report.spiffe_id)
        await self._save(_without_secrets(active), f"serves as {report.spiffe_id}")

    # -- parts --------------------------------------------------------------------------------------------------------

    async def _read(self, instance: str) -> FunctionRow:
        return await asyncio.to_thread(self._store.function, instance)

    async def _save(self, row: FunctionRow, says: str) -> FunctionRow:
        return await asyncio.to_thread(self._store.save, row, at=self._clock.now(), says=says)

    async def _views(self, row: FunctionRow, state: ProvenState, now: Instant) -> tuple[HostView, ...]:
        load, left = await asyncio.to_thread(lambda: (self._store.load(), self._store.left_guests(row.instance)))
        avoided = {one.host for one in left}
        views = await self._hosts.views(state, load, now)
        return tuple(dataclasses.replace(view, guest_left=view.host in avoided) for view in views)

    async def _change_of_use(self, host: str, use_case: str) -> None:
        """Before a host takes in another class of function than those it runs, it attests anew (SEC009 5.1.2)."""
        before = await asyncio.to_thread(self._store.uses, host)
        if before <= {use_case}:
            return
        try:
            await self._hosts.fresh(host, f"{use_case} beside {', '.join(sorted(before - {use_case}))}")
        except Refused as error:  # it does not stand any more: the next look at all hosts finds another place, or none
            raise Unavailable(
                "launch.host_not_fresh", "the chosen host did not attest anew", got=error.code, retry_after_s=RETRY_S
            ) from None

    async def _nowhere(self, row: FunctionRow, placement: Placement) -> MoorlineError:
        """No host fits: the end of a first launch, and for a while something to wait out for a later generation."""
        refusal = _none_fits(placement)
        if _verdicts(placement.as_json()) != _verdicts(row.placement or {}):
            await self._save(dataclasses.replace(row, placement=placement.as_json()), placement.says)
        if row.generation == 1 or self._clock.now() >= row.requested + REQUEST_LIFE_S:
            return refusal
        return Unavailable("launch.waiting_for_host", refusal.says, got=refusal.got, retry_after_s=RETRY_S)

    async def locate(self, hsm: str) -> str:
        """Where the broker of an HSM speaks HTTPS, from the HSM's record on the ledger."""
        state = await self.proven(standing.hsm_keys(self._me.provider, hsm))
        return origin_of(standing.active_hsm(state, self._me.provider, hsm).est_url)

    def _ended(self) -> Halt:
        problem = Refused("launch.ended", "an operator ended this function").as_problem()
        return Halt(
            cause=OPERATOR, code="launch.ended", problem=problem, afterwards=Afterwards.END, noticed=self._clock.now()
        )

    def _order(self, row: FunctionRow) -> GuestOrder:
        assert row.launch_fields is not None
        assert row.token is not None
        assert row.configuration is not None
        package, csar = self._store.package(row.package)
        return GuestOrder(
            instance=row.instance,
            entry=FUNCTION_ENTRY,
            host_data=launch.commitment(launch.parse_fields(row.launch_fields)),
            launch=schema.encode(FunctionLaunch(launch_fields=row.launch_fields, token=row.token)),
            package=csar,
            configuration=row.configuration,
            memory_mib=package.memory_mib,
            pids=package.pids,
            relays={"broker": row.broker or ""},
            publish=True,
        )

    def _configuration(self, row: FunctionRow) -> FunctionConfiguration:
        return FunctionConfiguration(
            trust=self._me.trust.encode(),
            provider=self._me.provider,
            hsm=row.hsm,
            service=row.service,
            contracts=row.contracts,
            max_age_s=self._me.max_age_s,
            settings=row.settings,
        )

    def _platform_keys(self) -> tuple[str, ...]:
        found = (key for host in self._hosts.names() for key in standing.platform_keys(self._me.provider, host))
        return tuple(dict.fromkeys(found))

    async def _wait_or_fail(self, row: FunctionRow, error: Unavailable) -> None:
        if row.state in CLEANING:
            await asyncio.sleep(max(RETRY_S, min(error.retry_after_s, CLEAN_UP_RETRY_S)))
            return
        ends = row.requested + REQUEST_LIFE_S if row.intent is None else intents.parse(row.intent).not_after
        if self._clock.now() >= ends:
            await self._fail(row, error)
        else:
            await asyncio.sleep(min(error.retry_after_s, RETRY_S))

    async def _fail(self, row: FunctionRow, error: MoorlineError) -> None:
        current = await self._read(row.instance)
        if current.state in TERMINAL or current.state in CLEANING or current.generation != row.generation:
            return
        if current.state in (LaunchState.GRANTED, LaunchState.STARTED):
            halt = Halt(
                cause=LAUNCH_FAILED,
                code=error.code,
                problem=dict(error.as_problem()),
                afterwards=Afterwards.FAIL,
                noticed=self._clock.now(),
            )
            await self.clean_ups.begin(current, halt, says=str(error))
            return
        failed = _without_secrets(dataclasses.replace(current, state=LaunchState.FAILED, problem=dict(error.as_problem())))
        with contextlib.suppress(Conflict):  # somebody else moved it on; the next round of `drive` sees where to
            await self._save(failed, str(error))

    async def _stop_quietly(self, row: FunctionRow) -> None:
        # A host that cannot be reached now may keep a guest that will never get an identity: its token ends by itself.
        if row.host is not None:
            with contextlib.suppress(MoorlineError):
                await self._hosts.stop(row.host, row.instance)


def permitted_package(service: ServiceRecord, package: PackageRow) -> PackageRule:
    """The rule of the service's record that allows this package. Raises Refused(`launch.package_not_registered` ...)."""
    for rule in service.packages:
        if rule.package_digest == package.digest:
            if service.use_case != package.use_case:
                raise Refused(
                    "launch.use_case_differs",
                    "package and service record name different SEC009 use cases",
                    expected=service.use_case,
                    got=package.use_case,
                )
            return rule
    raise Refused(
        "launch.package_not_registered",
        "the service's record does not allow this package",
        expected=", ".join(rule.package_digest.hex() for rule in service.packages),
        got=package.digest,
        remedy="register the package for the service (UpdateService)",
    )


def channel_profile(service: ServiceRecord) -> ChannelProfile:
    """How a function of the service opens its session: by TLS of the broker, unless the record has only HPKE-only."""
    only = service.profiles == (ChannelProfile.HPKE_ONLY.value,)
    return ChannelProfile.HPKE_ONLY if only else ChannelProfile.TLS


def origin_of(url: str) -> str:
    """Scheme and authority of an `https` URL: where its server is, whatever path the record names."""
    parts = urlsplit(url)
    return f"https://{parts.netloc}"


def as_json(row: FunctionRow) -> dict[str, Any]:
    """A function for the HTTP interface. Nothing in it is secret."""
    return {
        "id": row.instance,
        "service": row.service,
        "tenant": row.tenant,
        "package": row.package.hex(),
        "state": row.state.value,
        "generation": row.generation,
        "host": row.host,
        "address": row.address,
        "spiffe_id": row.spiffe_id,
        "launcher": row.launcher,
        "placement": row.placement,
        "problem": row.problem,
        "halt": None if row.halt is None else dataclasses.asdict(row.halt),
        "clean_ups": [dataclasses.asdict(one) for one in row.clean_ups],
    }


def _verdicts(placement: dict[str, Any]) -> dict[str, object]:
    return {verdict["host"]: verdict["code"] for verdict in placement.get("verdicts", ())}


def _none_fits(placement: Placement) -> Refused:
    reasons = "; ".join(f"{verdict.host}: {verdict.code}" for verdict in placement.verdicts)
    return Refused("placement.none_fits", placement.says, got=reasons or "no hosts", remedy="see the verdict on each host")


def _not_expired(intent: LaunchIntent, now: Instant) -> None:
    if now >= intent.not_after:
        raise Refused(
            "launch.intent_expired", "the intent ended before it was granted", got=now, remedy="create the function again"
        )


def _without_secrets(row: FunctionRow) -> FunctionRow:
    return dataclasses.replace(row, token=None, reply_key=None)
