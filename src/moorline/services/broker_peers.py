"""Role `peer HSM`, both ends: two brokers authenticate each other from the ledger and swap trust bundles (PROTOCOLS 6)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from moorline.channel.driver import Collected, open_session
from moorline.channel.session import Claim
from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Conflict, NotAuthentic, Refused
from moorline.hsm import exchange
from moorline.hsm.exchange import ExchangeReply, Expectation, Party, TrustBundle
from moorline.hsm.issuers import name_of
from moorline.ledger import records, standing
from moorline.ledger.light_client import ProvenState, verify_bundle
from moorline.ledger.records import HsmRecord
from moorline.nfv import Role, parse_name
from moorline.services import broker_pairs
from moorline.services.broker import Broker
from moorline.services.broker_role import no_such_operation
from moorline.storage.broker_bundles import Peer
from moorline.verification.chains import verify_ca, verify_chain
from moorline.wire import keys, schema
from moorline.wire.certificates import parse_certificate
from moorline.wire.session import Activation, Challenge, EvidenceFormat, PeerFields, SessionRole


@dataclass(slots=True)
class PeerSession:
    """The responder's end."""

    broker: Broker
    claim: Claim
    peer: HsmRecord | None = None
    pending: tuple[TrustBundle, bytes, bytes] | None = None
    met: bool = False

    async def appraise(self) -> bytes:
        """No secrets; raises unless the peer proves the HSM key that the ledger has for it now."""
        fields = schema.decode(PeerFields, self.claim.fields)
        party = Party(provider=parse_name(fields.provider, "provider"), hsm=parse_name(fields.hsm, "HSM"))
        # The peer's own bundle is not needed: we ask the ledger ourselves, which is at least as fresh.
        record = await self._standing(party)
        exchange.verify_proof(
            keys.parse_public(record.signing_public),
            self.claim.proof,
            challenge_digest=self.claim.challenge_digest,
            party=party,
        )
        self.peer = record
        return b""

    async def activate(self) -> Activation:
        """An HSM needs no certificate of ours."""
        return Activation(spiffe_id="", certificate=b"", chain=(), now=self.broker.clock.now(), renew_after_s=0, body=b"")

    async def call(self, operation: str, body: bytes) -> bytes:
        """`peer.exchange`: bundle for bundle and our signature; `peer.confirm`: theirs, both are kept; then broker_pairs.

        Before each the ledger is asked again: an HSM that was revoked agrees on nothing over a session that it kept open.
        """
        known = self._record()
        self.peer = await self._standing(Party(provider=known.provider, hsm=known.id))
        if operation == "peer.exchange":
            return await self._exchange(body)
        if operation == "peer.confirm":
            await self._confirm(body)
            return b""
        if self.met:
            return await broker_pairs.answer(self.broker, self._record(), operation, body)
        raise no_such_operation(operation)

    async def _standing(self, party: Party) -> HsmRecord:
        """The ledger's record of a peer, active, and of the key that this session was opened with."""
        state = await self.broker.ledger.state(standing.hsm_keys(party.provider, party.hsm))
        record = standing.active_hsm(state, party.provider, party.hsm)
        if not same(record.signing_public, self.claim.signing_public):
            raise NotAuthentic("exchange.other_key", "the session key is not the HSM key of the ledger's record")
        return record

    async def _exchange(self, body: bytes) -> bytes:
        record = self._record()
        us, them = _party(self.broker), Party(provider=record.provider, hsm=record.id)
        challenge = self.claim.challenge_digest
        expected = Expectation(ledger_id=self.broker.trust.ledger_id, sender=them, receiver=us, challenge=challenge)
        bundle = exchange.verify_bundle(body, keys.parse_public(record.signing_public), expected)
        await require_chains(self.broker, bundle)
        ours = await asyncio.to_thread(_signed_bundle, self.broker, us, them, challenge)
        agreed = exchange.transcript(challenge, body, ours)
        self.pending = (bundle, body, agreed)
        return schema.encode(ExchangeReply(bundle=ours, agreed=exchange.agree(self.broker.identity.signer, agreed)))

    async def _confirm(self, body: bytes) -> None:
        record = self._record()
        if self.pending is None:
            raise Conflict("exchange.out_of_order", "there is nothing to confirm yet")
        bundle, received, agreed = self.pending
        exchange.verify_agreed(body, keys.parse_public(record.signing_public), agreed)
        await asyncio.to_thread(_keep, self.broker, bundle, received, agreed)
        self.met = True

    def _record(self) -> HsmRecord:
        if self.peer is None:
            raise Conflict("exchange.out_of_order", "the peer is not known yet")
        return self.peer


