"""Attacks on attested sessions: evidence made for another session, reflected, of other code; tickets nobody gave."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.channel.driver import ClientSession, Collected, open_session
from moorline.channel.session import Claim, SessionFacts
from moorline.channel.session_port import serve_sessions
from moorline.channel.tls import TlsIdentity
from moorline.cli.demo import hardware, hosting, operating
from moorline.cli.demo.attack_tools import Outcome, collect, once, refused_with, tried
from moorline.cli.demo.world import HSM, VERIFIER, Provider, World, der, free_addresses, now
from moorline.clock import Instant, Validity
from moorline.digest import tagged_hash
from moorline.errors import Refused, Unavailable
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.hsm import exchange
from moorline.hsm.ceremony import HsmPublicKeys
from moorline.hsm.exchange import Party
from moorline.hsm.provider import certify_hsm, sign_launcher_ticket
from moorline.ledger import standing
from moorline.ledger import transactions as tx
from moorline.nfv import Role, SpiffeId
from moorline.services.launcher_parent import LauncherSettings
from moorline.services.launcher_parent import order as launcher_order
from moorline.simulators import firmware, guest_image
from moorline.simulators.manufacturer import open_chip
from moorline.wire import certificates, keys, schema
from moorline.wire.certificates import Issuer
from moorline.wire.guest import LauncherLaunch
from moorline.wire.http import HttpClient
from moorline.wire.orchestration import GuestOrder
from moorline.wire.session import (
    Activation,
    Challenge,
    EvidenceFormat,
    HostFields,
    LauncherFields,
    LauncherTicket,
    PeerFields,
    SessionRole,
)

_LIFE_S: Final = 1800
MIRROR: Final = "hsm-mirror"
Collect = Callable[[bytes, Challenge], Awaitable[Collected]]
Prove = Callable[[Challenge, bytes], Awaitable[bytes | None]]


async def _session(
    world: World,
    role: SessionRole,
    evidence: EvidenceFormat,
    fields: object,
    signing_public: bytes,
    *,
    prove: Prove | None = None,
    collect_evidence: Collect | None = None,
) -> ClientSession:
    """A session with alpha's broker, by somebody who judges nobody: whatever refuses is the broker."""

    async def trust_anybody(_challenge: Challenge, _chain: tuple[bytes, ...]) -> None:
        return None

    async def no_proof(_challenge: Challenge, _digest: bytes) -> None:
        return None

    async def no_evidence(_binding: bytes, _challenge: Challenge) -> Collected:
        return Collected(format=evidence, evidence=b"", endorsements=b"")

    return await open_session(
        world.alpha.sessions,
        role=role,
        formats=(evidence,),
        fields=schema.encode(fields),
        signing_public=signing_public,
        verify_broker=trust_anybody,
        prove=prove or no_proof,
        collect=collect_evidence or no_evidence,
    )


async def _used(session: Awaitable[ClientSession]) -> None:
    await (await session).aclose()


def _fresh_key() -> bytes:
    return keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())


# Evidence of another session ---------------------------------------------------------------------------------------------


async def evidence_relayed_from_other_session(world: World) -> Outcome:
    """Two sessions in the name of h1 are open at once; the second shows the quote that h1's TPM made for the first.

    Control: the very same bytes in the session they were made for.
    """
    one = hosting.host(world, "h1")
    assert one.tpm is not None
    tpm = await asyncio.to_thread(Tpm.open, one.tpm.tcti)
    try:
        async with _verifier(world) as verifier:
            attestation = HostAttestation(
                host="h1",
                verifier=verifier,
                tpm=tpm,
                logs=FileLogs(
                    events=one.directory / "logs" / firmware.EVENT_LOG, ima=one.directory / "logs" / firmware.IMA_LIST
                ),
                tag=one.tag,
                period_s=hosting.PERIOD_S,
            )
            return await _relay(world, tpm, attestation)
    finally:
        await asyncio.to_thread(tpm.close)


