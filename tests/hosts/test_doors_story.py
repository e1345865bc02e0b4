"""A stolen issuing CA at the doors of real processes: attestation authority, orchestrator, host agent."""

import asyncio
import secrets
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, SystemClock, Validity
from moorline.errors import MoorlineError
from moorline.ledger import transactions as tx
from moorline.nfv import SpiffeId
from moorline.services import settings
from moorline.services.host import HostSettings
from moorline.services.orchestrator import OrchestratorSettings
from moorline.services.orchestrator_peers import Peer
from moorline.wire import certificates
from moorline.wire.certificates import Issuer
from moorline.wire.http import ClientIdentity, HttpClient

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))
sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, Process, der, free_addresses
from test_process import issued, published, verifier_settings

pytestmark = [pytest.mark.story, pytest.mark.long]
MAX_AGE_S = 6


class Doors:
    """Where alpha's processes listen, and what each tells a caller: None, or the code of its refusal."""

    def __init__(self, consortium, alpha):
        self.consortium, self.alpha, self.at = consortium, alpha, {}

    async def ask(self, door, identity):
        address, name, path = self.at[door]
        async with HttpClient(
            f"https://{address}", server_name=name, roots_pem=self.alpha.roots_pem, identity=identity
        ) as client:
            try:
                await client.get_json(path)
            except MoorlineError as error:
                return error.code
        return None

    async def comes(self, door, identity, code):
        """Wait for an answer, not for a time."""
        async with asyncio.timeout(30):
            said = None
            while said != code:
                said = await self.ask(door, identity)
                await asyncio.sleep(0.1)


def signed(issuer, alpha, uri):
    """An identity under an issuing CA whose key is at hand."""
    now, key = SystemClock().now(), ec.generate_private_key(ec.SECP256R1())
    leaf = certificates.leaf_certificate(
        key.public_key(),
        spiffe_id=SpiffeId.parse(uri),
        issuer=issuer,
        validity=Validity(not_before=Instant(now - 60), not_after=Instant(now + 3000)),
        serial=secrets.randbits(100),
    )
    above = (alpha.directory / "chain.pem").read_bytes()
    chain = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (leaf, issuer.certificate)) + above
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ClientIdentity(certificate_chain_pem=chain, private_key_pem=key.private_bytes(*form))


async def second_ca(alpha):
    """An issuing CA of alpha beside the one in its token, registered like it; its key is what will be stolen."""
    now, key = SystemClock().now(), ec.generate_private_key(ec.SECP256R1())
    made = certificates.issuing_ca_certificate(
        key.public_key(),
        name="ca-9",
        issuer=alpha.issuer,
        validity=Validity(not_before=Instant(now - 60), not_after=Instant(now + 86400)),
        serial=secrets.randbits(100),
    )
    await alpha.submitter.send(tx.RegisterIssuingCa(id="ca-9", certificate=der(made)))
    return Issuer(certificate=made, key=key)


def pem_key(path):
    key = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*form))
    return key


def orchestrator_settings(made, alpha, directory):
    ledger = made.directory / "ledger"
    public = pem_key(directory / "intent.pem").public_key()
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (directory / "verifier.pem").write_bytes(public.public_bytes(*form))
    authorities = (url.split("|") for url in alpha.settings.ledger_urls)
    return OrchestratorSettings(
        provider="alpha",
        trust_domain="alpha.test",
        id="o1",
        hsm="hsm-1",
        listen="127.0.0.1:0",
        state=directory / "state",
        trust=ledger / "trust.cbor",
        roots=ledger / "roots.pem",
        certificate_chain=directory / "chain.pem",
        private_key=directory / "key.pem",
        intent_key=directory / "intent.pem",
        launcher="127.0.0.1:1",
        package_signers=ledger / "roots.pem",
        verifier=Peer(url="https://127.0.0.1:1", server_name="v1.verifier.alpha.test"),
        verifier_key=directory / "verifier.pem",
        ledger=tuple(Peer(url=url, server_name=name) for url, name in authorities),
        hosts=(),
    )


