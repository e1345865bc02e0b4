"""A consortium of real certificates under a false root, with a bad twin for every rule."""

import datetime as dt
import time
from dataclasses import dataclass, field

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moorline.channel.tls import TlsIdentity
from moorline.clock import Instant, Validity, to_datetime
from moorline.nfv import SpiffeId
from moorline.wire import certificates
from moorline.wire.certificates import Issuer


def der(certificate):
    return certificate.public_bytes(serialization.Encoding.DER)


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Consortium:
    """root -> authority -> provider -> {hsm, issuing CA} -> leaf, valid around `now`."""

    trust_domain: str = "alpha.test"
    now: Instant = field(default_factory=lambda: Instant(int(time.time())))
    above: "Consortium | None" = None
    constrained_to: str | None = None

    def __post_init__(self):
        years = Validity(not_before=Instant(self.now - 86400), not_after=Instant(self.now + 86400))
        self.long = years
        keys = {name: new_key() for name in ("root", "authority", "provider", "hsm", "ca")}
        if self.above is None:
            root = certificates.root_certificate(keys["root"], name="root", validity=years, serial=1)
            self.root = Issuer(certificate=root, key=keys["root"])
            authority = certificates.authority_certificate(
                keys["authority"].public_key(), name="authority-1", issuer=self.root, validity=years, serial=2
            )
            self.authority = Issuer(certificate=authority, key=keys["authority"])
        else:
            self.root, self.authority = self.above.root, self.above.authority
        provider = certificates.provider_certificate(
            keys["provider"].public_key(),
            name=self.trust_domain.split(".")[0],
            trust_domain=self.constrained_to or self.trust_domain,
            issuer=self.authority,
            validity=years,
            serial=3,
        )
        self.provider = Issuer(certificate=provider, key=keys["provider"])
        hsm = certificates.hsm_certificate(
            keys["hsm"].public_key(),
            spiffe_id=SpiffeId.parse(f"spiffe://{self.trust_domain}/hsm/hsm-1"),
            address="https://127.0.0.1:1",
            issuer=self.provider,
            validity=years,
            serial=4,
        )
        self.hsm = Issuer(certificate=hsm, key=keys["hsm"])
        ca = certificates.issuing_ca_certificate(
            keys["ca"].public_key(), name="ca-1", issuer=self.provider, validity=years, serial=5
        )
        self.ca = Issuer(certificate=ca, key=keys["ca"])

    @property
    def roots(self):
        return (der(self.root.certificate),)

    @property
    def intermediates(self):
        return tuple(der(issuer.certificate) for issuer in (self.ca, self.hsm, self.provider, self.authority))

    def leaf(self, path, *, issuer=None, key=None, not_before=-60, life=600, serial=77):
        validity = Validity(not_before=Instant(self.now + not_before), not_after=Instant(self.now + not_before + life))
        return certificates.leaf_certificate(
            (key or new_key()).public_key(),
            spiffe_id=SpiffeId.parse(f"spiffe://{self.trust_domain}/{path}"),
            issuer=issuer or self.ca,
            validity=validity,
            serial=serial,
        )

    def identity(self, path, *, issuer=None, **how):
        issuer = issuer or self.ca
        key = new_key()
        leaf = self.leaf(path, issuer=issuer, key=key, **how)
        chain = (leaf, issuer.certificate, self.provider.certificate, self.authority.certificate)
        return TlsIdentity(key=key, chain=tuple(der(certificate) for certificate in chain))

    def raw_leaf(
        self, *, uris=(), dns=(), ips=(), ca=False, usages=None, issuer=None, path_length=None, key=None, sign=None
    ):
        """A leaf that need not keep our profile: the bad twins."""
        issuer = issuer or self.ca
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(name) for name in dns] + [x509.IPAddress(ip) for ip in ips]
        public = (key or new_key()).public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "twin")]))
            .issuer_name(issuer.certificate.subject)
            .public_key(public)
            .serial_number(99)
            .not_valid_before(to_datetime(Instant(self.now - 60)))
            .not_valid_after(to_datetime(self.now) + dt.timedelta(minutes=10))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=ca,
                    crl_sign=ca,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        usages = both if usages is None else usages
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.sign(sign or issuer.key, hashes.SHA256())


@pytest.fixture(scope="session")
def consortium():
    return Consortium()


@pytest.fixture(scope="session")
def stranger():
    """The same names under another root."""
    return Consortium()


@pytest.fixture(scope="session")
def beta(consortium):
    """A second provider of the same consortium."""
    return Consortium(trust_domain="beta.test", above=consortium)


@pytest.fixture(scope="session")
def make_consortium():
    return Consortium
