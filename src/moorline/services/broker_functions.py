"""Role `function`: code this provider's orchestrator launched gets a key pair from the pool and an identity, once.

1. The proof is of the token of these launch fields, recomputed in the PKCS#11 token; until then nothing costly happens.
2. The evidence is authentic and bound to this session.
3. Ledger and attestation authority say how service, platform and host stand; hsm.release decides about all of it.
4. The launch is consumed in one durable transaction, before any answer.
5. The certificate is signed after the function confirmed; nothing usable exists before.

Role `resume` is the same function coming back to its session; `renew` is a fresh certificate within it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TypeVar

from moorline.channel.session import Claim
from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Conflict, Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.hsm import release
from moorline.hsm.release import EnclaveFacts, HostFacts, Place, ReleaseDecision, ReleaseRequest, ServiceRule
from moorline.hsm.release_policy import RecordFacts, ReleaseAction
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.ledger.records import PlatformRecord, RevocationKind, ServiceRecord
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.policy import sec009
from moorline.rats import Assurance, CapabilityLevel
from moorline.services import broker_device_keys, broker_function_requests
from moorline.services.broker import Broker
from moorline.services.broker_access import authorise_device
from moorline.services.broker_anchor import require_judged
from moorline.services.broker_enclaves import appraise_enclave, revocable_enclave
from moorline.services.broker_function_steps import Step
from moorline.services.broker_hosts import Standing
from moorline.services.broker_rekeying import Rekey, rekeyed
from moorline.services.broker_role import (
    Revocable,
    activation,
    issued,
    no_such_operation,
    require_not_revoked,
    revocable_keys,
    session_name,
)
from moorline.storage.broker_certificates import Issued
from moorline.storage.broker_consumption import Confirmation, Consumption
from moorline.storage.broker_epochs import Epoch, Lease
from moorline.storage.broker_instances import CURSOR
from moorline.storage.broker_launches import Fresh, Launch
from moorline.storage.broker_pool import Taken
from moorline.verification.snp import SnpClaims
from moorline.verification.verified import Verified
from moorline.wire import keys, launch, schema
from moorline.wire.launch import ChannelProfile, LaunchFields
from moorline.wire.session import (
    Activation,
    AuthoriseDeviceCall,
    FunctionFields,
    FunctionSecrets,
    KeyKind,
    RekeyCall,
    RekeyReply,
    resume_message,
)

_GENERATION_END: Final = 1 << 31
_NUMBER_END: Final = 1 << 63
_RENEWING: Final = frozenset({"renew", "rekey", "storage.key"})
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stands:
    """How service, platform and host of a launch stand."""

    service: ServiceRecord
    platform: PlatformRecord
    host: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What a function showed, authentic; and its launcher's epoch and leases."""

    expected: bytes | None
    enclave: Verified[SnpClaims]
    epoch: Epoch | None
    leases: tuple[Lease, ...]


