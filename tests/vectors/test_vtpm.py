"""Verifies that quotes of foreign TPMs count only under a key that is given, certified or bound."""

import base64
import dataclasses
import datetime as dt
import hashlib
import json
import struct

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence import azure_vtpm, tpm_envelopes
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.ima import ImaEntry
from moorline.evidence.tdx_quote import TdReport
from moorline.evidence.tpm_quote import ClockInfo, Quote, serialize_quote
from moorline.rats import EvidenceRoot
from moorline.verification import ima_signature, vtpm

NONCE = b"\x5c" * 24
NOW = Instant(1_800_000_000)
PCRS = {0: b"\x01" * 32, 7: b"\x07" * 32}


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(65537, 2048)


def message(pcrs=PCRS, *, nonce=NONCE, algorithm="sha256", banks=1):
    digest = hashlib.new(algorithm, b"".join(pcrs[index] for index in sorted(pcrs))).digest()
    selection = tpm.select(tpm.ALG_SHA256, tuple(sorted(pcrs)))
    clock = ClockInfo(1, 2, 3, safe=True)
    return serialize_quote(Quote(b"\x00\x0b" + bytes(32), nonce, clock, 1, (selection,) * banks, digest))


def signature(key, data, *, chosen=tpm.ALG_SHA256):
    algorithm = {tpm.ALG_SHA1: hashes.SHA1(), tpm.ALG_SHA256: hashes.SHA256(), tpm.ALG_SHA384: hashes.SHA384()}[chosen]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(algorithm)))
        return tpm.Signature(tpm.ALG_ECDSA, chosen, r.to_bytes(32, "big"), s.to_bytes(32, "big"))
    return tpm.Signature(tpm.ALG_RSASSA, chosen, key.sign(data, padding.PKCS1v15(), algorithm), b"")


def der(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def given_key(key):
    return vtpm.given_key(der(key), root=EvidenceRoot.SOFTWARE)


def verify(key, data, signed, pcrs=PCRS, /, **changes):
    arguments = {"key": given_key(key), "nonce": NONCE, "sha1": vtpm.Sha1.REFUSED, **changes}
    return vtpm.verify_foreign_quote(data, signed, pcrs, **arguments)


def test_a_genuine_quote_proves_its_values(key):
    data = message()
    verified = verify(key, data, signature(key, data))
    assert (dict(verified.value.pcrs), verified.value.selection) == (PCRS, (0, 7))
    assert verified.root is EvidenceRoot.SOFTWARE


def test_without_values_only_the_digest_is_proven(key):
    data = message()
    assert verify(key, data, signature(key, data), {}).value.pcrs == {}


def test_an_elliptic_key(key):
    elliptic = ec.generate_private_key(ec.SECP256R1())
    data = message()
    verify(elliptic, data, signature(elliptic, data))
    with pytest.raises(NotAuthentic, match="tpm.scheme_mismatch"):
        verify(elliptic, data, signature(key, data))


def test_sha1_is_taken_only_by_name(key):
    data = message(algorithm="sha1")
    signed = signature(key, data, chosen=tpm.ALG_SHA1)
    with pytest.raises(NotAuthentic, match="tpm.scheme_mismatch"):
        verify(key, data, signed)
    verify(key, data, signed, sha1=vtpm.Sha1.ACCEPTED)


def test_each_rule_of_a_quote(key):
    data = message()
    signed = signature(key, data)
    with pytest.raises(NotAuthentic, match="tpm.signature_invalid"):
        verify(key, message(nonce=b"\x00" * 24), signed)
    with pytest.raises(NotAuthentic, match="tpm.nonce_mismatch"):
        verify(key, data, signed, nonce=bytes(24))
    with pytest.raises(NotAuthentic, match="tpm.pcr_digest_mismatch"):
        verify(key, data, signed, PCRS | {7: bytes(32)})
    with pytest.raises(NotAuthentic, match="tpm.selection_mismatch"):
        verify(key, data, signed, {0: PCRS[0]})
    with pytest.raises(NotAuthentic, match="tpm.selection_mismatch"):
        verify(key, data, signed, PCRS | {7: bytes(20)})
    two = message(banks=2)
    with pytest.raises(NotAuthentic, match="tpm.selection_mismatch"):
        verify(key, two, signature(key, two))
    with pytest.raises(Malformed, match="tpm.not_generated_by_tpm"):
        verify(key, b"\x00" + data[1:], signed)


@pytest.mark.parametrize("spki", [b"nothing", None])
def test_a_key_that_cannot_be_used(spki):
    weak = rsa.generate_private_key(65537, 1024) if spki is None else None
    with pytest.raises(NotAuthentic, match="ak.unusable"):
        vtpm.given_key(spki or der(weak), root=EvidenceRoot.SOFTWARE)


# ---------------------------------------------------------------- certified keys

AK = tpm.RESTRICTED | tpm.SIGN | tpm.FIXED_TPM | tpm.FIXED_PARENT | tpm.SENSITIVE_DATA_ORIGIN


def public_area(key, *, attributes=AK):
    modulus = key.public_key().public_numbers().n.to_bytes(256, "big")
    parameters = tpm.RsaParameters(
        symmetric=(tpm.ALG_NULL, 0, 0),
        scheme=tpm.ALG_RSASSA,
        scheme_hash=tpm.ALG_SHA256,
        key_bits=2048,
        exponent=0,
        modulus=modulus,
    )
    return tpm.serialize_public(
        tpm.Public(name_algorithm=tpm.ALG_SHA256, attributes=attributes, policy=b"", parameters=parameters, encoded=b"")
    )


def certificate(key, subject, issuer_key, issuer, *, ca):
    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2040, 1, 1, tzinfo=dt.UTC))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def test_a_certified_key_rests_on_a_virtual_root(key):
    root = ec.generate_private_key(ec.SECP256R1())
    top, leaf = certificate(root, "r", root, "r", ca=True), certificate(key, "ak", root, "r", ca=False)
    held = vtpm.certified_key(public_area(key), leaf, (), roots=(top,), now=NOW)
    assert held.root is EvidenceRoot.VIRTUAL
    with pytest.raises(NotAuthentic, match="ak.chain"):
        vtpm.certified_key(public_area(key), leaf, (top,), roots=vtpm.gce_roots(), now=NOW)
    other = rsa.generate_private_key(65537, 2048)
    with pytest.raises(NotAuthentic, match="ak.certificate_mismatch"):
        vtpm.certified_key(public_area(other), leaf, (), roots=(top,), now=NOW)
    with pytest.raises(NotAuthentic, match="path.expired"):
        vtpm.certified_key(public_area(key), leaf, (), roots=(top,), now=Instant(2_300_000_000))


