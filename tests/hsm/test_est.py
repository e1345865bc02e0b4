"""EST (RFC 7030) with clients that know nothing of us: curl, openssl, strongSwan's `pki`; every way in, and wrong ones."""

from __future__ import annotations

import asyncio
import base64
import email
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from moorline.ledger import transactions as tx
from moorline.ledger.records import RevocationKind
from moorline.wire import cms
from moorline.wire.certificates import spiffe_id_of

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium, free_addresses
from foreign import Curl, Strongswan, csr, issue, openssl

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("est")
    maker = folder / "maker"
    maker.mkdir()
    issue(
        maker,
        "root",
        "/O=Maker/CN=Maker root",
        extensions="basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign",
    )
    issue(maker, "idevid", "/O=Maker/serialNumber=SN-0001", ca="root")
    issue(maker, "stranger", "/O=Maker/serialNumber=SN-0002", ca="root")
    issue(maker, "unnumbered", "/O=Maker/CN=x", ca="root")
    issue(maker, "svid", "/O=Maker/CN=x", ca="root", extensions="subjectAltName=URI:spiffe://beta.test/device/phone-1")
    issue(maker, "elsewhere", "/O=Elsewhere/serialNumber=SN-0001")
    consortium = await Consortium.found(folder)
    try:
        (listen,) = free_addresses(1)
        provider = await consortium.admit(
            "beta",
            listen_bootstrap=listen,
            manufacturer_roots=maker / "root.pem",
            device_certificates=5,
            revocation_poll_s=1,
        )
        provider.maker = maker
        yield provider
    finally:
        await consortium.close()


@pytest.fixture
def curl(beta, tmp_path):
    return Curl(tmp_path, beta.broker.said["https"], beta.server_name, str(beta.settings.roots))


@pytest.fixture
def bootstrap(beta, tmp_path):
    return Curl(tmp_path, beta.broker.said["bootstrap"], beta.server_name, str(beta.settings.roots))


async def post(provider, path, body):
    async with provider.admin() as admin:
        return await admin.post_json(path, body)


async def code(provider, device):
    return (await post(provider, "/v1/enrolment-codes", {"device": device}))["code"]


def chain(folder, curl, leaf):
    """The leaf with what cacerts says stands above it, for a TLS client."""
    above = curl("cacerts").certificates(folder)
    pem = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (leaf, *above))
    (folder / "chain.pem").write_bytes(pem)


async def test_every_operation_also_below_the_label_of_the_issuing_ca(beta, curl, tmp_path):
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "labelled")
    (leaf,) = curl.post("ca-1/simpleenroll", "d", "-u", f"labelled:{given}").certificates(tmp_path)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/labelled"
    assert len(curl("ca-1/cacerts").certificates(tmp_path)) == 4
    assert curl("ca-1/csrattrs").headers["content-type"] == "application/csrattrs"
    assert curl("ca-2/cacerts").status == 403
    assert curl("ca-2/cacerts").code == "http.no_such_route"


@pytest.mark.parametrize(
    ("path", "type_", "status", "code_"),
    [
        ("fullcmc", "application/pkcs7-mime; smime-type=CMC-request", 501, "est.not_offered"),
        ("simpleenroll", "application/pkcs10", 401, "est.unauthorised"),
        ("simpleenroll", "text/plain", 400, "est.media_type"),
        ("simplereenroll", "application/pkcs10", 401, "http.no_client_certificate"),
        ("serverkeygen", "application/pkcs10", 401, "est.unauthorised"),
    ],
)
async def test_what_is_not_offered_or_not_allowed_says_so_as_the_rfc_does(beta, curl, tmp_path, path, type_, status, code_):
    csr(tmp_path, "d", "/CN=x")
    answer = curl(path, "-H", f"Content-Type: {type_}", "--data-binary", "@d.b64")
    assert (answer.status, answer.code) == (status, code_)
    assert ("www-authenticate" in answer.headers) is (code_ == "est.unauthorised")


async def test_a_request_in_one_line_of_base64_and_one_in_many_are_the_same(beta, curl, tmp_path):
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "one-line")
    der = (tmp_path / "d.der").read_bytes()
    for text in (base64.b64encode(der), base64.encodebytes(der), base64.encodebytes(der).replace(b"\n", b"\r\n")):
        (tmp_path / "d.b64").write_bytes(text)
        assert curl.post("simpleenroll", "d", "-u", f"one-line:{given}").status == 200


