"""Endorsement keys and credential activation: known answers, and chains with their bad twins."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from moorline.clock import Instant
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.evidence import tpm_structures as tpm
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_identity import (
    EK_USAGE,
    TpmAnchor,
    _ecc_seed,
    kdfa,
    kdfe,
    make_credential,
    vendor_anchors,
    verify_endorsement,
)
from moorline.verification.tpm_revocation import Revocation, strong

NOW = Instant(1_790_000_000)
WAIVED = Revocation(crls=(), not_required={EvidenceRoot.HARDWARE: "test_revocation.py is about revocation"})
AT = datetime.fromtimestamp(NOW, UTC)


@pytest.mark.parametrize("name", ["kdfa", "kdfe"])
def test_key_derivation_known_answers(shared, name):
    tried = 0
    for one in json.loads((shared / f"vectors/tpm/kdf-and-encaps-kats/{name}.json").read_text()):
        if one["HashAlg"] not in tpm.HASH_NAMES:
            continue
        arguments = (one["Label"].encode(), bytes.fromhex(one["ContextU"]), bytes.fromhex(one["ContextV"]), one["Bits"])
        made = (
            kdfa(one["HashAlg"], bytes.fromhex(one["Key"]), *arguments)
            if name == "kdfa"
            else kdfe(one["HashAlg"], bytes.fromhex(one["Z"]), *arguments)
        )
        assert made.hex() == one["Result"], one["Name"]
        tried += 1
    assert tried > 20


def test_seed_encapsulation_known_answers(shared):
    tried = 0
    for one in json.loads((shared / "vectors/tpm/kdf-and-encaps-kats/ecc_labeled_encaps.json").read_text()):
        public = tpm.parse_public(bytes.fromhex(one["PublicKey"]))
        if one["Label"] != "IDENTITY" or public.parameters.curve not in (tpm.CURVE_P256, tpm.CURVE_P384):
            continue
        key = public.key()
        ephemeral = ec.derive_private_key(int(one["EphemeralPrivate"], 16), key.curve)
        seed, secret = _ecc_seed(public.name_algorithm, key, ephemeral)
        assert (seed.hex(), secret.hex()) == (one["Secret"], one["Ciphertext"]), one["Name"]
        tried += 1
    assert tried


class Maker:
    """A maker of endorsement keys with one intermediate; every argument is one way to do it wrong."""

    def __init__(self):
        self.root_key, self.ca_key, self.ek_key = (
            ec.generate_private_key(ec.SECP256R1()),
            ec.generate_private_key(ec.SECP256R1()),
            rsa.generate_private_key(public_exponent=65537, key_size=2048),
        )
        self.root = certificate("root", self.root_key.public_key(), "root", self.root_key, ca=True)

    def ca(self, **changes):
        options = {"ca": True} | changes
        return certificate("ca", self.ca_key.public_key(), "root", self.root_key, **options)

    def ek(self, *, key=None, signer=None, **changes):
        options = {"ca": False, "usage": EK_USAGE, "named": True} | changes
        return certificate("", (key or self.ek_key).public_key(), "ca", signer or self.ca_key, **options)

    def public(self, *, attributes=0x300B2):
        modulus = self.ek_key.public_key().public_numbers().n.to_bytes(256, "big")
        parameters = tpm.RsaParameters(
            symmetric=(tpm.ALG_AES, 128, tpm.ALG_CFB),
            scheme=tpm.ALG_NULL,
            scheme_hash=0,
            key_bits=2048,
            exponent=0,
            modulus=modulus,
        )
        return tpm.serialize_public(
            tpm.Public(
                name_algorithm=tpm.ALG_SHA256, attributes=attributes, policy=bytes(32), parameters=parameters, encoded=b""
            )
        )


def certificate(name, public, issuer, signer, *, ca, usage=None, named=False, ended=False, early=False, critical=None):
    start = AT + timedelta(days=1 if early else -20)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=10 if ended else 4000))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if named:
        who = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:00001014")])
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DirectoryName(who)]), critical=True)
    if critical is not None:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(critical), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    return builder.sign(signer, hashes.SHA256())


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def der(*certificates):
    return tuple(one.public_bytes(Encoding.DER) for one in certificates)


@pytest.fixture(scope="module")
def made():
    return Maker()


def judged(made, certificates, *, public=None, root=None):
    anchor = TpmAnchor(certificate=der(root or made.root)[0], root=EvidenceRoot.HARDWARE)
    return verify_endorsement(public or made.public(), certificates, anchors=(anchor,), revocation=WAIVED, now=NOW)


def test_a_chain_over_an_on_die_intermediate_leads_to_the_anchor(made):
    assert judged(made, der(made.ek(), made.ca())).root is EvidenceRoot.HARDWARE


def test_there_is_no_default_anchor(made):
    with pytest.raises(NotAuthentic) as refused:
        verify_endorsement(made.public(), der(made.ek(), made.ca()), anchors=(), revocation=WAIVED, now=NOW)
    assert refused.value.code == "ek.anchor_unknown"
    assert all(anchor.root is not EvidenceRoot.HARDWARE for anchor in vendor_anchors())


BAD = [
    (lambda m: der(m.ek()), "ek.anchor_unknown"),
    (lambda m: der(m.ek(), m.ca(ca=False)), "ek.anchor_unknown"),
    (lambda m: der(m.ek(signer=m.root_key), m.ca()), "ek.anchor_unknown"),
    (lambda m: der(m.ek(ended=True), m.ca()), "ek.certificate_expired"),
    (lambda m: der(m.ek(), m.ca(ended=True)), "ek.certificate_expired"),
    (lambda m: der(m.ek(early=True), m.ca()), "ek.certificate_not_yet_valid"),
    (lambda m: der(m.ek(), m.ca(early=True)), "ek.certificate_not_yet_valid"),
    (lambda m: der(m.ek(usage=None), m.ca()), "ek.profile"),
    (lambda m: der(m.ek(usage=x509.ObjectIdentifier("1.3.6.1.5.5.7.3.1")), m.ca()), "ek.profile"),
    (lambda m: der(m.ek(ca=True), m.ca()), "ek.profile"),
    (lambda m: der(m.ek(named=False), m.ca()), "ek.profile"),
    (lambda m: der(m.ek(critical="1.2.3.4"), m.ca()), "ek.critical_extension"),
    (lambda m: der(m.ek(), m.ca(critical="1.2.3.5")), "ek.critical_extension"),
    (lambda m: der(m.ek(key=rsa.generate_private_key(public_exponent=65537, key_size=2048)), m.ca()), "ek.key_mismatch"),
    (lambda _: (), "ek.certificates"),
]


@pytest.mark.parametrize(("chain", "code"), BAD, ids=[f"{index}-{code}" for index, (_, code) in enumerate(BAD)])
def test_each_bad_twin_is_refused_by_its_own_rule(made, chain, code):
    with pytest.raises(MoorlineError) as refused:
        judged(made, chain(made))
    assert refused.value.code == code


def test_signatures_over_sha1_count_for_nothing():
    """The library makes none, so the rule is asked by itself: `_issued` and `is_by` ask it for each signature."""
    assert [strong(one) for one in (hashes.SHA1(), hashes.MD5(), None)] == [False] * 3
    assert strong(hashes.SHA256())


@pytest.mark.parametrize("attributes", [0x700B2, 0x200B2, 0x300B0, 0x100B2])
def test_an_endorsement_key_decrypts_and_does_nothing_else(made, attributes):
    with pytest.raises(Refused) as refused:
        judged(made, der(made.ek(), made.ca()), public=made.public(attributes=attributes))
    assert refused.value.code == "ek.attributes"


def test_a_credential_is_different_each_time_and_bound_to_the_name(made):
    public = tpm.parse_public(made.public())
    one = make_credential(public, b"\x00\x0b" + bytes(32), bytes(32), seed=bytes(32))
    two = make_credential(public, b"\x00\x0b" + bytes(31) + b"\x01", bytes(32), seed=bytes(32))
    assert one[0] != two[0]
    with pytest.raises(MoorlineError):
        make_credential(public, b"n", bytes(33), seed=bytes(32))
