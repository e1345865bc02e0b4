"""AWS Nitro documents: raw, in base64, or as hex in a name of a certificate."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import nitro
from moorline.policy import rules
from moorline.policy.match import Exact
from moorline.rats import EvidenceRoot, Finding
from moorline.verification.nitro import NitroAnchor, NitroClaims, aws_anchor, verify_nitro
from moorline.verification.verified import Verified

HINTS: Final = frozenset({"nitro-document", "nitro-document-b64", "x509-san-nitro"})
_PCR: Final = re.compile(r"pcr([0-9]|[12][0-9]|3[01])")
_LABEL: Final = re.compile(r"[0-9a-f.]+")


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    verified = verify(case, facts)
    return _appraise(case, verified.value.document) if case.mode == "policy" else ()


def verify(case: Case, facts: Facts) -> Verified[NitroClaims]:
    """What the case proves, before any policy."""
    entry = case.evidence[0]
    document = nitro.parse_document(document_bytes(entry.hint, case.read(entry.file)))
    facts.update(document_facts(document))
    nonce = case.octets("nonce_hex")
    if case.at is None:
        raise Unavailable("material.no_time", "certificates are dated, and the case gives no time to appraise at")
    verified = verify_nitro(
        document,
        # A case without a nonce asks about authenticity only, so the document's own stands in for it.
        nonce=document.nonce if nonce is None else nonce or None,
        anchors=_anchors(case),
        now=case.at,
    )
    _tls_key(case, document)
    return verified


def document_bytes(hint: str, data: bytes) -> bytes:
    """The document itself, whatever it is wrapped in. Raises Malformed("nitro.wrapping")."""
    if hint == "nitro-document-b64":
        try:
            return base64.b64decode(b"".join(data.split()), validate=True)
        except (binascii.Error, ValueError):
            raise Malformed("nitro.wrapping", "not base64") from None
    return _in_names(data) if hint == "x509-san-nitro" else data


def document_facts(document: nitro.NitroDocument) -> Facts:
    """What a document says, for people; absent members are left out."""
    facts: Facts = {
        "module_id": document.module_id,
        "timestamp_ms": document.timestamp_ms,
        "debug": document.debug,
    }
    if 0 in document.pcrs:
        facts["pcr0"] = document.pcrs[0].hex()
    for name in ("nonce", "user_data"):
        value: bytes | None = getattr(document, name)
        if value is not None:
            facts[name] = value.hex()
    return facts


def _in_names(data: bytes) -> bytes:
    """The longest DNS name of the certificate that is hex, without its dots and the domain behind it."""
    der = material.certificates(data)
    try:
        names = (
            material.decoded(der[0])
            .extensions.get_extension_for_class(x509.SubjectAlternativeName)
            .value.get_values_for_type(x509.DNSName)
        )
    except (IndexError, x509.ExtensionNotFound):
        raise Malformed("nitro.wrapping", "the certificate has no alternative names") from None
    candidates = [_leading_hex(name) for name in names]
    longest = max(candidates, key=len, default="")
    if not longest or len(longest) % 2:
        raise Malformed("nitro.wrapping", "no alternative name of the certificate holds a document")
    return bytes.fromhex(longest)


def _leading_hex(name: str) -> str:
    labels: list[str] = []
    for label in name.lower().split("."):
        if not _LABEL.fullmatch(label):
            break
        labels.append(label)
    return "".join(labels)


def _anchors(case: Case) -> tuple[NitroAnchor, ...]:
    named = material.anchors(case)
    return tuple(NitroAnchor(certificate=der, root=EvidenceRoot.TEST) for der in named) if named else (aws_anchor(),)


def _tls_key(case: Case, document: nitro.NitroDocument) -> None:
    named = case.text("tls_certificate_file")
    if named is None:
        return
    supplied = material.certificates(case.read(named))
    if not supplied:
        raise Unavailable("material.certificate_undecodable", "the TLS certificate cannot be read", got=named)
    spki = (
        material.decoded(supplied[0])
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    if document.user_data is None or not document.user_data.startswith(spki):
        raise NotAuthentic("nitro.tls_key_mismatch", "the document does not name the key of this TLS certificate")


def _appraise(case: Case, document: nitro.NitroDocument) -> tuple[Finding, ...]:
    """`measurements` of PCRs and `allow_debug`; the expected PCRs of the reference where the policy names none."""
    measurements = case.policy.get("measurements", {})
    unknown = set(case.policy) - {"measurements", "allow_debug"}
    if unknown or not isinstance(measurements, dict):
        raise Unavailable("material.policy_unsupported", "a demand that is not understood here", got=sorted(unknown))
    findings = [_pcr(document, name, value) for name, value in measurements.items()]
    if case.policy.get("allow_debug") is False:
        demand = Exact(value=False)
        findings.append(
            rules.judged("nitro.debug", document.debug, demand, claim="runtime-opaque", remedy="start without --debug-mode")
        )
    return tuple(findings)


def _pcr(document: nitro.NitroDocument, name: str, value: object) -> Finding:
    match = _PCR.fullmatch(name)
    if match is None or not isinstance(value, str):
        raise Unavailable("material.policy_unsupported", "a measurement that is not understood here", got=json.dumps(name))
    index = int(match.group(1))
    code = f"nitro.pcr{index}" if index in (0, 1, 2, 3, 4, 8) else "nitro.other_pcrs"
    return rules.judged(
        code, document.pcrs.get(index), Exact(bytes.fromhex(value)), claim="executables", remedy="start the registered image"
    )
