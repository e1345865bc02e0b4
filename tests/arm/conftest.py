"""A platform, a realm and a device that sign real tokens under keys nobody vouches for outside these tests."""

import hashlib
from dataclasses import dataclass, field

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from moorline.rats import EvidenceRoot
from moorline.verification.cca import CpakAnchor
from moorline.verification.psa import IakAnchor, MacAnchor

ALGORITHMS = {-7: hashes.SHA256(), -35: hashes.SHA384(), -36: hashes.SHA512()}


def sign1(claims, key, *, algorithm, protected=None, unprotected=None, tag=18):
    header = cbor2.dumps({1: algorithm}) if protected is None else protected
    payload = claims if isinstance(claims, bytes) else cbor2.dumps(claims)
    chosen, size = ALGORITHMS[algorithm], (key.curve.key_size + 7) // 8
    r, s = decode_dss_signature(key.sign(cbor2.dumps(["Signature1", header, b"", payload]), ec.ECDSA(chosen)))
    parts = [header, unprotected or {}, payload, r.to_bytes(size, "big") + s.to_bytes(size, "big")]
    return cbor2.dumps(parts if tag is None else cbor2.CBORTag(tag, parts))


def mac0(claims, key, *, algorithm=5):
    header, payload = cbor2.dumps({1: algorithm}), cbor2.dumps(claims)
    maker = hmac.HMAC(key, hashes.SHA256())
    maker.update(cbor2.dumps(["MAC0", header, b"", payload]))
    return cbor2.dumps(cbor2.CBORTag(17, [header, {}, payload, maker.finalize()]))


def spki(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def point(key):
    return key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def component(number):
    return {1: f"part-{number}", 2: bytes([number]) * 32, 4: "1.0", 5: b"\xaa" * 32, 6: "sha-256"}


@dataclass
class Cca:
    """A platform with its CPAK and a realm with its RAK."""

    challenge: bytes = b"\x5c" * 64
    tag: int = 907
    legacy: bool = False
    cpak: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    rak: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))

    def key_claim(self, rak=None):
        raw = point(rak or self.rak)
        return raw if self.legacy else cbor2.dumps({1: 2, -1: 2, -2: raw[1:49], -3: raw[49:]})

    def realm_claims(self):
        claims = {
            10: self.challenge,
            44235: b"\x01" * 64,
            44236: "sha-256",
            44237: self.key_claim(),
            44238: b"\x02" * 32,
            44239: [bytes([number]) * 32 for number in range(4)],
            44240: "sha-256",
        }
        return claims if self.legacy else {265: "tag:arm.com,2023:realm#1.0.0", **claims}

    def platform_claims(self):
        return {
            265: "http://arm.com/CCA-SSD/1.0.0" if self.legacy else "tag:arm.com,2023:cca_platform#1.0.0",
            10: hashlib.sha256(self.key_claim()).digest(),
            2396: b"\x7f" * 32,
            256: b"\x01" + b"\x33" * 32,
            2401: b"\xcf",
            2395: 0x3003,
            2402: "sha-256",
            2399: [component(1), component(2)],
        }

    def token(self, *, platform=None, realm=None, platform_token=None, realm_token=None):
        parts = {
            44234: platform_token or sign1(platform or self.platform_claims(), self.cpak, algorithm=-35),
            44241: realm_token or sign1(realm or self.realm_claims(), self.rak, algorithm=-35),
        }
        if self.tag == 907:
            parts = {key: [263, value] for key, value in parts.items()}
        return cbor2.dumps(cbor2.CBORTag(self.tag, parts))

    @property
    def anchors(self):
        return (CpakAnchor(key=spki(self.cpak), instance_id=None, implementation_id=None, root=EvidenceRoot.HARDWARE),)


@dataclass
class Psa:
    """A device with its IAK, and a MAC key it shares."""

    nonce: bytes = b"\x5c" * 32
    first_generation: bool = False
    iak: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    mac_key: bytes = b"\x77" * 32

    def claims(self):
        if self.first_generation:
            return {
                -75000: "PSA_IOT_PROFILE_1",
                -75001: 3,
                -75002: 0x3000,
                -75003: b"\x7f" * 32,
                -75004: b"\x11" * 32,
                -75006: [component(1)],
                -75008: self.nonce,
                -75009: b"\x01" + b"\x33" * 32,
            }
        return {
            265: "tag:psacertified.org,2023:psa#tfm",
            2394: 3,
            2395: 0x3000,
            2396: b"\x7f" * 32,
            2398: "1234567890123-12345",
            2399: [component(1)],
            10: self.nonce,
            256: b"\x01" + b"\x33" * 32,
        }

    def token(self, claims=None, **changes):
        return sign1(claims or self.claims(), self.iak, **{"algorithm": -7, **changes})

    def mac_token(self, claims=None):
        return mac0(claims or self.claims(), self.mac_key)

    @property
    def anchors(self):
        return (IakAnchor(key=spki(self.iak), instance_id=None, implementation_id=None, root=EvidenceRoot.HARDWARE),)

    @property
    def mac_anchors(self):
        return (MacAnchor(key=self.mac_key, instance_id=None),)


@pytest.fixture(scope="session")
def signed():
    return sign1


@pytest.fixture
def cca():
    return Cca()


@pytest.fixture
def legacy_cca():
    return Cca(tag=399, legacy=True)


@pytest.fixture(params=["current", "legacy"])
def any_cca(request):
    return Cca() if request.param == "current" else Cca(tag=399, legacy=True)


@pytest.fixture
def psa():
    return Psa()


@pytest.fixture(params=["rfc9783", "iot-profile-1"])
def any_psa(request):
    return Psa(first_generation=request.param == "iot-profile-1")


@pytest.fixture(scope="session")
def flip_world():
    world = Cca()
    return world, world.token()


@pytest.fixture(scope="session")
def flip_device():
    device = Psa()
    return device, (device.token(), device.mac_token())
