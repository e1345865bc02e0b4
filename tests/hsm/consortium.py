"""A consortium of two authorities and brokers of providers, all real processes; what the stories of brokers share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, SystemClock, Validity
from moorline.hsm.ceremony import Ceremony as HsmCeremony
from moorline.hsm.ceremony import initialise
from moorline.hsm.custody import Circle
from moorline.hsm.provider import certify_hsm, make_provider_key
from moorline.ledger import transactions as tx
from moorline.ledger.ceremony import Ceremony, genesis_ceremony, issue_provider, load_authority
from moorline.ledger.client import LedgerClient, Submitter
from moorline.ledger.genesis import Parameters
from moorline.nfv import Role, SpiffeId
from moorline.services import settings
from moorline.services.broker_settings import BrokerSettings
from moorline.services.token_owner import TokenOwnerSettings
from moorline.wire import keys
from moorline.wire.certificates import Issuer, dns_name
from moorline.wire.http import ClientIdentity, HttpClient

AUTHORITIES = ("authority-1", "authority-2")


def free_addresses(count: int) -> list[str]:
    """Loopback addresses, all held at once so that none is given twice."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found.append(f"127.0.0.1:{sock.getsockname()[1]}")
        return found


@dataclass
class Process:
    """A `moor ... run`."""

    arguments: tuple[str, ...]
    log: Path
    running: Any = None
    said: dict[str, Any] = field(default_factory=dict)

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", "import sys; from moorline.cli import main; main()"),
                *self.arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        line = await asyncio.wait_for(self.running.stdout.readline(), 40)
        assert line, self.log.read_text()
        self.said = json.loads(line)
        assert self.said["ready"] is True

    async def stop(self, number: int = signal.SIGTERM) -> int:
        if self.running is None or self.running.returncode is not None:
            return 0
        self.running.send_signal(number)
        return await asyncio.wait_for(self.running.wait(), 20)


@dataclass
class Provider:
    """One provider with its broker."""

    name: str
    directory: Path
    issuer: Issuer
    hsm: HsmCeremony
    submitter: Submitter
    broker: Process
    settings: BrokerSettings
    roots_pem: bytes
    owner: Process | None = None
    orchestrators: set[str] = field(default_factory=set)

    @property
    def trust_domain(self) -> str:
        return f"{self.name}.test"

    @property
    def server_name(self) -> str:
        return dns_name(SpiffeId(trust_domain=self.trust_domain, role=Role.HSM, segments=("hsm-1",)))

    def admin(self) -> HttpClient:
        return HttpClient("http://broker", server_name="", roots_pem=b"", uds=str(self.settings.admin_socket))

    async def register(self, uri: str) -> None:
        """What the ledger must know of a name before its certificate opens doors: that there is such an orchestrator."""
        name = SpiffeId.parse(uri)
        if name.role is Role.ORCHESTRATOR and name.trust_domain == self.trust_domain and uri not in self.orchestrators:
            self.orchestrators.add(uri)
            key = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
            await self.submitter.send(tx.RegisterOrchestrator(id=name.segments[0], public_key=key))

    def https(self, identity: ClientIdentity | None = None) -> HttpClient:
        return HttpClient(
            f"https://{self.broker.said['https']}",
            server_name=self.server_name,
            roots_pem=self.roots_pem,
            identity=identity,
        )


