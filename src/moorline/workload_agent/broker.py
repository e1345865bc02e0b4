"""The function's link to its broker: attested session, identity, time, proofs, authorisation.

Everything the function believes about the outside comes over this link or is proven by the ledger. It fails closed: without
the link there is no time, without time no certificate and no proof is judged, and nobody is served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.attesters.reports import ReportSource
from moorline.channel.driver import ClientSession, Collected, VerifyBroker, answered, new_kem, open_session
from moorline.channel.tls import TlsIdentity
from moorline.clock import Instant, SystemClock
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import peers, standing
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.nfv import Role, SpiffeId
from moorline.verification.chains import VerifiedChain, verify_chain
from moorline.wire import cbor, keys, schema
from moorline.wire.launch import ChannelProfile, identity_name, token_proof
from moorline.wire.nopfs import FunctionKeyCall, FunctionKeyReply
from moorline.wire.session import (
    Activation,
    AuthoriseDeviceCall,
    AuthoriseDeviceReply,
    Challenge,
    EntropyCall,
    EntropyReply,
    EvidenceFormat,
    FunctionFields,
    FunctionSecrets,
    LogCall,
    ProveCall,
    SessionRole,
    StorageKeyReply,
    resume_message,
)
from moorline.workload_agent.launch import Launch

TIME_INTERVAL_S: Final = 20
TIME_TRUSTED_S: Final = 3 * TIME_INTERVAL_S
MAX_CLOCK_DISAGREEMENT_S: Final = 300
ATTEST_S: Final = 60.0
_WAIT_FOR_SESSION_S: Final = 5.0
_CHAINS_KEPT: Final = 4

IdentityKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
"""What a function's identity may be made of."""


class BrokerClock:
    """Time as the broker last told it, and none when that is too long ago (PROTOCOLS.md 4, Time).

    Between two answers it goes on by this machine's monotonic clock, which the host could slow down or stop; that is why
    the trust in an answer is short.
    """

    def __init__(self, now: int) -> None:
        self.set(now)

    def set(self, now: int) -> None:
        """Take the broker's answer to a question just asked."""
        self._told = now
        self._at = time.monotonic()

    def now(self) -> Instant:
        """The present; raises Unavailable("workload.no_time") if the broker has not told it lately."""
        passed = time.monotonic() - self._at
        if passed > TIME_TRUSTED_S:
            raise Unavailable("workload.no_time", "the broker has not told the time lately, so nothing can be judged")
        # The broker tells whole seconds, rounded down: a second more, so that no proof passes for younger than it is.
        return Instant(int(self._told + passed) + 1)


def trust_of(launch: Launch) -> LedgerTrust:
    """The trust of the configuration, with the stricter of its two bounds on age."""
    return replace(launch.trust, max_age_s=min(launch.trust.max_age_s, launch.configuration.max_age_s))


def is_verdict(error: MoorlineError) -> bool:
    """Whether the broker said that this function has to end: revoked, its host not standing, a later generation launched.

    Everything else, also a broker that cannot be trusted now, is a reason to ask again as long as there is time.
    """
    return error.code.startswith("renewal.") or error.code == "session.superseded"