async def _relay(world: World, tpm: Tpm, attestation: HostAttestation) -> Outcome:
    fields = HostFields(host="h1", ak_public=await asyncio.to_thread(tpm.attestation_key))
    made: list[bytes] = []
    accepted: list[str | None] = []

    async def honest(binding: bytes, _challenge: Challenge) -> Collected:
        made.append(await attestation.evidence_for_session(binding))
        return Collected(format=EvidenceFormat.TPM, evidence=made[0], endorsements=b"")

    async def relayed(_binding: bytes, _challenge: Challenge) -> Collected:
        first = _session(world, SessionRole.HOST, EvidenceFormat.TPM, fields, _fresh_key(), collect_evidence=honest)
        accepted.append(await refused_with(_used(first)))
        return Collected(format=EvidenceFormat.TPM, evidence=made[0], endorsements=b"")

    second = _session(world, SessionRole.HOST, EvidenceFormat.TPM, fields, _fresh_key(), collect_evidence=relayed)
    code = await refused_with(_used(second))
    return Outcome(code=code, control=accepted == [None], says="the session it was made for was given h1's identity for it")


def _verifier(world: World) -> HttpClient:
    return HttpClient(
        f"https://{world.facts['verifier_address']}",
        server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
        roots_pem=world.roots_pem,
    )


# Reflection --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Mirror:
    """An HSM of beta, rogue: registered by all the rules, its key in the attacker's memory."""

    key: ec.EllipticCurvePrivateKey
    identity: TlsIdentity
    address: str


async def evidence_reflected(world: World) -> Outcome:
    """A rogue HSM of beta lets alpha's broker authenticate to it, and shows alpha's own proof back to alpha's broker.

    Control: the same session in the rogue HSM's own name, with its own proof.
    """
    mirror = await _register_mirror(world)
    try:
        claim = await _caught(world, mirror)

        async def reflected(_challenge: Challenge, _digest: bytes) -> bytes | None:
            return claim.proof

        as_alpha = schema.decode(PeerFields, claim.fields)
        code = await refused_with(
            _used(
                _session(world, SessionRole.PEER_HSM, EvidenceFormat.NONE, as_alpha, claim.signing_public, prove=reflected)
            )
        )
        control = await refused_with(_used(_as_itself(world, mirror)))
    finally:
        await world.beta.submitter.send(tx.RevokeHsm(id=MIRROR))
    return Outcome(code=code, control=control is None, says="in its own name, with its own proof, the same HSM is let in")


