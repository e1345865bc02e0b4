"""An enclave of a cloud nobody trusts: the same chain and document as AWS's, under a root made here."""

import datetime as dt
from dataclasses import dataclass, field

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from moorline.clock import Instant
from moorline.rats import EvidenceRoot
from moorline.verification.nitro import NitroAnchor

NOW = Instant(1_800_000_000)
HOUR = 3600


def moment(at):
    return dt.datetime.fromtimestamp(at, dt.UTC)


def certificate(key, subject, issuer_key, issuer, *, ca, start=NOW - 24 * HOUR, end=NOW + 24 * HOUR):
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    ) | {"key_cert_sign" if ca else "digital_signature": True}
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment(start))
        .not_valid_after(moment(end))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(issuer_key, hashes.SHA384())
        .public_bytes(serialization.Encoding.DER)
    )


@dataclass
class Enclave:
    """An enclave below root, region and instance. `payload()` is what the next document will say."""

    nonce: bytes | None = b"\x5c" * 20
    leaf_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    leaf_window: tuple[int, int] = (NOW - 60, NOW + 3 * HOUR)

    def __post_init__(self):
        root, region, instance = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
        self.root = certificate(root, "SIMULATED root", root, "SIMULATED root", ca=True)
        self.bundle = [
            self.root,
            certificate(region, "region", root, "SIMULATED root", ca=True),
            certificate(instance, "instance", region, "region", ca=True),
        ]
        start, end = self.leaf_window
        self.leaf = certificate(self.leaf_key, "enclave", instance, "instance", ca=False, start=start, end=end)

    @property
    def anchors(self):
        return (NitroAnchor(certificate=self.root, root=EvidenceRoot.TEST),)

    def payload(self, **changes):
        members = {
            "module_id": "i-0-enc0",
            "digest": "SHA384",
            "timestamp": NOW * 1000 + 5,
            "pcrs": {index: bytes([index + 1 if index in (0, 1, 2, 3, 4, 8) else 0]) * 48 for index in range(16)},
            "certificate": self.leaf,
            "cabundle": self.bundle,
            "public_key": b"key",
            "user_data": b"data",
            "nonce": self.nonce,
        }
        return {key: value for key, value in (members | changes).items() if value is not Ellipsis}

    def document(self, payload=None, *, key=None, algorithm=-35, tag=None):
        header = cbor2.dumps({1: algorithm})
        body = payload if isinstance(payload, bytes) else cbor2.dumps(payload or self.payload())
        signer = key or self.leaf_key
        signature = signer.sign(cbor2.dumps(["Signature1", header, b"", body]), ec.ECDSA(hashes.SHA384()))
        size = (signer.curve.key_size + 7) // 8
        parts = [header, {}, body, b"".join(n.to_bytes(size, "big") for n in decode_dss_signature(signature))]
        return cbor2.dumps(parts if tag is None else cbor2.CBORTag(tag, parts))


@pytest.fixture
def enclave():
    return Enclave()


@pytest.fixture
def made():
    return Enclave


@pytest.fixture(scope="session")
def flip_enclave():
    enclave = Enclave()
    return enclave, enclave.document()


@pytest.fixture(scope="session")
def now():
    return NOW
