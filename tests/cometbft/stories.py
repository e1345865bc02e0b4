"""Transactions for stories on a network of real processes."""

import asyncio
import hashlib
import secrets
import time

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant
from moorline.errors import MoorlineError, Unavailable
from moorline.ledger import ceremony, transactions
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.transactions import AnchorLog, Approve, Sender, SenderKind
from moorline.wire import keys


class Provider:
    """A provider of a network, which writes anchors of its log."""

    def __init__(self, network, name):
        self.network, self.name = network, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.size = 0

    async def admitted(self):
        certificate = ceremony.issue_provider(
            self.network.keys["authority-1"].ca,
            self.key.public_key(),
            name=self.name,
            trust_domain=f"{self.name}.test",
            now=Instant(int(time.time())),
        )
        action = transactions.AdmitProvider(
            name=self.name, trust_domain=f"{self.name}.test", certificate=certificate.public_bytes(Encoding.DER)
        )
        await decide(self.network, action, by=("authority-1", "authority-2"))
        return self

    def anchor(self, *, height=0, log="hsm-1"):
        """A signed anchor of the next size."""
        self.size += 1
        root = hashlib.sha256(f"{log} {self.size}".encode()).digest()
        payload = transactions.make(
            AnchorLog(log=log, size=self.size, root=root),
            sender=Sender(kind=SenderKind.PROVIDER, name=self.name),
            ledger_id=self.network.made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=height + 900,
        )
        return transactions.sign(payload, keys.KeySigner(self.key))


def signed_by(network, name, body, *, key=None):
    payload = transactions.make(
        body,
        sender=Sender(kind=SenderKind.AUTHORITY, name=name),
        ledger_id=network.made.genesis.ledger_id,
        nonce=secrets.token_bytes(32),
        valid_until=900,
    )
    return transactions.sign(payload, (key or network.keys[name]).signer()), payload


async def decide(network, action, by):
    """Propose by the first, approve by the others; the last receipt."""
    async with network.client() as client:
        data, payload = signed_by(network, by[0], transactions.propose(action))
        receipt = await client.submit(data)
        for name in by[1:]:
            data, _ = signed_by(network, name, Approve(proposal=transactions.proposal_id(payload)))
            receipt = await client.submit(data)
    return receipt


async def submit(network, data, *numbers, within_s=60.0):
    """The receipt, asked for again while there is no quorum or no authority."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            async with network.client(*numbers) as client:
                return await client.submit(data)
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


async def proven(network, *keys_, number=None):
    async with network.client(*([number] if number else [])) as client:
        bundle = await client.prove(keys_)
    return verify_bundle(bundle, network.made.trust, now=Instant(int(time.time())))


async def same_roots(network, *numbers, at_least=0, within_s=60.0):
    """The root that all of these authorities have at one height of at least so much."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            heads = await network.heads(*numbers)
        except MoorlineError:
            heads = {}
        found = set(heads.values())
        if len(found) == 1 and next(iter(found))[0] >= at_least:
            return next(iter(found))
        assert time.monotonic() < deadline, heads
        await asyncio.sleep(0.1)