@pytest.mark.parametrize("attributes", [AK & ~tpm.RESTRICTED, AK & ~tpm.FIXED_TPM, AK | tpm.DECRYPT])
def test_a_key_that_could_sign_anything_is_no_attestation_key(key, attributes):
    with pytest.raises(NotAuthentic, match="ak.not_restricted"):
        vtpm.given_public(public_area(key, attributes=attributes), root=EvidenceRoot.SOFTWARE)


# ---------------------------------------------------------------- keys bound to hardware evidence


def hcl(claims, *, kind=2, claims_hash=1, **changes):
    fields = {"magic": b"HCLA", "version": 1, "request": 2, "status": 0, "runtime": 1, "behind": bytes(10), **changes}
    size = changes.get("size", 32 + 0x4A0 + 20 + len(claims))
    head = struct.pack("<4s7I", fields["magic"], fields["version"], size, fields["request"], fields["status"], 0, 0, 0)
    runtime = struct.pack("<5I", 20 + len(claims), fields["runtime"], kind, claims_hash, len(claims))
    return head + bytes(0x4A0) + runtime + claims + fields["behind"]


def runtime_claims(key, *, kids=("HCLAkPub",)):
    def text(number, size):
        return base64.urlsafe_b64encode(number.to_bytes(size, "big")).decode().rstrip("=")

    numbers = key.public_key().public_numbers()
    named = [{"kid": kid, "kty": "RSA", "n": text(numbers.n, 256), "e": text(numbers.e, 3)} for kid in kids]
    return json.dumps({"keys": named, "user-data": "00" * 64}).encode()


def test_a_key_in_the_runtime_claims_is_bound_by_report_data(key):
    report = azure_vtpm.parse_hcl_report(hcl(runtime_claims(key)))
    claims = azure_vtpm.parse_runtime_claims(report.claims)
    report_data = hashlib.sha256(report.claims).digest() + bytes(32)
    bound = vtpm.bound_key(report, claims, report_data=report_data, root=EvidenceRoot.HARDWARE)
    data = message()
    assert verify(key, data, signature(key, data), key=bound).root is EvidenceRoot.HARDWARE
    with pytest.raises(NotAuthentic, match="tpm.scheme_mismatch"):
        verify(key, data, signature(key, data, chosen=tpm.ALG_SHA384), key=bound)
    for wrong in (bytes(64), report_data[:32] + b"\x01" + bytes(31)):
        with pytest.raises(NotAuthentic, match="vtpm.claims_mismatch"):
            vtpm.bound_key(report, claims, report_data=wrong, root=EvidenceRoot.HARDWARE)
    weak = dataclasses.replace(claims, modulus=b"\x01\x01")
    with pytest.raises(NotAuthentic, match="ak.unusable"):
        vtpm.bound_key(report, weak, report_data=report_data, root=EvidenceRoot.HARDWARE)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"magic": b"HCLB"}, "azure.hcl_header"),
        ({"version": 9}, "azure.hcl_header"),
        ({"request": 3}, "azure.hcl_header"),
        ({"status": 1}, "azure.hcl_header"),
        ({"runtime": 2}, "azure.hcl_header"),
        ({"size": 7}, "azure.hcl_size"),
        ({"kind": 3}, "azure.hcl_kind"),
        ({"claims_hash": 9}, "azure.hcl_kind"),
        ({"behind": b"\x00\x01"}, "azure.hcl_trailing"),
    ],
)
def test_each_rule_of_an_hcl_report(changes, code):
    with pytest.raises(Malformed) as refused:
        azure_vtpm.parse_hcl_report(hcl(b"{}", **changes))
    assert refused.value.code == code


