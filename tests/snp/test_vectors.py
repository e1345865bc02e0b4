"""Real evidence: every SNP case of the shared vectors, run as its case.json says."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.utils import CryptographyDeprecationWarning

from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.evidence.snp import (
    ASK_GUID,
    REPORT_BYTES,
    VCEK_GUID,
    CertificateTable,
    GuestPolicy,
    Product,
    SigningKey,
    SnpReport,
    TcbVersion,
    parse_certificate_table,
    parse_report,
    serialize_certificate_table,
    serialize_report,
)
from moorline.rats import EvidenceRoot
from moorline.verification.anchors import production_anchors
from moorline.verification.snp import SnpEndorsements, endorsements_from_table, verify_snp, verify_snp_chain
from moorline.verification.snp_launch import in_pages, launch_digest

SNP = Path(__file__).parents[2].parent / "shared" / "vectors" / "snp"
CASES = sorted(path.parent.name for path in SNP.glob("*/case.json")) if SNP.is_dir() else []
CLASS_OF = {
    "snp.report_size": "structure",
    "snp.chain_broken": "chain",
    "snp.anchor_unknown": "chain",
    "snp.signature_invalid": "signature",
    "snp.certificate_expired": "expired",
    "snp.certificate_not_yet_valid": "not_yet_valid",
    "snp.tcb_mismatch": "binding",
    "snp.chip_mismatch": "binding",
    "snp.report_data_mismatch": "report_data",
}

pytestmark = pytest.mark.skipif(not CASES, reason="shared vectors are not on this machine")


def _case(name: str) -> dict:
    return json.loads((SNP / name / "case.json").read_text())


def _certificates(directory: Path, case: dict) -> SnpEndorsements:
    leaf, others = b"", []
    for endorsement in case["endorsements"]:
        data = (directory / endorsement["file"]).read_bytes()
        if endorsement["as"] == "cert-der":
            leaf = data
        else:
            chain = x509.load_pem_x509_certificates(data)
            others += [cert.public_bytes(serialization.Encoding.DER) for cert in chain]
    return SnpEndorsements(leaf=leaf, intermediates=tuple(others), crl=None)


def _from_trustee_json(text: str) -> bytes:
    """The 1184 bytes behind virtee's JSON form."""
    fields = json.loads(text)["attestation_report"]

    def raw_tcb(part: dict) -> int:
        return TcbVersion(
            boot_loader=part["bootloader"], tee=part["tee"], snp=part["snp"], microcode=part["microcode"], fmc=part["fmc"]
        ).raw()

    def version(part: dict) -> tuple[int, int, int]:
        return (part["major"], part["minor"], part["build"])

    names = ("family_id", "image_id", "report_data", "measurement", "host_data", "id_key_digest", "author_key_digest")
    report = SnpReport(
        **{name: bytes(fields[name]) for name in (*names, "report_id", "report_id_ma", "chip_id")},
        version=fields["version"],
        guest_svn=fields["guest_svn"],
        policy=GuestPolicy(raw=fields["policy"]),
        vmpl=fields["vmpl"],
        signature_algo=fields["sig_algo"],
        current_tcb=raw_tcb(fields["current_tcb"]),
        platform_info=fields["plat_info"],
        signer_info=fields["key_info"],
        reported_tcb=raw_tcb(fields["reported_tcb"]),
        cpuid_fam_id=fields["cpuid_fam_id"],
        cpuid_mod_id=fields["cpuid_mod_id"],
        cpuid_step=fields["cpuid_step"],
        committed_tcb=raw_tcb(fields["committed_tcb"]),
        current_version=version(fields["current"]),
        committed_version=version(fields["committed"]),
        launch_tcb=raw_tcb(fields["launch_tcb"]),
        launch_mit_vector=None,
        current_mit_vector=None,
        signature_r=int.from_bytes(bytes(fields["signature"]["r"]), "little"),
        signature_s=int.from_bytes(bytes(fields["signature"]["s"]), "little"),
    )
    return serialize_report(report)


def _evidence(directory: Path, case: dict) -> bytes:
    (entry,) = case["evidence"]
    data = (directory / entry["file"]).read_bytes()
    return _from_trustee_json(data.decode()) if entry["as"] == "snp-json-trustee" else data


