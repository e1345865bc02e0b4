"""The launcher enclave's work: permitted intents in, launch fields and one-time tokens out (PROTOCOLS.md 3).

It runs inside a measured guest whose host is not trusted; the launch key never leaves its memory. Therefore:

* Time is the broker's, never the host's: a `time` answer inside the attested session, plus what has passed since. Without
  a recent one nothing is minted.
* Every sequence number is used once: it is taken before the token is made, and a failure after that loses it.
* The same intent gets the same grant again, so that an orchestrator that crashed may ask again; another intent gets another.
* Lease or epoch used up: a new lease is asked of the broker, once for each intent; if that fails, nothing is minted.

This file imports nothing that the measured guest image does not hold (standard library, cryptography, cbor2).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from moorline.clock import Instant
from moorline.digest import Digest256
from moorline.errors import Malformed, MoorlineError, Refused, Unavailable
from moorline.ledger.light_client import LedgerTrust, ProvenState
from moorline.orchestration import intent as intents
from moorline.wire import cbor, cose, keys, launch, schema
from moorline.wire.launch import LaunchFields
from moorline.wire.orchestration import GRANT_PURPOSE, LaunchGrant, LaunchIntent, LaunchReply, LaunchRequest, seal_token
from moorline.wire.session import Activation, LauncherSecrets

REMEMBERED: Final = 1024
TIME_LIFE_S: Final = 60.0


class Session(Protocol):
    """The launcher's attested session with its broker; `channel.driver.ClientSession` is one."""

    @property
    def closed(self) -> bool:
        """True when it can carry nothing more."""
        ...

    async def call(self, operation: str, body: bytes, /) -> bytes:
        """The broker's answer, or the error it reported."""
        ...


class Lease:
    """Sequence numbers left to use in one epoch, and the key of that epoch."""

    def __init__(self, secrets: LauncherSecrets) -> None:
        self.secrets = secrets
        self._next = secrets.lease_first

    def take(self, now: Instant) -> int:
        """The next number, never given again. Raises Refused("launcher.lease_exhausted")."""
        end = self.secrets.lease_first + self.secrets.lease_count
        ends = min(self.secrets.lease_not_after, self.secrets.epoch_not_after)
        if self._next >= end or now >= ends:
            raise Refused(
                "launcher.lease_exhausted",
                "the launcher's lease of sequence numbers is used up or has ended",
                expected=f"number < {end}, time < {ends}",
                got=f"{self._next}, {now}",
                remedy="the launcher asks its broker for another; if that fails, look at the broker",
            )
        taken, self._next = self._next, self._next + 1
        return taken


class SessionClock:
    """The broker's time: its last answer plus what the monotonic clock counted since, for `TIME_LIFE_S` at most.

    A host that stops or slows the guest's clock makes this time too early for at most that long (limitations.md).
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._told: tuple[Instant, float] | None = None

    def tell(self, now: Instant) -> None:
        """Take the broker's time. It never goes back."""
        floor = self._told[0] if self._told is not None else 0
        self._told = (Instant(max(now, floor)), self._monotonic())

    def now(self) -> Instant | None:
        """The time, or None if the last answer is too old to rely on."""
        if self._told is None:
            return None
        passed = self._monotonic() - self._told[1]
        return Instant(self._told[0] + int(passed)) if 0 <= passed < TIME_LIFE_S else None