@dataclass(slots=True)
class FunctionSession:
    """One function. `taken` is set once its launch is consumed."""

    broker: Broker
    claim: Claim
    fields: LaunchFields | None = None
    taken: Taken | None = None
    verdicts_seen: int = 0
    asked: ReleaseRequest | None = None
    record: RecordFacts | None = None
    _rests_on: tuple[str, ...] = ()
    """What the ledger must say about it for a renewal; of these launch fields always the same."""
    _stood: tuple[ProvenState, Standing, Instant] | None = None
    """By what this session was last found renewable: from the same facts in the same second follows the same."""
    _storage: bytes = b""
    """The storage key made for a launch, from its decision to its answer."""
    _kind: KeyKind = KeyKind.P256
    _logging: broker_function_requests.LogRoom = field(default_factory=broker_function_requests.LogRoom)

    async def appraise(self) -> bytes:
        """Numbers are those of the module's docstring."""
        broker = self.broker
        require_judged(broker)
        fields = _named(self.claim)
        shown = await broker.steps.work(partial(self._appraised, fields))  # 1, 2
        prepare = partial(self._decided, fields, shown, await self._stands(fields))  # 3
        secrets = await broker.steps.consume(Step(prepare, partial(self._released, fields)))  # 3, 4
        broker.refill.set()
        self._opened(fields)
        return secrets

    async def activate(self) -> Activation:
        """5. The certificate of the pool key."""
        return await self.broker.steps.confirm(Step(self._certified, self._activated))

    async def call(self, operation: str, body: bytes) -> bytes:
        """`device.authorise` and `device.key` for its own service, what _RENEWING names, `entropy` and `log`."""
        fields, _ = self._held()
        if operation == "device.authorise":
            asked = schema.decode(AuthoriseDeviceCall, body)
            return schema.encode(await authorise_device(self.broker, fields, asked))
        if operation == "device.key":
            return await broker_device_keys.for_function(self.broker, fields, body)
        if operation in _RENEWING:
            return await self._renewing(operation, fields, body)
        if operation == "entropy":
            return await asyncio.to_thread(broker_function_requests.entropy, self.broker, body)
        if operation == "log":
            asked_at = self.broker.clock.now()
            self._logging.require_room(asked_at)
            name = str(self._spiffe_id(fields))
            await asyncio.to_thread(broker_function_requests.log, self.broker, name, body, asked_at)
            return b""
        raise no_such_operation(operation)

    async def _renewing(self, operation: str, fields: LaunchFields, body: bytes) -> bytes:
        """A certificate, another key with one, or the storage key: for whom a renewal is allowed, and for nobody else."""
        if operation == "storage.key":
            return await self._renew(partial(asyncio.to_thread, broker_function_requests.storage_key, self.broker, fields))
        if operation == "rekey":
            self._kind = schema.decode(RekeyCall, body).kind
            return schema.encode(await self._renew(self._rekeyed))
        return schema.encode(await self._renew(self._renewal))

    def _appraised(self, fields: LaunchFields) -> _Shown:
        """1 and 2: the launch token it expects, and the enclave, once both hold."""
        broker = self.broker
        expected = broker.launch_keys.recompute(fields)
        release.require_token(expected, self.claim.proof, self.claim.challenge_digest)
        enclave = appraise_enclave(broker, self.claim)
        # Before the look at the host: a loss the broker acts on from here on stops the consumption, which judges epoch and
        # leases again, as they stand then.
        self.verdicts_seen, epoch, leases = broker.store.launch_facts(CURSOR, fields.launcher, fields.epoch)
        return _Shown(expected=expected, enclave=enclave, epoch=epoch, leases=leases)

    def _decided(self, fields: LaunchFields, shown: _Shown, stands: _Stands) -> Consumption:
        """3, and what is to be consumed (4), with a new storage key for the generation."""
        request = self._request(fields, shown, stands)
        self._decide(ReleaseAction.RELEASE, request, release.decide(request))
        self._storage, wrapped = self.broker.launch_keys.new_storage_key(fields)
        return self._consumption(fields, wrapped)

    async def _stands(self, fields: LaunchFields) -> _Stands:
        """What ledger and attestation authority say now."""
        broker = self.broker
        provider = broker.settings.provider
        revocable = self._revocable(fields)
        state = await broker.ledger.state(
            (
                *standing.hsm_keys(provider, broker.settings.hsm),
                *standing.service_keys(provider, fields.service),
                *standing.platform_keys(provider, fields.host),
                *revocable_keys(revocable),
            )
        )
        standing.active_hsm(state, provider, broker.settings.hsm)
        service = standing.active_service(state, provider, fields.service)
        platform = standing.active_platform(state, provider, fields.host)
        require_not_revoked(state, revocable)
        said = await broker.require_hosts().standing(fields.host)
        return _Stands(service=service, platform=platform, host=said)

    def _request(self, fields: LaunchFields, shown: _Shown, stands: _Stands) -> ReleaseRequest:
        broker, claims = self.broker, shown.enclave.value
        self.record = _record(stands.service)
        return ReleaseRequest(
            place=Place(
                ledger_id=broker.trust.ledger_id,
                provider=broker.settings.provider,
                hsm=broker.settings.hsm,
                simulated_allowed=broker.trust.simulated_allowed,
            ),
            fields=fields,
            profile=self.claim.profile,
            expected_token=shown.expected,
            proof=self.claim.proof,
            challenge_digest=self.claim.challenge_digest,
            enclave=EnclaveFacts(
                measurement=claims.measurement,
                chip=claims.chip_id,
                commitment=claims.host_data,
                root=shown.enclave.root,
            ),
            epoch=shown.epoch,
            leases=shown.leases,
            service=_rule(stands.service),
            host=_host_facts(stands.host, stands.service, stands.platform),
            now=broker.clock.now(),
        )

    def _decide(self, action: ReleaseAction, request: ReleaseRequest, floor: ReleaseDecision) -> None:
        assert self.record is not None
        self.broker.decisions.decide(action, request, floor, self.record, session=session_name(self.claim))
        # A renewal looks at the host anew: the result itself is not kept for as long as the session is open, its digest is.
        self.asked = replace(request, host=replace(request.host, result=None))

    def _revocable(self, fields: LaunchFields) -> tuple[Revocable, ...]:
        provider = self.broker.settings.provider
        return (
            (RevocationKind.INSTANCE, provider, launch.identity_name(fields.instance, fields.generation)),
            (RevocationKind.HOST, provider, fields.host),
            (RevocationKind.LAUNCHER, provider, fields.launcher.hex()),
            *revocable_enclave(fields.measurement, fields.chip),
        )

    def _released(self, fields: LaunchFields, asked: Consumption, said: Callable[[], Taken]) -> bytes:
        """4: the secrets of what was consumed."""
        broker, profile = self.broker, fields.profile.value
        try:
            taken = broker.launch_keys.guarded(said, asked.at)
        except Unavailable as empty:
            if empty.code != "launch.pool_empty":
                raise
            broker.pool.refill(fields.service, profile)
            taken = broker.launch_keys.guarded(lambda: broker.store.consumed(asked), asked.at)
        broker.pool.took(fields.service, profile)
        private_key = broker.pool.open(taken, fields.service, profile)
        # Of a retry, the key that the first answer brought; what was made for this one is dropped.
        storage = broker.launch_keys.storage_key(fields, taken.storage) if taken.again else self._storage
        self._storage, self.fields, self.taken = b"", fields, taken
        return schema.encode(FunctionSecrets(private_key=private_key, storage_key=storage, generation=fields.generation))

    def _consumption(self, fields: LaunchFields, storage: bytes) -> Consumption:
        """The launch, to be used up with this wrapped storage key for its generation."""
        fresh = Fresh(
            storage=storage,
            commitment=launch.commitment(fields),
            verdicts_seen=self.verdicts_seen,
            not_after=Instant(fields.not_after),
            advance=self.broker.launch_keys.advance_in,
            host_result=self._host_result(),
            nonce=self.claim.nonce,
        )
        return Consumption(self._launch(fields), self.broker.clock.now(), fresh)

    def _host_result(self) -> bytes:
        """The digest of the result about its host that this function was released under."""
        return b"" if self.asked is None else self.asked.host.result_digest or b""

    def _opened(self, fields: LaunchFields) -> None:
        """From now on this session ends when its instance does; earlier generations ended with the consumption."""
        open_now = self.broker.open
        open_now.opened(fields.instance, fields.generation, self.claim.nonce)
        if fields.generation == 1:
            return  # none is earlier: nobody is told, and nothing is to be revoked
        behind = Refused(
            "renewal.generation_behind", "a later generation of this instance was launched", got=fields.generation
        )
        open_now.end_before(fields.instance, fields.generation, behind)
        self.broker.revoking.set()

    def _certified(self) -> Confirmation:
        fields, taken = self._held()
        now, spiffe_id = self.broker.clock.now(), self._spiffe_id(fields)
        leaf = self.broker.ca.issue(taken.public, spiffe_id, now)
        return Confirmation(self._launch(fields), issued(leaf, spiffe_id, taken.public), now)

    def _activated(self, asked: Confirmation, said: Callable[[], Issued]) -> Activation:
        return activation(self.broker, said().der, asked.issued.spiffe_id)

    async def _renew(self, make: Callable[[], Awaitable[T]]) -> T:
        fields, _ = self._held()
        try:
            try:
                await self._require_renewable(fields)
            except MoorlineError:
                # A generation that ended says more exactly why than what ended it does.
                await asyncio.to_thread(self.broker.instances.require_live, fields.instance, fields.generation)
                raise
            # That the generation lives is judged in the transaction that records the certificate.
            return await make()
        except Refused as refusal:
            await asyncio.to_thread(
                self.broker.instances.refused,
                fields.instance,
                fields.generation,
                refusal.code,
                at=self.broker.clock.now(),
            )
            raise

    async def _require_renewable(self, fields: LaunchFields) -> None:
        provider = self.broker.settings.provider
        revocable = self._revocable(fields)
        if not self._rests_on:
            self._rests_on = (
                *standing.service_keys(provider, fields.service),
                *standing.platform_keys(provider, fields.host),
                *revocable_keys(revocable),
            )
        state = await self.broker.ledger.state(self._rests_on)
        said, now = await self.broker.require_hosts().standing(fields.host), self.broker.clock.now()
        stood = self._stood
        if stood is not None and stood[0] is state and stood[1] is said and stood[2] == now:
            return
        try:
            service = standing.active_service(state, provider, fields.service)
            platform = standing.active_platform(state, provider, fields.host)
            require_not_revoked(state, revocable)
        except Refused as refusal:
            raise _as_renewal(refusal) from None
        _require_standing_host(said, fields.host)
        if self.asked is None:
            return  # on the way to a resumption, which is decided as a whole
        request = replace(self.asked, service=_rule(service), host=_host_facts(said, service, platform), now=now)
        self.record = _record(service)
        try:
            self._decide(ReleaseAction.RENEW, request, release.decide_resumption(request))
        except Refused as refusal:
            raise _as_renewal(refusal) from None
        self._stood = state, said, now

    async def _renewal(self) -> Activation:
        return await asyncio.to_thread(self._renewed, *self._held(), "function-renewed")

    def _renewed(self, fields: LaunchFields, taken: Taken, kind: str) -> Activation:
        public, now = taken.public, self.broker.clock.now()
        spiffe_id = self._spiffe_id(fields)
        leaf = self.broker.ca.issue(public, spiffe_id, now)
        self.broker.instances.renew(fields.instance, fields.generation, issued(leaf, spiffe_id, public), kind=kind, at=now)
        return activation(self.broker, leaf.der, str(spiffe_id))

    async def _rekeyed(self) -> RekeyReply:
        fields, _ = self._held()
        wanted = Rekey(
            instance=fields.instance,
            generation=fields.generation,
            service=fields.service,
            spiffe_id=self._spiffe_id(fields),
            kind=self._kind,
        )
        return await self.broker.rekeying.ask(wanted, partial(rekeyed, self.broker))

    def _spiffe_id(self, fields: LaunchFields) -> SpiffeId:
        segments = (fields.service, launch.identity_name(fields.instance, fields.generation))
        return SpiffeId(trust_domain=self.broker.settings.trust_domain, role=Role.SERVICE, segments=segments)

    def _launch(self, fields: LaunchFields) -> Launch:
        return Launch(
            launcher=fields.launcher,
            epoch=fields.epoch,
            sequence=fields.sequence,
            kem_digest=hashlib.sha256(self.claim.kem_public).digest(),
            signing_digest=hashlib.sha256(self.claim.signing_public).digest(),
            session=session_name(self.claim),
            service=fields.service,
            profile=fields.profile.value,
            tenant=fields.tenant,
            instance=fields.instance,
            generation=fields.generation,
            host=fields.host,
        )

    def _held(self) -> tuple[LaunchFields, Taken]:
        if self.fields is None or self.taken is None:
            raise Conflict("launch.not_consumed", "this session holds no launch")
        return self.fields, self.taken


