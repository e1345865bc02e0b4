"""Our CMS reader against OpenSSL, both ways, and against forgers."""

import shutil
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.orchestration import cms, package

CONTENT = b"metadata:\n  vnf_product_name: records\n"
VALIDITY = Validity(not_before=Instant(1_600_000_000), not_after=Instant(4_000_000_000))


def signer(key):
    return package.publisher_certificate(key, name="signer", validity=VALIDITY, serial=7), key


EC = signer(ec.generate_private_key(ec.SECP256R1()))
RSA = signer(rsa.generate_private_key(public_exponent=65537, key_size=2048))
openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")


@pytest.fixture
def files(tmp_path):
    for name, (certificate, key) in {"ec": EC, "rsa": RSA}.items():
        (tmp_path / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (tmp_path / f"{name}.key").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
    (tmp_path / "content").write_bytes(CONTENT)
    return tmp_path


def run(directory, *arguments):
    return subprocess.run(["openssl", "cms", *arguments], cwd=directory, capture_output=True, check=False)


@openssl
@pytest.mark.parametrize(("name", "pair"), [("ec", EC), ("rsa", RSA)])
def test_openssl_verifies_what_we_sign(files, name, pair):
    (files / "signature").write_bytes(cms.sign(CONTENT, certificate=pair[0], key=pair[1]))
    common = ("-verify", "-inform", "DER", "-in", "signature", "-binary", "-purpose", "any", "-CAfile", f"{name}.pem")
    assert run(files, *common, "-content", "content").returncode == 0
    (files / "content").write_bytes(CONTENT + b"!")
    assert run(files, *common, "-content", "content").returncode != 0


@openssl
@pytest.mark.parametrize(("name", "pair"), [("ec", EC), ("rsa", RSA)])
@pytest.mark.parametrize("option", [(), ("-keyid",), ("-nosmimecap",)])
def test_we_verify_what_openssl_signs(files, name, pair, option):
    made = run(
        files,
        *("-sign", "-binary", "-md", "sha256", "-in", "content", "-signer", f"{name}.pem", "-inkey", f"{name}.key"),
        *("-outform", "DER", "-out", "signature", *option),
    )
    assert made.returncode == 0, made.stderr
    signature = (files / "signature").read_bytes()
    assert cms.verify(signature, CONTENT).signer == pair[0]
    with pytest.raises(NotAuthentic) as caught:
        cms.verify(signature, CONTENT + b"!")
    assert caught.value.code == "cms.content_digest"


@openssl
@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("-noattr",), "cms.signed_attributes"),
        (("-md", "sha384"), "cms.algorithm"),
        (("-nodetach",), "cms.not_detached"),
        (("-nocerts",), "cms.certificates"),
        (("-signer", "rsa.pem", "-inkey", "rsa.key"), "cms.signers"),
        (("-econtent_type", "1.2.3.4"), "cms.kind"),
    ],
)
def test_what_we_do_not_take(files, options, code):
    made = run(
        files,
        *("-sign", "-binary", "-in", "content", "-signer", "ec.pem", "-inkey", "ec.key", "-outform", "DER"),
        *("-out", "signature", *options),
    )
    assert made.returncode == 0, made.stderr
    with pytest.raises(Malformed) as caught:
        cms.verify((files / "signature").read_bytes(), CONTENT)
    assert caught.value.code == code


def test_the_certificate_may_come_from_elsewhere():
    certificate, key = EC
    options = [pkcs7.PKCS7Options.DetachedSignature, pkcs7.PKCS7Options.Binary, pkcs7.PKCS7Options.NoCerts]
    builder = pkcs7.PKCS7SignatureBuilder().set_data(CONTENT).add_signer(certificate, key, hashes.SHA256())
    bare = builder.sign(serialization.Encoding.DER, options)
    with pytest.raises(Malformed):
        cms.verify(bare, CONTENT)
    assert cms.verify(bare, CONTENT, known=(certificate,)).signer == certificate


def test_another_certificate_with_issuer_and_serial_of_the_signer():
    """Somebody swaps the certificate for one that has the same name and serial number, and his own key."""
    certificate, key = EC
    other = package.publisher_certificate(
        ec.generate_private_key(ec.SECP256R1()), name="signer", validity=VALIDITY, serial=7
    )
    message = cms.sign(CONTENT, certificate=certificate, key=key)
    mine, theirs = (each.public_bytes(serialization.Encoding.DER) for each in (certificate, other))
    if len(mine) != len(theirs):
        return  # DER lengths of the two signatures differ by chance; the fuzz below covers the rest
    with pytest.raises(MoorlineError) as caught:
        cms.verify(message.replace(mine, theirs), CONTENT)
    assert caught.value.code == "cms.signature"


def test_small_rsa_keys_and_other_curves_are_not_taken():
    for key in (rsa.generate_private_key(public_exponent=65537, key_size=1024), ec.generate_private_key(ec.SECP384R1())):
        certificate, _ = signer(key)
        with pytest.raises(Malformed) as caught:
            cms.verify(cms.sign(CONTENT, certificate=certificate, key=key), CONTENT)
        assert caught.value.code == "cms.algorithm"


MESSAGE = cms.sign(CONTENT, certificate=EC[0], key=EC[1])


@given(st.integers(min_value=0, max_value=len(MESSAGE) * 8 - 1))
@settings(max_examples=200, deadline=None)
def test_no_flipped_bit_gives_another_signer(position):
    """Bits of the carried certificate's own signature are not judged here; whose key signed the content is."""
    flipped = bytearray(MESSAGE)
    flipped[position // 8] ^= 1 << (position % 8)
    try:
        found = cms.verify(bytes(flipped), CONTENT)
    except (Malformed, NotAuthentic):
        return
    assert found.signer.public_key() == EC[0].public_key()


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_any_bytes_are_malformed(data):
    with pytest.raises(Malformed):
        cms.verify(data, CONTENT)


def test_a_certificate_is_what_verify_returns():
    assert isinstance(cms.verify(MESSAGE, CONTENT).signer, x509.Certificate)