async def connect(broker: Broker, provider: str, hsm: str, *, rotate: bool = False) -> Peer:
    """The initiator's end: open a session with a registered HSM at its registered address, and exchange trust bundles.

    Then a pair key is agreed if there is none, if one was left unfinished, or to `rotate`; and news are asked for.
    Raises what ledger, chain, session, exchange and pair raise; nothing is kept unless everything held.
    """
    them, us = Party(provider=parse_name(provider, "provider"), hsm=parse_name(hsm, "HSM")), _party(broker)
    own_keys = standing.hsm_keys(us.provider, us.hsm)
    bundle, state = await broker.ledger.proven((*own_keys, *standing.hsm_keys(provider, hsm)))
    record = standing.active_hsm(state, provider, hsm)
    digest = b""

    async def verify_broker(challenge: Challenge, chain: tuple[bytes, ...]) -> None:
        judge_broker(broker, them, record, challenge, chain)

    async def prove(_: Challenge, challenge_digest: bytes) -> bytes:
        nonlocal digest
        digest = challenge_digest
        return exchange.prove(broker.identity.signer, challenge_digest=challenge_digest, party=us)

    async def collect(_binding: bytes, _challenge: Challenge) -> Collected:
        return Collected(format=EvidenceFormat.NONE, evidence=b"", endorsements=b"")

    async with await open_session(
        record.address,
        role=SessionRole.PEER_HSM,
        formats=(EvidenceFormat.NONE,),
        fields=schema.encode(PeerFields(provider=us.provider, hsm=us.hsm, bundle=bundle)),
        signing_public=keys.public_bytes(broker.identity.signer.public_key()),
        verify_broker=verify_broker,
        prove=prove,
        collect=collect,
    ) as session:
        ours = await asyncio.to_thread(_signed_bundle, broker, us, them, digest)
        reply = schema.decode(ExchangeReply, await session.call("peer.exchange", ours))
        key = keys.parse_public(record.signing_public)
        expected = Expectation(ledger_id=broker.trust.ledger_id, sender=them, receiver=us, challenge=digest)
        theirs = exchange.verify_bundle(reply.bundle, key, expected)
        await require_chains(broker, theirs)
        agreed = exchange.transcript(digest, ours, reply.bundle)
        exchange.verify_agreed(reply.agreed, key, agreed)
        await session.call("peer.confirm", exchange.agree(broker.identity.signer, agreed))
        peer = await asyncio.to_thread(_keep, broker, theirs, reply.bundle, agreed)
        await broker_pairs.agree(broker, record, session, rotate=rotate)
        await broker_pairs.ask_news(broker, record, session)
    return peer


def judge_broker(broker: Broker, them: Party, record: HsmRecord, challenge: Challenge, chain: tuple[bytes, ...]) -> None:
    """Is this TLS endpoint the HSM of that ledger record? Raises NotAuthentic or Refused (`chain.*`, `exchange.*`)."""
    if (challenge.ledger_id, challenge.provider, challenge.hsm) != (broker.trust.ledger_id, them.provider, them.hsm):
        raise Refused("exchange.other_peer", "another HSM answered", got=f"{challenge.provider}/{challenge.hsm}")
    verified = verify_chain(chain[0], chain[1:], broker.roots, broker.clock.now())
    named = verified.spiffe_id
    if named.role is not Role.HSM or named.segments != (them.hsm,) or not same(verified.issuer, record.certificate):
        raise NotAuthentic(
            "exchange.other_certificate",
            "the TLS certificate is not under the HSM certificate of the ledger's record",
            expected=f"{them.provider}/{them.hsm}",
            got=str(named),
        )
    proven = verify_bundle(challenge.bundle, broker.trust, now=broker.clock.now())
    standing.active_hsm(proven, them.provider, them.hsm)


async def require_chains(broker: Broker, bundle: TrustBundle) -> None:
    """Every issuing CA in a peer's bundle chains to our roots, under its provider, and is active on the ledger."""
    now = broker.clock.now()
    names = []
    for der in bundle.issuing_cas:
        path = verify_ca(der, bundle.above, broker.roots, now)
        names.append((common_name(der), der, path))
    wanted = tuple(key for name, _, _ in names for key in standing.issuing_ca_keys(bundle.provider, name))
    state = await broker.ledger.state((*standing.provider_keys(bundle.provider), *wanted))
    owner = standing.active_provider(state, bundle.provider)
    if owner.trust_domain != bundle.trust_domain:
        raise Refused("exchange.trust_domain", "the bundle names another trust domain", got=bundle.trust_domain)
    for name, der, _ in names:
        _require_registered(state, bundle.provider, name, der)


def common_name(der: bytes) -> str:
    """The id of an issuing CA's ledger record: the common name of its certificate."""
    return records.parse_name(name_of(parse_certificate(der)), "issuing CA")


def _require_registered(state: ProvenState, provider: str, name: str, der: bytes) -> None:
    if not same(standing.active_issuing_ca(state, provider, name).certificate, der):
        raise Refused("exchange.other_certificate", "the issuing CA is not the registered one", got=name)


def _party(broker: Broker) -> Party:
    return Party(provider=broker.settings.provider, hsm=broker.settings.hsm)


def _signed_bundle(broker: Broker, us: Party, them: Party, challenge: bytes) -> bytes:
    now = broker.clock.now()
    bundle = exchange.our_bundle(
        expected=Expectation(ledger_id=broker.trust.ledger_id, sender=us, receiver=them, challenge=challenge),
        trust_domain=broker.settings.trust_domain,
        sequence=now,  # rises with time; a peer refuses one below what it keeps
        now=Instant(now),
        roots=broker.roots,
        issuing_cas=broker.ca.living,
        above=broker.ca.above,
    )
    return exchange.sign_bundle(bundle, broker.identity.signer)


def _keep(broker: Broker, bundle: TrustBundle, received: bytes, agreed: bytes) -> Peer:
    peer = Peer(
        provider=bundle.provider,
        hsm=bundle.hsm,
        at=broker.clock.now(),
        sequence=bundle.sequence,
        transcript=agreed,
        bundle=received,
    )
    broker.store.record_peer(peer)
    return peer