@dataclass(slots=True)
class ResumedSession(FunctionSession):
    """A function that has its identity and lost its session: the broker was restarted, or a relay broke (PROTOCOLS.md 4).

    1. the launch was confirmed here and these are its fields; 2. the identity key signed this attempt; 3. the evidence is
    fresh, authentic and bound to this session; 4. the generation lives; 5. ledger, service, platform and host still say yes.
    It gets no secret, for it holds them all; a function that does not must be launched again.
    """

    async def appraise(self) -> bytes:
        """Numbers are those of the class's docstring."""
        broker = self.broker
        require_judged(broker)
        fields = _named(self.claim)
        confirmed = await asyncio.to_thread(broker.instances.confirmed, fields.launcher, fields.epoch, fields.sequence)
        if not same(confirmed.commitment, launch.commitment(fields)):  # 1
            raise Refused("renewal.not_known", "this broker confirmed another launch under this number")
        _require_identity_key(self.claim, confirmed.public)  # 2
        _require_fresh_kem(self.claim, confirmed.launch.kem_digest)
        shown = await broker.steps.work(partial(self._appraised_again, fields))  # 3
        await asyncio.to_thread(broker.instances.require_live, fields.instance, fields.generation)  # 4
        await self._require_renewable(fields)  # 5
        try:
            stands = await self._stands(fields)
            request = self._request(fields, shown, stands)
            self._decide(ReleaseAction.RESUME, request, release.decide_resumption(request))
        except Refused as refusal:
            raise _as_renewal(refusal) from None
        self.fields, self.taken = fields, Taken(public=confirmed.public, wrapped=b"", again=True)
        await asyncio.to_thread(broker.instances.hold, fields.instance, fields.generation, self.claim.nonce)
        self._opened(fields)
        return b""

    def _appraised_again(self, fields: LaunchFields) -> _Shown:
        enclave = appraise_enclave(self.broker, self.claim)
        epoch, leases = self.broker.launch_keys.epoch_and_leases(fields)
        return _Shown(expected=None, enclave=enclave, epoch=epoch, leases=leases)

    async def activate(self) -> Activation:
        """A fresh certificate for the same key."""
        return await asyncio.to_thread(self._renewed, *self._held(), "function-resumed")