def test_a_td_report_and_a_td_quote_are_of_one_domain():
    fields = {
        name: bytes([number]) * 48 for number, name in enumerate(("mr_td", "mr_config_id", "mr_owner", "mr_owner_config"))
    }
    quoted = TdReport(
        tee_tcb_svn=bytes(16),
        mr_seam=bytes(48),
        mr_signer_seam=bytes(48),
        seam_attributes=bytes(8),
        td_attributes=1 << 28,
        xfam=3,
        **fields,
        rtmrs=(b"\x05" * 48, b"\x06" * 48, b"\x07" * 48, b"\x08" * 48),
        report_data=b"\x09" * 64,
        tee_tcb_svn_2=None,
        mr_service_td=None,
    )
    info = struct.pack("<QQ", quoted.td_attributes, quoted.xfam) + b"".join(fields.values()) + b"".join(quoted.rtmrs)
    hardware = bytes(128) + quoted.report_data + bytes(320) + info + bytes(112)
    report = azure_vtpm.HclReport(
        kind=azure_vtpm.ReportKind.TDX, claims_hash=azure_vtpm.ClaimsHash.SHA256, hardware=hardware, claims=b"{}"
    )
    vtpm.require_same_domain(report, quoted)
    for position in (128, 191, 512, 528, 911):
        changed = bytearray(hardware)
        changed[position] ^= 1
        with pytest.raises(NotAuthentic, match="vtpm.td_report_mismatch"):
            vtpm.require_same_domain(dataclasses.replace(report, hardware=bytes(changed)), quoted)


@pytest.mark.parametrize("kids", [(), ("HCLEkPub",), ("HCLAkPub", "HCLAkPub")])
def test_the_claims_name_exactly_one_attestation_key(key, kids):
    with pytest.raises(Malformed, match="azure.claims"):
        azure_vtpm.parse_runtime_claims(runtime_claims(key, kids=kids))


def test_claims_with_a_member_twice():
    with pytest.raises(Malformed, match="azure.claims"):
        azure_vtpm.parse_runtime_claims(b'{"keys": [], "keys": []}')


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_malformed(data):
    for parse in (
        azure_vtpm.parse_hcl_report,
        azure_vtpm.parse_runtime_claims,
        azure_vtpm.parse_envelope,
        azure_vtpm.parse_quote_json,
        azure_vtpm.parse_quote_bincode,
        tpm_envelopes.parse_gotpm,
        tpm_envelopes.parse_goattest,
        tpm_envelopes.parse_trustee,
        tpm_envelopes.parse_keylime,
        tpm_envelopes.parse_tpm2_tools_pcrs,
    ):
        with pytest.raises(Malformed):
            parse(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "quote",
                        "tpm_quote",
                        "report",
                        "hcl_report",
                        "pcrs",
                        "message",
                        "keys",
                        "AK",
                        "Quote",
                        "Log",
                        "PCRs",
                        "Alg",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_an_envelope_or_malformed(document):
    data = json.dumps(document).encode()
    for parse in (
        azure_vtpm.parse_runtime_claims,
        azure_vtpm.parse_envelope,
        azure_vtpm.parse_quote_json,
        tpm_envelopes.parse_goattest,
        tpm_envelopes.parse_trustee,
    ):
        with pytest.raises(Malformed):
            parse(data)


# ---------------------------------------------------------------- file signatures in IMA


def signed_entry(key, *, algorithm="sha256", number=4, **changes):
    digest = hashlib.new(algorithm, b"a file").digest()
    raw = key.sign(b"a file", ec.ECDSA(hashes.SHA256()))
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest[-4:]
    fields = {"kind": 3, "version": 2, "identifier": identifier, "size": len(raw), **changes}
    extra = struct.pack(">BBB4sH", fields["kind"], fields["version"], number, fields["identifier"], fields["size"]) + raw
    return ImaEntry(10, bytes(20), fields.get("template", "ima-sig"), algorithm, digest, b"/bin/x", extra)


def test_a_signed_file_and_each_rule_of_its_signature():
    key = ec.generate_private_key(ec.SECP256R1())
    keys = [ima_signature.load_key(der(key))]
    entry = signed_entry(key)
    assert ima_signature.is_signed(entry, keys)
    for change in ({"kind": 1}, {"version": 1}, {"identifier": bytes(4)}, {"size": 1}, {"number": 6}, {"number": 99}):
        assert not ima_signature.is_signed(signed_entry(key, **change), keys)
    assert not ima_signature.is_signed(signed_entry(key, template="ima-ng"), keys)
    assert not ima_signature.is_signed(entry._replace(digest=bytes(32)), keys)
    assert not ima_signature.is_signed(entry._replace(extra=b""), keys)
    assert not ima_signature.is_signed(entry, [])
    with pytest.raises(NotAuthentic, match="ima.key_unusable"):
        ima_signature.load_key(b"nothing")
