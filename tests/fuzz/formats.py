"""Every parser of bytes from outside, by format name: any input gives a value or `Malformed`, nothing else."""

from collections.abc import Callable

from moorline.cli import collateral_facts
from moorline.evidence import (
    cca,
    ccel,
    cms,
    debian,
    debian_index,
    eventlog,
    ima,
    intel_collateral,
    nitro,
    psa,
    ratls,
    sgx_quote,
    snp,
    tdx_quote,
    tpm_quote,
    tpm_structures,
    uefi_variables,
)
from moorline.hsm import revocation
from moorline.ledger import checkpoint, proof, transactions
from moorline.nfv import SpiffeId
from moorline.orchestration import descriptor
from moorline.policy import distance, inspection
from moorline.policy.sec009 import report
from moorline.verification import anchors, intel_pck, snp_launch, tpm_revocation
from moorline.verification.collateral import ItemName
from moorline.wire import cbor, certificates, cmp, collateral_bundle, cose, keys, launch, nopfs, pair, schema, session

FORMATS: dict[str, Callable[[bytes], object]] = {
    "snp-report": snp.parse_report,
    "snp-certificate-table": snp.parse_certificate_table,
    "snp-anchors": anchors.parse_anchor_file,
    "tpm-quote": tpm_quote.parse_quote,
    "tpm-nv-certification": tpm_quote.parse_nv_certification,
    "tpm-crl": tpm_revocation.parse_tpm_crl,
    "tpm-public": tpm_structures.parse_public,
    "tpm-signature": tpm_structures.parse_signature,
    "eventlog": eventlog.parse_event_log,
    "sgx-quote": sgx_quote.parse_sgx_quote,
    "tdx-quote": tdx_quote.parse_tdx_quote,
    "ccel-table": ccel.parse_ccel_table,
    "ratls-certificate": ratls.parse_ratls_certificate,
    "oe-report": ratls.parse_oe_report,
    "tcb-info": intel_collateral.parse_tcb_info,
    "qe-identity": intel_collateral.parse_qe_identity,
    "tcb-evaluation-numbers": intel_collateral.parse_evaluation_numbers,
    "sgx-extension": intel_pck.parse_sgx_extension,
    "cca-token": cca.parse_token,
    "cca-platform-claims-json": cca.parse_platform_claims_json,
    "psa-token": psa.parse_token,
    "nitro-document": nitro.parse_document,
    "ima": ima.parse_ima,
    "ima-binary": ima.parse_binary,
    "uefi-variable": uefi_variables.parse_variable,
    "uefi-keys": uefi_variables.parse_signature_lists,
    "ovmf": snp_launch.parse_firmware,
    "cbor": cbor.decode,
    "cms": cms.parse_detached,
    "cmp": cmp.parse,
    "ocsp-request": revocation.parse_ocsp,
    "crl": revocation.parse_crl,
    "nopfs-hello": lambda data: schema.decode(nopfs.NoPfsHello, data),
    "pair-statement": lambda data: schema.decode(pair.PairStatement, data),
    "cose": lambda data: cose.parse("fuzz", data),
    "certificate": certificates.parse_certificate,
    "public-key": keys.parse_public,
    "launch-fields": launch.parse_fields,
    "session-hello": lambda data: schema.decode(session.Hello, data),
    "spiffe-id": lambda data: SpiffeId.parse(data.decode("latin-1")),
    "ledger-transaction": transactions.parse,
    "ledger-note": checkpoint.parse_note,
    "ledger-bundle": proof.parse_bundle,
    "package-descriptor": descriptor.parse,
    "collateral-bundle": lambda data: schema.decode(collateral_bundle.Bundle, data),
    "collateral-name": lambda data: ItemName.parse(data.decode("latin-1")),
    "collateral-facts": collateral_facts.parse_facts,
    "deb": debian.parse_deb,
    "deb-release": debian_index.digests_of_release,
    "deb-packages": debian_index.digests_of_packages,
    "host-assessment": report.parse_report,
    "inspection-request": inspection.parse_request,
    "place": lambda data: distance.parse_place(data.decode("latin-1")),
}