def _named(claim: Claim) -> LaunchFields:
    """The launch fields of a claim, with names that are names. Raises Malformed."""
    fields = launch.parse_fields(schema.decode(FunctionFields, claim.fields).launch_fields)
    for name, what in ((fields.service, "service"), (fields.tenant, "tenant"), (fields.host, "host")):
        parse_name(name, what)
    if not (0 < fields.generation < _GENERATION_END and 0 <= fields.epoch < _NUMBER_END > fields.sequence >= 0):
        raise Malformed("launch.number_range", "a number of the launch is out of range", got=fields.generation)
    launch.require_instance_name(parse_name(fields.instance, "instance"))
    parse_name(launch.identity_name(fields.instance, fields.generation), "instance with its generation")
    return fields


def _require_identity_key(claim: Claim, public: bytes) -> None:
    try:
        if claim.signing_public != public:
            raise NotAuthentic("renewal.proof_invalid", "the session is opened with another key than the identity's")
        keys.verify(keys.parse_public(public), claim.proof or b"", resume_message(claim.challenge_digest))
    except NotAuthentic as error:
        raise NotAuthentic(
            "renewal.proof_invalid",
            "whoever resumes does not prove to hold the identity's key",
            got=error.code,
            remedy="launch the function again",
        ) from None


def _require_fresh_kem(claim: Claim, launched: bytes) -> None:
    """Without TLS of ours the KEM key is all that keeps a recorded session shut: it serves one session (PROTOCOLS.md 4)."""
    if claim.profile is ChannelProfile.HPKE_ONLY and same(hashlib.sha256(claim.kem_public).digest(), launched):
        raise Refused("session.kem_reused", "the KEM key of the launch came again", remedy="make a new one for each session")


