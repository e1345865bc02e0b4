"""The issuing CA is replaced, first in peace and then because it was stolen: two broker processes, one token, one database.

One story: each test goes on where the one before it ended. The token is in an owner process, so new keys are made through
its socket. The thief has what a thief of a CA key has: signatures of it over whatever he likes.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moorline.clock import Instant, SystemClock, Validity
from moorline.device import enrolment
from moorline.device.store import DeviceStore
from moorline.errors import MoorlineError, Refused
from moorline.hsm.issuing import IssuingCa
from moorline.hsm.token import RemoteToken
from moorline.ledger import peers
from moorline.ledger import transactions as tx
from moorline.ledger.client import Endpoint
from moorline.ledger.light_client import verify_bundle
from moorline.nfv import SpiffeId
from moorline.services import settings
from moorline.verification.chains import verify_chain
from moorline.wire import certificates, keys, schema
from moorline.wire.http import ClientIdentity, HttpClient
from moorline.wire.session import Activation

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Process, der, free_addresses
from looking import issuing_ca
from test_revocation_story import Device
from test_sessions import built, svid

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


class Two:
    """Alpha with two broker processes, what they issued, and a thief."""

    def __init__(self, world, second: Process) -> None:
        self.world, self.second = world, second
        self.alpha = world.alpha
        self.sockets = (self.alpha.settings.admin_socket, self.alpha.directory / "admin-2.sock")
        self.folder = self.alpha.directory

    def admin(self, number: int) -> HttpClient:
        return HttpClient("http://broker", server_name="", roots_pem=b"", uds=str(self.sockets[number]))

    def https(self, number: int, identity: ClientIdentity | None = None) -> HttpClient:
        address = (self.alpha.broker.said["https"], self.second.said["https"])[number]
        name, roots = self.alpha.server_name, self.alpha.roots_pem
        return HttpClient(f"https://{address}", server_name=name, roots_pem=roots, identity=identity)

    async def replace_ca(self, name: str) -> x509.Certificate:
        """Begin, certify, register and activate another issuing CA, all at the first broker."""
        async with self.admin(0) as admin:
            begun = await admin.post_json("/v1/hsm/keys/rotate", {"role": "issuing-ca"})
            now = SystemClock().now()
            made = certificates.issuing_ca_certificate(
                keys.parse_public(base64.b64decode(begun["public_key"])),
                name=name,
                issuer=self.alpha.issuer,
                validity=Validity(not_before=Instant(now - 60), not_after=Instant(now + 86400)),
                serial=secrets.randbits(100),
            )
            await self.alpha.submitter.send(tx.RegisterIssuingCa(id=name, certificate=der(made)))
            pem = made.public_bytes(serialization.Encoding.PEM).decode()
            answer = await admin.post_json("/v1/hsm/keys/activate", {"label": begun["label"], "certificate": pem})
            assert answer["state"] == "active"
        return made

    async def issued_under(self, number: int) -> str:
        """The issuing CA of a certificate that a broker signs now, or why it signs none."""
        public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
        asked = {"public_key": base64.b64encode(public).decode(), "spiffe_id": "spiffe://alpha.test/operator/o-1"}
        try:
            async with self.admin(number) as admin:
                answer = await admin.post_json("/v1/svid", asked)
        except MoorlineError as error:
            return error.code
        issuer = x509.load_pem_x509_certificate(answer["certificate"].encode()).issuer
        return issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value

    def stolen(self, label: str, certificate: x509.Certificate) -> IssuingCa:
        """The issuing CA's key in the hands of a thief: whoever has the HSM's socket has its signatures."""
        token = RemoteToken(self.folder / "owner.sock")
        above = tuple(der(one) for one in x509.load_pem_x509_certificates((self.folder / "chain.pem").read_bytes()))
        return issuing_ca(token, certificate, above, life_s=3000, label=label)  # a thief asks no ledger

    def forged(self, ca: IssuingCa, name: str, *, serial: int | None = None) -> ClientIdentity:
        if serial is not None:
            ca._serials._drawn = [serial]
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = ca.issue(
            keys.public_bytes(key.public_key()), SpiffeId.parse(f"spiffe://alpha.test/{name}"), SystemClock().now()
        )
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, *form)
        return ClientIdentity(certificate_chain_pem=leaf.pem_chain(), private_key_pem=pem)

    async def served(self, number: int, ca: x509.Certificate) -> str:
        """Whether a broker hands out this CA (EST cacerts)."""
        async with self.https(number) as client:
            answer = await client.send("GET", "/.well-known/est/cacerts", headers={})
        return "served" if der(ca) in enrolment.certificates_of(answer) else "gone"

    async def retiring(self, number: int, identity: ClientIdentity) -> str:
        """What an operator with this certificate is told who wants to end an instance that is not there."""
        async with self.https(number, identity) as client:
            try:
                await client.post_json("/v1/instances/none-1/retire", {"generation": 1, "reason": "a test"})
            except MoorlineError as error:
                return error.code
        return "done"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ca")
    lists, other_lists, sessions, https = free_addresses(4)
    more = {"listen_revocation": lists, "revocation_url": f"http://{lists}", "revocation_poll_s": 1}
    async with built(directory, owned=True, **more) as world:
        alpha = world.alpha
        changed = replace(
            alpha.settings,
            listen_sessions=sessions,
            listen_https=https,
            listen_revocation=other_lists,
            admin_socket=alpha.directory / "admin-2.sock",
        )
        settings.write(changed, alpha.directory / "broker-2.toml")
        second = Process(("broker", "run", "--config", str(alpha.directory / "broker-2.toml")), alpha.directory / "log-2")
        await second.start()
        yield Two(world, second)
        await second.stop()


async def comes(what, said: str) -> None:
    """`what()` comes to say `said`; how long that takes is the bound's business, not this test's."""
    until = time.monotonic() + 30
    while (found := await what()) != said:
        assert time.monotonic() < until, found
        await asyncio.sleep(0.1)


async def device(two, name: str) -> DeviceStore:
    """A device that enrolled over EST with its code."""
    store = DeviceStore(directory=two.folder / name)
    trust = two.world.consortium.ceremony.trust
    store.provision(trust, two.world.consortium.ceremony.endpoints)
    async with two.admin(0) as admin:
        code = (await admin.post_json("/v1/enrolment-codes", {"device": name}))["code"]
    url = f"https://{two.alpha.broker.said['https']}"
    now = SystemClock().now()
    await enrolment.enrol(store, url=url, server_name=two.alpha.server_name, device=name, code=code, now=now)
    return store


async def renewed(two, store: DeviceStore, number: int) -> str:
    """The issuing CA after a renewal at one of the brokers."""
    address = (two.alpha.broker.said["https"], two.second.said["https"])[number]
    home: Endpoint = replace(store.home(), url=f"https://{address}")
    now = SystemClock().now()
    chain = await enrolment.renew(store, url=home.url, server_name=home.server_name, now=now)
    return chain.leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


async def judged(two, path: tuple[bytes, ...]) -> None:
    """How every end that asks the ledger judges a certificate: chain and proof together."""
    consortium = two.world.consortium
    chain = verify_chain(path[0], path[1:], consortium.ceremony.trust.roots, SystemClock().now())
    bundle = await consortium.client.prove(peers.device_keys(chain))
    peers.device_peer(verify_bundle(bundle, consortium.ceremony.trust, now=SystemClock().now()), chain)


def seen_by_openssl(two, store: DeviceStore, name: str) -> Device:
    folder = two.folder / f"openssl-{name}"
    folder.mkdir()
    two.alpha.consortium = two.world.consortium
    return Device(folder, two.alpha, (store.directory / "chain.pem").read_bytes())


async def test_the_other_process_follows_a_rotation(two):
    """verifies that: a CA activated at one broker signs at the other too, without a restart, both serving both chains."""
    two.first_ca = x509.load_pem_x509_certificate((two.folder / "issuing-ca.pem").read_bytes())
    two.phone = await device(two, "phone-1")
    two.watched = seen_by_openssl(two, two.phone, "one")
    two.function = await two.world.function(two.world.fields())
    assert [await two.issued_under(number) for number in (0, 1)] == ["ca-1", "ca-1"]
    made = await two.replace_ca("ca-2")
    assert await two.issued_under(0) == "ca-2"
    await comes(lambda: two.issued_under(1), "ca-2")
    for number in (0, 1):
        assert [await two.served(number, ca) for ca in (two.first_ca, made)] == ["served", "served"]


async def test_a_retiring_ca_answers_for_its_own_certificates(two):
    """verifies that: CRL and OCSP of the old CA stay fresh by openssl's word, and name what is revoked of it, only there."""
    assert await two.watched.ocsp() == "good"
    assert await two.watched.by_list() == "good"
    other = await device(two, "phone-2")
    theirs = seen_by_openssl(two, other, "two")
    assert await theirs.ocsp() == "good"
    async with two.admin(0) as admin:
        await admin.post_json("/v1/certificates/revoke", {"serial": theirs.serial, "reason": "key_compromise"})
    await comes(theirs.ocsp, "revoked")
    assert "revoked" in await theirs.by_list()
    assert await two.watched.by_list() == "good"
    old = x509.load_der_x509_crl((two.watched.folder / "ca.crl").read_bytes())
    new = x509.load_der_x509_crl((theirs.folder / "ca.crl").read_bytes())
    assert (len(old), len(new)) == (0, 1)
    assert old.is_signature_valid(two.first_ca.public_key())
    # Asked about the old CA's certificate under the new CA's name: one that it never made.
    words = f"ocsp -issuer ca.pem -serial 0x{two.watched.serial} -CAfile root.pem -verify_other between.pem"
    said = await theirs.run(*words.split(), "-url", f"{theirs.base}/ocsp")
    assert ": unknown" in said.stdout


