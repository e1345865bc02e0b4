"""Role `host`: a host agent whose TPM holds the attestation key enrolled for this host gets an SVID for its session key.

It establishes that whoever asks can use that TPM now. It says nothing about the state of the host, which is what Attestation
Results are for, and nothing about which process asked (PROTOCOLS.md 8).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from moorline.channel.session import Claim
from moorline.digest import same
from moorline.errors import NotAuthentic, Refused
from moorline.ledger import standing
from moorline.ledger.records import RevocationKind
from moorline.nfv import Role, SpiffeId, parse_name
from moorline.rats import EvidenceRoot
from moorline.services.broker import Broker
from moorline.services.broker_role import (
    Revocable,
    issue_for_session,
    no_such_operation,
    require_not_revoked,
    revocable_keys,
)
from moorline.verification.tpm_quote import attestation_key, verify_quote
from moorline.wire import host as wire_host
from moorline.wire import schema
from moorline.wire.session import Activation, EvidenceFormat, HostFields


@dataclass(slots=True)
class HostSession:
    """One host agent."""

    broker: Broker
    claim: Claim
    host: str = ""

    async def appraise(self) -> bytes:
        """No secrets; raises unless the enrolled key quoted this session's binding."""
        if self.claim.format is not EvidenceFormat.TPM:
            raise Refused("session.format", "this role needs evidence of a TPM", expected="tpm", got=self.claim.format)
        fields = schema.decode(HostFields, self.claim.fields)
        name = parse_name(fields.host, "host")
        enrolled = await self.broker.require_hosts().enrolled_key(name)
        if not same(enrolled, fields.ak_public):
            raise NotAuthentic(
                "host.other_key", "this is not the attestation key enrolled for the host", remedy="enrol at the verifier"
            )
        await self._require_standing(name)
        await asyncio.to_thread(self._verify, enrolled)
        self.host = name
        return b""

    async def activate(self) -> Activation:
        """An SVID for the session signing key."""
        spiffe_id = SpiffeId(trust_domain=self.broker.settings.trust_domain, role=Role.HOST, segments=(self.host,))
        return await asyncio.to_thread(issue_for_session, self.broker, self.claim, spiffe_id, "host-certificate")

    async def call(self, operation: str, _body: bytes) -> bytes:
        """`renew`."""
        if operation == "renew":
            await self._require_standing(self.host)
            return schema.encode(await self.activate())
        raise no_such_operation(operation)

    async def _require_standing(self, name: str) -> None:
        provider = self.broker.settings.provider
        revocable: tuple[Revocable, ...] = ((RevocationKind.HOST, provider, name),)
        state = await self.broker.ledger.state((*standing.platform_keys(provider, name), *revocable_keys(revocable)))
        standing.active_platform(state, provider, name)
        require_not_revoked(state, revocable)

    def _verify(self, enrolled: bytes) -> None:
        evidence = wire_host.decode_evidence(self.claim.evidence)
        pcrs = wire_host.pcr_map(evidence)
        # What the key rests on was judged at enrolment and is carried by Attestation Results, not by this SVID.
        verify_quote(
            evidence.quoted,
            evidence.signature,
            pcrs,
            key=attestation_key(enrolled, EvidenceRoot.NONE),
            qualifying=wire_host.session_qualifying_data(self.claim.binding),
            bank=evidence.bank,
            selection=tuple(sorted(pcrs)),
        )
