"""Appended signatures of files (ima-modsig), made by `openssl cms` exactly as the kernel's sign-file makes them."""

import hashlib
import json
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.cli.evidence_cases import compare, families
from moorline.evidence import ima as lists
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.verification import ima, ima_signature

FILE = b"\x7fELF a kernel module, without what was appended to it"
AS_SIGN_FILE = ("-noattr", "-nocerts", "-binary", "-nosmimecap")


class Signer:
    """A key with a certificate, and what openssl signs with it."""

    def __init__(self, folder, name, key):
        self.folder, self.name, self.key = folder, name, key
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start = datetime(2026, 1, 1, tzinfo=UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=5000))
            .add_extension(x509.SubjectKeyIdentifier(hashlib.sha256(name.encode()).digest()[:20]), critical=False)
            .sign(key, hashes.SHA256())
        )
        (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / f"{name}.crt").write_bytes(self.certificate.public_bytes(Encoding.PEM))

    @property
    def spki(self):
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def by_certificate(self):
        return ima_signature.load_certificate(self.certificate.public_bytes(Encoding.DER))

    @property
    def by_key(self):
        return ima_signature.load_key(self.spki)

    def sign(self, data, *options, digest="sha256"):
        (self.folder / "data").write_bytes(data)
        files = ("-in", "data", "-signer", f"{self.name}.crt", "-inkey", f"{self.name}.key")
        command = ("openssl", "cms", "-sign", *files, "-md", digest, "-outform", "DER", *(options or AS_SIGN_FILE))
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True).stdout

    def verified_by_openssl(self, data, signature):
        (self.folder / "data").write_bytes(data)
        (self.folder / "sig").write_bytes(signature)
        trust = ("-certfile", f"{self.name}.crt", "-CAfile", f"{self.name}.crt", "-noverify")
        command = ("openssl", "cms", "-verify", "-in", "sig", "-inform", "DER", "-content", "data", "-binary", *trust)
        return subprocess.run(command, cwd=self.folder, check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module", params=["rsa", "ec"])
def signer(request, tmp_path_factory):
    return made_signer(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return made_signer(tmp_path_factory, "rsa", name="stranger")


def made_signer(tmp_path_factory, kind, name="signer"):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048) if kind == "rsa" else None
    return Signer(tmp_path_factory.mktemp(name), name, key or ec.generate_private_key(ec.SECP256R1()))


def entry(appended, *, data=FILE, algorithm="sha256"):
    """What the kernel writes: the digest of the file as it lies there, the one of the file before, the appended PKCS #7."""
    whole = hashlib.sha256(data + appended).digest()
    shape = lists.ImaEntry(
        10, b"", "ima-modsig", "sha256", whole, b"/lib/modules/x.ko", b"", "", algorithm,
        hashlib.new(algorithm, data).digest(), appended,
    )  # fmt: skip
    return shape._replace(template_hash=hashlib.sha1(shape.template_data()).digest())


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("named", [(), ("-keyid",)], ids=["issuer", "keyid"])
def test_a_module_as_sign_file_signs_it_is_signed(signer, digest, named):
    made = entry(signer.sign(FILE, *AS_SIGN_FILE, *named, digest=digest), algorithm=digest)
    assert ima_signature.is_signed(made, [signer.by_certificate])
    by_key = ima_signature.is_signed(made, [signer.by_key])
    assert by_key is (not named)  # the certificate gives its key another identifier than the key alone would have
    assert not ima_signature.is_signed(made, [])


def test_a_signature_with_signed_attributes_is_over_them_and_they_are_about_the_file(signer):
    appended = signer.sign(FILE, "-nocerts", "-binary")
    assert ima_signature.is_signed(entry(appended), [signer.by_certificate])
    assert not ima_signature.is_signed(entry(appended, data=b"another file"), [signer.by_certificate])


def test_the_list_replays_and_its_line_keeps_the_signature(signer):
    made = entry(signer.sign(FILE))
    line = lists.serialize_line(made) + b"\n"
    quoted = ima.replay([made], ALG_SHA256)
    read = ima.verify_ima(ima.initial(ALG_SHA256), line, bank=ALG_SHA256, quoted=quoted)
    assert read.entries == (made,)
    assert lists.parse_binary(lists.serialize_binary((made,))) == (made,)
    assert ima_signature.is_signed(read.entries[0], [signer.by_certificate])


def test_another_file_another_key_another_digest_is_not_signed(signer, stranger):
    appended = signer.sign(FILE)
    assert not ima_signature.is_signed(entry(appended, data=FILE + b"!"), [signer.by_certificate])
    assert not ima_signature.is_signed(entry(appended), [stranger.by_certificate, stranger.by_key])
    assert not ima_signature.is_signed(entry(appended, algorithm="sha512"), [signer.by_certificate])
    assert not ima_signature.is_signed(entry(signer.sign(FILE, digest="sha512")), [signer.by_certificate])
    bare = entry(appended)
    assert not ima_signature.is_signed(bare._replace(appended_digest=b""), [signer.by_certificate])
    assert not ima_signature.is_signed(bare._replace(appended_signature=b""), [signer.by_certificate])


def test_a_certificate_that_comes_with_the_message_is_nobodys_word(signer, stranger):
    """verifies that: the attack of bringing one's own certificate under a trusted name is in vain"""
    appended = stranger.sign(FILE, "-noattr", "-binary")
    assert stranger.certificate.public_bytes(Encoding.DER) in appended
    assert not ima_signature.is_signed(entry(appended), [signer.by_certificate])


def test_content_inside_two_signers_or_an_unusual_digest_is_not_signed(signer, stranger):
    (signer.folder / "other.crt").write_bytes(stranger.certificate.public_bytes(Encoding.PEM))
    (signer.folder / "other.key").write_bytes(stranger.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    two = signer.sign(FILE, *AS_SIGN_FILE, "-signer", "other.crt", "-inkey", "other.key")
    assert not ima_signature.is_signed(entry(two), [signer.by_certificate, stranger.by_certificate])
    inside = signer.sign(FILE, *AS_SIGN_FILE, "-nodetach")
    assert not ima_signature.is_signed(entry(inside), [signer.by_certificate])
    assert not ima_signature.is_signed(entry(signer.sign(FILE, digest="sha224")), [signer.by_certificate])


def test_an_ordinary_signature_of_such_an_entry_counts_by_its_own_rules(signer):
    """verifies that: ima-modsig also has the field of ima-sig, and either of the two is enough"""
    made = entry(b"")
    kind = ec.ECDSA(hashes.SHA256()) if isinstance(signer.key, ec.EllipticCurvePrivateKey) else None
    raw = signer.key.sign(FILE, kind) if kind else signer.key.sign(FILE, ima_signature._PADDING, hashes.SHA256())
    key = signer.by_key
    extra = b"\x03\x02\x04" + key.identifier + len(raw).to_bytes(2, "big") + raw
    assert ima_signature.is_signed(made._replace(extra=extra), [key])
    assert not ima_signature.is_signed(made._replace(extra=extra, digest=bytes(32)), [key])


def test_a_policy_that_asks_for_signatures_takes_it_and_refuses_others_by_code(signer, stranger, tmp_path):
    """verifies that: a case demands signatures, under certificates that it gives, and says which rule refused"""
    case = tmp_path / "ima" / "case"
    case.mkdir(parents=True)
    (case / "list").write_bytes(lists.serialize_line(entry(signer.sign(FILE))) + b"\n")
    document = {
        **dict.fromkeys(("at", "code_class", "per_file")),
        "format": 1,
        "kind": "ima",
        "mode": "policy",
        "expect": "accept",
        "reference": [],
        "inputs": {},
        "facts": {},
        "evidence": [{"file": "list", "as": "ima-ascii"}],
        "endorsements": [{"file": "key.pem", "as": "cert-pem"}],
        "policy": {"ima_cover": "signature"},
    }
    (case / "case.json").write_text(json.dumps(document))
    for one, code in ((signer, None), (stranger, "ima.signature_invalid")):
        (case / "key.pem").write_bytes(one.certificate.public_bytes(Encoding.PEM))
        (row,) = compare.run_folders([case], families.family_of)
        assert (row.got, row.code) == ("refuse" if code else "accept", code)


@pytest.fixture(scope="module")
def signed(signer):
    return signer, entry(signer.sign(FILE)), entry(signer.sign(FILE, "-nocerts", "-binary"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_of_a_signature_lets_another_digest_pass_or_survives_unless_openssl_agrees(signed, data):
    """What may change is what is not signed: unsigned parts that mean the same. OpenSSL is asked about those that pass."""
    signer, *made = signed
    one = data.draw(st.sampled_from(made))
    bad = bytearray(one.appended_signature)
    bit = data.draw(st.integers(0, 8 * len(bad) - 1))
    bad[bit // 8] ^= 1 << bit % 8
    changed = one._replace(appended_signature=bytes(bad))
    if ima_signature.is_signed(changed, [signer.by_certificate]):
        assert signer.verified_by_openssl(FILE, bytes(bad))
    assert not ima_signature.is_signed(changed._replace(appended_digest=bytes(32)), [signer.by_certificate])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_a_signature_or_not(data):
    made = lists.ImaEntry(10, b"", "ima-modsig", "sha256", bytes(32), b"/x", b"", "", "sha256", bytes(32), data)
    key = ec.derive_private_key(7, ec.SECP256R1()).public_key()
    trusted = ima_signature.load_key(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    assert not ima_signature.is_signed(made, [trusted])
