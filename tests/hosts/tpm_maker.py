"""A maker of TPMs under a false root: root, authority, authority on the die, endorsement key, and revocation lists."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from moorline.evidence import tpm_structures as tpm
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_identity import EK_USAGE, TpmAnchor

DAY = timedelta(days=1)


class TpmMaker:
    """Three authorities and one endorsement key; the two lower authorities' certificates point to their issuer's list."""

    def __init__(self, now, root=EvidenceRoot.HARDWARE, where="http://maker.test"):
        self.where = where
        self.at, self.root_kind = datetime.fromtimestamp(now, UTC), root
        self.keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "ca", "die")}
        self.ek_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.root = self.certificate("root", "root")
        self.ca = self.certificate("ca", "root", lists=True)
        self.die = self.certificate("die", "ca", lists=True)
        self.ek = self.certificate("", "die")
        self.numbers = {"root": 5, "ca": 5}

    @property
    def anchor(self):
        return TpmAnchor(certificate=der(self.root), root=self.root_kind, intermediates=(der(self.ca),))

    @property
    def anchors(self):
        return (self.anchor,)

    @property
    def brought(self):
        """What the TPM holds: its certificate, and the authority on its die."""
        return der(self.ek), der(self.die)

    def certificate(self, name, issuer, *, lists=False, crl_sign=True, key=None):
        ca = bool(name)
        public = (key or self.keys[name]).public_key() if ca else self.ek_key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.at - 20 * DAY)
            .not_valid_after(self.at + 4000 * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if ca:
            builder = builder.add_extension(usage(crl_sign), critical=True)
        else:
            who = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:00001014")])
            builder = builder.add_extension(x509.ExtendedKeyUsage([EK_USAGE]), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DirectoryName(who)]), critical=True)
        if lists:
            where = [x509.UniformResourceIdentifier(f"{self.where}/{issuer}.crl")]
            point = x509.DistributionPoint(full_name=where, relative_name=None, reasons=None, crl_issuer=None)
            builder = builder.add_extension(x509.CRLDistributionPoints([point]), critical=False)
        return builder.sign(self.keys[issuer], hashes.SHA256())

    def crl(self, issuer, *revoked, key=None, start=-1, end=1, number=None, scope=None, delta=False, entry=None):
        """The list of `issuer`; `start` and `end` in days from now, `scope` an issuing distribution point."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(named(issuer))
            .last_update(self.at + start * DAY)
            .next_update(self.at + end * DAY)
            .add_extension(x509.CRLNumber(self.numbers.get(issuer, 1) if number is None else number), critical=False)
        )
        for certificate in revoked:
            one = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(self.at - DAY)
            if entry is not None:
                one = one.add_extension(entry, critical=True)
            builder = builder.add_revoked_certificate(one.build())
        if scope is not None:
            builder = builder.add_extension(scope, critical=True)
        if delta:
            builder = builder.add_extension(x509.DeltaCRLIndicator(1), critical=True)
        return builder.sign(key or self.keys[issuer], hashes.SHA256()).public_bytes(Encoding.DER)

    def public(self):
        """TPMT_PUBLIC of the endorsement key."""
        parameters = tpm.RsaParameters(
            symmetric=(tpm.ALG_AES, 128, tpm.ALG_CFB),
            scheme=tpm.ALG_NULL,
            scheme_hash=0,
            key_bits=2048,
            exponent=0,
            modulus=self.ek_key.public_key().public_numbers().n.to_bytes(256, "big"),
        )
        made = tpm.Public(
            name_algorithm=tpm.ALG_SHA256, attributes=0x300B2, policy=bytes(32), parameters=parameters, encoded=b""
        )
        return tpm.serialize_public(made)


def scope(**limits):
    """An issuing distribution point that limits nothing but what is named."""
    options = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**(options | limits))


def usage(crl_sign):
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    rest = dict.fromkeys((*names, "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(key_cert_sign=True, crl_sign=crl_sign, **rest)


def named(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"maker {text}")] if text else [])


def der(certificate):
    return certificate.public_bytes(Encoding.DER)