@pytest.mark.parametrize("name", [name for name in CASES if _case(name)["kind"] == "evidence"])
def test_evidence_gets_the_outcome_and_class_its_case_names(name):
    directory, case = SNP / name, _case(name)
    now = Instant(int(datetime.fromisoformat(case["at"]).timestamp()))
    stated = case["inputs"].get("report_data_hex", case["facts"].get("report_data", "00" * 64))
    try:
        data = _evidence(directory, case)
        report = parse_report(data)
        assert serialize_report(report) == data
        endorsements = _certificates(directory, case)
        verified = verify_snp(report, endorsements, report_data=bytes.fromhex(stated), anchors=production_anchors(), now=now)
    except MoorlineError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert case["expect"] == ("malformed" if isinstance(refusal, Malformed) else "refuse")
        assert CLASS_OF[refusal.code] == case["code_class"]
        return
    claims, facts = verified.value, case["facts"]
    assert case["expect"] == "accept"
    assert verified.root is EvidenceRoot.HARDWARE
    assert claims.measurement.hex() == facts["measurement"]
    assert claims.report_data.hex() == facts["report_data"]
    assert claims.report.vmpl == facts["vmpl"]
    assert claims.signer == facts["signing_key"]
    assert claims.report.policy.debug == facts["debug_allowed"]
    assert claims.report.reported_tcb.to_bytes(8, "little").hex() == facts["reported_tcb"]
    assert (claims.chip_id is None) == (claims.signer is SigningKey.VLEK)


def test_real_certificates_with_serial_number_zero_are_still_read(vectors):
    """Verifies that: the installed `cryptography` still parses AMD's certificates; it announced that it will stop."""
    leaf = (vectors / "milan-v2-virtee" / "vcek.der").read_bytes()
    with pytest.warns(CryptographyDeprecationWarning, match="serial number"):
        assert x509.load_der_x509_certificate(leaf).serial_number == 0


def test_a_real_turin_chain_is_verified_without_a_report(vectors):
    directory, case = vectors / "turin-vcek-chain-only", _case("turin-vcek-chain-only")
    now = Instant(int(datetime.fromisoformat(case["at"]).timestamp()))
    chain = verify_snp_chain(_certificates(directory, case), anchors=production_anchors(), now=now)
    assert chain.leaf.product is Product.TURIN
    assert chain.leaf.hwid.hex() == case["facts"]["hwid"]
    assert chain.leaf.tcb.fmc == 0


def test_the_page_chain_gives_the_digest_that_others_computed(vectors):
    """Verifies that: our PAGE_INFO chain over OVMF's pages is the one virtee/sev computed (seed of its launch digests)."""
    directory = vectors / "launch-digest-vectors"
    expected = {case.get("ovmf_hash") for case in json.loads((directory / "expected.json").read_text())}
    ovmf = (directory / "ovmf_AmdSev_suffix.bin").read_bytes()
    assert launch_digest(in_pages(ovmf), first_gpa=(1 << 32) - len(ovmf)).hex() in expected


def test_known_id_key_digests_are_of_the_keys_in_the_auth_block(vectors):
    """Verifies that: what a report carries as ID key digest is SHA-384 over the key of the ID authentication block."""
    directory = vectors / "id-block-auth-block"
    block = (directory / "auth_block.bin").read_bytes()
    expected = json.loads((directory / "expected.json").read_text())
    id_key, author_key = block[0x240 : 0x240 + 0x404], block[0x880 : 0x880 + 0x404]
    assert hashlib.sha384(id_key).digest() == base64.b64decode(expected["id_key_digest_b64"])
    assert hashlib.sha384(author_key).digest() == base64.b64decode(expected["auth_key_digest_b64"])
    assert (directory / "id_block.bin").read_bytes()[:48].hex() == expected["launch_digest"]


def test_real_evidence_travels_in_a_certificate_table(vectors):
    directory = vectors / "milan-v2-virtee"
    ask = production_anchors().snp[0].intermediates[0]
    entries = ((VCEK_GUID, (directory / "vcek.der").read_bytes()), (ASK_GUID, ask))
    table = CertificateTable(entries=entries)
    auxblob = serialize_certificate_table(table).ljust(8192, b"\0")  # hosts pad to whole pages
    assert parse_certificate_table(auxblob) == table
    report = parse_report((directory / "report.bin").read_bytes())
    now = Instant(1_704_067_200)
    endorsements = endorsements_from_table(auxblob)
    verified = verify_snp(report, endorsements, report_data=report.report_data, anchors=production_anchors(), now=now)
    assert verified.value.chip_id == report.chip_id


@pytest.mark.parametrize(
    "name", [name for name in CASES if (_case(name)["kind"], _case(name)["expect"]) == ("evidence", "accept")]
)
def test_any_flipped_bit_of_real_evidence_is_refused(name):
    """Verifies that: every single byte of a real report is covered: by the signature, or by a reserved field."""
    directory, case = SNP / name, _case(name)
    data, endorsements = _evidence(directory, case), _certificates(directory, case)
    now = Instant(int(datetime.fromisoformat(case["at"]).timestamp()))
    for position in range(0, REPORT_BYTES, 13):
        spoiled = bytearray(data)
        spoiled[position] ^= 1 << position % 8
        with pytest.raises((Malformed, NotAuthentic)):
            verify_snp(
                parse_report(bytes(spoiled)),
                endorsements,
                report_data=bytes(spoiled[0x50:0x90]),
                anchors=production_anchors(),
                now=now,
            )
