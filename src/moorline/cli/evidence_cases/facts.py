"""What a file says of itself, by kind: for people, unverified."""

from __future__ import annotations

import importlib
from typing import Any, Final

from moorline.cli.evidence_cases import material
from moorline.cli.evidence_cases.compare import Facts
from moorline.cli.evidence_cases.families import cca as cca_family
from moorline.cli.evidence_cases.families import eventlog as log_family
from moorline.cli.evidence_cases.families import ima as ima_family
from moorline.cli.evidence_cases.families import nitro as nitro_family
from moorline.cli.evidence_cases.families import psa as psa_family
from moorline.cli.evidence_cases.families import snp as snp_family
from moorline.cli.evidence_cases.families import tpm as tpm_family
from moorline.evidence import cca, corim, eventlog, ima, nitro, psa, snp, tpm_quote

_CERTIFICATES: Final = frozenset({"cert-der", "chain-pem"})


def facts_of(kind: str, data: bytes) -> Facts:
    """The facts in `data`, which is of `kind`; its size where nothing more is read. Raises only Malformed."""
    if kind in _CERTIFICATES:
        return {"certificates": [_certificate(der) for der in material.certificates(data)]}
    if kind in ("sgx-quote", "tdx-quote", "oe-report"):
        return _intel(kind, data)
    reader = _READERS.get(kind)
    return {"bytes": len(data)} if reader is None else reader(data)


def _certificate(der: bytes) -> dict[str, str]:
    certificate = material.decoded(der)
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }


def _intel(kind: str, data: bytes) -> Facts:
    if kind == "tdx-quote":
        domain: Any = importlib.import_module("moorline.evidence.tdx_quote").parse_tdx_quote(data)
        return {"mr_td": domain.report.mr_td.hex(), "report_data": domain.report.report_data.hex()}
    if kind == "oe-report":
        data = importlib.import_module("moorline.evidence.ratls").parse_oe_report(data)
    enclave: Any = importlib.import_module("moorline.evidence.sgx_quote").parse_sgx_quote(data)
    report = enclave.report
    return {
        "mrenclave": report.mr_enclave.hex(),
        "mrsigner": report.mr_signer.hex(),
        "report_data": report.report_data.hex(),
    }


def _keys(data: bytes) -> Facts:
    keys = corim.parse_endorsed_keys(data)
    return {"endorsed_keys": len(keys), "instances": [key.instance_id.hex() for key in keys if key.instance_id is not None]}


def _platform(data: bytes) -> Facts:
    claims = cca.parse_platform_token(data).claims
    return {"platform_profile": claims.profile, "instance_id": claims.instance_id.hex(), "lifecycle": claims.state.value}


_READERS: Final = {
    "snp-report": lambda data: snp_family.report_facts(snp.parse_report(data)),
    "snp-json-trustee": lambda data: snp_family.report_facts(snp.parse_report(snp_family.from_trustee_json(data)[0])),
    "cca-token": lambda data: cca_family.token_facts(cca.parse_token(data)),
    "cca-platform-token": _platform,
    "parsec-cca": lambda data: cca_family.token_facts(cca.parse_key_attestation(data).token),
    "psa-token": lambda data: psa_family.token_facts(psa.parse_token(data)),
    "nitro-document": lambda data: nitro_family.document_facts(nitro.parse_document(data)),
    "tcg-eventlog": lambda data: log_family.log_facts(eventlog.parse_event_log(data), ccel=False),
    "ccel": lambda data: log_family.log_facts(eventlog.parse_event_log(data), ccel=True),
    "ima-ascii": lambda data: ima_family.list_facts(ima.parse_ima(data)),
    "ima-binary": lambda data: ima_family.list_facts(ima.parse_binary(data)),
    "tpm-quote-msg": lambda data: tpm_family.quote_facts(tpm_quote.parse_quote(data)),
    "corim": _keys,
}