class BrokerLink:
    """The session of this function, another one after each `resume`, and what came with the first."""

    def __init__(self, session: ClientSession, launch: Launch, secrets: FunctionSecrets) -> None:
        self._session = session
        self._up = asyncio.Event()
        self._chains: tuple[VerifiedChain, ...] = ()
        self._launch = launch
        self._trust = trust_of(launch)
        self._key = _private_key(secrets.private_key)
        self.clock = BrokerClock(session.activation.now)
        self.storage_key = secrets.storage_key
        self._take(session.activation)

    @property
    def identity(self) -> TlsIdentity:
        """The current certificate and key; another object after each renewal."""
        return self._identity

    @property
    def chain(self) -> VerifiedChain:
        """The current certificate's chain."""
        return self._chain

    @property
    def chains(self) -> tuple[VerifiedChain, ...]:
        """The current chain and those before it that connections may still rest on."""
        return self._chains

    @property
    def renew_after_s(self) -> int:
        """When the identity must be renewed."""
        return self._renew_after_s

    @property
    def closed(self) -> bool:
        """True while there is no session."""
        return self._session.closed

    async def ended(self) -> MoorlineError:
        """Waits until the session is gone; why it is."""
        return await self._session.ended()

    async def aclose(self) -> None:
        """End the session."""
        await self._session.aclose()

    def forget(self) -> None:
        """Drop identity key, certificate and storage key; the link is of no use after it."""
        del self._key, self._identity, self.storage_key

    async def resume(self, address: str, reports: ReportSource) -> None:
        """A new session for the same identity (PROTOCOLS.md 4, role resume): fresh evidence, and the identity key's proof.

        The broker is judged by the time it last told, not by the host's clock. Raises what the broker reports, and all
        that `attest` raises but the token's refusals; Unavailable("workload.no_time") when that time is too long ago.
        """

        async def verify_broker(challenge: Challenge, certificates: tuple[bytes, ...]) -> keys.PublicKey:
            return judge_broker(challenge, certificates, self._launch, self._trust, self.clock.now())

        session = await _resume(address, self._launch, reports, verify_broker, self._key)
        try:
            self._take(session.activation)
        except BaseException:
            await session.aclose()
            raise
        await self._session.aclose()
        self._session = session
        self.clock.set(session.activation.now)
        self._up.set()

    async def synchronise(self) -> None:
        """Ask the broker for the time. The session's records make the answer fresh."""
        item = cbor.decode(await self._call("time", b""))
        now = item.get("now") if isinstance(item, dict) else None
        if not isinstance(now, int) or isinstance(now, bool):
            raise Malformed("workload.time_malformed", "the broker's time is not one")
        self.clock.set(now)

    async def renew(self) -> None:
        """A fresh certificate for the same key."""
        self._take(schema.decode(Activation, await self._call("renew", b"")))

    async def prove(self, wanted: tuple[str, ...]) -> tuple[bytes, ProvenState]:
        """A ledger proof bundle with these keys, verified, and what it proves."""
        bundle = await self._call("ledger.prove", schema.encode(ProveCall(keys=wanted)))
        return bundle, self.verify(bundle)

    def verify(self, bundle: bytes) -> ProvenState:
        """What a bundle proves, to this function, now. Raises `ledger.*`."""
        return verify_bundle(bundle, self._trust, now=self.clock.now())

    async def fetch_storage_key(self) -> bytes:
        """The sealed-storage key of this generation, again: refused once this function would not be renewed."""
        return schema.decode(StorageKeyReply, await self._call("storage.key", b"")).storage_key

    async def entropy(self, size: int) -> bytes:
        """Random bytes of the HSM's generator, to be mixed with one's own. Raises what the broker reports."""
        reply = schema.decode(EntropyReply, await self._call("entropy", schema.encode(EntropyCall(size=size))))
        if len(reply.random) != size:
            raise Malformed("session.entropy_size", "another number of bytes came", expected=size, got=len(reply.random))
        return reply.random

    async def log(self, event: str, says: str) -> None:
        """A line in the HSM's secure log, in this function's name; durable when this returns."""
        await self._call("log", schema.encode(LogCall(event=event, says=says)))

    async def authorise(self, call: AuthoriseDeviceCall) -> AuthoriseDeviceReply:
        """The broker's decision about a connection of a device, with the proof it rests on."""
        return schema.decode(AuthoriseDeviceReply, await self._call("device.authorise", schema.encode(call)))

    async def device_key(self, call: FunctionKeyCall) -> FunctionKeyReply:
        """Keys of the profile without forward secrecy, claimed for this instance by its broker."""
        return schema.decode(FunctionKeyReply, await self._call("device.key", schema.encode(call)))

    async def _call(self, operation: str, body: bytes) -> bytes:
        if self._session.closed:
            # Whoever serves a device meanwhile waits a little for the session to come back; a device waits no longer.
            self._up.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_FOR_SESSION_S):
                    await self._up.wait()
        return await self._session.call(operation, body)

    def _take(self, activation: Activation) -> None:
        """The certificate must be for our key, in our name, and its chain must hold: also the broker can make a mistake."""
        chain = verify_chain(activation.certificate, activation.chain, self._trust.roots, Instant(activation.now))
        fields = self._launch.fields
        name = identity_name(fields.instance, fields.generation)
        mine = chain.spiffe_id.role is Role.SERVICE and chain.spiffe_id.segments == (fields.service, name)
        public = keys.public_bytes(self._key.public_key())
        certified = chain.leaf.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if not mine or chain.provider_name != fields.provider or certified != public:
            raise NotAuthentic(
                "workload.identity_mismatch",
                "the broker certified another name or key than this function's",
                expected=f"svc/{fields.service}/{name} of {fields.provider}",
                got=str(chain.spiffe_id),
            )
        self._chain = chain
        self._chains = (chain, *self._chains[: _CHAINS_KEPT - 1])
        self._identity = TlsIdentity(key=self._key, chain=(activation.certificate, *activation.chain))
        self._renew_after_s = max(1, activation.renew_after_s)


