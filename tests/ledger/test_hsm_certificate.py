"""An HSM's certificate judged by its bytes: whatever is taken that way, the long way takes too."""

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import MoorlineError
from moorline.ledger import hsm_certificate, issuance
from moorline.nfv import SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.certificates import Issuer

NOW = Instant(1_790_000_000)
DAY = Validity(not_before=NOW, not_after=Instant(NOW + 86400))
HSM = SpiffeId.parse("spiffe://alpha.test/hsm/hsm-1")
KEY = ec.generate_private_key(ec.SECP256R1())
OWN = ec.generate_private_key(ec.SECP256R1())


def provider(key=KEY, name="alpha"):
    return Issuer(
        certificate=certificates.provider_certificate(
            key.public_key(),
            name=name,
            trust_domain="alpha.test",
            issuer=root(),
            validity=Validity(not_before=NOW, not_after=Instant(NOW + 10 * 86400)),
            serial=5,
        ),
        key=key,
    )


def root():
    key = ec.generate_private_key(ec.SECP256R1())
    return Issuer(certificate=certificates.root_certificate(key, name="root", validity=DAY, serial=1), key=key)


ISSUER = provider()
CAS = (ISSUER.certificate.public_bytes(Encoding.DER),)


def made(*, issuer=ISSUER, address="https://h:1", public=None, serial=7, validity=DAY):
    return certificates.hsm_certificate(
        public or OWN.public_key(), spiffe_id=HSM, address=address, issuer=issuer, validity=validity, serial=serial
    ).public_bytes(Encoding.DER)


ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def signed(tbs, algorithm=ECDSA_SHA256):
    """These bytes, whatever they are, as a certificate the provider really signed."""
    return sequence(tbs + algorithm + bits(KEY.sign(tbs, ec.ECDSA(hashes.SHA256()))))


def sequence(content):
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


def bits(content):
    return bytes((0x03, len(content) + 1, 0)) + content


def long_way(der, at=NOW):
    """The code with which it is refused when the library reads it all, or None."""
    issuance.parse.cache_clear()
    try:
        issuance._hsm(der, HSM, CAS, at)
    except MoorlineError as error:
        return error.code
    return None


def short_way(der, at=NOW):
    found = hsm_certificate.recognised(der, HSM)
    return found is not None and issuance._issued(found, CAS, at)


def tbs_of(der):
    return x509.load_der_x509_certificate(der).tbs_certificate_bytes


@pytest.mark.parametrize(
    "der",
    [
        made(),
        made(serial=(1 << 159) - 1),
        made(serial=0x80),
        made(address="https://[2001:db8::1]:65535/" + "a" * 25),
    ],
)
def test_what_our_own_tools_make_is_recognised(der):
    """verifies that: the short way takes it, with the key that the certificate has; so does the long way."""
    assert short_way(der)
    assert long_way(der) is None
    assert hsm_certificate.recognised(der, HSM).spki == keys.public_bytes(OWN.public_key()) == issuance.spki(der)


@pytest.mark.parametrize("mask", [0x01, 0x02, 0x20, 0x80, 0xFF])
def test_a_changed_byte_that_was_signed_is_judged_alike(mask):
    """verifies that: with any byte of what the provider signs changed, nothing is taken that the long way refuses."""
    tbs, taken = tbs_of(made()), 0
    for at in range(len(tbs)):
        der = signed(tbs[:at] + bytes((tbs[at] ^ mask,)) + tbs[at + 1 :])
        if short_way(der):
            taken += 1
            assert long_way(der) is None, (at, tbs[at] ^ mask)
    assert taken, "serial number, key identifiers and address are free"


@settings(max_examples=300, deadline=None)
@given(
    at=st.integers(0, 400),
    cut=st.integers(0, 3),
    put=st.binary(max_size=3),
    tail=st.binary(max_size=2),
    algorithm=st.sampled_from(["300a06082a8648ce3d040302", "300a06082a8648ce3d040303", "300c06082a8648ce3d0403020500"]),
)
def test_bytes_put_in_and_cut_out_are_judged_alike(at, cut, put, tail, algorithm):
    """verifies that: lengths that lie, other algorithms outside than inside and bytes behind the end get nothing past it."""
    tbs = tbs_of(made())
    der = signed(tbs[:at] + put + tbs[at + cut :], bytes.fromhex(algorithm)) + tail
    if short_way(der):
        assert long_way(der) is None


def test_the_time_of_both_certificates_counts():
    """verifies that: before, after, and under a CA that is over, the short way takes nothing and the long way says why."""
    der = made(validity=Validity(not_before=NOW, not_after=Instant(NOW + 20 * 86400)))
    assert short_way(der)
    for at in (Instant(NOW - 1), Instant(NOW + 11 * 86400), Instant(NOW + 21 * 86400)):
        assert not short_way(der, at)
        assert long_way(der, at) == "ledger.certificate_validity"


def test_another_issuer_of_the_same_name_does_not_count():
    """verifies that: the name of the provider is not enough, its key has to have signed."""
    other = made(issuer=provider(ec.generate_private_key(ec.SECP256R1())))
    assert hsm_certificate.recognised(other, HSM) is not None
    assert not short_way(other)
    assert long_way(other) == "ledger.certificate_issuer"


def test_forms_that_are_right_but_not_ours_go_the_long_way():
    """verifies that: extensions in another order, another curve, another hash: not recognised, and taken all the same."""
    for der in (reordered(), made(public=ec.generate_private_key(ec.SECP384R1()).public_key()), by_sha384()):
        assert hsm_certificate.recognised(der, HSM) is None
        assert issuance.hsm(der, trust_domain="alpha.test", hsm_id="hsm-1", provider_cas=CAS, at=NOW) == issuance.spki(der)


def by_sha384():
    digest = hashes.Hash(hashes.SHA384())
    tbs = tbs_of(made()).replace(bytes.fromhex("2a8648ce3d040302"), bytes.fromhex("2a8648ce3d040303"))
    digest.update(tbs)
    signature = KEY.sign(digest.finalize(), ec.ECDSA(Prehashed(hashes.SHA384())))
    return sequence(tbs + bytes.fromhex("300a06082a8648ce3d040303") + bits(signature))


def reordered():
    found = x509.load_der_x509_certificate(made())
    builder = (
        x509.CertificateBuilder()
        .subject_name(found.subject)
        .issuer_name(found.issuer)
        .public_key(OWN.public_key())
        .serial_number(7)
        .not_valid_before(dt.datetime.fromtimestamp(NOW, dt.UTC))
        .not_valid_after(dt.datetime.fromtimestamp(NOW + 86400, dt.UTC))
    )
    for extension in reversed(list(found.extensions)):
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


@settings(max_examples=50, deadline=None)
@given(at=st.integers(0, 24), put=st.sampled_from([b"0", b"4", b"5", b"9", b"+", b" ", b"-", b"Z"]))
def test_odd_times_are_judged_alike(at, put):
    """verifies that: no time is read in another way than the library reads it."""
    tbs = tbs_of(made())
    begin = tbs.index(bytes.fromhex("301e170d")) + 4
    der = signed(tbs[: begin + at] + put + tbs[begin + at + 1 :])
    if short_way(der):
        assert long_way(der) is None


@given(data=st.binary(max_size=600))
def test_any_bytes_are_judged(data):
    """verifies that: bytes that are no certificate are simply not recognised."""
    assert hsm_certificate.recognised(data, HSM) is None