@dataclass
class Consortium:
    """The ledger with its two authorities, and providers by name."""

    directory: Path
    ceremony: Ceremony
    authorities: list[Process]
    client: LedgerClient
    providers: dict[str, Provider] = field(default_factory=dict)

    @classmethod
    async def found(cls, directory: Path, *, max_age_s: int = 30) -> Consortium:
        made = genesis_ceremony(
            directory / "ledger",
            names=AUTHORITIES,
            consortium_domain="consortium.test",
            simulated_allowed=True,
            parameters=Parameters(max_age_s=max_age_s),
            addresses=dict(zip(AUTHORITIES, free_addresses(2), strict=True)),
            now=SystemClock().now(),
        )
        folders = [directory / "ledger" / "authorities" / name for name in AUTHORITIES]
        processes = [
            Process(("authority", "run", "--config", str(folder / "authority.toml")), folder / "log") for folder in folders
        ]
        await asyncio.gather(*(process.start() for process in processes))
        return cls(directory, made, processes, LedgerClient(made.endpoints, roots_pem=made.roots_pem))

    async def admit(
        self, name: str, *, start: bool = True, owned: bool = False, circle: Circle | None = None, **changes
    ) -> Provider:
        """Admit a provider, set its HSM up, register it, start its broker; `owned`: its token in a process of its own."""
        folder = self.directory / name
        folder.mkdir()
        now = SystemClock().now()
        authority = load_authority(self.directory / "ledger" / "authorities" / AUTHORITIES[0])
        key = make_provider_key(folder / "provider.key.pem")
        certificate = issue_provider(authority.ca, key.public_key(), name=name, trust_domain=f"{name}.test", now=now)
        issuer = Issuer(certificate=certificate, key=key)
        hsm = await asyncio.to_thread(initialise, folder / "token", label=name, circle=circle)
        sessions, https = free_addresses(2)
        validity = Validity(not_before=Instant(now - 60), not_after=Instant(now + 86400))
        signed = certify_hsm(
            issuer,
            hsm.keys,
            trust_domain=f"{name}.test",
            hsm="hsm-1",
            issuing_ca="ca-1",
            address=sessions,
            validity=validity,
            serials=(secrets.randbits(100), secrets.randbits(100)),
        )
        await self._admit_on_ledger(name, certificate)
        submitter = Submitter(
            self.client,
            sender=tx.Sender(kind=tx.SenderKind.PROVIDER, name=name),
            signer=keys.KeySigner(key),
            ledger_id=self.ceremony.trust.ledger_id,
        )
        await submitter.send(
            tx.RegisterHsm(
                id="hsm-1",
                certificate=der(signed.hsm),
                address=sessions,
                est_url=f"https://{https}/.well-known/est",
                kem_public=hsm.keys.kem,
                signing_public=keys.public_bytes(hsm.keys.identity),
                bundle_sequence=1,
            )
        )
        await submitter.send(tx.RegisterIssuingCa(id="ca-1", certificate=der(signed.issuing_ca)))
        for file, certificates in {
            "hsm.pem": (signed.hsm,),
            "issuing-ca.pem": (signed.issuing_ca,),
            "chain.pem": (certificate, authority.ca.certificate),
        }.items():
            (folder / file).write_bytes(b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates))
        owner = await self._own(folder, hsm) if owned else None
        if owner is not None:
            changes["token_owner"] = folder / "owner.sock"
        chosen = replace(self._settings(name, folder, hsm, sessions, https), **changes)
        settings.write(chosen, folder / "broker.toml")
        process = Process(("broker", "run", "--config", str(folder / "broker.toml")), folder / "log")
        provider = Provider(name, folder, issuer, hsm, submitter, process, chosen, self.ceremony.roots_pem, owner)
        self.providers[name] = provider
        if start:
            await process.start()
        return provider

    async def close(self) -> None:
        for provider in self.providers.values():
            await provider.broker.stop()
            if provider.owner is not None:
                await provider.owner.stop()
        await self.client.aclose()
        for authority in self.authorities:
            await authority.stop()

    async def _own(self, folder: Path, hsm: HsmCeremony) -> Process:
        wanted = TokenOwnerSettings(
            token_module=hsm.location.module,
            token_label=hsm.location.label,
            token_pin_file=hsm.location.pin_file,
            softhsm_conf=Path(hsm.location.environment["SOFTHSM2_CONF"]),
            socket=folder / "owner.sock",
        )
        settings.write(wanted, folder / "token.toml")
        process = Process(("hsm", "serve", "--config", str(folder / "token.toml")), folder / "owner-log")
        await process.start()
        return process

    def authority_submitter(self, name: str) -> Submitter:
        authority = load_authority(self.directory / "ledger" / "authorities" / name)
        return Submitter(
            self.client,
            sender=tx.Sender(kind=tx.SenderKind.AUTHORITY, name=name),
            signer=authority.signer(),
            ledger_id=self.ceremony.trust.ledger_id,
        )

    async def _admit_on_ledger(self, name: str, certificate) -> None:
        await self.decide(tx.AdmitProvider(name=name, trust_domain=f"{name}.test", certificate=der(certificate)))

    async def decide(self, action) -> None:
        """An action of the authorities together."""
        first, second = (self.authority_submitter(each) for each in AUTHORITIES)
        _, proposal = await first.send_proposal(action)
        await second.approve(proposal)

    def _settings(self, name: str, folder: Path, hsm: HsmCeremony, sessions: str, https: str) -> BrokerSettings:
        ledger = self.directory / "ledger"
        return BrokerSettings(
            provider=name,
            trust_domain=f"{name}.test",
            hsm="hsm-1",
            issuing_ca="ca-1",
            token_module=hsm.location.module,
            token_label=hsm.location.label,
            token_pin_file=hsm.location.pin_file,
            softhsm_conf=Path(hsm.location.environment["SOFTHSM2_CONF"]),
            database=folder / "broker.db",
            ledger_trust=ledger / "trust.cbor",
            ledger_urls=tuple(f"{one.url}|{one.server_name}" for one in self.ceremony.endpoints),
            roots=ledger / "roots.pem",
            hsm_certificate=folder / "hsm.pem",
            issuing_ca_certificate=folder / "issuing-ca.pem",
            authority_certificates=folder / "chain.pem",
            listen_sessions=sessions,
            listen_https=https,
            admin_socket=folder / "admin.sock",
            proof_reuse_s=0.0,  # the stories revoke, and look at once
        )


def der(certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)
