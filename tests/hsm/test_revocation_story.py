"""A device is revoked: openssl sees it by CRL and OCSP, our own ends see it on the ledger, all within the bound printed."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from moorline.clock import SystemClock
from moorline.errors import Refused, Unavailable
from moorline.ledger import peers
from moorline.ledger import transactions as tx
from moorline.ledger.light_client import verify_bundle
from moorline.ledger.records import RevocationKind
from moorline.verification.chains import verify_chain
from moorline.wire import keys

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, free_addresses
from foreign import openssl

MAX_AGE_S = 9
pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alpha(tmp_path_factory):
    consortium = await Consortium.found(tmp_path_factory.mktemp("revocation"), max_age_s=MAX_AGE_S)
    try:
        (listen,) = free_addresses(1)
        provider = await consortium.admit(
            "alpha", listen_revocation=listen, revocation_url=f"http://{listen}", revocation_poll_s=1
        )
        provider.consortium = consortium
        yield provider
    finally:
        await consortium.close()


class Device:
    """A device with a certificate, and what openssl needs to judge it."""

    def __init__(self, folder, alpha, chain):
        self.folder, self.alpha = folder, alpha
        self.base = f"http://{alpha.settings.listen_revocation}"
        self.leaf, *above = x509.load_pem_x509_certificates(chain)
        (folder / "leaf.pem").write_bytes(self.leaf.public_bytes(Encoding.PEM))
        (folder / "between.pem").write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in above))
        (folder / "ca.pem").write_bytes(above[0].public_bytes(Encoding.PEM))
        (folder / "root.pem").write_bytes(alpha.roots_pem)
        self.path = tuple(one.public_bytes(Encoding.DER) for one in (self.leaf, *above))

    @classmethod
    async def made(cls, folder, alpha, name):
        public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
        asked = {"public_key": base64.b64encode(public).decode(), "spiffe_id": f"spiffe://alpha.test/device/{name}"}
        async with alpha.admin() as admin:
            answer = await admin.post_json("/v1/svid", asked)
        return cls(folder, alpha, answer["chain"].encode())

    @property
    def serial(self):
        return f"{self.leaf.serial_number:x}"

    async def run(self, *words):
        return await asyncio.to_thread(openssl, self.folder, *words)

    async def ocsp(self):
        """What `openssl ocsp` says, over POST."""
        words = f"ocsp -issuer ca.pem -cert leaf.pem -CAfile root.pem -verify_other between.pem -url {self.base}/ocsp"
        done = await self.run(*words.split())
        said = done.stdout.partition("leaf.pem: ")[2].split("\n")[0]
        if said:
            assert "Response verify OK" in done.stderr
        return said or (done.stdout + done.stderr).strip()

    async def ocsp_by_get(self):
        await self.run(*["ocsp", "-issuer", "ca.pem", "-cert", "leaf.pem", "-reqout", "request.der", "-no_nonce"])
        asked = quote(base64.b64encode((self.folder / "request.der").read_bytes()).decode(), safe="")
        curl = ("curl", "-sS", "-o", "answer.der", f"{self.base}/ocsp/{asked}")
        done = await asyncio.create_subprocess_exec(*curl, cwd=self.folder)
        assert await done.wait() == 0
        words = "ocsp -issuer ca.pem -cert leaf.pem -respin answer.der -CAfile root.pem -verify_other between.pem -no_nonce"
        return (await self.run(*words.split())).stdout.partition("leaf.pem: ")[2].split("\n")[0]

    async def ocsp_ends(self):
        """When an answer given now ends to be one; None if there is no answer."""
        await self.run(*["ocsp", "-issuer", "ca.pem", "-cert", "leaf.pem", "-reqout", "request.der", "-no_nonce"])
        curl = ("curl", "-sS", "-o", "answer.der", "--data-binary", "@request.der", f"{self.base}/ocsp")
        done = await asyncio.create_subprocess_exec(*curl, cwd=self.folder)
        assert await done.wait() == 0
        answer = ocsp.load_der_ocsp_response((self.folder / "answer.der").read_bytes())
        return answer.next_update_utc if answer.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL else None

    async def by_list(self):
        """What `openssl verify -crl_check` says with the list fetched now."""
        url = self.leaf.extensions.get_extension_for_class(x509.CRLDistributionPoints).value[0].full_name[0].value
        done = await asyncio.create_subprocess_exec("curl", "-sS", "-f", "-o", "ca.crl", url, cwd=self.folder)
        if await done.wait() != 0:
            return "no list"
        await self.run(*["crl", "-inform", "DER", "-in", "ca.crl", "-out", "ca.crl.pem"])
        words = "verify -x509_strict -crl_check -extended_crl -CAfile root.pem -untrusted between.pem"
        done = await self.run(*words.split(), "-CRLfile", "ca.crl.pem", "leaf.pem")
        return "good" if done.returncode == 0 else done.stderr

    async def on_ledger(self):
        """How our own device and function judge it: chain and proof together."""
        alpha, now = self.alpha, SystemClock().now()
        chain = verify_chain(self.path[0], self.path[1:], alpha.consortium.ceremony.trust.roots, now)
        bundle = await alpha.consortium.client.prove(peers.device_keys(chain))
        peers.device_peer(verify_bundle(bundle, alpha.consortium.ceremony.trust, now=SystemClock().now()), chain)


async def within(what, bound_s, *, said):
    """`what()` comes to hold `said`; the bound is how long this waits, not what is asserted."""
    until = time.monotonic() + bound_s + 15
    while time.monotonic() < until:
        found = await what()
        if said in found:
            return
        await asyncio.sleep(0.2)
    pytest.fail(f"still {found}")


async def test_a_device_revoked_on_the_ledger_is_refused_by_everybody_within_the_bound(alpha, tmp_path):
    device = await Device.made(tmp_path, alpha, "phone-1")
    await within(device.ocsp, 5, said="good")
    assert await device.ocsp_by_get() == "good"
    assert await device.by_list() == "good"
    await device.on_ledger()
    issuer = device.leaf.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value[1]
    done = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-o", "issuer.cer", issuer.access_location.value, cwd=tmp_path
    )
    assert await done.wait() == 0
    assert (tmp_path / "issuer.cer").read_bytes() == device.path[1]

    async with alpha.admin() as admin:
        bound = await admin.get_json("/v1/revocation")
    assert (bound["bound_asked_s"], bound["bound_kept_s"]) == (1, 1 + MAX_AGE_S)
    await alpha.submitter.send(tx.Revoke(kind=RevocationKind.DEVICE, id="phone-1"))
    await within(device.ocsp, bound["bound_kept_s"], said="revoked")
    await within(device.by_list, bound["bound_kept_s"], said="certificate revoked")
    assert await device.ocsp_by_get() == "revoked"
    with pytest.raises(Refused, match="ledger.revoked"):
        await device.on_ledger()


async def test_a_certificate_revoked_at_the_broker_is_so_at_once_and_on_the_ledger_soon(alpha, tmp_path):
    device = await Device.made(tmp_path, alpha, "phone-2")
    async with alpha.admin() as admin:
        await within(device.ocsp, 5, said="good")
        await admin.post_json("/v1/certificates/revoke", {"serial": device.serial, "reason": "key_compromise"})
    assert await device.ocsp() == "revoked"
    assert "certificate revoked" in await device.by_list()

    async def ledger():
        try:
            await device.on_ledger()
        except Refused as refusal:
            return refusal.code
        return "good"

    await within(ledger, 5, said="ledger.revoked")


async def test_numbers_rise_and_strangers_are_unknown(alpha, tmp_path):
    device = await Device.made(tmp_path, alpha, "phone-3")
    numbers: list[int] = []
    while len(set(numbers)) < 2 and len(numbers) < 2 * MAX_AGE_S:  # a ledger at rest makes a block every third of max_age
        await device.by_list()
        shown = (await device.run(*["crl", "-in", "ca.crl.pem", "-noout", "-crlnumber"])).stdout
        numbers.append(int(shown.strip().partition("=")[2], 16))
        await asyncio.sleep(1.1)
    assert numbers == sorted(numbers)
    assert numbers[0] < numbers[-1]
    words = f"ocsp -issuer ca.pem -serial 0x1234567 -CAfile root.pem -verify_other between.pem -url {device.base}/ocsp"
    assert "0x1234567: unknown" in (await device.run(*words.split())).stdout


async def test_without_the_ledger_nobody_is_called_good(alpha, tmp_path):
    """verifies that: silence of the ledger ends the answers, it does not make them good."""
    device = await Device.made(tmp_path, alpha, "phone-4")
    await within(device.ocsp, 5, said="good")
    for authority in alpha.consortium.authorities:
        await authority.stop()
    # Each answer is as old as the last look at the ledger, however late it is asked for.
    seen = set()
    while (ends := await device.ocsp_ends()) is not None:
        seen.add(ends)
        await asyncio.sleep(0.5)
    assert len(seen) <= 2, seen  # a look may still have been on its way
    await within(device.ocsp, MAX_AGE_S, said="trylater")
    await within(device.by_list, MAX_AGE_S, said="no list")


async def signed(alpha):
    """What a broker says that is asked for a certificate now: "signed", or why not, and that it says when to ask again."""
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    asked = {"public_key": base64.b64encode(public).decode(), "spiffe_id": "spiffe://alpha.test/device/phone-5"}
    try:
        async with alpha.admin() as admin:
            await admin.post_json("/v1/svid", asked)
    except Unavailable as error:
        assert error.retry_after_s >= 1
        return error.code
    except Refused as error:
        return error.code
    return "signed"


@pytest.mark.long
async def test_a_broker_signs_nothing_that_the_ledger_was_not_seen_to_allow(alpha):
    """verifies that: nothing is signed max_age + poll after the last look, nor by a broker that starts without a ledger.

    For its issuing CA may have been revoked meanwhile, as it was here.
    """
    await within(partial(signed, alpha), MAX_AGE_S, said="issuing.not_seen")
    await alpha.broker.stop(9)
    await alpha.broker.start()
    assert await signed(alpha) == "issuing.not_seen"
    await asyncio.gather(*(authority.start() for authority in alpha.consortium.authorities))
    await within(partial(signed, alpha), MAX_AGE_S, said="signed")
    await alpha.broker.stop(9)
    await alpha.submitter.send(tx.RevokeIssuingCa(id="ca-1"))
    for authority in alpha.consortium.authorities:
        await authority.stop()
    await alpha.broker.start()
    assert await signed(alpha) == "issuing.not_seen"
    await asyncio.gather(*(authority.start() for authority in alpha.consortium.authorities))
    await within(partial(signed, alpha), MAX_AGE_S, said="issuing.ca_revoked")
