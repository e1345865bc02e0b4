"""Four authorities, each a process with its own key and database, over TLS."""

import asyncio
import dataclasses
import json
import secrets
import sqlite3
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.ledger import batch, ceremony, records, standing, transactions
from moorline.ledger.blocks import verify_receipt
from moorline.ledger.client import LedgerClient, Submitter
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.transactions import AdmitProvider, Sender, SenderKind
from moorline.wire import keys
from moorline.wire.http import ClientIdentity, HttpClient

from .conftest import NAMES, consortium_at, der
from .processes import free_addresses, running

pytestmark = pytest.mark.story


def now():
    return Instant(int(time.time()))


@pytest.fixture
def real(tmp_path):
    """A consortium whose authorities have real addresses and the present time."""
    return consortium_at(tmp_path / "consortium", addresses=free_addresses(NAMES), max_age_s=6, now=now())


def submitter(client, real, name):
    return Submitter(
        client,
        sender=Sender(kind=SenderKind.AUTHORITY, name=name),
        signer=real.authorities[name].signer(),
        ledger_id=real.made.trust.ledger_id,
    )


async def admit(client, real, name):
    key = ec.generate_private_key(ec.SECP256R1())
    domain = f"{name}.test"
    certificate = ceremony.issue_provider(
        real.authorities["authority-1"].ca, key.public_key(), name=name, trust_domain=domain, now=now()
    )
    action = AdmitProvider(name=name, trust_domain=domain, certificate=der(certificate))
    _, proposal = await submitter(client, real, "authority-1").send_proposal(action)
    return await submitter(client, real, "authority-2").approve(proposal)


async def until(condition):
    """Ask again until it holds; pytest's timeout bounds it."""
    while not await condition():  # noqa: ASYNC110 - the condition is in another process
        await asyncio.sleep(0.05)


async def a_changed_database_is_found(real, client, authorities):
    """A record changed behind an authority's back: it does not start again, and the honest quorum goes on."""
    victim = authorities["authority-4"]
    assert await victim.stop() == 0
    with sqlite3.connect(victim.directory / "ledger.db") as database:
        (value,) = database.execute("SELECT value FROM records WHERE key = 'provider/alpha'").fetchone()
        changed = value.replace(b"alpha.test", b"gamma.test", 1)
        assert records.parse(records.ProviderRecord, changed) != records.parse(records.ProviderRecord, value)
        database.execute("UPDATE records SET value = ? WHERE key = 'provider/alpha'", (changed,))
    await victim.start()
    assert await asyncio.wait_for(victim.process.wait(), 30) == 2
    assert "ledger.database_corrupt" in (victim.directory / "log").read_text()
    await admit(client, real, "gamma")


async def test_a_provider_is_admitted_one_authority_is_killed_and_catches_up(real):
    """verifies that: a quorum of processes admits and proves; three go on without the fourth; it catches up on its own."""
    endpoints = real.made.endpoints
    async with (
        running(real.made, NAMES) as authorities,
        LedgerClient(endpoints, roots_pem=real.made.roots_pem) as client,
        LedgerClient([endpoints[-1]], roots_pem=real.made.roots_pem) as fourth,
    ):
        receipt = await admit(client, real, "alpha")
        proven = verify_bundle(await client.prove(standing.provider_keys("alpha")), real.made.trust, now=now())
        assert standing.active_provider(proven, "alpha").trust_domain == "alpha.test"
        assert proven.height >= receipt.height

        await authorities["authority-4"].kill()
        await admit(client, real, "beta")
        with pytest.raises(Unavailable) as caught:
            await fourth.note()
        assert caught.value.code == "peer.unreachable"

        await (await authorities["authority-4"].start()).ready()

        async def caught_up():
            try:
                verify_bundle(await fourth.prove(["provider/beta"]), real.made.trust, now=now()).record("provider/beta")
            except (Unavailable, Refused):
                return False
            return True

        await until(caught_up)
        # ... and it signs again: with another one gone, the quorum needs it.
        await authorities["authority-3"].kill()
        await admit(client, real, "delta")
        await (await authorities["authority-3"].start()).ready()
        await a_changed_database_is_found(real, client, authorities)


async def moor(*arguments):
    """One command of `moor`, as a process: its exit code and output."""
    program = "import sys; from moorline.cli import main; main()"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode() + errors.decode()


async def read_by_command(real):
    """A proof is fetched to a file by one command and verified offline by another; a changed one is refused."""
    directory = real.made.directory
    genesis, trust, bundle = directory / "genesis.cbor", directory / "trust.cbor", directory / "bundle.cbor"
    code, said = await moor(
        "ledger", "prove", "parameter/max_age_s", "provider/zeta", "--genesis", genesis, "--output", bundle
    )
    assert (code, "moor ledger verify" in said) == (0, True), said
    code, said = await moor("ledger", "verify", bundle, "--trust", trust)
    assert (code, "parameter/max_age_s" in said, "proven absent" in said) == (0, True, True), said
    code, said = await moor("ledger", "verify", bundle, "--trust", trust, "--json")
    shown = json.loads(said)["records"]
    assert (code, shown) == (0, {"parameter/max_age_s": {"name": "max_age_s", "value": 6}, "provider/zeta": None})
    data = bytearray(bundle.read_bytes())
    data[-1] ^= 1
    bundle.write_bytes(data)
    code, said = await moor("ledger", "verify", bundle, "--trust", trust)
    assert code in {1, 2}
    assert "[ledger." in said or "[message." in said or "[cbor." in said