async def attest(address: str, launch: Launch, reports: ReportSource) -> BrokerLink:
    """The function's session with its broker: evidence over this connection, the token proven and never sent.

    A connection that broke before the answer is opened again under the same two keys, which is what makes it the same
    launch to a broker that consumed the token and died (PROTOCOLS.md 3, Consumption); fresh evidence goes with each. One
    that broke between message 4 and 6 may be of a broker that has confirmed and forgotten the private key: the function
    holds it, so it resumes; a broker that had not confirmed yet does not know the instance, and is asked as before.
    Raises what the broker reports (its refusal), NotAuthentic("workload.broker_not_trusted" | "workload.identity_mismatch"),
    Refused("workload.clock_disagrees") and what `channel.driver.open_session` raises.
    """
    trust = trust_of(launch)

    async def verify_broker(challenge: Challenge, certificates: tuple[bytes, ...]) -> keys.PublicKey:
        return judge_broker(challenge, certificates, launch, trust, SystemClock().now())

    async def prove(_challenge: Challenge, digest: bytes) -> bytes:
        return token_proof(launch.token, digest)

    kem, signing = new_kem(), keys.public_bytes(ed25519.Ed25519PrivateKey.generate().public_key())
    held: list[bytes] = []  # what message 4 brought, the newest last

    async def ask() -> ClientSession:
        if held:
            try:
                key = _private_key(_secrets(held[-1]).private_key)
                return await _resume(address, launch, reports, verify_broker, key)
            except MoorlineError as error:
                if error.code != "renewal.not_known":
                    raise
        return await open_session(
            address,
            role=SessionRole.FUNCTION,
            formats=(EvidenceFormat.SNP,),
            fields=schema.encode(FunctionFields(launch_fields=launch.encoded_fields)),
            signing_public=signing,
            verify_broker=verify_broker,
            prove=prove,
            collect=_collector(reports),
            profile=launch.fields.profile,
            kem=kem,
            learned=held.append,
        )

    session = await answered(ask, within_s=ATTEST_S)
    try:
        off = abs(session.activation.now - SystemClock().now())
        if off > MAX_CLOCK_DISAGREEMENT_S:
            # The broker was judged by the host's clock: a clock turned back would have let an old proof of it pass.
            raise Refused(
                "workload.clock_disagrees",
                "the host's clock is not the broker's",
                expected=MAX_CLOCK_DISAGREEMENT_S,
                got=off,
            )
        return BrokerLink(session, launch, _secrets(held[-1]))
    except BaseException:
        await session.aclose()
        raise


async def _resume(
    address: str, launch: Launch, reports: ReportSource, verify_broker: VerifyBroker, key: IdentityKey
) -> ClientSession:
    signer = keys.KeySigner(key)

    async def prove(_challenge: Challenge, digest: bytes) -> bytes:
        return signer.sign(resume_message(digest))

    return await open_session(
        address,
        role=SessionRole.RESUME,
        formats=(EvidenceFormat.SNP,),
        fields=schema.encode(FunctionFields(launch_fields=launch.encoded_fields)),
        signing_public=keys.public_bytes(signer.public_key()),
        verify_broker=verify_broker,
        prove=prove,
        collect=_collector(reports),
        profile=launch.fields.profile,
    )


def _secrets(data: bytes) -> FunctionSecrets:
    return schema.decode(FunctionSecrets, data)


def _collector(reports: ReportSource) -> Callable[[bytes, Challenge], Awaitable[Collected]]:
    async def collect(binding: bytes, _challenge: Challenge) -> Collected:
        report = await asyncio.to_thread(reports.report, binding)
        return Collected(format=EvidenceFormat.SNP, evidence=report.outblob, endorsements=report.auxblob)

    return collect


def judge_broker(
    challenge: Challenge, certificates: tuple[bytes, ...], launch: Launch, trust: LedgerTrust, now: Instant
) -> keys.PublicKey:
    """Raises unless this is the broker the launch names, certified, registered and active; its HSM key (PROTOCOLS.md 4).

    Of a launch for the HPKE-only profile the certificates are not looked at, for they may be a proxy's: there messages 2 and
    4 must be signed by the key that comes back.
    Raises NotAuthentic("workload.broker_not_trusted"), `chain.*`, `ledger.*`.
    """
    fields = launch.fields
    named = (challenge.ledger_id, challenge.provider, challenge.hsm)
    if named != (fields.ledger_id, fields.provider, fields.hsm):
        raise NotAuthentic(
            "workload.broker_not_trusted",
            "this is not the broker this launch is bound to",
            expected=f"{fields.provider}/{fields.hsm}",
            got=f"{challenge.provider}/{challenge.hsm}",
        )
    state = verify_bundle(challenge.bundle, trust, now=now)
    if fields.profile is ChannelProfile.HPKE_ONLY:
        return keys.parse_public(standing.active_hsm(state, fields.provider, fields.hsm).signing_public)
    chain = verify_chain(certificates[0], certificates[1:], trust.roots, now)
    record = peers.hsm_peer(state, chain, provider=fields.provider, hsm=fields.hsm)
    return keys.parse_public(record.signing_public)


def spiffe_id(link: BrokerLink) -> SpiffeId:
    """Who this function is."""
    return link.chain.spiffe_id


def _private_key(der: bytes) -> IdentityKey:
    try:
        key = serialization.load_der_private_key(der, password=None)
    except Exception as error:  # the loader raises several kinds on bytes that are not a key; none may show the bytes
        raise Malformed("workload.key_unreadable", "the broker's key is not one", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise Malformed("workload.key_unreadable", "the broker's key is of another kind")
    return key