async def test_a_key_made_by_the_server_and_the_certificate_before_is_revoked(beta, curl, tmp_path):
    """verifies that: serverkeygen gives key and certificate that belong together; asked again, the first is revoked."""
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "tiny-1")
    serials = []
    for _ in range(2):
        answer = curl.post("serverkeygen", "d", "-u", f"tiny-1:{given}")
        assert answer.status == 200, answer.body
        kind = answer.headers["content-type"]
        message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + answer.body)
        key_part, certificate_part = message.get_payload()
        assert key_part.get_content_type() == "application/pkcs8"
        assert certificate_part.get_content_type() == "application/pkcs7-mime"
        (tmp_path / "made.der").write_bytes(key_part.get_payload(decode=True))
        openssl(tmp_path, *["pkey", "-inform", "DER", "-in", "made.der", "-out", "made.pem"], check=True)
        (tmp_path / "p7.der").write_bytes(certificate_part.get_payload(decode=True))
        openssl(tmp_path, *["pkcs7", "-inform", "DER", "-in", "p7.der", "-print_certs", "-out", "leaf.pem"], check=True)
        (leaf,) = x509.load_pem_x509_certificates((tmp_path / "leaf.pem").read_bytes())
        key = serialization.load_pem_private_key((tmp_path / "made.pem").read_bytes(), password=None)
        assert key.public_key() == leaf.public_key()
        serials.append(f"{leaf.serial_number:x}")
    async with beta.https() as client:
        listed = x509.load_der_x509_crl(await client.get_bytes("/crl/ca-1.crl"))
    revoked = {f"{one.serial_number:x}": one for one in listed}
    assert serials[0] in revoked
    assert serials[1] not in revoked
    # The new identity re-enrols, also for another key made by the server.
    (tmp_path / "own.pem").write_bytes((tmp_path / "made.pem").read_bytes())
    chain(tmp_path, curl, leaf)
    shown = ("--cert", "chain.pem", "--key", "own.pem")
    assert curl.post("simplereenroll", "d", *shown).status == 200
    assert curl.post("serverkeygen", "d", *shown).status == 200
    # That revoked the certificate just shown, so it is not taken any more.
    answer = curl.post("simplereenroll", "d", *shown)
    assert (answer.status, answer.code) == (403, "est.certificate_revoked")
    # Another key with the same code is a thief's.
    csr(tmp_path, "thief", "/CN=x")
    assert curl.post("serverkeygen", "thief", "-u", f"tiny-1:{given}").code == "est.code_used"


def wanting(folder, key, identifier, *, which="54", tag=_ASN1Type.OctetString):
    """d.b64: a request that names the key to which a private key is to be encrypted (RFC 7030 4.4.1)."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    oid = x509.ObjectIdentifier(f"1.2.840.113549.1.9.16.2.{which}")
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_attribute(oid, identifier, _tag=tag)
    der = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    (folder / "d.b64").write_bytes(base64.b64encode(der))


def opened_by_openssl(folder, answer, key):
    """The private key in an answer, as openssl decrypts it with `key` and verifies who made it."""
    kind = answer.headers["content-type"]
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + answer.body)
    key_part, certificate_part = message.get_payload()
    assert key_part.get_content_type() == "application/pkcs7-mime"
    assert key_part.get_param("smime-type") == "server-generated-key"
    (folder / "envelope.der").write_bytes(key_part.get_payload(decode=True))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "reader.pem").write_bytes(key.private_bytes(*form))
    words = "cms -decrypt -inform DER -in envelope.der -inkey reader.pem -out signed.der"
    done = openssl(folder, *words.split())
    if done.returncode != 0:
        return None
    (folder / "info.der").write_bytes(cms.content_info((folder / "signed.der").read_bytes()))
    words = "cms -verify -inform DER -in info.der -CAfile root.pem -purpose any -out package.der"
    openssl(folder, *words.split(), check=True)
    package = (folder / "package.der").read_bytes()
    made = serialization.load_der_private_key(package[2:] if package[1] < 0x80 else package[2 + (package[1] & 0x7F) :], None)
    (folder / "p7.der").write_bytes(certificate_part.get_payload(decode=True))
    openssl(folder, *["pkcs7", "-inform", "DER", "-in", "p7.der", "-print_certs", "-out", "leaf.pem"], check=True)
    (leaf,) = x509.load_pem_x509_certificates((folder / "leaf.pem").read_bytes())
    assert leaf.public_key() == made.public_key()
    return made


async def test_a_key_made_by_the_server_is_encrypted_to_the_key_that_is_named(beta, curl, tmp_path):
    """verifies that: openssl opens the envelope with the named key and no other, and sees the issuing CA's signature."""
    (tmp_path / "root.pem").write_bytes(beta.roots_pem)
    key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    given = await code(beta, "tiny-3")
    wanting(tmp_path, key, cms.key_identifier(key.public_key()))
    answer = curl.post("serverkeygen", "d", "-u", f"tiny-3:{given}")
    assert answer.status == 200, answer.body
    made = opened_by_openssl(tmp_path, answer, key)
    assert made is not None
    assert opened_by_openssl(tmp_path, answer, other) is None
    raw = made.private_numbers().private_value.to_bytes(32, "big")
    assert raw not in answer.body
    assert base64.b64encode(raw)[:40] not in answer.body
    # With TLS client authentication the key of the certificate shown can be named: the one that was just made.
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "own.pem").write_bytes(made.private_bytes(*form))
    (leaf,) = x509.load_pem_x509_certificates((tmp_path / "leaf.pem").read_bytes())
    chain(tmp_path, curl, leaf)
    wanting(tmp_path, other, cms.key_identifier(made.public_key()))
    again = curl.post("serverkeygen", "d", "--cert", "chain.pem", "--key", "own.pem")
    assert again.status == 200, again.body
    assert opened_by_openssl(tmp_path, again, made) is not None
    assert opened_by_openssl(tmp_path, again, other) is None