def _as_renewal(refusal: Refused) -> Refused:
    """What ledger or host say against a renewal, in the words a function acts on; anything else as it is."""
    if refusal.code == "ledger.revoked":
        return Refused("renewal.instance_revoked", "this instance, or what it rests on, was revoked", got=refusal.says)
    if refusal.code in ("ledger.service_not_active", "ledger.provider_not_active"):
        return Refused("renewal.service_not_active", "the service is not active any more", got=refusal.code)
    if refusal.code in ("ledger.platform_not_active", "launch.host_not_standing", "launch.host_below_profile"):
        return Refused("renewal.host_not_standing", "the host does not stand any more", got=refusal.got or refusal.code)
    return refusal


def _record(service: ServiceRecord) -> RecordFacts:
    return RecordFacts(use_case=service.use_case, profiles=service.profiles, callers=service.callers)


def _rule(service: ServiceRecord) -> ServiceRule:
    return ServiceRule(
        packages=frozenset((rule.package_digest, rule.measurement) for rule in service.packages),
        profiles=frozenset(service.profiles),
    )


def _host_facts(said: Standing, service: ServiceRecord, platform: PlatformRecord) -> HostFacts:
    shown = () if said.result is None else said.result.capabilities
    # What the attestation authority does not say about a host, its provider declares on the ledger. The enclave technology
    # is stronger than declared here, for the function itself just proved it; the profile of hosts asks for no more.
    declared = (
        CapabilityLevel(capability="location.jurisdiction", level=Assurance.DECLARED, value=platform.location),
        *((CapabilityLevel(capability="hmee.sev_snp", level=Assurance.DECLARED),) if platform.chip_id else ()),
    )
    gaps = sec009.gap(sec009.profile(service.use_case), (*shown, *declared))
    return HostFacts(
        result=said.result,
        problem=said.problem,
        gaps=tuple(gap.says for gap in gaps),
        platform_chip=platform.chip_id,
        result_digest=said.digest,
    )


def _require_standing_host(said: Standing, host: str) -> None:
    refusal = said.refusal(host)
    if refusal is not None:
        raise Refused("renewal.host_not_standing", "the host does not stand now; the identity is not renewed", got=refusal)
