"""Steps 1 and 2: the consortium and its two providers; their HSMs and brokers, and how these come to know each other."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Final

from moorline.cli.demo.stage import Stage
from moorline.cli.demo.world import (
    AUTHORITIES,
    CONSORTIUM,
    HSM,
    ISSUING_CA,
    MAX_AGE_S,
    VERIFIER,
    Provider,
    World,
    der,
    free_addresses,
    now,
    pem,
)
from moorline.clock import Instant, Validity
from moorline.hsm import ceremony as hsm_ceremony
from moorline.hsm.provider import certify_hsm, make_provider_key
from moorline.ledger import transactions as tx
from moorline.ledger.ceremony import genesis_ceremony, issue_provider, load_authority
from moorline.ledger.client import LedgerClient, Submitter
from moorline.ledger.genesis import Parameters
from moorline.services import settings
from moorline.simulators.manufacturer import SIMULATED_TCB
from moorline.wire import keys

_YEAR_S: Final = 365 * 24 * 3600
ADMITTED: Final = ("alpha", "beta")


async def found_consortium(stage: Stage) -> World:
    """Genesis, four authority processes, and a client that believes only what three of them signed."""
    stage.spawn("hardware", str(stage.directory), module="moorline.cli.demo.hardware")
    addresses = dict(zip(AUTHORITIES, free_addresses(len(AUTHORITIES)), strict=True))
    consortium = genesis_ceremony(
        stage.path("consortium"),
        names=AUTHORITIES,
        consortium_domain=CONSORTIUM,
        simulated_allowed=True,
        parameters=Parameters(max_age_s=MAX_AGE_S),
        addresses=addresses,
        now=now(),
    )
    processes = [
        stage.spawn(
            name, "authority", "run", "--config", str(consortium.directory / "authorities" / name / "authority.toml")
        )
        for name in AUTHORITIES
    ]
    await asyncio.gather(*(process.wait_ready() for process in processes))
    ledger = LedgerClient(consortium.endpoints, roots_pem=consortium.roots_pem)
    return World(stage=stage, consortium=consortium, ledger=ledger)


async def admit_providers(world: World) -> str:
    """Two authorities admit each provider; what step `ledger` says."""
    heights = [await _admit(world, name) for name in ADMITTED]
    checkpoint = await world.ledger.checkpoint()
    return (
        f"4 authorities, 3 of 4 sign; {' and '.join(ADMITTED)} each admitted by two of them at heights "
        f"{', '.join(map(str, heights))}; head {checkpoint.height}; simulated hardware allowed by genesis"
    )


def authority_submitter(world: World, name: str) -> Submitter:
    """An authority that signs transactions."""
    authority = load_authority(world.consortium.directory / "authorities" / name)
    return Submitter(
        world.ledger,
        sender=tx.Sender(kind=tx.SenderKind.AUTHORITY, name=name),
        signer=authority.signer(),
        ledger_id=world.consortium.trust.ledger_id,
    )


def stranger(world: World, name: str) -> Provider:
    """A provider as it is before admission: with a key and a certificate by an authority, and nothing on the ledger."""
    directory = world.stage.path(name)
    key = make_provider_key(directory / "provider.key.pem")
    authority = load_authority(world.consortium.directory / "authorities" / AUTHORITIES[0])
    certificate = issue_provider(authority.ca, key.public_key(), name=name, trust_domain=f"{name}.test", now=now())
    sessions, https = free_addresses(2)
    return Provider(
        name=name,
        directory=directory,
        key=key,
        certificate=certificate,
        authority=authority.ca.certificate,
        submitter=Submitter(
            world.ledger,
            sender=tx.Sender(kind=tx.SenderKind.PROVIDER, name=name),
            signer=keys.KeySigner(key),
            ledger_id=world.consortium.trust.ledger_id,
        ),
        sessions=sessions,
        https=https,
    )


async def _admit(world: World, name: str) -> int:
    provider = stranger(world, name)
    world.providers[name] = provider
    first, second = (authority_submitter(world, authority) for authority in AUTHORITIES[:2])
    action = tx.AdmitProvider(name=name, trust_domain=provider.trust_domain, certificate=der(provider.certificate))
    _, proposal = await first.send_proposal(action)
    return (await second.approve(proposal)).height


async def start_brokers(world: World) -> str:
    """A token and a broker for each provider, both on the ledger; then each HSM authenticates the other from it."""
    await world.stage.processes["hardware"].wait_done()
    world.facts["verifier_address"] = free_addresses(1)[0]
    for provider in world.providers.values():
        await _set_up_hsm(world, provider)
    await asyncio.gather(*(process.wait_ready() for process in _brokers(world)))
    async with world.alpha.admin() as admin:
        met: Any = await admin.post_json("/v1/peers/connect", {"provider": world.beta.name, "hsm": HSM})
    return (
        "keys made in two SoftHSM2 tokens, certificates on the ledger; "
        f"HSMs met through the ledger alone, transcript {met['transcript'][:16]}"
    )


def _brokers(world: World) -> list[Any]:
    return [provider.broker for provider in world.providers.values() if provider.broker is not None]


async def _set_up_hsm(world: World, provider: Provider) -> None:
    directory = world.stage.path(provider.name, "broker")
    made = await asyncio.to_thread(hsm_ceremony.initialise, directory / "token", label=provider.name)
    provider.keys = made.keys
    started = now()
    certificates = certify_hsm(
        provider.issuer,
        made.keys,
        trust_domain=provider.trust_domain,
        hsm=HSM,
        issuing_ca=ISSUING_CA,
        address=provider.sessions,
        validity=Validity(not_before=Instant(started - 60), not_after=Instant(started + _YEAR_S)),
        serials=(secrets.randbits(120), secrets.randbits(120)),
    )
    (directory / "hsm.pem").write_bytes(pem(certificates.hsm))
    (directory / "issuing-ca.pem").write_bytes(pem(certificates.issuing_ca))
    (directory / "chain.pem").write_bytes(pem(provider.certificate, provider.authority))
    await provider.submitter.send(
        tx.RegisterHsm(
            id=HSM,
            certificate=der(certificates.hsm),
            address=provider.sessions,
            est_url=f"https://{provider.https}/.well-known/est",
            kem_public=made.keys.kem,
            signing_public=keys.public_bytes(made.keys.identity),
            bundle_sequence=1,
        )
    )
    await provider.submitter.send(tx.RegisterIssuingCa(id=ISSUING_CA, certificate=der(certificates.issuing_ca)))
    settings.write(_broker_settings(world, provider, made), directory / "broker.toml")
    provider.broker = world.stage.spawn(
        f"broker-{provider.name}", "broker", "run", "--config", str(directory / "broker.toml")
    )


def _broker_settings(world: World, provider: Provider, made: hsm_ceremony.Ceremony) -> object:
    from moorline.services.broker_settings import BrokerSettings

    directory = provider.directory / "broker"
    has_hosts = provider.name == "alpha"
    return BrokerSettings(
        provider=provider.name,
        trust_domain=provider.trust_domain,
        hsm=HSM,
        issuing_ca=ISSUING_CA,
        token_module=made.location.module,
        token_label=made.location.label,
        token_pin_file=made.location.pin_file,
        softhsm_conf=directory / "token" / "softhsm2.conf",
        database=directory / "broker.db",
        ledger_trust=world.trust_file,
        ledger_urls=world.ledger_urls(),
        roots=world.roots_file,
        hsm_certificate=directory / "hsm.pem",
        issuing_ca_certificate=directory / "issuing-ca.pem",
        authority_certificates=directory / "chain.pem",
        listen_sessions=provider.sessions,
        listen_https=provider.https,
        admin_socket=provider.admin_socket,
        verifier=VERIFIER if has_hosts else None,
        verifier_url=f"https://{world.facts['verifier_address']}" if has_hosts else None,
        snp_anchors=world.stage.directory / "silicon" / "anchors.cbor" if has_hosts else None,
        snp_minimum_tcb=(SIMULATED_TCB.boot_loader, SIMULATED_TCB.tee, SIMULATED_TCB.snp, SIMULATED_TCB.microcode)
        if has_hosts
        else (),
        pool_services=("records",) if has_hosts else (),
    )