async def _caught(world: World, mirror: _Mirror) -> Claim:
    """What alpha's broker shows when its operator has it connect to the rogue HSM."""
    caught: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()

    async def appraise(claim: Claim) -> bytes:
        if not caught.done():
            caught.set_result(claim)
        raise Refused("demo.caught", "the mirror has what it wants")

    async def never(_claim: Claim) -> Activation:
        raise Refused("demo.caught", "the mirror has what it wants")

    async def no_calls(_claim: Claim, _operation: str, _body: bytes) -> bytes:
        raise Refused("demo.caught", "the mirror has what it wants")

    async def bundle() -> bytes:
        return await world.ledger.prove(standing.hsm_keys("beta", MIRROR))

    async with (
        await serve_sessions(
            mirror.address,
            identity=lambda: mirror.identity,
            facts=SessionFacts(ledger_id=world.consortium.trust.ledger_id, provider="beta", hsm=MIRROR),
            bundle=bundle,
            appraise=appraise,
            activate=never,
            call=no_calls,
        ),
        world.alpha.admin() as admin,
    ):
        said = await refused_with(admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": MIRROR}))
    if not caught.done():
        raise Unavailable("demo.nothing_reflected", "alpha's broker showed the rogue HSM nothing", got=said)
    return caught.result()


def _as_itself(world: World, mirror: _Mirror) -> Awaitable[ClientSession]:
    async def prove(_challenge: Challenge, digest: bytes) -> bytes:
        party = Party(provider="beta", hsm=MIRROR)
        return exchange.prove(keys.KeySigner(mirror.key), challenge_digest=digest, party=party)

    return _session(
        world,
        SessionRole.PEER_HSM,
        EvidenceFormat.NONE,
        PeerFields(provider="beta", hsm=MIRROR, bundle=b""),
        keys.public_bytes(mirror.key.public_key()),
        prove=prove,
    )


async def _register_mirror(world: World) -> _Mirror:
    key, tls_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    address = free_addresses(1)[0]
    life = Validity(not_before=Instant(now() - 60), not_after=Instant(now() + _LIFE_S))
    serials = (secrets.randbits(120), secrets.randbits(120))
    public = HsmPublicKeys(
        identity=key.public_key(), issuing_ca=key.public_key(), verifier=key.public_key(), kem=_point(key.public_key())
    )
    certified = certify_hsm(
        world.beta.issuer,
        public,
        trust_domain=world.beta.trust_domain,
        hsm=MIRROR,
        issuing_ca="ca-mirror",
        address=address,
        validity=life,
        serials=serials,
    )
    await world.beta.submitter.send(
        tx.RegisterHsm(
            id=MIRROR,
            certificate=der(certified.hsm),
            address=address,
            est_url=f"https://{address}/.well-known/est",
            kem_public=public.kem,
            signing_public=keys.public_bytes(key.public_key()),
            bundle_sequence=1,
        )
    )
    leaf = certificates.leaf_certificate(
        tls_key.public_key(),
        spiffe_id=SpiffeId(trust_domain=world.beta.trust_domain, role=Role.HSM, segments=(MIRROR,)),
        issuer=Issuer(certificate=certified.hsm, key=key),
        validity=life,
        serial=secrets.randbits(120),
    )
    chain = (leaf, certified.hsm, world.beta.certificate, world.beta.authority)
    return _Mirror(key=key, identity=TlsIdentity(key=tls_key, chain=tuple(map(der, chain))), address=address)


def _point(public: ec.EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


# Launchers ---------------------------------------------------------------------------------------------------------------


async def launcher_wrong_measurement(world: World) -> Outcome:
    """A genuine ticket, shown with evidence of other code on the right chip. Control: the launcher it was written for."""
    ticket = await _ticket(world)
    launch = LauncherLaunch(ticket=ticket, trust=world.consortium.trust.encode(), provider="alpha", hsm=HSM)
    host_data = tagged_hash("launcher-configuration", schema.encode(launch))

    async def of_other_code(binding: bytes, _challenge: Challenge) -> Collected:
        report, table = await collect(world, hardware.MANAGEMENT, report_data=binding, host_data=host_data)
        return Collected(format=EvidenceFormat.SNP, evidence=report, endorsements=table)

    session = _session(
        world,
        SessionRole.LAUNCHER,
        EvidenceFormat.SNP,
        LauncherFields(ticket=ticket),
        _fresh_key(),
        collect_evidence=of_other_code,
    )
    code, control = await asyncio.gather(refused_with(_used(session)), _genuine_launcher(world))
    return Outcome(code=code, control=control is None, says="the launcher of the measurement it names is admitted with it")


async def launcher_without_ticket(world: World) -> Outcome:
    """The genuine launcher enclave on the right chip, with a ticket its host wrote. Control: with alpha's own."""
    forged = await asyncio.to_thread(write_ticket, world, world.alpha, signed_by=ec.generate_private_key(ec.SECP256R1()))
    order = launcher_guest(world, world.alpha, "without-ticket", forged)
    code, control = await asyncio.gather(tried(world, order, machine=hardware.MANAGEMENT), _genuine_launcher(world))
    return Outcome(code=code, control=control is None, says="with a ticket by alpha the same enclave is admitted")


async def _ticket(world: World) -> bytes:
    async def write() -> bytes:
        return await asyncio.to_thread(write_ticket, world, world.alpha)

    return await once(world, "launcher ticket", write)


async def _genuine_launcher(world: World) -> str | None:
    async def start() -> str | None:
        order = launcher_guest(world, world.alpha, "second-launcher", await _ticket(world))
        return await tried(world, order, machine=hardware.MANAGEMENT)

    return await once(world, "genuine launcher", start)


def write_ticket(world: World, provider: Provider, *, signed_by: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """A ticket of a provider for a launcher on the management machine, by its own key or somebody else's."""
    ticket = LauncherTicket(
        ledger_id=world.consortium.trust.ledger_id,
        provider=provider.name,
        ticket=secrets.token_bytes(32),
        measurement=guest_image.measure(operating.LAUNCHER_ENTRY),
        chip=open_chip(world.stage.directory / "silicon" / "chips" / hardware.MANAGEMENT).chip_id,
        not_after=now() + _LIFE_S,
    )
    return sign_launcher_ticket(provider.key if signed_by is None else signed_by, ticket)


def launcher_guest(world: World, provider: Provider, name: str, ticket: bytes) -> GuestOrder:
    """A launcher enclave as its parent process orders it."""
    directory = world.stage.path("attacker", "launchers")
    file = directory / f"{name}.ticket"
    file.write_bytes(ticket)
    return launcher_order(
        LauncherSettings(
            provider=provider.name,
            hsm=HSM,
            name=name,
            listen="",
            state=Path(),
            silicon="",
            broker=provider.sessions,
            ticket=file,
            trust=world.trust_file,
        )
    )
