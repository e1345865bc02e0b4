"""Steps 4 to 8: launcher, package, placement, launch, contract; as alpha's operator does them, over real interfaces."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

import moorline
from moorline.cli.demo import hardware, hosting
from moorline.cli.demo.world import (
    CONTRACT,
    HSM,
    LOCATION,
    ORCHESTRATOR,
    SERVICE,
    USE_CASE,
    VERIFIER,
    World,
    free_addresses,
    issue,
    now,
    pem,
    private_pem,
)
from moorline.clock import Instant, Validity
from moorline.errors import Refused, Unavailable, from_problem
from moorline.hsm.provider import sign_launcher_ticket
from moorline.ledger import transactions as tx
from moorline.ledger.records import PackageRule
from moorline.nfv import Role
from moorline.orchestration import package as packages
from moorline.orchestration.descriptor import FUNCTION_FILE, Descriptor
from moorline.services import settings
from moorline.services.launcher_parent import LauncherSettings
from moorline.services.orchestrator import OrchestratorSettings
from moorline.services.orchestrator_peers import NamedHost, Peer
from moorline.simulators import guest_image
from moorline.simulators.manufacturer import open_chip
from moorline.wire import keys
from moorline.wire.http import HttpClient
from moorline.wire.session import LauncherTicket

LAUNCHER_ENTRY: Final = "moorline.services.launcher"
FUNCTION_ENTRY: Final = "moorline.workload_agent"
TENANT: Final = "clinic"
CONDITIONS: Final = (
    'permit(principal, action == Moorline::Action::"connect", resource) when { principal.provider == "beta" };'
)
_TICKET_LIFE_S: Final = 300
_PUBLISHER_LIFE_S: Final = 365 * 24 * 3600
LAUNCH_DEADLINE_S: Final = 30.0


async def start_launcher(world: World) -> str:
    """A one-time ticket by the provider, and the launcher enclave on the management machine's silicon."""
    directory = world.stage.path("alpha", "launcher")
    chip = open_chip(world.stage.directory / "silicon" / "chips" / hardware.MANAGEMENT)
    measurement = await asyncio.to_thread(guest_image.measure, LAUNCHER_ENTRY)
    ticket = LauncherTicket(
        ledger_id=world.consortium.trust.ledger_id,
        provider="alpha",
        ticket=secrets.token_bytes(32),
        measurement=measurement,
        chip=chip.chip_id,
        not_after=now() + _TICKET_LIFE_S,
    )
    (directory / "ticket.cose").write_bytes(sign_launcher_ticket(world.alpha.key, ticket))
    world.facts["launcher_address"] = free_addresses(1)[0]
    configured = LauncherSettings(
        provider="alpha",
        hsm=HSM,
        name="launcher-1",
        listen=world.facts["launcher_address"],
        state=directory / "state",
        silicon=f"unix:{hosting.silicon_socket(world, hardware.MANAGEMENT)}",
        broker=world.alpha.sessions,
        ticket=directory / "ticket.cose",
        trust=world.trust_file,
    )
    settings.write(configured, directory / "launcher.toml")
    await world.stage.start("launcher", "launcher", "run", "--config", str(directory / "launcher.toml"))
    return (
        f"SIMULATED SEV-SNP guest, measurement {measurement.hex()[:16]}…, ticket used once; "
        "launch key and lease received over the attested session"
    )


async def onboard_package(world: World) -> str:
    """The package is built and signed by its publisher, registered for the service, and onboarded."""
    key = ec.generate_private_key(ec.SECP256R1())
    publisher = packages.Publisher(certificate=_publisher_certificate(key, "records publisher"), key=key)
    csar = packages.build(records_package(), publisher)
    digest = packages.package_digest(csar)
    measurement = await asyncio.to_thread(guest_image.measure, FUNCTION_ENTRY)
    world.facts.update(csar=csar, package=digest.hex(), measurement=measurement, package_digest=digest)
    await world.alpha.submitter.send(
        tx.RegisterService(
            name=SERVICE,
            use_case=USE_CASE,
            packages=(PackageRule(package_digest=digest, measurement=measurement),),
            profiles=("tls",),
            callers=("beta",),
        )
    )
    await _start_orchestrator(world, pem(publisher.certificate))
    answer = await onboard(world, csar)
    return f"{answer['service']} {answer['version']}, use case {answer['use_case']}, digest {answer['digest'][:16]}…"


def records_package() -> packages.PackageContent:
    """The sample function: a small records service."""
    return packages.PackageContent(
        descriptor=Descriptor(
            service=SERVICE,
            provider="alpha",
            version="1.0",
            use_case=USE_CASE,
            jurisdiction=LOCATION,
            memory_mib=256,
            pids=64,
            artifact=FUNCTION_FILE,
        ),
        function=_sample("records/function.py"),
        release=now(),
    )


def signed_by_stranger() -> bytes:
    """The same package under the signature of somebody alpha does not know."""
    key = ec.generate_private_key(ec.SECP256R1())
    return packages.build(
        records_package(), packages.Publisher(certificate=_publisher_certificate(key, "records publisher"), key=key)
    )


async def onboard(world: World, csar: bytes) -> dict[str, Any]:
    """POST /v1/packages as alpha's operator."""
    import json

    async with orchestrator(world) as client:
        body = await client.send("POST", "/v1/packages", content=csar, headers={"content-type": "application/zip"})
    answer: dict[str, Any] = json.loads(body)
    return answer


