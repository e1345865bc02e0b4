"""Certificates with odd encodings, names and signatures, where devices, functions, peers and brokers take them.

Each is signed by the right issuing CA after it was made odd: only the oddness can be what refuses it. The ledger's own list
is tests/ledger/test_bad_input.py; requests for certificates (EST, CMP's p10cr) are at the end.
"""

import warnings

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from moorline.errors import MoorlineError
from moorline.verification.chains import verify_ca, verify_chain
from moorline.wire import est
from moorline.wire.der import bits, sequence

DER = serialization.Encoding.DER
MARK = 0x4142434445464748
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
ECDSA_SHA1 = bytes.fromhex("300906072a8648ce3d0401")


def content(der):
    """The content of the SEQUENCE that `der` begins with."""
    if der[1] < 128:
        return der[2 : 2 + der[1]]
    size = der[1] - 128
    return der[2 + size : 2 + size + int.from_bytes(der[2 : 2 + size], "big")]


def signed(consortium, tbs, algorithm=ECDSA_SHA256, digest=None):
    signature = consortium.ca.key.sign(tbs, ec.ECDSA(digest or hashes.SHA256()))
    return sequence(tbs + algorithm + bits(signature))


def made(consortium, before=b"", after=b"", **how):
    """A device's certificate in which something was encoded otherwise before the issuing CA signed it."""
    good = consortium.leaf("device/d-1", serial=MARK).public_bytes(DER)
    body = content(content(good))
    assert before in body
    changed = body.replace(before, after, 2 if "algorithm" in how else 1) if before else body
    return signed(consortium, sequence(changed), **how)


def serial(encoded):
    return lambda c: made(c, b"\x02\x08ABCDEFGH", encoded)


def good(consortium):
    return consortium.leaf("device/d-1", serial=MARK).public_bytes(DER)


ODD = {
    "nothing": lambda _c: b"",
    "PEM": lambda c: c.leaf("device/d-1").public_bytes(serialization.Encoding.PEM),
    "cut short": lambda c: good(c)[:-1],
    "a byte more": lambda c: good(c) + b"\x00",
    "two of them": lambda c: good(c) * 2,
    "BER, indefinite": lambda c: b"\x30\x80" + content(good(c)) + b"\x00\x00",
    "length not minimal": lambda c: b"\x30\x83\x00" + good(c)[2:],
    "too large": lambda c: good(c) + bytes(64 * 1024),
    "serial zero": serial(b"\x02\x01\x00"),
    "serial negative": serial(b"\x02\x01\x80"),
    "serial not minimal": serial(b"\x02\x02\x00\x05"),
    "serial empty": serial(b"\x02\x00"),
    "serial of 21 octets": serial(b"\x02\x15" + b"\x01" * 21),
    "SHA-1": lambda c: made(c, ECDSA_SHA256, ECDSA_SHA1, algorithm=ECDSA_SHA1, digest=hashes.SHA1()),
    "SHA-1 outside only": lambda c: made(c, algorithm=ECDSA_SHA1),
}
NAMES = (
    "spiffe://ALPHA.test/device/d-1",
    "SPIFFE://alpha.test/device/d-1",
    "spiffe://alpha.test./device/d-1",
    "spiffe://.alpha.test/device/d-1",
    "spiffe://*.test/device/d-1",
    "spiffe://*/device/d-1",
    "spiffe://alpha.test/device/*",
    "spiffe://alpha.test/device/D-1",
    "spiffe://alpha.test/device/d-1/",
    "spiffe://alpha.test//device/d-1",
    "spiffe://alpha.test/device/../device/d-1",
    "spiffe://alpha.test/device/d%2d1",
    "spiffe://alpha.test/device/d-1?x=1",
    "spiffe://alpha.test/device/d-1#x",
    "spiffe://alpha.test:443/device/d-1",
    "spiffe://user@alpha.test/device/d-1",
    "spiffe://xn--lpha-8na.test/device/d-1",
    "spiffe://alpha.test/device/d-1 ",
    "spiffe:///device/d-1",
)


