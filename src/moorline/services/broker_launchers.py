"""Role `launcher`: an enclave with an unused ticket gets the launch key of the epoch and a lease (PROTOCOLS.md 3).

1. The ticket is signed by a key the ledger has for this provider, for this ledger, and has not expired.
2. The evidence is authentic, bound to this session, of the measurement and on the chip the ticket names.
3. HOST_DATA is the hash of exactly the configuration this broker would have given it: ticket, trust file, provider, HSM.
4. Neither launcher, code nor chip is revoked, and the provider stands.
5. The ticket is used, once, in the database; only then is there a lease.

4 is asked again for each lease and certificate: the key of the next epoch is not for who lost its trust in this one.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Final

from moorline.channel.session import Claim
from moorline.digest import same, tagged_hash
from moorline.errors import Refused
from moorline.hsm.provider import verify_launcher_ticket
from moorline.ledger import standing
from moorline.ledger.light_client import ProvenState
from moorline.nfv import Role, SpiffeId
from moorline.services.broker import Broker
from moorline.services.broker_anchor import require_judged
from moorline.services.broker_enclaves import appraise_enclave
from moorline.services.broker_launcher_watch import rests_on
from moorline.services.broker_role import (
    Revocable,
    issue_for_session,
    no_such_operation,
    require_not_revoked,
    revocable_keys,
    session_name,
)
from moorline.storage.broker_epochs import Launcher
from moorline.storage.steps import reached
from moorline.verification.snp import SnpClaims
from moorline.wire import certificates, keys, schema
from moorline.wire.guest import LauncherLaunch
from moorline.wire.session import Activation, LauncherFields, LauncherTicket

_NAME_DIGITS: Final = 32


@dataclass(slots=True)
class LauncherSession:
    """One launcher."""

    broker: Broker
    claim: Claim
    _revocable: tuple[Revocable, ...] = ()
    """What it rests on; empty until it was appraised."""

    @property
    def launcher(self) -> bytes:
        """SHA-256 of its session signing key: a restarted launcher is another one."""
        return hashlib.sha256(self.claim.signing_public).digest()

    async def appraise(self) -> bytes:
        """Numbers are those of the module's docstring."""
        broker, provider = self.broker, self.broker.settings.provider
        require_judged(broker)
        fields = schema.decode(LauncherFields, self.claim.fields)
        claims = (await asyncio.to_thread(appraise_enclave, broker, self.claim)).value
        admitted = Launcher(launcher=self.launcher, measurement=claims.measurement, chip=claims.chip_id or b"")
        self._revocable = rests_on(broker, admitted)
        state = await self._proven()
        record = standing.active_provider(state, provider)
        ticket = verify_launcher_ticket(  # 1
            fields.ticket,
            tuple(_key_of(der) for der in record.ca_certificates_at(state.time)),
            ledger_id=broker.trust.ledger_id,
            provider=provider,
            now=broker.clock.now(),
        )
        _require_ticketed(claims, ticket)  # 2
        self._require_configuration(claims, fields)  # 3
        require_not_revoked(state, self._revocable)  # 4
        return await asyncio.to_thread(self._admit, ticket)  # 5

    async def activate(self) -> Activation:
        """An SVID for the session signing key."""
        name = self.launcher.hex()[:_NAME_DIGITS]
        spiffe_id = SpiffeId(trust_domain=self.broker.settings.trust_domain, role=Role.LAUNCHER, segments=(name,))
        return await asyncio.to_thread(issue_for_session, self.broker, self.claim, spiffe_id, "launcher-certificate")

    async def call(self, operation: str, _body: bytes) -> bytes:
        """`launcher.lease`: more numbers, and the new key if the epoch moved on. `renew`: another certificate."""
        if operation == "launcher.lease":
            await self._require_standing()
            return await asyncio.to_thread(self._lease)
        if operation == "renew":
            await self._require_standing()
            return schema.encode(await self.activate())
        raise no_such_operation(operation)

    async def _proven(self) -> ProvenState:
        """What the ledger says now about the provider, and about what this launcher rests on."""
        provider = self.broker.settings.provider
        return await self.broker.ledger.state((*standing.provider_keys(provider), *revocable_keys(self._revocable)))

    async def _require_standing(self) -> None:
        """4, again. Raises Refused("ledger.revoked" | "ledger.provider_not_active" | "launch.launcher_not_admitted")."""
        state = await self._proven()
        standing.active_provider(state, self.broker.settings.provider)
        require_not_revoked(state, self._revocable)
        if not await asyncio.to_thread(self.broker.store.launcher_active, self.launcher):
            raise Refused("launch.launcher_not_admitted", "this launcher was revoked", got=self.launcher)

    def _require_configuration(self, claims: SnpClaims, fields: LauncherFields) -> None:
        settings = self.broker.settings
        configuration = LauncherLaunch(
            ticket=fields.ticket, trust=self.broker.trust_bytes, provider=settings.provider, hsm=settings.hsm
        )
        expected = tagged_hash("launcher-configuration", schema.encode(configuration))
        if not same(expected, claims.host_data):
            raise Refused(
                "launcher.configuration_mismatch",
                "the launcher was started with another ticket, trust file, provider or HSM",
                expected=expected,
                got=claims.host_data,
                remedy="give launcher and broker the same trust file",
            )

    def _admit(self, ticket: LauncherTicket) -> bytes:
        self.broker.store.admit_launcher(
            launcher=self.launcher,
            ticket=ticket.ticket,
            measurement=ticket.measurement,
            chip=ticket.chip,
            session=session_name(self.claim),
            at=self.broker.clock.now(),
        )
        reached("broker.ticket.used")
        return self._lease()

    def _lease(self) -> bytes:
        return schema.encode(self.broker.launch_keys.lease(self.launcher, self.broker.clock.now()))


def _require_ticketed(claims: SnpClaims, ticket: LauncherTicket) -> None:
    if claims.measurement != ticket.measurement:
        raise Refused(
            "launcher.measurement_mismatch",
            "other code runs than the ticket is for",
            expected=ticket.measurement,
            got=claims.measurement,
        )
    if claims.chip_id is None or claims.chip_id != ticket.chip:
        raise Refused(
            "launcher.chip_mismatch",
            "the launcher runs on another chip than the ticket is for",
            expected=ticket.chip,
            got=claims.chip_id or "masked",
        )


def _key_of(der: bytes) -> keys.PublicKey:
    public = certificates.parse_certificate(der).public_key()
    assert isinstance(public, keys.PublicKey)  # the ledger admits no other kind
    return public