def orchestrator(world: World) -> HttpClient:
    """The orchestrator's interface, as alpha's operator."""
    return HttpClient(
        f"https://{world.facts['orchestrator_address']}",
        server_name=world.alpha.name_of(Role.ORCHESTRATOR, ORCHESTRATOR),
        roots_pem=world.roots_pem,
        identity=world.facts["operator"],
    )


async def _start_orchestrator(world: World, package_signers: bytes) -> None:
    directory = world.stage.path("alpha", "orchestrator")
    await issue(world.alpha, Role.ORCHESTRATOR, ORCHESTRATOR, directory)
    intent_key = ec.generate_private_key(ec.SECP256R1())
    world.facts["intent_key"] = intent_key
    intent_file = directory / "intent.key.pem"
    intent_file.touch(mode=0o600)
    intent_file.write_bytes(private_pem(intent_key))
    (directory / "package-signers.pem").write_bytes(package_signers)
    assert world.alpha.keys is not None
    (directory / "verifier.pem").write_bytes(_public_pem(world.alpha.keys.verifier))
    await world.alpha.submitter.send(
        tx.RegisterOrchestrator(id=ORCHESTRATOR, public_key=keys.public_bytes(intent_key.public_key()))
    )
    world.facts["orchestrator_address"] = free_addresses(1)[0]
    hosts: dict[str, hosting.Host] = world.facts["hosts"]
    for one in hosts.values():
        one.address = one.address or free_addresses(1)[0]
    configured = OrchestratorSettings(
        provider="alpha",
        trust_domain=world.alpha.trust_domain,
        id=ORCHESTRATOR,
        hsm=HSM,
        listen=world.facts["orchestrator_address"],
        state=directory / "state",
        trust=world.trust_file,
        roots=world.roots_file,
        certificate_chain=directory / "chain.pem",
        private_key=directory / "key.pem",
        intent_key=intent_file,
        launcher=world.facts["launcher_address"],
        package_signers=directory / "package-signers.pem",
        verifier=Peer(
            url=f"https://{world.facts['verifier_address']}", server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER)
        ),
        verifier_key=directory / "verifier.pem",
        ledger=tuple(Peer(url=one.url, server_name=one.server_name) for one in world.consortium.endpoints),
        hosts=tuple(
            NamedHost(id=one.name, url=f"https://{one.address}", server_name=world.alpha.name_of(Role.HOST, one.name))
            for one in hosts.values()
        ),
    )
    settings.write(configured, directory / "orchestrator.toml")
    await world.stage.start("orchestrator", "orchestrator", "run", "--config", str(directory / "orchestrator.toml"))


async def explain_placement(world: World) -> str:
    """Which host may run the package, and why the others may not."""
    async with orchestrator(world) as client:
        answer: Any = await client.post_json("/v1/placement/explain", {"package": world.facts["package"]})
    others = {verdict["host"]: verdict["code"] for verdict in answer["verdicts"] if not verdict["eligible"]}
    if answer["chosen"] != "h1" or not {"h2", "h3"} <= set(others):
        raise Refused(
            "demo.placement_unexpected", "the orchestrator chose otherwise than the story goes", expected="h1", got=answer
        )
    refused = ", ".join(f"{name} refused: {others[name]}" for name in ("h2", "h3"))
    return f"use case {USE_CASE} needs {len(answer['profile'])} capabilities of a host; chosen h1; {refused}"


async def launch_function(world: World) -> str:
    """The orchestrator launches the function on h1 and reports it active."""
    async with orchestrator(world) as client:
        created: Any = await client.post_json(
            "/v1/functions",
            {
                "service": SERVICE,
                "package": world.facts["package"],
                "tenant": TENANT,
                "contracts": [CONTRACT],
                "id": "records-1",
            },
        )
        function = await _until_settled(client, created["id"])
    if function["state"] != "active":
        raise from_problem(function["problem"])
    world.facts["function"] = function
    return f"{function['spiffe_id']} on {function['host']}, key pair from the pool, token consumed"


async def _until_settled(client: HttpClient, instance: str) -> Any:  # noqa: ANN401 - JSON
    deadline = asyncio.get_running_loop().time() + LAUNCH_DEADLINE_S
    while True:
        function: Any = await client.get_json(f"/v1/functions/{instance}")
        if function["state"] in ("active", "failed"):
            return function
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable("demo.launch_slow", "the function did not become active in time", got=function["state"])
        await asyncio.sleep(0.05)


async def agree_contract(world: World) -> str:
    """Alpha offers, beta accepts."""
    offered = await world.alpha.submitter.send(
        tx.OfferAccess(contract=CONTRACT, service=SERVICE, grantee="beta", conditions=CONDITIONS, profiles=("tls",))
    )
    accepted = await world.beta.submitter.send(tx.AcceptAccess(contract=CONTRACT))
    return f"offered by alpha at height {offered.height}, accepted by beta at {accepted.height}, conditions in Cedar"


def _sample(name: str) -> bytes:
    inside = Path(moorline.__file__).parent / "examples" / name
    return (inside if inside.exists() else Path(moorline.__file__).parents[2] / "examples" / name).read_bytes()


def _publisher_certificate(key: ec.EllipticCurvePrivateKey, name: str) -> Any:  # noqa: ANN401 - x509.Certificate
    life = Validity(not_before=Instant(now() - 60), not_after=Instant(now() + _PUBLISHER_LIFE_S))
    return packages.publisher_certificate(key, name=name, validity=life, serial=secrets.randbits(120))


def _public_pem(key: keys.PublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