class Launcher:
    """One admitted launcher. Its id is the SHA-256 of its session signing key, so a restart makes another launcher."""

    def __init__(
        self,
        *,
        trust: LedgerTrust,
        provider: str,
        signer: keys.Signer,
        session: Session,
        secrets: LauncherSecrets,
        activation: Activation,
        clock: SessionClock,
    ) -> None:
        self._trust = trust
        self._provider = provider
        self._signer = signer
        self._session = session
        self._lease = Lease(secrets)
        self._clock = clock
        self._activation = activation
        self._highest: ProvenState | None = None
        self._granted: OrderedDict[Digest256, bytes] = OrderedDict()
        self._turn = asyncio.Lock()
        self.id = launcher_id(keys.public_bytes(signer.public_key()))
        clock.tell(Instant(activation.now))

    def readmitted(self, secrets: LauncherSecrets, activation: Activation) -> None:
        """The broker took this launcher in again, over a new session: what it had leased before is not relied upon."""
        self._lease = Lease(secrets)
        self._activation = activation

    async def answer(self, frame: bytes) -> bytes:
        """The reply frame to a request frame, both `wire.orchestration`. Input is untrusted; a refusal is a reply too."""
        try:
            request = schema.decode(LaunchRequest, frame)
            reply = LaunchReply(grant=await self.grant(request), problem=None)
        except MoorlineError as error:
            reply = LaunchReply(grant=None, problem=problem_bytes(error))
        return schema.encode(reply)

    async def grant(self, request: LaunchRequest) -> bytes:
        """The signed grant for an untrusted request. Raises what `intent.permit` does, `launcher.*`, and broker errors."""
        highest = self._highest  # before it is this request's turn: those that came together may be in any order
        async with self._turn:
            now = await self._time()
            permitted = intents.permit(request, self._trust, provider=self._provider, now=now, highest=highest)
            if self._highest is None or permitted.state.height > self._highest.height:
                self._highest = permitted.state
            remembered = self._granted.get(permitted.digest)
            if remembered is not None:
                return remembered
            sequence = await self._sequence(now)
            await self._renew_identity(now)
            grant = self._mint(permitted, request.intent, sequence)
            self._granted[permitted.digest] = grant
            while len(self._granted) > REMEMBERED:
                self._granted.popitem(last=False)
            return grant

    def _mint(self, permitted: intents.Permitted, signed_intent: bytes, sequence: int) -> bytes:
        secrets = self._lease.secrets
        fields = launch_fields(
            permitted.intent,
            launcher=self.id,
            epoch=secrets.epoch,
            sequence=sequence,
            not_after=min(permitted.intent.not_after, secrets.epoch_not_after),
        )
        token = launch.token(secrets.launch_key, fields)
        grant = LaunchGrant(
            intent_digest=permitted.digest,
            launch_fields=launch.encode_fields(fields),
            sealed_token=seal_token(token, permitted.intent.reply_key, signed_intent),
        )
        chain = (self._activation.certificate, *self._activation.chain)
        return cose.sign(GRANT_PURPOSE, schema.encode(grant), self._signer, x5chain=chain)

    async def _time(self) -> Instant:
        now = self._clock.now()
        if now is None:
            answer = cbor.decode(await self._session.call("time", b""))
            told = answer.get("now") if isinstance(answer, dict) else None
            if not isinstance(told, int):
                raise Malformed("launcher.time_malformed", "the broker's time is not a number", got=type(told).__name__)
            self._clock.tell(Instant(told))
            now = self._clock.now()
        if now is None:
            raise Unavailable("launcher.no_time", "the broker's answer about the time came too late")
        return now

    async def _sequence(self, now: Instant) -> int:
        try:
            return self._lease.take(now)
        except Refused:
            secrets = schema.decode(LauncherSecrets, await self._session.call("launcher.lease", b""))
            self._lease = Lease(secrets)
            return self._lease.take(now)

    async def _renew_identity(self, now: Instant) -> None:
        if now >= self._activation.now + self._activation.renew_after_s:
            self._activation = schema.decode(Activation, await self._session.call("renew", b""))


def launcher_id(session_public: bytes) -> bytes:
    """A launcher's id in launch fields: SHA-256 of its session signing key (DER SubjectPublicKeyInfo)."""
    return hashlib.sha256(session_public).digest()


def launch_fields(intent: LaunchIntent, *, launcher: bytes, epoch: int, sequence: int, not_after: int) -> LaunchFields:
    """The launch fields of an intent, completed by what only the launcher knows."""
    return LaunchFields(
        ledger_id=intent.ledger_id,
        provider=intent.provider,
        tenant=intent.tenant,
        service=intent.service,
        package_digest=intent.package_digest,
        configuration_digest=intent.configuration_digest,
        measurement=intent.measurement,
        instance=intent.instance,
        generation=intent.generation,
        host=intent.host,
        chip=intent.chip,
        hsm=intent.hsm,
        profile=intent.profile,
        launcher=launcher,
        epoch=epoch,
        sequence=sequence,
        not_after=not_after,
    )


def problem_bytes(error: MoorlineError) -> bytes:
    """An error as CBOR. Our CBOR has no floating point: `retry_after_s` travels as whole seconds."""
    problem = {name: int(value) if isinstance(value, float) else value for name, value in error.as_problem().items()}
    return cbor.encode(problem)
