"""Leaves from the template are the builder's, byte for byte, whatever is in them."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.clock import Instant, Validity
from moorline.errors import Malformed
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.leaf_template import LeafTemplate

YEAR = Validity(not_before=Instant(1_700_000_000), not_after=Instant(1_900_000_000))
POINTERS = certificates.Pointers(
    crl="http://alpha.test/crl/ca-1.crl", ocsp="http://alpha.test/ocsp", issuer="http://alpha.test/ca/ca-1.cer"
)
SUBJECTS = {
    "p-256": ec.generate_private_key(ec.SECP256R1()).public_key(),
    "p-384": ec.generate_private_key(ec.SECP384R1()).public_key(),
    "ed25519": ed25519.Ed25519PrivateKey.generate().public_key(),
    "rsa-2048": rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key(),
}
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
identities = st.builds(
    SpiffeId,
    trust_domain=names.map("{}.test".format),
    role=st.sampled_from(sorted(Role)),
    segments=st.lists(names, min_size=1, max_size=2).map(tuple),
)
# Both encodings of time, and their border at the year 2050.
starts = st.integers(0, 4_000_000_000) | st.integers(2_524_600_000, 2_524_616_400)


def issuer(key):
    return certificates.Issuer(
        certificate=certificates.root_certificate(key, name="issuing", validity=YEAR, serial=1), key=key
    )


P256 = issuer(ec.generate_private_key(ec.SECP256R1()))
ED25519 = issuer(ed25519.Ed25519PrivateKey.generate())
TEMPLATES = {(one, way): LeafTemplate(one, way) for one in (P256, ED25519) for way in (None, POINTERS)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=st.sampled_from(sorted(TEMPLATES, key=str)),
    subject=st.sampled_from(sorted(SUBJECTS)),
    spiffe_id=identities,
    start=starts,
    life=st.integers(0, certificates.LEAF_MAX_LIFE_S),
    serial=st.integers(1, (1 << 159) - 1),
)
def test_a_leaf_from_the_template_is_the_one_the_builder_makes(made, subject, spiffe_id, start, life, serial):
    issued_by, pointers = made
    validity = Validity(not_before=Instant(start), not_after=Instant(start + life))
    public = SUBJECTS[subject]

    der = TEMPLATES[made].leaf(keys.public_bytes(public), spiffe_id=spiffe_id, validity=validity, serial=serial)

    built = certificates.leaf_certificate(
        public, spiffe_id=spiffe_id, issuer=issued_by, validity=validity, serial=serial, pointers=pointers
    )
    ours = x509.load_der_x509_certificate(der)
    assert ours.tbs_certificate_bytes == built.tbs_certificate_bytes
    ours.verify_directly_issued_by(issued_by.certificate)
    if issued_by is ED25519:  # the one whose signatures are a function of what is signed
        assert der == built.public_bytes(Encoding.DER)


def test_a_leaf_that_lives_longer_than_an_hour_is_not_made():
    with pytest.raises(Malformed, match=r"certificate\.life"):
        TEMPLATES[P256, None].leaf(
            keys.public_bytes(SUBJECTS["p-256"]),
            spiffe_id=SpiffeId.parse("spiffe://alpha.test/device/d-1"),
            validity=YEAR,
            serial=8,
        )
