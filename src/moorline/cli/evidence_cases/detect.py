"""What kind of file is this? By content alone: a file is of a kind if it parses as one. Names are not looked at.

A file that parses as more than one kind is ambiguous, and the candidates are named; one that parses as none is unknown.
Broken evidence is therefore unknown, not guessed at. Two kinds have no form at all, a bare RSA signature and a symmetric
key: they are what is left when a file parses as nothing and has exactly their size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from cryptography import x509

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.families import snp as snp_family
from moorline.errors import Malformed, MoorlineError, Unavailable
from moorline.evidence import (
    azure_vtpm,
    cca,
    corim,
    eventlog,
    ima,
    nitro,
    psa,
    snp,
    tpm_envelopes,
    tpm_quote,
    tpm_structures,
)
from moorline.policy import intel_case

EVIDENCE: Final = frozenset(
    {
        "snp-report",
        "snp-json-trustee",
        "tsm-json",
        "sgx-quote",
        "tdx-quote",
        "oe-report",
        "ratls-cert",
        "cca-token",
        "cca-platform-token",
        "parsec-cca",
        "psa-token",
        "nitro-document",
        "nitro-document-b64",
        "azure-snp-vtpm-json-v2",
        "azure-tdx-vtpm-json-v1",
        "azure-hcl",
        "azure-tpm-quote-json",
        "tpm-quote-msg",
        "tpm-quote-sig",
        "tpm-quote-sig-raw",
        "enacttrust-token",
        "tpm2-tools-pcrs",
        "tpm-attestation-gotpm-proto",
        "go-attestation-dump",
        "tpm-json-trustee",
        "tcg-eventlog",
        "ccel",
        "ccel-acpi-table",
        "ima-ascii",
        "ima-binary",
    }
)
"""Kinds that are appraised; every other kind vouches for them."""

_Parser = Callable[[bytes], object]


def _enacttrust(data: bytes) -> object:
    """A token has no mark of its own: it is one if what it wraps is a quote and a signature."""
    (signed,) = tpm_envelopes.parse_enacttrust(data).quotes
    tpm_structures.parse_signature(signed.signature)
    return tpm_quote.parse_quote(signed.message)


_PARSERS: Final[dict[str, _Parser]] = {
    "snp-report": snp.parse_report,
    "cca-token": cca.parse_token,
    "cca-platform-token": cca.parse_platform_token,
    "parsec-cca": cca.parse_key_attestation,
    "psa-token": psa.parse_token,
    "nitro-document": nitro.parse_document,
    "azure-hcl": azure_vtpm.parse_hcl_report,
    "tpm-quote-msg": tpm_quote.parse_quote,
    "tpm-quote-sig": tpm_structures.parse_signature,
    "enacttrust-token": _enacttrust,
    "tpmt-public": tpm_structures.parse_public,
    "tpm2-tools-pcrs": tpm_envelopes.parse_tpm2_tools_pcrs,
    "tpm-attestation-gotpm-proto": tpm_envelopes.parse_gotpm,
    "corim": corim.parse_endorsed_keys,
}
_JSON_PARSERS: Final[dict[str, _Parser]] = {
    "snp-json-trustee": snp_family.from_trustee_json,
    "go-attestation-dump": tpm_envelopes.parse_goattest,
    "tpm-json-trustee": tpm_envelopes.parse_trustee,
    "azure-tpm-quote-json": azure_vtpm.parse_quote_json,
    "public-key-jwk": lambda data: material.spki_of_jwk(json.loads(data)),
    "cca-trust-anchors-json": lambda data: _list_of(data, {"pkey", "implementation-id", "instance-id"}),
    "cca-reference-json": lambda data: _list_of(
        json.dumps(_member(data, "platform")), {"implementation-id", "sw-components"}
    ),
    "veraison-endorsement-json": lambda data: _members(data, {"scheme", "type", "attributes"}),
    "enacttrust-reference-json": lambda data: _members(data, {"node-id", "firmware", "pcrs", "algorithm", "digest"}),
    "keylime-runtime-policy": lambda data: _members(data, {"digests", "excludes"}),
}
_RAW_SIGNATURES: Final = frozenset({256, 384, 512})
_RAW_KEYS: Final = frozenset({32, 48, 64})
_REGISTERS: Final = 4
"""The highest measurement register of a CC event log; the log of a TPM always has more PCRs than that."""


def kind_of(name: str, data: bytes) -> str:
    """The kind of the file `name`, a hint of the case schema. Raises Unavailable (`evidence.*`)."""
    found = candidates(data)
    if not found:
        raise Unavailable(
            "evidence.kind_unknown",
            "no kind of evidence or endorsement that is known here parses",
            got=f"{name}, {len(data)} bytes",
            remedy="a file that was cut or changed is of no kind; see docs for the kinds",
        )
    if len(found) > 1:
        raise Unavailable(
            "evidence.ambiguous", "a file could be of more than one kind", got=f"{name}: {', '.join(sorted(found))}"
        )
    return found.pop()


def candidates(data: bytes) -> set[str]:
    """Every kind that `data` parses as."""
    if data[:1] in b"{[ \t\r\n" and data.strip()[:1] in (b"{", b"["):
        return _json_kinds(data)
    if b"-----BEGIN " in data and data.isascii():  # quotes and CoRIMs hold PEM among binary
        return _pem_kinds(data)
    found = {kind for kind, parse in _PARSERS.items() if _parses(parse, data)}
    found |= _logs(data) | _der_kinds(data)
    if _parses(ima.parse_binary, data) and ima.parse_binary(data):
        found.add("ima-binary")
    intel = None if found else intel_case.detect(data)
    if intel is not None:
        found.add(intel)
    return found or _text_kinds(data) or _formless(data)


def _formless(data: bytes) -> set[str]:
    """What is left: bytes without a form of their own, told by their size alone."""
    if len(data) in _RAW_SIGNATURES:
        return {"tpm-quote-sig-raw"}
    return {"mac-key-raw"} if len(data) in _RAW_KEYS else set()


def _member(data: bytes | str, name: str) -> object:
    document = json.loads(data)
    if not isinstance(document, dict) or name not in document:
        raise ValueError(name)
    return document[name]


def _members(data: bytes, names: set[str]) -> None:
    for name in names:
        _member(data, name)


def _list_of(data: bytes | str, names: set[str]) -> None:
    document = json.loads(data)
    if not isinstance(document, list) or not document:
        raise ValueError("not a list")
    if not all(isinstance(one, dict) and names <= set(one) for one in document):
        raise ValueError("other members")


def _parses(parse: _Parser, data: bytes) -> bool:
    try:
        parse(data)
    except (MoorlineError, ValueError):
        return False
    return True


def _json_kinds(data: bytes) -> set[str]:
    found = {kind for kind, parse in _JSON_PARSERS.items() if _parses(parse, data)}
    try:
        envelope = azure_vtpm.parse_envelope(data)
    except Malformed:
        pass
    else:
        found.add("azure-snp-vtpm-json-v2" if envelope.td_quote is None else "azure-tdx-vtpm-json-v1")
    document = json.loads(data) if _parses(json.loads, data) else None
    if isinstance(document, dict) and {"outblob", "auxblob"} <= set(document):
        found.add("tsm-json")
    intel = intel_case.detect(data)
    return found if intel is None else found | {intel}


def _pem_kinds(data: bytes) -> set[str]:
    if b"-----BEGIN CERTIFICATE-----" in data:
        return {"chain-pem"}
    return {"public-key-pem"} if _parses(material.spki, data) else set()


def _der_kinds(data: bytes) -> set[str]:
    if data[:1] != b"\x30":
        return set()
    if _parses(x509.load_der_x509_crl, data):
        return {"crl-der"}
    if _parses(material.decoded, data):
        return {"ratls-cert"} if intel_case.detect(data) == "ratls-cert" else {"cert-der"}
    return set()


def _logs(data: bytes) -> set[str]:
    """A log of the older form has no magic: it counts only if it has events, and all of PCRs that exist."""
    if not _parses(eventlog.parse_event_log, data):
        return set()
    log = eventlog.parse_event_log(data)
    if not log.events or any(event.pcr > 23 for event in log.events):
        return set()
    only_sha384 = log.banks == (tpm_structures.ALG_SHA384,)
    registers = log.banks == (tpm_structures.ALG_SM3_256,) and all(event.pcr <= _REGISTERS for event in log.events)
    return {"ccel"} if log.crypto_agile and (only_sha384 or registers) else {"tcg-eventlog"}


def _text_kinds(data: bytes) -> set[str]:
    if _parses(ima.parse_ima, data) and data.strip():
        return {"ima-ascii"}
    return {"nitro-document-b64"} if _parses(_nitro_b64, data) else set()


def _nitro_b64(data: bytes) -> object:
    from moorline.cli.evidence_cases.families.nitro import document_bytes

    return nitro.parse_document(document_bytes("nitro-document-b64", data))
