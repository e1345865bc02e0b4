"""Step 3: hosts with TPMs that really booted something, their platform records, the attestation authority, their agents."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.cli.demo import hardware
from moorline.cli.demo.stage import Process
from moorline.cli.demo.world import (
    ELSEWHERE,
    HSM,
    LOCATION,
    ORCHESTRATOR,
    VERIFIER,
    World,
    free_addresses,
    issue,
    now,
    private_pem,
)
from moorline.clock import Instant
from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import transactions as tx
from moorline.nfv import Role
from moorline.policy import ear, reference_values
from moorline.rats import AttestationResult, Tier
from moorline.services import settings
from moorline.services.host import HostSettings
from moorline.services.host_attesting import AttestationSettings
from moorline.services.silicon import SiliconSettings
from moorline.services.verifier_settings import VerifierSettings
from moorline.simulators import firmware
from moorline.simulators.manufacturer import Chip, open_chip
from moorline.simulators.tpm import SimulatedTpm
from moorline.wire import keys
from moorline.wire.http import HttpClient

_MONTH_S: Final = 30 * 24 * 3600
PERIOD_S: Final = 3.0
LEASE_S: Final = 20
STANDING_DEADLINE_S: Final = 25.0


@dataclass(slots=True, kw_only=True)
class Host:
    """One machine of alpha: what it boots, where it stands, and the processes that play it."""

    name: str
    profile: firmware.BootProfile
    location: str
    directory: Path
    tpm: SimulatedTpm | None = None
    chip: Chip | None = None
    silicon: Process | None = None
    agent: Process | None = None
    address: str = ""
    tag: bytes = b""


async def start_hosts(world: World) -> str:
    """Boot h1, h2 and h3, register them, start the verifier and the agents, and wait until each has its verdict."""
    world.facts["hosts"] = {
        name: Host(name=name, profile=profile, location=location, directory=world.stage.path("hosts", name))
        for name, profile, location in (
            ("h1", firmware.GOOD, LOCATION),
            ("h2", firmware.CHANGED_KERNEL, LOCATION),
            ("h3", firmware.GOOD, ELSEWHERE),
            ("h4", firmware.GOOD, LOCATION),
        )
    }
    location_key = ec.generate_private_key(ec.SECP256R1())
    reference_key = ec.generate_private_key(ec.SECP256R1())
    world.facts["location_signer"] = keys.KeySigner(location_key)
    silicons = [start_silicon(world, name) for name in (hardware.MANAGEMENT, *hardware.HOSTS)]
    verifier = await _start_verifier(world, location_key, reference_key)
    await asyncio.gather(*(boot(world, world.facts["hosts"][name]) for name in hardware.HOSTS))
    await asyncio.gather(*(process.wait_ready() for process in (verifier, *silicons)))
    for name in ("h1", "h2", "h3"):
        start_agent(world, world.facts["hosts"][name])
    verdicts = {name: await verdict(world, name) for name in ("h1", "h2", "h3")}
    return "; ".join(f"{name} {_said(result)}" for name, result in verdicts.items())


def host(world: World, name: str) -> Host:
    """A host by name."""
    found: Host = world.facts["hosts"][name]
    return found


def start_silicon(world: World, name: str) -> Process:
    """The (simulated) secure processor of a machine."""
    directory = world.stage.path("silicon", "run", name)
    config = directory / "silicon.toml"
    chip = world.stage.directory / "silicon" / "chips" / name
    settings.write(
        SiliconSettings(listen=world.stage.directory / f"{name}.silicon", chip=chip, state=directory / "state"), config
    )
    process = world.stage.spawn(f"silicon-{name}", "simulate", "silicon", "--config", str(config))
    if name in world.facts["hosts"]:
        host(world, name).silicon = process
        host(world, name).chip = open_chip(chip)
    return process


def silicon_socket(world: World, name: str) -> str:
    """Where the silicon of a machine listens."""
    return str(world.stage.directory / f"{name}.silicon")


async def boot(world: World, one: Host) -> None:
    """Power on: the TPM starts, the firmware simulator measures a boot into it, the provider registers the platform."""
    one.tpm = SimulatedTpm(one.directory / "tpm")
    world.stage.at_end(one.tpm.stop)
    ek_digest = await asyncio.to_thread(_boot, world, one)
    assert one.chip is not None
    await world.alpha.submitter.send(
        tx.RegisterPlatform(
            id=one.name,
            chip_id=one.chip.chip_id,
            product=one.chip.product.value,
            ek_digest=ek_digest,
            location=one.location,
            tag_digest=reference_values.tag_digest(one.tag),
            simulated=True,
        )
    )


def _boot(world: World, one: Host) -> bytes:
    assert one.tpm is not None
    one.tpm.start()
    with Tpm.open(one.tpm.tcti) as tpm:
        ek_digest = ek_digest_of(tpm)
        tag = reference_values.LocationTag(
            host=one.name, ek_digest=ek_digest, location=one.location, not_after=now() + _MONTH_S
        )
        one.tag = reference_values.sign_tag(tag, world.facts["location_signer"])
        (one.directory / "tag.cose").write_bytes(one.tag)
        tpm.write_location(reference_values.tag_digest(one.tag))
        firmware.boot(tpm, one.directory / "logs", one.profile)
    return ek_digest


def ek_digest_of(tpm: Tpm) -> bytes:
    """SHA-256 of the endorsement key's SubjectPublicKeyInfo, as the platform record names it."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(tpm.endorsement().certificates[0])
    spki = certificate.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


