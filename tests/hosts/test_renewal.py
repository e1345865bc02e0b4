"""A verifier whose certificate is renewed while it serves: hosts that are connected notice nothing, bad files do no harm."""

import asyncio
import ssl

import pytest
from structlog.testing import capture_logs
from test_service import PKI, by_chain_alone, composed, configured, silicon, trust  # noqa: F401 - fixtures

from moorline.clock import SystemClock
from moorline.errors import Misconfigured
from moorline.services import verifier, verifier_anchors, verifier_routes

OWN = "spiffe://alpha.test/verifier/v1"
OTHER = "spiffe://alpha.test/verifier/v2"


@pytest.fixture
async def address(configured, world, monkeypatch):  # noqa: F811
    """A verifier that looks at its files all the time."""
    monkeypatch.setattr(verifier, "IDENTITY_REREAD_S", 0.02)
    monkeypatch.setattr(verifier, "IDENTITY_RETRY_S", 0.02)
    anchors = verifier_anchors.read_anchors(configured, trust())
    authority = composed(configured, world, anchors)
    app = verifier_routes.application(
        authority, anchors, trust_domain="alpha.test", clock=SystemClock(), guard=by_chain_alone
    )
    bound = asyncio.get_running_loop().create_future()

    def ready(_, *, address):
        bound.set_result(address)

    task = asyncio.create_task(verifier._serve(configured, app, PKI.roots_pem, ready))
    yield await bound
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Kept:
    """One connection, and the certificate it was made under."""

    async def open(self, address):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=PKI.roots_pem.decode())
        host, _, port = address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname="v1.verifier.alpha.test"
        )
        self.shown = ssl.DER_cert_to_PEM_cert(
            self.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        ).encode()
        return self

    async def ask(self):
        """The status line of an answer over this very connection."""
        self.writer.write(b"GET /healthz HTTP/1.1\r\nhost: v1\r\n\r\n")
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self.reader.readexactly(int(length.partition(b":")[2]))
        return head.partition(b"\r\n")[0].strip()

    def close(self):
        self.writer.close()


async def shown(address):
    """The certificate whoever connects now sees."""
    connection = await Kept().open(address)
    assert b" 200" in await connection.ask()
    connection.close()
    return connection.shown


def write(configured, *, chain=None, key=None):  # noqa: F811
    if key is not None:
        configured.identity_key.write_bytes(key)
    if chain is not None:
        configured.identity_chain.write_bytes(chain)


async def comes(address, chain):
    """Wait for a certificate, not for a time."""
    async with asyncio.timeout(10):
        while await shown(address) != chain:  # noqa: ASYNC110 - what is waited for is in another task
            await asyncio.sleep(0.01)


async def refused(logs, code, more=2):
    """Wait until the verifier has looked at what is there and refused it, several times."""
    async with asyncio.timeout(10):
        while sum(one.get("code") == code for one in logs) < more:  # noqa: ASYNC110 - what is waited for is a log
            await asyncio.sleep(0.01)


async def test_a_renewal_is_shown_to_who_connects_and_hangs_up_on_nobody(address, configured):  # noqa: F811
    """verifies that: a kept connection is served before and after, and who connects afterwards sees the new certificate."""
    first, second = configured.identity_chain.read_bytes(), PKI.identity(OWN)
    kept = await Kept().open(address)
    assert kept.shown == first
    assert b" 200" in await kept.ask()
    with capture_logs() as logs:
        write(configured, chain=second.certificate_chain_pem, key=second.private_key_pem)
        await comes(address, second.certificate_chain_pem)
    assert second.certificate_chain_pem != first
    assert {one["event"] for one in logs} <= {"no new identity, the one in use stays"}  # between the two writes
    assert b" 200" in await kept.ask()
    kept.close()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("a certificate cut off", "verifier.identity"),
        ("a chain cut off", "verifier.identity"),
        ("a key cut off", "verifier.identity"),
        ("a key of another certificate", "verifier.identity"),
        ("nothing", "verifier.identity"),
        ("somebody else's", "verifier.identity"),
        ("no file", "verifier.unreadable"),
    ],
)
async def test_a_renewal_that_cannot_be_used_changes_nothing_and_is_said(address, configured, bad, code):  # noqa: F811
    """verifies that: the certificate in use stays, the log says why and holds no key, and the next good one is shown."""
    first, second, other = configured.identity_chain.read_bytes(), PKI.identity(OWN), PKI.identity(OTHER)
    chain, key = second.certificate_chain_pem, second.private_key_pem
    kept = await Kept().open(address)
    with capture_logs() as logs:
        {
            "a certificate cut off": lambda: write(configured, chain=chain[:200], key=key),
            "a chain cut off": lambda: write(configured, chain=chain + first[:200], key=key),
            "a key cut off": lambda: write(configured, key=key[:100]),
            "a key of another certificate": lambda: write(configured, key=key),
            "nothing": lambda: write(configured, chain=b"", key=b""),
            "somebody else's": lambda: write(configured, chain=other.certificate_chain_pem, key=other.private_key_pem),
            "no file": configured.identity_chain.unlink,
        }[bad]()
        await refused(logs, code)
        assert await shown(address) == first
        assert b" 200" in await kept.ask()
    said = [one for one in logs if one.get("code") == code]
    assert {(one["event"], one["log_level"]) for one in said} == {("no new identity, the one in use stays", "warning")}
    assert not any("PRIVATE KEY" in str(one) for one in said)
    write(configured, chain=chain, key=key)
    await comes(address, chain)
    assert b" 200" in await kept.ask()
    kept.close()


def test_a_verifier_does_not_start_with_half_an_identity(configured):  # noqa: F811
    """verifies that: at the start there is nothing to keep, so the same files are refused in words."""
    write(configured, key=PKI.identity(OWN).private_key_pem)
    with pytest.raises(Misconfigured) as refusal:
        verifier._identity(configured)
    assert refusal.value.code == "verifier.identity"
