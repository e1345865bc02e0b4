"""Which class of the case schema each of our codes belongs to. A code that is not here matches no expectation.

Codes raised as Malformed are of class `structure` unless this table says otherwise: that is what Malformed means.
"""

from __future__ import annotations

import importlib
from typing import Final

from moorline.errors import Malformed, MoorlineError

CLASSES: Final = frozenset(
    {
        "structure",
        "unsupported",
        "key",
        "chain",
        "signature",
        "revoked",
        "expired",
        "not_yet_valid",
        "identity",
        "binding",
        "nonce",
        "report_data",
        "replay",
        "log",
        "debug",
        "tcb",
        "measurement",
        "reference_value",
    }
)

_CODES: Final = {
    # tokens in COSE, and the certificates that come with them
    "cose.key_unusable": "key",
    "cose.key_curve": "key",
    "cose.algorithm_not_allowed": "unsupported",
    "cose.signature_invalid": "signature",
    "path.anchor": "chain",
    "path.broken": "chain",
    "path.not_ca": "chain",
    "path.critical": "chain",
    "path.leaf_key": "key",
    "path.expired": "expired",
    "path.not_yet_valid": "not_yet_valid",
    # Arm CCA
    "cca.cpak_unknown": "key",
    "cca.realm_binding": "binding",
    "cca.realm_key_mismatch": "binding",
    "cca.challenge_mismatch": "nonce",
    "cca.platform_challenge_mismatch": "nonce",
    "cca.key_nonce_mismatch": "nonce",
    "cca.root": "chain",
    "cca.platform_profile": "structure",
    "cca.implementation_id": "identity",
    "cca.instance_id": "identity",
    "cca.lifecycle": "debug",
    "cca.platform_config": "reference_value",
    "cca.platform_components": "reference_value",
    "cca.initial_measurement": "measurement",
    "cca.extensible_measurements": "measurement",
    "cca.personalization": "measurement",
    "cca.realm_profile": "structure",
    "cca.realm_key": "binding",
    # PSA
    "psa.iak_unknown": "key",
    "psa.no_anchor": "chain",
    "psa.nonce_mismatch": "nonce",
    "psa.root": "chain",
    "psa.profile": "structure",
    "psa.implementation_id": "identity",
    "psa.instance_id": "identity",
    "psa.lifecycle": "debug",
    "psa.software_components": "reference_value",
    "psa.measurement": "measurement",
    "psa.caller": "identity",
    "psa.certification_reference": "identity",
    # AWS Nitro
    "nitro.root_unknown": "chain",
    "nitro.timestamp_outside": "binding",
    "nitro.nonce_mismatch": "nonce",
    "nitro.tls_key_mismatch": "binding",
    "nitro.root": "chain",
    "nitro.debug": "debug",
    "nitro.pcr0": "measurement",
    "nitro.pcr1": "measurement",
    "nitro.pcr2": "measurement",
    "nitro.pcr3": "measurement",
    "nitro.pcr4": "measurement",
    "nitro.pcr8": "measurement",
    "nitro.other_pcrs": "measurement",
    "nitro.module_id": "identity",
    "nitro.user_data": "report_data",
    "nitro.public_key": "report_data",
    # material that the case supplies
    "material.anchor": "chain",
    "material.anchor_undecodable": "chain",
    "material.key_undecodable": "key",
    "material.unsupported": "unsupported",
    # AMD SEV-SNP
    "snp.algorithm_unsupported": "unsupported",
    "snp.unsigned": "signature",
    "snp.leaf_missing": "key",
    "snp.anchor_not_self_signed": "chain",
    "snp.anchor_unknown": "chain",
    "snp.chain_broken": "chain",
    "snp.chain_long": "chain",
    "snp.certificate_expired": "expired",
    "snp.certificate_not_yet_valid": "not_yet_valid",
    "snp.leaf_key": "key",
    "snp.signer_mismatch": "key",
    "snp.product_missing": "chain",
    "snp.product_unknown": "unsupported",
    "snp.product_mismatch": "binding",
    "snp.hwid_missing": "binding",
    "snp.tcb_missing": "binding",
    "snp.chip_mismatch": "binding",
    "snp.tcb_mismatch": "binding",
    "snp.signature_invalid": "signature",
    "snp.report_data_mismatch": "report_data",
    "snp.revoked": "revoked",
    "snp.crl_invalid": "signature",
    "snp.crl_stale": "expired",
    "snp.crl_not_yet_valid": "not_yet_valid",
    "snp.root": "chain",
    "snp.debug": "debug",
    "snp.reported_tcb": "tcb",
    "snp.committed_tcb": "tcb",
    "snp.launch_tcb": "tcb",
    "snp.measurement": "measurement",
    "snp.host_data": "measurement",
    "snp.chip_id": "identity",
    # TPM 2.0
    "tpm.scheme_mismatch": "unsupported",
    "tpm.signature_invalid": "signature",
    "tpm.nonce_mismatch": "nonce",
    "tpm.selection_mismatch": "binding",
    "tpm.pcr_digest_mismatch": "binding",
    "tpm.clock_regressed": "binding",
    "tpm.nv_name_mismatch": "binding",
    "tpm.nv_partial": "binding",
    "ak.attributes": "key",
    "ak.scheme": "unsupported",
    "ak.unknown": "key",
    "ak.unusable": "key",
    "ak.trust_unknown": "key",
    "ak.other_key": "key",
    "ak.not_restricted": "key",
    "ak.certificate_mismatch": "binding",
    "ak.chain": "chain",
    "vtpm.claims_mismatch": "binding",
    "vtpm.td_report_mismatch": "binding",
    "vtpm.user_data_mismatch": "report_data",
    "vtpm.td_quote_missing": "key",
    "tpm.log_unproven": "replay",
    "tpm.parts": "structure",
    # logs
    "eventlog.bank_missing": "unsupported",
    "eventlog.bank_incomplete": "log",
    "eventlog.replay_mismatch": "replay",
    "eventlog.hash_unsupported": "unsupported",
    "ima.template_unknown": "unsupported",
    "ima.digest_type": "unsupported",
    "ima.hash_unsupported": "unsupported",
    "ima.algorithm_unknown": "unsupported",
    "ima.pcr": "log",
    "ima.template_hash": "log",
    "ima.replay_mismatch": "replay",
    "ima.not_covered": "reference_value",
    "ima.signature_invalid": "signature",
}


def class_of(code: str) -> str | None:
    """The class of a code of ours, or None. Intel's codes are classified where they are raised."""
    return _CODES.get(code) or _intel(code)


def class_of_error(error: MoorlineError) -> str | None:
    """The class of an error: by its code, or by being Malformed."""
    found = class_of(error.code)
    if found is None and isinstance(error, Malformed) and not error.code.startswith("case."):
        return "structure"
    return found


def _intel(code: str) -> str | None:
    try:
        module = importlib.import_module("moorline.policy.intel_case")
    except ModuleNotFoundError:
        return None
    found: str | None = module.class_of(code)
    return found