async def only_the_sequencer_proposes(real, client):
    """Cosigning takes the sequencer's certificate; odd bytes and numbers on a public route give a typed refusal."""
    second = real.made.endpoints[1]
    chain, key = ceremony.tls_identity(real.authorities["authority-3"], "consortium.test", now=now())
    identities = {
        "http.no_client_certificate": None,
        "ledger.not_sequencer": ClientIdentity(certificate_chain_pem=chain, private_key_pem=key),
    }
    for code, identity in identities.items():
        http = HttpClient(second.url, server_name=second.server_name, roots_pem=real.made.roots_pem, identity=identity)
        async with http:
            with pytest.raises((Refused, NotAuthentic)) as caught:
                await http.post_cbor("/v1/cosign", b"\xa0")
            assert caught.value.code == code
    with pytest.raises(Exception, match="ledger.transaction_malformed"):
        await client.submit(b"\xff" * 100)
    assert (await client.checkpoint()).height >= 1
    http = HttpClient(second.url, server_name=second.server_name, roots_pem=real.made.roots_pem)
    async with http:
        for path in ("/v1/blocks/-1", f"/v1/blocks/{1 << 70}", "/v1/proof", "/v1/nothing"):
            with pytest.raises(MoorlineError) as caught:
                await http.get_bytes(path)
            assert caught.value.code.startswith("http.")


async def several_at_once(real, client, known, receipt):
    """A batch through an authority that does not sequence: an answer to each; too many at once are refused together."""
    bodies = [transactions.Approve(proposal=transactions.proposal_id(transactions.parse(known).payload))]
    bodies += [transactions.propose(transactions.SetParameter(name="max_age_s", value=value)) for value in (10, 11)]
    new = [
        transactions.sign(
            transactions.make(
                body,
                sender=Sender(kind=SenderKind.AUTHORITY, name="authority-3"),
                ledger_id=real.made.trust.ledger_id,
                nonce=secrets.token_bytes(32),
                valid_until=100,
            ),
            real.authorities["authority-3"].signer(),
        )
        for body in bodies
    ]
    found = await client.submit_all([known, b"garbage", *new])
    assert found[0] == receipt
    assert found[1].code == "ledger.transaction_malformed"
    for data, one in zip(new, found[2:], strict=True):
        assert verify_receipt(one, data, real.made.trust).height == one.height
    assert await client.submit_all(new, wait=False) == found[2:]  # they are there already
    second = real.made.endpoints[1]
    async with HttpClient(second.url, server_name=second.server_name, roots_pem=real.made.roots_pem) as http:
        for body in (batch.encode([b""] * (batch.MAX_TRANSACTIONS + 1)), batch.encode([bytes(batch.MAX_BYTES)]), b"\x80"):
            with pytest.raises(Malformed):
                await http.post_cbor("/v1/transactions/batch", body)


async def test_a_receipt_proves_the_transaction_and_a_repeat_gives_the_same(real):
    """verifies that: what a sender gets is provable, sending again is harmless, and empty blocks keep proofs young."""
    async with running(real.made, NAMES), LedgerClient(real.made.endpoints, roots_pem=real.made.roots_pem) as client:
        payload = transactions.make(
            transactions.propose(transactions.SetParameter(name="max_age_s", value=9)),
            sender=Sender(kind=SenderKind.AUTHORITY, name="authority-2"),
            ledger_id=real.made.trust.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=100,
        )
        transaction = transactions.sign(payload, real.authorities["authority-2"].signer())
        receipt = await client.submit(transaction)
        assert verify_receipt(receipt, transaction, real.made.trust).height == receipt.height
        with pytest.raises(NotAuthentic, match="not_included"):
            verify_receipt(receipt, transaction + b"\x00", real.made.trust)
        again = await client.submit(transaction)
        assert again == receipt

        await read_by_command(real)
        await only_the_sequencer_proposes(real, client)

        async def empty_block():
            return (await client.checkpoint()).height > receipt.height + 1

        await until(empty_block)
        # Through an authority that does not sequence, too.
        async with LedgerClient(real.made.endpoints[1:], roots_pem=real.made.roots_pem) as other:
            assert await other.submit(transaction) == again
            await several_at_once(real, other, transaction, again)
            stranger = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
            forged = transactions.sign(dataclasses.replace(payload, nonce=secrets.token_bytes(32)), stranger)
            with pytest.raises(NotAuthentic) as caught:
                await other.submit(forged)
            assert caught.value.code == "ledger.key_unknown"