async def test_a_stolen_ca_ends_everywhere(two):
    """verifies that: RevokeIssuingCa ends what the thief made at both brokers, on CRL, OCSP and ledger, devices go on."""
    thief = two.stolen("issuing-ca", two.first_ca)
    operator = two.forged(thief, "operator/o-9")
    honest = await svid(two.alpha, "spiffe://alpha.test/operator/o-1")
    refused = await two.retiring(0, operator)
    assert refused == await two.retiring(0, honest) != "http.issuing_ca"  # the theft is not known yet
    path = two.watched.path
    await judged(two, path)

    await two.alpha.submitter.send(tx.RevokeIssuingCa(id="ca-1"))
    with pytest.raises(Refused) as caught:
        await judged(two, path)
    assert caught.value.code == "ledger.issuing_ca_not_active"
    for number in (0, 1):
        await comes(lambda number=number: two.retiring(number, operator), "http.issuing_ca")
        assert await two.retiring(number, honest) == refused
        await comes(lambda number=number: two.served(number, two.first_ca), "gone")  # from the next look on
    await comes(two.watched.by_list, "no list")
    assert "unauthorized" in await two.watched.ocsp()

    assert await renewed(two, two.phone, 1) == "ca-2"  # the genuine certificate still fetches the next one
    await judged(two, two.phone.identity().chain)
    two.world.verifier = await svid(two.alpha, "spiffe://alpha.test/verifier/v1")  # the provider's services renew too
    function = schema.decode(Activation, await two.function.call("renew", b""))
    issuer = x509.load_der_x509_certificate(function.certificate).issuer
    assert issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "ca-2"
    assert function.chain[0] != der(two.first_ca)