@pytest.mark.parametrize(
    ("wanted", "status", "code_"),
    [
        ({"identifier": b"key"}, 403, "est.key_encryption"),
        ({"identifier": b"k" * 20}, 403, "est.key_encryption"),
        ({"identifier": b"key", "which": "37"}, 403, "est.key_encryption"),
        ({"identifier": b"key", "tag": _ASN1Type.UTF8String}, 400, "est.key_identifier"),
        ({"identifier": b""}, 400, "est.key_identifier"),
        ({"identifier": b"k" * 65}, 400, "est.key_identifier"),
    ],
)
async def test_a_request_for_an_encrypted_key_is_never_answered_in_the_clear(beta, curl, tmp_path, wanted, status, code_):
    """verifies that: a key nobody showed, a shared key, and a name of another form are refused, and use no code up."""
    wanting(tmp_path, ec.generate_private_key(ec.SECP256R1()), **wanted)
    given = await code(beta, "tiny-2")
    answer = curl.post("serverkeygen", "d", "-u", f"tiny-2:{given}")
    assert (answer.status, answer.code) == (status, code_)


async def test_an_installers_account_over_http_basic(beta, curl, tmp_path):
    account = await post(
        beta, "/v1/enrolment-accounts", {"name": "crew", "prefix": "meter-", "devices": 2, "ttl_s": 600, "approval": False}
    )
    user = f"{account['user']}:{account['password']}"
    csr(tmp_path, "d", "/CN=meter-1")
    (leaf,) = curl.post("simpleenroll", "d", "-u", user).certificates(tmp_path)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/meter-1"
    csr(tmp_path, "other", "/CN=meter-1")
    assert curl.post("simpleenroll", "other", "-u", user).code == "est.device_known"
    csr(tmp_path, "phone", "/CN=phone-1")
    assert curl.post("simpleenroll", "phone", "-u", user).code == "est.other_device"
    answer = curl.post("simpleenroll", "d", "-u", f"{account['user']}:guess")
    assert (answer.status, answer.code) == (401, "est.credentials")
    csr(tmp_path, "nameless", "/O=x")
    assert curl.post("simpleenroll", "nameless", "-u", user).code == "est.no_subject"


async def test_a_person_approves_and_the_client_asks_again(beta, curl, tmp_path):
    """verifies that: 202 with Retry-After while nobody decided, then the certificate, or a refusal (RFC 7030 4.2.3)."""
    body = {"name": "slow", "prefix": "gate-", "devices": 5, "ttl_s": 600, "approval": True}
    account = await post(beta, "/v1/enrolment-accounts", body)
    user = f"{account['user']}:{account['password']}"
    for device, approved in (("gate-1", True), ("gate-2", False)):
        csr(tmp_path, device, f"/CN={device}")
        answer = curl.post("simpleenroll", device, "-u", user)
        assert answer.status == 202
        assert int(answer.headers["retry-after"]) > 0
        await post(beta, "/v1/enrolments/decide", {"device": device, "approved": approved})
        answer = curl.post("simpleenroll", device, "-u", user)
        assert answer.status == (200 if approved else 403)