def code_of(call):
    with pytest.raises(MoorlineError) as caught:
        call()
    return caught.value.code


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("name", ODD)
def test_an_odd_certificate_is_refused(consortium, name):
    leaf = ODD[name](consortium)
    code = code_of(lambda: verify_chain(leaf, consortium.intermediates, consortium.roots, consortium.now))
    assert code.startswith(("certificate.", "chain."))
    assert code_of(lambda: verify_ca(leaf, consortium.intermediates, consortium.roots, consortium.now)) != "chain.not_ca"


def test_the_helper_makes_certificates_that_are_taken(consortium):
    """verifies that: the rows above differ from something that holds (control)."""
    chain = verify_chain(made(consortium), consortium.intermediates, consortium.roots, consortium.now)
    assert chain.serial == MARK


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_exact_or_none(consortium, name):
    """verifies that: case, dots, wildcards, ports, escapes and encoded labels name nobody, under the right issuing CA."""
    leaf = consortium.raw_leaf(uris=[name], dns=[])
    code = code_of(lambda: verify_chain(leaf.public_bytes(DER), consortium.intermediates, consortium.roots, consortium.now))
    assert code in {
        "chain.spiffe_id",
        "chain.name_constraint",
        "spiffe.malformed",
        "certificate.undecodable",
        "name.malformed",
    }


def test_huge_chains_are_refused_before_anything_is_verified(consortium):
    many = consortium.intermediates * 50
    leaf = good(consortium)
    assert code_of(lambda: verify_chain(leaf, many, consortium.roots, consortium.now)) == "chain.too_long"
    assert code_of(lambda: verify_ca(leaf, many, consortium.roots, consortium.now)) == "chain.too_long"


# Requests ----------------------------------------------------------------------------------------------------------------


def csr(key=None, *, digest=None, extensions=(), public_of=None):
    """A request of `key`, or by `key` for the key of somebody else."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "d-1")])
    )
    for one in extensions:
        builder = builder.add_extension(one, critical=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = builder.sign(key, digest or hashes.SHA256()).public_bytes(DER)
    if public_of is None:
        return made
    mine, other = (
        one.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo) for one in (key, public_of)
    )
    return made.replace(mine, other)


def with_sha1():
    key = ec.generate_private_key(ec.SECP256R1())
    tbs = content(csr(key))
    tbs = tbs[: len(sequence(content(tbs)))]
    signature = key.sign(tbs, ec.ECDSA(hashes.SHA1()))
    return sequence(tbs + ECDSA_SHA1 + bits(signature))


REQUESTS = {
    "nothing": (lambda: b"", "est.csr_malformed"),
    "PEM": (lambda: b"-----BEGIN CERTIFICATE REQUEST-----", "est.csr_malformed"),
    "cut short": (lambda: csr()[:-1], "est.csr_malformed"),
    "a byte more": (lambda: csr() + b"\x00", "est.csr_malformed"),
    "BER, indefinite": (lambda: b"\x30\x80" + content(csr()) + b"\x00\x00", "est.csr_malformed"),
    "length not minimal": (lambda: b"\x30\x83\x00" + csr()[2:], "est.csr_malformed"),
    "too large": (lambda: csr() + bytes(1 << 20), "est.csr_too_large"),
    "P-521": (lambda: csr(ec.generate_private_key(ec.SECP521R1())), "est.key_kind"),
    "RSA of 1024 bits": (lambda: csr(rsa.generate_private_key(65537, 1024)), "est.key_kind"),
    "signed by another key": (lambda: csr(public_of=ec.generate_private_key(ec.SECP256R1())), "est.possession"),
    "SHA-1": (with_sha1, "est.csr_algorithm"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_odd_request_is_refused(name):
    make, code = REQUESTS[name]
    assert code_of(lambda: est.parse_csr(make())) == code


def test_names_that_a_request_asks_for_are_not_taken_from_it():
    """verifies that: subject alternative names in a request, wildcards and other domains too, are not read at all."""
    names = [
        x509.UniformResourceIdentifier("spiffe://*/device/*"),
        x509.DNSName("*.alpha.test"),
        x509.DNSName("xn--a-8na.test"),
    ]
    key = ec.generate_private_key(ec.SECP256R1())
    assert est.parse_csr(csr(key, extensions=(x509.SubjectAlternativeName(names),))) == est.parse_csr(csr(key))