async def test_what_a_thief_makes_enrols_nowhere(two):
    """verifies that: a forged certificate of a device that exists, though it chains, gets none under the new CA."""
    thief = two.stolen("issuing-ca", two.first_ca)
    genuine = x509.load_der_x509_certificate(two.phone.identity().chain[0])
    await enrols_nowhere(two, two.forged(thief, "device/phone-1"))
    await enrols_nowhere(two, two.forged(thief, "device/phone-1", serial=genuine.serial_number))


async def enrols_nowhere(two, forged):
    mine = DeviceStore(directory=two.folder / "thief")
    trust = two.world.consortium.ceremony.trust
    mine.provision(trust, two.world.consortium.ceremony.endpoints)
    (mine.directory / "key.pem").write_bytes(forged.private_key_pem)
    (mine.directory / "chain.pem").write_bytes(forged.certificate_chain_pem)
    mine.keep_home(two.phone.home())
    with pytest.raises(Refused) as caught:
        await renewed(two, mine, 0)
    assert caught.value.code == "est.certificate_unknown"


async def test_without_a_ca_that_counts_nothing_is_signed(two):
    """verifies that: where the active CA itself is revoked, both brokers sign nothing until another one is activated."""
    await two.alpha.submitter.send(tx.RevokeIssuingCa(id="ca-2"))
    for number in (0, 1):
        await comes(lambda number=number: two.issued_under(number), "issuing.ca_revoked")
    await two.replace_ca("ca-3")
    for number in (0, 1):
        await comes(lambda number=number: two.issued_under(number), "ca-3")
    assert await renewed(two, two.phone, 0) == "ca-3"
    await two.function.aclose()