async def test_a_manufacturers_certificate_opens_the_bootstrap_door_only(beta, curl, bootstrap, tmp_path):
    maker = beta.maker
    idevid = (maker / "idevid.pem").read_text()
    await post(beta, "/v1/expected-devices", {"device": "plant-1", "certificate": idevid})
    csr(tmp_path, "d", "/CN=ignored")

    def shown(name):
        return ("--cert", str(maker / f"{name}.pem"), "--key", str(maker / f"{name}.key.pem"))

    (leaf,) = bootstrap.post("simpleenroll", "d", *shown("idevid")).certificates(tmp_path)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/plant-1"
    for name, code_ in (("stranger", "est.not_expected"), ("unnumbered", "est.not_idevid"), ("svid", "est.not_idevid")):
        assert bootstrap.post("simpleenroll", "d", *shown(name)).code == code_
    assert bootstrap.post("simplereenroll", "d", *shown("idevid")).code == "est.bootstrap_only"
    assert bootstrap.post("simpleenroll", "d").code == "http.no_client_certificate"
    # Under another root with the same serial number TLS itself says no; and here the maker's name counts for nothing.
    with pytest.raises(AssertionError, match="alert|SSL|reset|Empty reply"):
        bootstrap.post("simpleenroll", "d", *shown("elsewhere"))
    with pytest.raises(AssertionError, match="alert|SSL|reset|Empty reply"):
        curl.post("simplereenroll", "d", *shown("svid"))


async def test_who_guesses_waits_and_shuts_nobody_else_out(beta, curl, tmp_path):
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "guessed")
    for _ in range(10):
        assert curl.post("simpleenroll", "d", "-u", "guessed:wrong").status == 401
    answer = curl.post("simpleenroll", "d", "-u", f"guessed:{given}")
    assert (answer.status, answer.code) == (429, "est.too_many_attempts")
    assert 0 < int(answer.headers["retry-after"]) <= 60
    other = await code(beta, "not-guessed")
    assert curl.post("simpleenroll", "d", "-u", f"not-guessed:{other}").status == 200
    elsewhere = ("--interface", "127.0.0.9")
    assert curl.post("simpleenroll", "d", "-u", f"guessed:{given}", *elsewhere).status == 200


async def test_a_device_over_its_quota_waits(beta, curl, tmp_path):
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "greedy")
    statuses = [curl.post("simpleenroll", "d", "-u", f"greedy:{given}").status for _ in range(6)]
    assert statuses == [200] * 5 + [429]


async def test_a_revoked_device_gets_nothing_whatever_it_shows(beta, curl, tmp_path):
    csr(tmp_path, "d", "/CN=x")
    given = await code(beta, "lost")
    (leaf,) = curl.post("simpleenroll", "d", "-u", f"lost:{given}").certificates(tmp_path)
    chain(tmp_path, curl, leaf)
    await beta.submitter.send(tx.Revoke(kind=RevocationKind.DEVICE, id="lost"))
    async with asyncio.timeout(20):
        while curl.post("simplereenroll", "d", "--cert", "chain.pem", "--key", "d.key.pem").status != 403:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert curl.post("simpleenroll", "d", "-u", f"lost:{given}").code == "ledger.revoked"
    assert curl.post("serverkeygen", "d", "-u", f"lost:{given}").code == "ledger.revoked"


async def test_strongswan_enrols_and_renews(beta, tmp_path):
    """verifies that: `pki --estca` and `pki --est` of Debian's strongSwan work, by code, by certificate, and with a wait."""
    # strongSwan 5.9.8 cannot read IP subtrees in name constraints: it is told to go on without them.
    pki = Strongswan(tmp_path, beta.broker.said["https"], beta.server_name, str(beta.settings.roots))
    out, _ = await pki("--estca", "--outform", "pem")
    assert out.count(b"BEGIN CERTIFICATE") >= 3
    given = await code(beta, "swan-1")
    openssl(tmp_path, *["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "swan.key.pem"], check=True)
    (tmp_path / "req.der").write_bytes(
        (await pki.offline("--req", "--in", "swan.key.pem", "--type", "ecdsa", "--dn", "CN=swan-1"))[0]
    )
    out, _ = await pki("--est", "--in", "req.der", "--userpass", f"swan-1:{given}", "--outform", "pem")
    leaf = x509.load_pem_x509_certificate(out)
    assert str(spiffe_id_of(leaf)) == "spiffe://beta.test/device/swan-1"
    (tmp_path / "old.pem").write_bytes(out)
    out, _ = await pki("--est", "--in", "req.der", "--cert", "old.pem", "--key", "swan.key.pem", "--outform", "pem")
    assert x509.load_pem_x509_certificate(out).serial_number != leaf.serial_number
