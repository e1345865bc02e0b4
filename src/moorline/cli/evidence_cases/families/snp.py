"""AMD SEV-SNP: reports raw, as JSON of fields, and as configfs-tsm hands them out; CAs come with the package."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Final

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.errors import Malformed, Unavailable
from moorline.evidence import eat_cbor, snp
from moorline.policy import rules
from moorline.policy.match import AtLeast, Exact
from moorline.rats import EvidenceRoot, Finding
from moorline.verification import anchors
from moorline.verification.snp import SnpClaims, SnpEndorsements, endorsements_from_table, verify_snp
from moorline.verification.verified import Verified

HINTS: Final = frozenset({"snp-report", "snp-json-trustee", "tsm-json", "tsm-cbor", "snp-cert-table"})
_CERTIFICATES: Final = frozenset({"cert-der", "cert-pem", "chain-pem"})


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    verified = verify(case, facts)
    return _appraise(case, verified.value) if case.mode == "policy" else ()


def verify(case: Case, facts: Facts) -> Verified[SnpClaims]:
    """What the case proves, before any policy."""
    raw, supplied, table = _parts(case)
    report = snp.parse_report(raw)
    facts.update(report_facts(report))
    for entry in case.endorsements:
        if entry.hint in _CERTIFICATES:
            supplied += material.certificates(case.read(entry.file))
        elif entry.hint == "snp-cert-table":
            table = case.read(entry.file)
        elif entry.hint != "crl-der":
            raise Unavailable("material.unsupported", "a kind of endorsement that is not read here", got=entry.hint)
    crl = next((case.read(entry.file) for entry in case.endorsements if entry.hint == "crl-der"), None)
    expected = case.octets("report_data_hex")
    if case.at is None:
        raise Unavailable("material.no_time", "certificates are dated, and the case gives no time to appraise at")
    return verify_snp(
        report,
        endorsements(supplied, table, crl),
        # A case without report data asks about authenticity only, so the report's own stands in for it.
        report_data=report.report_data if expected is None else expected,
        anchors=_anchors(case),
        now=case.at,
    )


def _anchors(case: Case) -> anchors.AnchorSet:
    """AMD's roots; with AMD's intermediates unless the case wants a path from what it supplies alone."""
    named = material.anchors(case)
    if named:  # whose product line such a root is of, it does not say itself: it stands for the one that the leaf names
        return anchors.AnchorSet(
            snp=tuple(
                anchors.SnpAnchor(product=product, ark=der, intermediates=(), root=EvidenceRoot.TEST)
                for product in snp.Product
                for der in named
            )
        )
    shipped = anchors.production_anchors()
    if case.text("intermediates") != "supplied":
        return shipped
    return anchors.AnchorSet(snp=tuple(dataclasses.replace(anchor, intermediates=()) for anchor in shipped.snp))


def report_facts(report: snp.SnpReport) -> Facts:
    """What a report says, for people. The TCB is as it stands: only a certificate says how to read it."""
    return {
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "vmpl": report.vmpl,
        "reported_tcb": _tcb(report),
        "signing_key": report.signing_key.value,
        "debug_allowed": report.policy.debug,
    }


def endorsements(supplied: list[bytes], table: bytes | None, crl: bytes | None) -> SnpEndorsements:
    """The endorsements in certificates of any order, or in a certificate table where there are none."""
    supplied = list(dict.fromkeys(supplied))
    leaves = [der for der in supplied if not _is_vendor_ca(der)]
    if not leaves and table is not None:
        return endorsements_from_table(table)
    if not leaves:
        raise Unavailable("snp.leaf_missing", "no VCEK or VLEK was supplied", remedy="fetch it from AMD's KDS")
    if len(leaves) > 1:
        raise Malformed("snp.leaf_ambiguous", "more than one certificate could be the chip's", got=len(leaves))
    others = tuple(der for der in supplied if der != leaves[0])
    # The CAs above: those supplied, and those that come with the package (CASES.md, `intermediates`).
    return SnpEndorsements(leaf=leaves[0], intermediates=others[:4], crl=crl)


def _is_vendor_ca(der: bytes) -> bool:
    try:
        return material.is_ca(material.decoded(der))
    except Unavailable:
        return False  # a broken certificate is the chip's: verification says what is wrong with it


def _parts(case: Case) -> tuple[bytes, list[bytes], bytes | None]:
    """Report, certificates and certificate table in the evidence files."""
    report: bytes | None = None
    table: bytes | None = None
    supplied: list[bytes] = []
    for entry in case.evidence:
        data = case.read(entry.file)
        if entry.hint == "snp-json-trustee":
            report, more = from_trustee_json(data)
            supplied += more
        elif entry.hint == "tsm-json":
            report, table = _from_tsm(data)
        elif entry.hint == "tsm-cbor":
            report, table = _from_tsm_cbor(data)
        elif entry.hint == "snp-cert-table":
            table = data
        else:
            report = data
    if report is None:
        raise Unavailable("snp.report_missing", "no report among the evidence")
    return report, supplied, table


def _tcb(report: snp.SnpReport) -> str:
    return report.reported_tcb.to_bytes(8, "little").hex()


def _appraise(case: Case, claims: SnpClaims) -> tuple[Finding, ...]:
    known = {"allow_debug", "measurements", "min_tcb"}
    measurements = case.policy.get("measurements", {})
    if set(case.policy) - known or not isinstance(measurements, dict) or set(measurements) - {"measurement"}:
        raise Unavailable("material.policy_unsupported", "a demand that is not understood here", got=sorted(case.policy))
    findings: list[Finding] = []
    if case.policy.get("allow_debug") is False:
        demand = Exact(value=False)
        findings.append(
            rules.judged(
                "snp.debug", claims.report.policy.debug, demand, claim="runtime-opaque", remedy="launch without debug"
            )
        )
    if "measurement" in measurements:
        value = Exact(bytes.fromhex(measurements["measurement"]))
        findings.append(
            rules.judged(
                "snp.measurement", claims.measurement, value, claim="executables", remedy="start the registered image"
            )
        )
    least = case.policy.get("min_tcb")
    if isinstance(least, dict):
        minimum = snp.TcbVersion(
            boot_loader=least.get("bl", 0),
            tee=least.get("tee", 0),
            snp=least.get("snp", 0),
            microcode=least.get("ucode", 0),
            fmc=None if claims.reported_tcb.fmc is None else least.get("fmc", 0),
        )
        findings.append(
            rules.judged(
                "snp.reported_tcb", claims.reported_tcb, AtLeast(minimum), claim="hardware", remedy="update firmware"
            )
        )
    return tuple(findings)


# ---------------------------------------------------------------- other encodings of a report


def _from_tsm(data: bytes) -> tuple[bytes, bytes | None]:
    """configfs-tsm as JSON: outblob and auxblob in base64."""
    try:
        document = json.loads(data)
        outblob = base64.b64decode(document["outblob"], validate=True)
        auxblob = document.get("auxblob")
        return outblob, None if auxblob is None else base64.b64decode(auxblob, validate=True)
    except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
        raise Malformed("snp.tsm_json", "not a configfs-tsm report in JSON", got=type(error).__name__) from None


def _from_tsm_cbor(data: bytes) -> tuple[bytes, bytes | None]:
    """configfs-tsm as CBOR: a map with outblob and auxblob."""
    item = eat_cbor.decode(data, encoding=eat_cbor.Encoding.ANY)
    blobs = item if isinstance(item, dict) else {}
    outblob, auxblob = blobs.get("outblob"), blobs.get("auxblob")
    if not isinstance(outblob, bytes) or not (auxblob is None or isinstance(auxblob, bytes)):
        raise Malformed("snp.tsm_cbor", "not a configfs-tsm report in CBOR")
    return outblob, auxblob


def from_trustee_json(data: bytes) -> tuple[bytes, list[bytes]]:
    """The report bytes and certificates of virtee's JSON: every field is written back where the ABI has it.

    What the JSON leaves out (reserved fields) is zero; a value that does not fit its field is Malformed("snp.json").
    """
    try:
        document = json.loads(data)
        certificates = [bytes(item["data"]) for item in document.get("cert_chain") or []]
        return _report_bytes(document["attestation_report"]), certificates
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise Malformed("snp.json", "not a report in JSON", got=f"{type(error).__name__} {error}") from None


def _report_bytes(fields: Mapping[str, object]) -> bytes:
    report = snp.SnpReport(
        version=_number(fields, "version"),
        guest_svn=_number(fields, "guest_svn"),
        policy=snp.GuestPolicy(raw=_number(fields, "policy")),
        family_id=_bytes(fields, "family_id", 16),
        image_id=_bytes(fields, "image_id", 16),
        vmpl=_number(fields, "vmpl"),
        signature_algo=_number(fields, "sig_algo"),
        current_tcb=_tcb_number(fields, "current_tcb"),
        platform_info=_number(fields, "plat_info"),
        signer_info=_number(fields, "key_info"),
        report_data=_bytes(fields, "report_data", 64),
        measurement=_bytes(fields, "measurement", 48),
        host_data=_bytes(fields, "host_data", 32),
        id_key_digest=_bytes(fields, "id_key_digest", 48),
        author_key_digest=_bytes(fields, "author_key_digest", 48),
        report_id=_bytes(fields, "report_id", 32),
        report_id_ma=_bytes(fields, "report_id_ma", 32),
        reported_tcb=_tcb_number(fields, "reported_tcb"),
        cpuid_fam_id=_optional(fields, "cpuid_fam_id"),
        cpuid_mod_id=_optional(fields, "cpuid_mod_id"),
        cpuid_step=_optional(fields, "cpuid_step"),
        chip_id=_bytes(fields, "chip_id", 64),
        committed_tcb=_tcb_number(fields, "committed_tcb"),
        current_version=_version(fields, "current"),
        committed_version=_version(fields, "committed"),
        launch_tcb=_tcb_number(fields, "launch_tcb"),
        launch_mit_vector=_optional(fields, "launch_mit_vector"),
        current_mit_vector=_optional(fields, "current_mit_vector"),
        signature_r=int.from_bytes(_bytes(_mapping(fields, "signature"), "r", 72), "little"),
        signature_s=int.from_bytes(_bytes(_mapping(fields, "signature"), "s", 72), "little"),
    )
    return snp.serialize_report(report)


def _mapping(fields: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = fields[name]
    if not isinstance(value, dict):
        raise TypeError(name)
    return value


def _number(fields: Mapping[str, object], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(name)
    return value


def _optional(fields: Mapping[str, object], name: str) -> int | None:
    return None if fields.get(name) is None else _number(fields, name)


def _bytes(fields: Mapping[str, object], name: str, size: int) -> bytes:
    value = fields[name]
    if not isinstance(value, list) or len(value) != size:
        raise TypeError(name)
    return bytes(value)


def _version(fields: Mapping[str, object], name: str) -> tuple[int, int, int]:
    version = _mapping(fields, name)
    return (_number(version, "major"), _number(version, "minor"), _number(version, "build"))


def _tcb_number(fields: Mapping[str, object], name: str) -> int:
    tcb = _mapping(fields, name)
    fmc = _optional(tcb, "fmc")
    parts = {key: _number(tcb, key) for key in ("bootloader", "tee", "snp", "microcode")}
    return snp.TcbVersion(
        boot_loader=parts["bootloader"], tee=parts["tee"], snp=parts["snp"], microcode=parts["microcode"], fmc=fmc
    ).raw()