async def _start_verifier(
    world: World, location_key: ec.EllipticCurvePrivateKey, reference_key: ec.EllipticCurvePrivateKey
) -> Process:
    directory = world.stage.path("alpha", "verifier")
    await issue(world.alpha, Role.VERIFIER, VERIFIER, directory)
    good = firmware.reference_values(
        firmware.GOOD, name="good", not_before=Instant(now() - 60), not_after=Instant(now() + _MONTH_S)
    )
    (directory / "reference-values.cose").write_bytes(reference_values.sign(good, keys.KeySigner(reference_key)))
    for name, key in (("reference", reference_key), ("location", location_key)):
        (directory / f"{name}-signer.der").write_bytes(keys.public_bytes(key.public_key()))
    await world.alpha.submitter.send(
        tx.RegisterReferenceValues(
            id="good", kind="tpm", digest=hashlib.sha256((directory / "reference-values.cose").read_bytes()).digest()
        )
    )
    settings.write(verifier_settings(world, directory), directory / "verifier.toml")
    return world.stage.spawn("verifier", "verifier", "run", "--config", str(directory / "verifier.toml"))


def verifier_settings(world: World, directory: Path) -> VerifierSettings:
    """Alpha's attestation authority: vendor anchors and, because the genesis allows it, the simulated ones."""
    return VerifierSettings(
        id=VERIFIER,
        listen=world.facts["verifier_address"],
        provider="alpha",
        trust_domain=world.alpha.trust_domain,
        identity_chain=directory / "chain.pem",
        identity_key=directory / "key.pem",
        consortium_roots=world.roots_file,
        database=directory / "verifier.db",
        ledger_trust=world.trust_file,
        ledger_urls=world.ledger_urls(),
        broker_url=f"https://{world.alpha.https}",
        broker_name=world.alpha.name_of(Role.HSM, HSM),
        anchors=("vendor", "simulated"),
        simulated_tpm_roots=(world.stage.directory / "tpm-maker" / "root.der",),
        simulated_snp_roots=(world.stage.directory / "silicon" / "anchors.cbor",),
        reference_values=(directory / "reference-values.cose",),
        reference_signers=(directory / "reference-signer.der", directory / "location-signer.der"),
        lease_s=LEASE_S,
    )


def start_agent(world: World, one: Host) -> None:
    """The agent of a host: attests it, and will start guests for the orchestrator."""
    directory = world.stage.path("hosts", one.name, "agent")
    one.address = one.address or free_addresses(1)[0]
    assert one.tpm is not None
    configured = HostSettings(
        provider="alpha",
        trust_domain=world.alpha.trust_domain,
        id=one.name,
        listen=one.address,
        state=directory / "state",
        silicon=f"unix:{silicon_socket(world, one.name)}",
        orchestrator=ORCHESTRATOR,
        roots=world.roots_file,
        certificate_chain=None,
        private_key=None,
        broker=world.alpha.sessions,
        hsm=HSM,
        trust=world.trust_file,
        ledger_urls=world.ledger_urls(),
        attestation=AttestationSettings(
            tcti=one.tpm.tcti,
            verifier_url=f"https://{world.facts['verifier_address']}",
            verifier_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
            event_log=one.directory / "logs" / firmware.EVENT_LOG,
            ima=one.directory / "logs" / firmware.IMA_LIST,
            tag=one.directory / "tag.cose",
            period_s=PERIOD_S,
        ),
    )
    settings.write(configured, directory / "host.toml")
    one.agent = world.stage.spawn(f"host-{one.name}", "host", "run", "--config", str(directory / "host.toml"))


async def verdict(world: World, name: str) -> AttestationResult:
    """The verifier's standing result about a host, with its signature verified; waits until there is one."""
    identity = world.facts.get("operator")
    if identity is None:
        identity = await issue(world.alpha, Role.OPERATOR, "ann", world.stage.path("alpha", "operator"))
        world.facts["operator"] = identity
    deadline = asyncio.get_running_loop().time() + STANDING_DEADLINE_S
    async with HttpClient(
        f"https://{world.facts['verifier_address']}",
        server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
        roots_pem=world.roots_pem,
        identity=identity,
    ) as client:
        while True:
            try:
                answer: Any = await client.get_json(f"/v1/results/{name}")
                break
            except MoorlineError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise Unavailable(
                        "demo.no_verdict", f"there is no verdict about {name}", got=error, remedy="read the logs of verifier"
                    ) from error
                await asyncio.sleep(0.1)
    assert world.alpha.keys is not None
    return ear.parse_verified(answer["ear"], world.alpha.keys.verifier, now=now(), audience=world.alpha.trust_domain)


def _said(result: AttestationResult) -> str:
    refusal = result.first_refusal()
    if result.status is Tier.AFFIRMING or refusal is None:
        return f"{result.status.word} at {result.bound.get('location', 'no proven location')} (root {result.root})"
    return f"{result.status.word}: {refusal.code}"


def unused_key() -> bytes:
    """A fresh private key as PEM."""
    return private_pem(ec.generate_private_key(ec.SECP256R1()))
