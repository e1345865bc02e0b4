"""The X.509 profile, judged by OpenSSL: a provider cannot speak for another provider's names."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import crypto

from moorline.clock import Instant, Validity, to_datetime
from moorline.errors import Malformed
from moorline.nfv import SpiffeId
from moorline.wire import certificates as profile

NOW = Instant(1_800_000_000)
YEAR = Validity(not_before=Instant(NOW - 1000), not_after=Instant(NOW + 10_000_000))
HOUR = Validity(not_before=Instant(NOW - 10), not_after=Instant(NOW + 3000))
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "authority", "provider", "ca", "leaf")}


@pytest.fixture(scope="module")
def chain():
    root = profile.root_certificate(KEYS["root"], name="consortium", validity=YEAR, serial=1)
    authority = profile.authority_certificate(
        KEYS["authority"].public_key(), name="authority-1", issuer=issuer(root, "root"), validity=YEAR, serial=2
    )
    provider = profile.provider_certificate(
        KEYS["provider"].public_key(),
        name="alpha",
        trust_domain="alpha.test",
        issuer=issuer(authority, "authority"),
        validity=YEAR,
        serial=3,
    )
    ca = profile.issuing_ca_certificate(
        KEYS["ca"].public_key(), name="alpha issuing", issuer=issuer(provider, "provider"), validity=YEAR, serial=4
    )
    return root, authority, provider, ca


def issuer(certificate: x509.Certificate, key: str) -> profile.Issuer:
    return profile.Issuer(certificate=certificate, key=KEYS[key])


def leaf(ca: x509.Certificate, uri: str) -> x509.Certificate:
    return profile.leaf_certificate(
        KEYS["leaf"].public_key(), spiffe_id=SpiffeId.parse(uri), issuer=issuer(ca, "ca"), validity=HOUR, serial=5
    )


def judged_by_openssl(root, leaf_certificate, intermediates):
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(root))
    store.set_time(to_datetime(NOW))
    crypto.X509StoreContext(
        store,
        crypto.X509.from_cryptography(leaf_certificate),
        [crypto.X509.from_cryptography(certificate) for certificate in intermediates],
    ).verify_certificate()


def test_a_leaf_of_the_own_trust_domain_chains_to_the_root(chain):
    root, *intermediates = chain
    judged_by_openssl(root, leaf(chain[3], "spiffe://alpha.test/svc/records/i-1"), intermediates)


@pytest.mark.parametrize("uri", ["spiffe://beta.test/svc/records/i-1", "spiffe://alpha.test.evil.test/svc/records/i-1"])
def test_a_leaf_of_another_trust_domain_is_refused_by_openssl(chain, uri):
    root, *intermediates = chain
    with pytest.raises(crypto.X509StoreContextError, match="subtree"):
        judged_by_openssl(root, leaf(chain[3], uri), intermediates)


def test_an_issuing_ca_cannot_make_another_ca(chain):
    root, *intermediates = chain
    below = profile.issuing_ca_certificate(
        KEYS["leaf"].public_key(), name="below", issuer=issuer(chain[3], "ca"), validity=YEAR, serial=6
    )
    grandchild = profile.leaf_certificate(
        KEYS["root"].public_key(),
        spiffe_id=SpiffeId.parse("spiffe://alpha.test/device/d-1"),
        issuer=issuer(below, "leaf"),
        validity=HOUR,
        serial=7,
    )
    with pytest.raises(crypto.X509StoreContextError, match="path length"):
        judged_by_openssl(root, grandchild, [*intermediates, below])


def test_a_leaf_that_lives_longer_than_an_hour_is_not_made(chain):
    with pytest.raises(Malformed, match="certificate.life"):
        profile.leaf_certificate(
            KEYS["leaf"].public_key(),
            spiffe_id=SpiffeId.parse("spiffe://alpha.test/device/d-1"),
            issuer=issuer(chain[3], "ca"),
            validity=YEAR,
            serial=8,
        )


@pytest.mark.parametrize(
    "uri",
    [
        "https://alpha.test/device/d",
        "spiffe://alpha.test/device",
        "spiffe://alpha.test/device/d/../e",
        "spiffe://Alpha.test/device/d",
        "spiffe://alpha.test:1/device/d",
        "spiffe://alpha.test/admin/d",
        "spiffe://alpha.test/device/d?x",
        "spiffe://alpha.test./device/d",
        "spiffe:///device/d",
    ],
)
def test_odd_spiffe_ids_are_malformed(uri):
    with pytest.raises(Malformed):
        SpiffeId.parse(uri)
