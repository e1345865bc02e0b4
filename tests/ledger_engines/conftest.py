"""A ledger of real processes under each engine, behind one small interface."""

import asyncio
import contextlib
import secrets
import sys
import time
from pathlib import Path

import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[1] / "cometbft"))
sys.path.insert(0, str(Path(__file__).parents[1] / "ledger"))
import networks
import processes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant
from moorline.ledger import ceremony, transactions
from moorline.ledger.client import LedgerClient
from moorline.ledger.genesis import Parameters
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.transactions import Approve, Sender, SenderKind
from moorline.wire import cbor, keys


class Ledger:
    """Four authorities of one engine. Numbers are 1 to 4; 1 is the sequencer where there is one."""

    def __init__(self, engine, made, authorities):
        self.engine, self.made, self.authorities = engine, made, authorities
        self.keys = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in authorities}
        self.providers = {}

    def client(self, *numbers):
        wanted = [f"authority-{number}" for number in numbers or (1, 2, 3, 4)]
        addresses = {f"https://{one.address}": one.name for one in self.made.genesis.authorities}
        by_name = {addresses[one.url]: one for one in self.made.endpoints}
        return LedgerClient([by_name[name] for name in wanted], roots_pem=self.made.roots_pem)

    async def start(self, *numbers):
        for number in numbers:
            await self.authorities[f"authority-{number}"].start()
        for number in numbers:
            await self.authorities[f"authority-{number}"].ready()

    async def kill(self, *numbers):
        await asyncio.gather(*(self.authorities[f"authority-{number}"].kill() for number in numbers))

    async def status(self, number):
        async with self.client(number) as client:
            return cbor.decode(await client._first(lambda one: one.get_bytes("/v1/ledger")))

    async def height(self):
        async with self.client() as client:
            return (await client.checkpoint()).height

    async def proven(self, *wanted, number=None):
        async with self.client(*([number] if number else [])) as client:
            bundle = await client.prove(wanted)
        return verify_bundle(bundle, self.made.trust, now=Instant(int(time.time())))

    async def submit(self, data, *numbers):
        async with self.client(*numbers) as client:
            return await client.submit(data)

    # -- transactions -----------------------------------------------------------------------------------------------------

    def signed(self, kind, name, body, signer, height, **changes):
        values = {
            "sender": Sender(kind=kind, name=name),
            "ledger_id": self.made.genesis.ledger_id,
            "nonce": secrets.token_bytes(32),
            "valid_until": height + 200,
        }
        payload = transactions.make(body, **(values | changes))
        return transactions.sign(payload, signer), payload

    def by_authority(self, number, body, height, **changes):
        name = f"authority-{number}"
        return self.signed(SenderKind.AUTHORITY, name, body, self.keys[name].signer(), height, **changes)

    def by_provider(self, name, body, height, **changes):
        signer = keys.KeySigner(self.providers[name])
        return self.signed(SenderKind.PROVIDER, name, body, signer, height, **changes)[0]

    def admission(self, name):
        key = self.providers[name] = ec.generate_private_key(ec.SECP256R1())
        certificate = ceremony.issue_provider(
            self.keys["authority-1"].ca,
            key.public_key(),
            name=name,
            trust_domain=f"{name}.test",
            now=Instant(int(time.time())),
        )
        return transactions.AdmitProvider(
            name=name, trust_domain=f"{name}.test", certificate=certificate.public_bytes(Encoding.DER)
        )

    async def admit(self, name):
        """The receipt of the approval that admitted it."""
        height = await self.height()
        data, payload = self.by_authority(1, transactions.propose(self.admission(name)), height)
        await self.submit(data)
        approval, _ = self.by_authority(2, Approve(proposal=transactions.proposal_id(payload)), height)
        return await self.submit(approval)


def embedded(directory):
    addresses = processes.free_addresses(networks.NAMES)
    made = ceremony.genesis_ceremony(
        directory,
        names=networks.NAMES,
        consortium_domain=networks.DOMAIN,
        simulated_allowed=True,
        parameters=Parameters(max_age_s=30),
        addresses=addresses,
        now=Instant(int(time.time()) - 1),
    )
    folder = directory / "authorities"
    return Ledger("embedded", made, {name: processes.Authority(name, folder / name) for name in networks.NAMES})


def cometbft(directory):
    found = networks.made_network(directory)
    return Ledger("cometbft", found.made, found.authorities)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["embedded", "cometbft"])
async def ledger(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param) / "ledger"
    found = (embedded if request.param == "embedded" else cometbft)(directory)
    try:
        await found.start(1, 2, 3, 4)
        await found.admit("alpha")
        yield found
    finally:
        for one in found.authorities.values():
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                await one.stop()