def host_settings(made, alpha, directory):
    ledger = made.directory / "ledger"
    return HostSettings(
        provider="alpha",
        trust_domain="alpha.test",
        id="h1",
        listen=free_addresses(1)[0],
        state=directory / "state",
        silicon=f"unix:{directory}/none.sock",
        orchestrator="o1",
        roots=ledger / "roots.pem",
        trust=ledger / "trust.cbor",
        ledger_urls=alpha.settings.ledger_urls,
        certificate_chain=directory / "chain.pem",
        private_key=directory / "key.pem",
        broker=None,
        hsm=None,
        attestation=None,
    )


async def served(made, alpha, maker, tmp_path):
    """The three processes with identities of the token's CA, and their doors."""
    found, folders = {}, {}
    for role, name in (("verifier", "v1"), ("orchestrator", "o1"), ("host", "h1")):
        folders[role] = tmp_path / role
        await issued(alpha, f"spiffe://alpha.test/{role}/{name}", folders[role])
    published(folders["verifier"], SystemClock().now())
    written = {
        "verifier": verifier_settings(made, alpha, folders["verifier"], maker),
        "orchestrator": orchestrator_settings(made, alpha, folders["orchestrator"]),
        "host": host_settings(made, alpha, folders["host"]),
    }
    for role, one in written.items():
        settings.write(one, folders[role] / f"{role}.toml")
        found[role] = Process((role, "run", "--config", str(folders[role] / f"{role}.toml")), folders[role] / "log")
    await asyncio.gather(*(process.start() for process in found.values()))
    doors = Doors(made, alpha)
    paths = {"verifier": ("v1", "/v1/hosts"), "orchestrator": ("o1", "/v1/functions"), "host": ("h1", "/v1/guests")}
    for role, (name, path) in paths.items():
        doors.at[role] = (found[role].said["address"], f"{name}.{role}.alpha.test", path)
    return found, doors


async def test_what_a_thief_of_an_issuing_ca_signs_opens_no_door(maker, tmp_path):
    """verifies that: RevokeIssuingCa ends the thief at each process; who stands under another CA goes on at each.

    And then: RevokeOrchestrator ends the orchestrator's certificate at each that takes one;
    without any authority the honest go on until max_age, and are asked to wait afterwards.
    """
    made = await Consortium.found(tmp_path, max_age_s=MAX_AGE_S)
    processes = {}
    try:
        alpha = await made.admit("alpha", verifier="v1", verifier_url="https://127.0.0.1:1")
        processes, doors = await served(made, alpha, maker, tmp_path)
        thief, honest = await second_ca(alpha), {}
        stolen = {}
        for door, who in (("verifier", "orchestrator/o1"), ("orchestrator", "operator/ann"), ("host", "orchestrator/o1")):
            uri = f"spiffe://alpha.test/{who}"
            honest[door] = await issued(alpha, uri, tmp_path / f"honest-{door}")
            stolen[door] = signed(thief, alpha, uri)
            assert await doors.ask(door, honest[door]) is None
            assert await doors.ask(door, stolen[door]) is None  # the theft is not known yet
        await alpha.submitter.send(tx.RevokeIssuingCa(id="ca-9"))
        for door, identity in stolen.items():
            await doors.comes(door, identity, "http.issuing_ca")
            assert await doors.ask(door, honest[door]) is None
        await alpha.submitter.send(tx.RevokeOrchestrator(id="o1"))
        for door in ("verifier", "host"):
            await doors.comes(door, honest.pop(door), "ledger.orchestrator_not_active")
        assert await doors.ask("orchestrator", honest["orchestrator"]) is None  # an operator
        for authority in made.authorities:
            await authority.stop(9)
        for door, identity in honest.items():
            await doors.comes(door, identity, "http.standing_unknown")
    finally:
        for process in processes.values():
            await process.stop()
        await made.close()
