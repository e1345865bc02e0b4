"""CMP (RFC 9483) driven by Debian's `openssl cmp`: every kind of request, and clients that are wrong or not who they say."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.cli import run as moor
from moorline.clock import Instant, SystemClock, Validity
from moorline.device import cmp as device_cmp
from moorline.errors import Conflict, Misconfigured
from moorline.hsm import root_update
from moorline.nfv import SpiffeId
from moorline.services import broker_cmp
from moorline.services.broker_role import issued
from moorline.storage.broker_cmp import CmpStore, CmpTransaction
from moorline.storage.broker_revocations import RevocationStore
from moorline.wire import cmp, cmp_reply, der, keys
from moorline.wire.certificates import root_certificate, spiffe_id_of
from moorline.wire.cmp import Body

sys.path.insert(0, str(Path(__file__).parent))
from cmp_client import Client, Device, cert_request, confirmation, posted, self_signed
from cmp_samples import by_openssl, pbmac1, sample
from consortium import Consortium, free_addresses
from foreign import openssl
from looking import issuing_ca


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beta(tmp_path_factory):
    consortium = await Consortium.found(tmp_path_factory.mktemp("cmp"))
    try:
        (listen,) = free_addresses(1)
        following = consortium.directory / "next"
        words = ("crl", "renew-root", "--root", str(consortium.directory / "ledger" / "root"), "--output", str(following))
        assert await asyncio.to_thread(moor, list(words)) == 0
        update = following / "root-update.pem"
        made = await consortium.admit("beta", listen_revocation=listen, revocation_poll_s=1, root_update=update)
        made.next_root = following
        yield made
    finally:
        await consortium.close()


@pytest.fixture
def client(beta, tmp_path):
    return Client(tmp_path, beta)


SIGNED = ("-cert", "cert.pem", "-key", "key.pem", "-untrusted", "chain.pem")
story = pytest.mark.asyncio(loop_scope="module")


@story
async def test_ir_with_a_code_and_an_explicit_confirmation(client):
    said = await client.initial("phone-1", "-cacertsout", "ca.pem")
    assert "PKICONF" in said.upper()
    leaf = client.certificate()
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/phone-1"
    assert (client.folder / "ca.pem").read_bytes().count(b"BEGIN CERTIFICATE") >= 1
    words = "verify -x509_strict -CAfile root.pem -untrusted chain.pem cert.pem"
    done = openssl(client.folder, *words.split())
    assert done.returncode == 0, done.stderr
    assert leaf.serial_number not in await client.revoked()


@story
async def test_ir_with_implicit_confirmation(client):
    said = await client.initial("phone-2", "-implicit_confirm")
    assert "PKICONF" not in said.upper()


@story
async def test_cr_kur_and_p10cr_signed_with_the_certificate(client):
    await client.initial("phone-3")
    first = client.certificate().serial_number
    for command, more in (
        ("cr", ("-newkey", "next.pem", "-subject", "/CN=x")),
        ("kur", ("-newkey", "next.pem", "-oldcert", "cert.pem")),
        ("p10cr", ("-csr", "request.pem")),
    ):
        client.key("next")
        openssl(client.folder, *["req", "-new", "-key", "next.pem", "-subj", "/CN=x", "-out", "request.pem"], check=True)
        await client(command, *SIGNED, *more, "-certout", "new.pem")
        made = client.certificate("new.pem")
        assert str(spiffe_id_of(made)) == "spiffe://beta.test/device/phone-3"
        assert made.serial_number != first


@story
async def test_p10cr_with_a_code(client):
    given_code = await client.code("phone-4")
    client.key("key")
    openssl(client.folder, *["req", "-new", "-key", "key.pem", "-subj", "/CN=x", "-out", "request.pem"], check=True)
    words = ("-ref", "phone-4", "-secret", f"pass:{given_code}", "-csr", "request.pem", "-certout", "cert.pem")
    await client("p10cr", *words, "-mac", "hmacWithSHA256")
    assert str(spiffe_id_of(client.certificate())) == "spiffe://beta.test/device/phone-4"


@story
async def test_rr_revokes_the_devices_own_certificate_and_no_other(client, tmp_path_factory, beta):
    await client.initial("phone-5")
    other = Client(tmp_path_factory.mktemp("other"), beta)
    await other.initial("phone-6")
    (client.folder / "theirs.pem").write_bytes((other.folder / "cert.pem").read_bytes())
    said = await client("rr", *SIGNED, "-oldcert", "theirs.pem", "-revreason", "1", ok=False)
    assert "badCertId" in said
    assert "cmp.other_certificate" in said
    await client("rr", *SIGNED, "-oldcert", "cert.pem", "-revreason", "1")
    revoked = await client.revoked()
    assert client.certificate().serial_number in revoked
    assert other.certificate().serial_number not in revoked
    # A revoked certificate signs nothing more.
    client.key("next")
    said = await client("kur", *SIGNED, "-newkey", "next.pem", "-certout", "new.pem", ok=False)
    assert "certRevoked" in said


@story
async def test_genm_tells_the_cas(client):
    await client.initial("phone-7")
    assert "GENP" in (await client("genm", *SIGNED, "-infotype", "caCerts", "-verbosity", "7")).upper()


@story
@pytest.mark.parametrize("asked_for", ["1.3.6.1.5.5.7.4.18", "1.3.6.1.5.5.7.4.20"])
async def test_genm_tells_of_the_next_root(client, asked_for):
    """verifies that: a root that was really renewed is announced by three certificates; openssl follows them both ways."""
    asked = replace(sample()[0], body=Body.GENM, content=der.sequence(der.sequence(der.oid(asked_for))))
    header = cmp_reply._encoded_header(
        replace(asked, time=datetime.now(UTC).strftime("%Y%m%d%H%M%SZ"), transaction=os.urandom(16))
    )
    (client.folder / "genm.der").write_bytes(der.sequence(header, der.tagged(Body.GENM, asked.content)))
    answer = await asyncio.to_thread(posted, client, "genm.der")
    assert answer.body is Body.GENP
    told = (client.beta.next_root / "root-update.pem").read_bytes()
    new, with_old, with_new = x509.load_pem_x509_certificates(told)
    shown = [one.public_bytes(serialization.Encoding.DER) for one in (new, with_old, with_new)]
    assert der.sequence(shown[0], der.tagged(0, shown[1]), der.tagged(1, shown[2])) in answer.content.der
    for name, one in (("new", new), ("with_old", with_old), ("with_new", with_new)):
        (client.folder / f"{name}.pem").write_bytes(one.public_bytes(serialization.Encoding.PEM))
    assert new == x509.load_pem_x509_certificate((client.beta.next_root / "root.pem").read_bytes())
    assert new.public_key() == with_old.public_key() != with_new.public_key()
    await client.initial(f"phone-{20 + int(asked_for[-2:])}")
    for trusted, between, leaf, ok in (
        ("root.pem", (), "with_old.pem", True),
        ("new.pem", ("with_new.pem", "chain.pem"), "cert.pem", True),
        ("new.pem", ("chain.pem",), "cert.pem", False),
    ):
        words = [
            "verify",
            "-x509_strict",
            "-CAfile",
            trusted,
            *(word for name in between for word in ("-untrusted", name)),
            leaf,
        ]
        assert (openssl(client.folder, *words).returncode == 0) is ok, words


def test_what_leads_to_no_other_root_is_not_announced(tmp_path):
    """verifies that: certificates in another order, of another root, or of the same one are refused at the start."""
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    for folder in (old, other):
        key = ec.generate_private_key(ec.SECP384R1())
        now = SystemClock().now()
        life = Validity(not_before=now, not_after=Instant(now + 3600))
        made = root_certificate(key, name="root", validity=life, serial=7)
        folder.mkdir()
        (folder / "root.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / "root.key.pem").write_bytes(key.private_bytes(*form))
    assert moor(["crl", "renew-root", "--root", str(old), "--output", str(new)]) == 0
    assert (new / "root.key.pem").stat().st_mode & 0o077 == 0
    pem = (new / "root-update.pem").read_bytes()
    first, second, third = (one.public_bytes(serialization.Encoding.PEM) for one in x509.load_pem_x509_certificates(pem))
    roots = [
        x509.load_pem_x509_certificate((folder / "root.pem").read_bytes()).public_bytes(serialization.Encoding.DER)
        for folder in (old, other)
    ]
    assert root_update.verify(pem, (roots[0],)).pem() == pem
    own = (old / "root.pem").read_bytes()
    for wrong in (b"", first, first + third + second, second + first + third, own + own + own, pem + first):
        with pytest.raises(Misconfigured, match=r"root_update\.not_one"):
            root_update.verify(wrong, (roots[0],))
    with pytest.raises(Misconfigured):
        root_update.verify(pem, (roots[1],))


@story
async def test_a_code_serves_one_key(client):
    given_code = await client.code("phone-8")
    for name, ok in (("key", True), ("key", True), ("thief", False)):
        if not (client.folder / f"{name}.pem").exists():
            client.key(name)
        words = ("-ref", "phone-8", "-secret", f"pass:{given_code}", "-newkey", f"{name}.pem", "-subject", "/CN=x")
        said = await client("ir", *words, "-certout", "cert.pem", ok=ok)
        assert ok or ("notAuthorized" in said and "est.code_used" in said)


@story
@pytest.mark.parametrize("words", [("-ref", "phone-9", "-secret", "pass:guess"), ("-ref", "nobody", "-secret", "pass:x")])
async def test_a_wrong_code_is_a_bad_message_check(client, words):
    await client.code("phone-9")
    client.key("key")
    enrol = ("-newkey", "key.pem", "-subject", "/CN=x", "-certout", "cert.pem", "-untrusted", "root.pem")
    said = await client("ir", *words, *enrol, "-unprotected_errors", ok=False)
    assert "badMessageCheck" in said
    assert not (client.folder / "cert.pem").exists()


@story
async def test_a_request_without_possession_of_its_key_is_refused(client):
    said = await client.initial("phone-10", "-popo", "-1", ok=False)
    assert "badPOP" in said


@story
async def test_a_stranger_and_a_self_signed_signer_are_not_trusted(client):
    self_signed(client, "key.pem", "cert.pem")
    (client.folder / "chain.pem").write_bytes((client.folder / "cert.pem").read_bytes())
    client.key("next")
    said = await client("cr", *SIGNED, "-newkey", "next.pem", "-subject", "/CN=x", "-certout", "new.pem", ok=False)
    assert "signerNotTrusted" in said


@story
async def test_a_certificate_the_client_rejects_is_revoked(client):
    """verifies that: without its confirmation a certificate does not stay: the client trusts another root, and says no."""
    self_signed(client, "o.key", "other.pem")
    before = await client.revoked()
    await client.initial("phone-11", "-out_trusted", "other.pem", ok=False)
    assert len(await client.revoked() - before) == 1


@story
async def test_a_recorded_request_sent_again_gets_nothing_new(client):
    """verifies that: copies of requests that were answered, with a code or a certificate, waited for or not, get nothing."""
    await client.initial("phone-12", "-reqout", "ir.der,certconf.der")
    client.key("next")
    renewal = ("-newkey", "next.pem", "-oldcert", "cert.pem", "-implicit_confirm")
    await client("kur", *SIGNED, *renewal, "-reqout", "kur.der", "-certout", "new.pem")
    for recorded, code in (
        ("certconf.der", b"cmp.nothing_to_confirm"),
        ("ir.der", b"cmp.transaction_in_use"),
        ("kur.der", b"cmp.transaction_in_use"),
    ):
        answer = await asyncio.to_thread(posted, client, recorded)
        assert answer.body is Body.ERROR
        assert code in answer.content.der
    # Eight copies more than the device's quota are answered the same, and it gets its next certificate as before.
    for _ in range(8):
        assert (await asyncio.to_thread(posted, client, "kur.der")).body is Body.ERROR
    await client("kur", "-cert", "new.pem", "-key", "next.pem", "-untrusted", "chain.pem", *renewal, "-certout", "third.pem")


@story
async def test_nobody_has_a_word_in_the_certificate_of_another_device(client, tmp_path_factory, beta):
    """verifies that: who reads the messages of a device can neither confirm nor reject its certificate."""
    await client.initial("phone-13")
    other = Client(tmp_path_factory.mktemp("other"), beta)
    await other.initial("phone-14")
    mine, theirs = Device(client), Device(other)
    wanted = device_cmp.pkcs10(ec.generate_private_key(ec.SECP256R1()), "phone-13")
    answer = await mine.asks(Body.P10CR, wanted, transaction=b"T" * 16)
    made, nonce = cmp.issued_certificate(answer.content), answer.header.sender_nonce
    for status in (0, 2):
        said = confirmation(made, status=status)
        refused = await theirs.asks(Body.CERTCONF, said, transaction=b"T" * 16, recipient_nonce=nonce)
        assert refused.body is Body.ERROR
        assert b"cmp.other_certificate" in refused.content.der
    in_use = await theirs.asks(Body.P10CR, wanted, transaction=b"T" * 16)
    assert b"cmp.transaction_in_use" in in_use.content.der
    # The control: its own device is heard, first with a nonce that is not the server's, then as it should be.
    wrong = await mine.asks(Body.CERTCONF, confirmation(made), transaction=b"T" * 16, recipient_nonce=b"?" * 16)
    assert b"cmp.recipient_nonce" in wrong.content.der
    good = await mine.asks(Body.CERTCONF, confirmation(made), transaction=b"T" * 16, recipient_nonce=nonce)
    assert good.body is Body.PKICONF
    assert x509.load_der_x509_certificate(made).serial_number not in await client.revoked()


@story
async def test_a_proof_of_possession_by_another_key_is_none(client):
    """verifies that: whoever asks for a certificate over somebody else's key, signed with another, gets none in any form."""
    await client.initial("phone-16")
    device, key, other = Device(client), *(ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    for body in (Body.CR, Body.KUR):
        answer = await device.asks(body, cert_request(key, proven_by=other))
        assert b"cmp.possession" in answer.content.der
    request = bytearray(device_cmp.pkcs10(key, "phone-16"))
    request[-1] ^= 1
    answer = await device.asks(Body.P10CR, bytes(request))
    assert b"est.possession" in answer.content.der
    assert (await device.asks(Body.CR, cert_request(key, proven_by=key))).body is Body.CP


@story
async def test_a_confirmation_of_another_certificate_is_a_rejection(client):
    """verifies that: what the client confirms is this certificate by its hash, or the certificate does not stay."""
    await client.initial("phone-17")
    device, transaction = Device(client), os.urandom(16)
    wanted = device_cmp.pkcs10(ec.generate_private_key(ec.SECP256R1()), "phone-17")
    answer = await device.asks(Body.P10CR, wanted, transaction=transaction)
    nonce, made = answer.header.sender_nonce, cmp.issued_certificate(answer.content)
    said = confirmation(b"another certificate")
    answer = await device.asks(Body.CERTCONF, said, transaction=transaction, recipient_nonce=nonce)
    assert answer.body is Body.PKICONF
    assert x509.load_der_x509_certificate(made).serial_number in await client.revoked()


@story
async def test_a_request_at_another_time_or_in_the_wrong_place_is_refused(client):
    """verifies that: a message of an hour ago or ahead is refused, and so is a first request by who has a certificate."""
    await client.initial("phone-18")
    device, key = Device(client), ec.generate_private_key(ec.SECP256R1())
    wanted = cert_request(key, proven_by=key)
    for late_s in (3600, -3600):
        assert b"cmp.time" in (await device.asks(Body.CR, wanted, late_s=late_s)).content.der
    assert b"cmp.template" in (await device.asks(Body.IR, wanted)).content.der
    assert (await device.asks(Body.CR, wanted, late_s=30)).body is Body.CP


@story
async def test_who_is_no_device_gets_no_devices_certificate(client, beta):
    """verifies that: a certificate of this very broker that names something else signs no request."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
    async with beta.admin() as admin:
        asked = {"public_key": public, "spiffe_id": "spiffe://beta.test/verifier/v1"}
        chain = x509.load_pem_x509_certificates((await admin.post_json("/v1/svid", asked))["chain"].encode())
    pem = serialization.Encoding.PEM
    (client.folder / "cert.pem").write_bytes(chain[0].public_bytes(pem))
    (client.folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain[1:]))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (client.folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    answer = await Device(client).asks(Body.KUR, cert_request(key, proven_by=key))
    assert answer.body is Body.ERROR
    assert b"cmp.signer" in answer.content.der


@pytest.mark.parametrize("transaction", [b"", b"t" * 65])
@story
async def test_a_transaction_of_odd_length_is_refused(client, transaction):
    await client.initial(f"phone-15-{len(transaction)}")
    answer = await Device(client).asks(Body.P10CR, b"\x30\x00", transaction=transaction)
    assert b"cmp.nonce" in answer.content.der


def test_what_nobody_confirmed_is_revoked_whoever_comes_next(store, token, real_now, monkeypatch):
    """verifies that: a certificate given out and never confirmed is revoked in time, without a further request."""
    ca = issuing_ca(token, real_now.signed.issuing_ca, real_now.above)
    named = SpiffeId.parse("spiffe://alpha.test/device/phone-1")
    clock = SimpleNamespace(now=lambda: now)
    broker = SimpleNamespace(store=store, clock=clock, revocations=RevocationStore(store), revoking=asyncio.Event())
    server, now = broker_cmp.Cmp(broker), Instant(SystemClock().now())
    public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    leaf = ca.issue(public, named, now)
    store.record_certificate(issued(leaf, named, public), kind="device-enrolled", at=now)
    serial = f"{leaf.serial:x}"
    hashed = hashlib.sha256(leaf.der).digest()
    CmpStore(store).expect(
        CmpTransaction(transaction=b"t", serial=serial, certificate_hash=hashed, number=0, nonce=b"n", at=now)
    )
    server.sweep()
    assert broker.revocations.find(serial) == (True, None)
    now = Instant(now + 301)
    monkeypatch.setattr(broker_cmp, "_SWEEP_EVERY_S", 0.01)

    async def swept():
        sweeping = asyncio.ensure_future(server.keep_sweeping())
        await asyncio.wait_for(broker.revoking.wait(), 10)
        sweeping.cancel()

    asyncio.run(swept())
    assert broker.revocations.find(serial)[1].reason == "superseded"


def test_a_transaction_is_remembered_for_as_long_as_a_code_can_be_in_force(store):
    kept, now = CmpStore(store), Instant(SystemClock().now())
    kept.use(b"t", at=now)
    for later in (0, 7 * 86400):
        with pytest.raises(Conflict, match=r"cmp\.transaction_in_use"):
            kept.use(b"t", at=Instant(now + later))
    kept.use(b"t", at=Instant(now + 9 * 86400))


@story
@pytest.mark.parametrize("body", [b"", b"\x30\x80\x00\x00", b"\x30\x03\x02\x01\x02", b"\xff" * 300])
async def test_garbage_gets_a_signed_error_message(client, beta, body):
    (client.folder / "body").write_bytes(body)
    answer = await asyncio.to_thread(posted, client, "body")
    assert answer.body is Body.ERROR
    assert answer.protection is not None


@story
async def test_a_device_enrols_with_pbmac1(client):
    """verifies that: p10cr under PBMAC1 gets a certificate in an answer under the same MAC; a wrong code gets none."""
    secret = await client.code("phone-12")
    key = ec.generate_private_key(ec.SECP256R1())
    chosen = {"prf": "sha256", "scheme": "sha512", "salt": b"q" * 16, "iterations": 500, "length": 32}
    asked = cmp_reply.Reply(
        sender=cmp_reply.directory_name(x509.Name([])),
        recipient=cmp_reply.directory_name(x509.Name([])),
        time=datetime.now(UTC).strftime("%Y%m%d%H%M%SZ"),
        algorithm=pbmac1(**chosen),
        reference=b"phone-12",
        transaction=b"t" * 16,
        sender_nonce=b"n" * 16,
        recipient_nonce=None,
        body=Body.P10CR,
        content=device_cmp.pkcs10(key, "phone-12"),
        info=((cmp.IMPLICIT_CONFIRM, b"\x05\x00"),),
    )
    for transaction, code_, body in ((b"u" * 16, "wrong", Body.ERROR), (b"t" * 16, secret, Body.CP)):
        message = replace(asked, transaction=transaction)
        mac = by_openssl(client.folder, code_, cmp_reply.protected_part(message), **chosen)
        (client.folder / "asked.der").write_bytes(cmp_reply.encode(message, mac, ()))
        answer = await asyncio.to_thread(posted, client, "asked.der")
        assert answer.body is body
    assert answer.header.algorithm == asked.algorithm
    assert answer.protection == by_openssl(client.folder, secret, answer.protected, **chosen)
    made = x509.load_der_x509_certificate(cmp.issued_certificate(answer.content))
    assert made.public_key() == key.public_key()
    assert str(spiffe_id_of(made)) == "spiffe://beta.test/device/phone-12"
