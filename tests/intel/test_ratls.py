"""Evidence inside a certificate: the certificate's own key is bound and proven, in both conventions."""

import hashlib
import struct

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from moorline.clock import to_datetime
from moorline.errors import Malformed, MoorlineError
from moorline.evidence.ratls import RatlsForm, parse_oe_report, parse_ratls_certificate
from moorline.evidence.sgx_quote import serialize_sgx_quote
from moorline.verification.intel_collateral import Collateral
from moorline.verification.sgx import verify_ratls


def certificate(fake, key, form, *, bound=None, signer=None, more=()):
    public = (bound or key).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    hashed = der if form is RatlsForm.GRAMINE else pem + b"\x00"
    fake.report = {"report_data": hashlib.sha256(hashed).digest() + bytes(32)} | fake.report
    quote = serialize_sgx_quote(fake.quote())
    if form is RatlsForm.OPEN_ENCLAVE:
        quote = struct.pack("<IIQ", 1, 2, len(quote)) + quote
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "enclave")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(to_datetime(fake.now))
        .not_valid_after(to_datetime(fake.now + 9))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    for oid, value in ((form.value, quote), *more):
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def verify(fake, data):
    return verify_ratls(data, fake.endorsements(), collateral=Collateral.FULL, anchors=fake.anchors, now=fake.now)


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.mark.parametrize("form", list(RatlsForm))
def test_a_certificate_with_evidence_holds(sgx, tools, rsa_key, form):
    """verifies that: in both conventions, with EC and RSA keys, the evidence of a certificate is authentic and bound"""
    for key in (tools.new_key(), rsa_key):
        sgx.report = {}
        assert verify(sgx, certificate(sgx, key, form)).value.report.mr_enclave == b"\x0e" * 32


@pytest.mark.parametrize("form", list(RatlsForm))
def test_the_certificates_key_is_the_bound_one(sgx, tools, form):
    """verifies that: evidence about another key, or with anything in the other half of the report data, is refused"""
    key, other = tools.new_key(), tools.new_key()
    with pytest.raises(MoorlineError, match="ratls.key_unbound"):
        verify(sgx, certificate(sgx, key, form, bound=other))
    good = certificate(sgx, key, form)
    assert good
    sgx.report = {"report_data": sgx.report["report_data"][:32] + b"\x01" * 32}
    with pytest.raises(MoorlineError, match="ratls.key_unbound"):
        verify(sgx, certificate(sgx, key, form))


def test_the_key_signed_its_certificate(sgx, tools):
    """verifies that: a certificate that another key signed, or signed with an unknown algorithm, is refused"""
    key = tools.new_key()
    with pytest.raises(MoorlineError, match="ratls.signature_invalid"):
        verify(sgx, certificate(sgx, key, RatlsForm.GRAMINE, signer=tools.new_key()))
    sgx.report = {}
    strange = ec.generate_private_key(ec.SECP384R1())
    data = certificate(sgx, strange, RatlsForm.GRAMINE)
    verify(sgx, data)
    sha512 = data.replace(tools.der_oid("1.2.840.10045.4.3.2"), tools.der_oid("1.2.840.10045.4.3.4"))
    with pytest.raises(MoorlineError, match="ratls.key_unsupported"):
        verify(sgx, sha512)


def test_two_pieces_of_evidence_are_ambiguous(sgx, tools):
    """verifies that: a certificate with evidence in both conventions, or in none, is malformed"""
    both = certificate(sgx, tools.new_key(), RatlsForm.GRAMINE, more=((RatlsForm.OPEN_ENCLAVE.value, b"x"),))
    with pytest.raises(Malformed, match="ratls.evidence"):
        parse_ratls_certificate(both)
    with pytest.raises(Malformed, match="ratls.evidence"):
        parse_ratls_certificate(serialization_of(sgx.certificate("root")))


@pytest.mark.parametrize(
    "header", [b"", struct.pack("<IIQ", 2, 2, 1), struct.pack("<IIQ", 1, 1, 1), struct.pack("<IIQ", 1, 2, 2)]
)
def test_the_open_enclave_header_is_exact(header):
    """verifies that: another version, a local report or another length is malformed"""
    with pytest.raises(Malformed, match="ratls.oe_header"):
        parse_oe_report(header + b"x" if header else b"")


def serialization_of(pem):
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
