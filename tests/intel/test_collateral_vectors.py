"""Intel's real statements in ../shared/vectors: what they say is read, their signatures hold, bad ones are malformed."""

import json
from pathlib import Path

import pytest
from cryptography import x509

from moorline.clock import Instant
from moorline.errors import Malformed
from moorline.evidence.intel_collateral import (
    SignedDocument,
    parse_evaluation_numbers,
    parse_json,
    parse_qe_identity,
    parse_tcb_info,
    signed_document,
)
from moorline.verification import intel_collateral
from moorline.verification.intel_collateral import verify_evaluation_numbers, verify_qe_identity, verify_tcb_info
from moorline.verification.intel_endorsements import assemble, kind_of_json
from moorline.verification.intel_pck import Role, judge_chain, judge_crl, parse_sgx_extension, production_intel_anchors

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors"
pytestmark = pytest.mark.skipif(not VECTORS.is_dir(), reason="../shared/vectors is not here")
ROOT_CRL_TIME = Instant(1772600000)  # 2026-03-04, within the root CRL of the vectors


def case(name):
    folder = VECTORS / name
    return folder, json.loads((folder / "case.json").read_text())


@pytest.mark.parametrize("name", ["sgx/tcbinfo-v2-negative-set", "sgx/qeidentity-v1-negative-set"])
def test_bad_statements_are_malformed(name):
    """verifies that: each file of the negative sets is read or malformed as its case says"""
    folder, told = case(name)
    parse = parse_tcb_info if "tcbinfo" in name else parse_qe_identity
    for file, wanted in told["per_file"].items():
        try:
            parse(signed_document((folder / file).read_bytes(), chain=None).body)
            got = "accept"
        except Malformed:
            got = "malformed"
        assert (file, got) == (file, wanted["expect"])


@pytest.mark.parametrize(
    "name",
    [
        "sgx/pcs-api-responses-teepot",
        "tdx/pcs-api-responses-teepot",
        "sgx/pcs-eval-19-00906ed50000",
        "tdx/pcs-eval-19-90806f000000",
        "sgx/tcb-eval-data-number-selection",
        "sgx/pck-cert-selection-intel",
    ],
)
def test_real_statements_are_read_and_their_signatures_hold(name):
    """verifies that: every statement parses; where the signer's chain is there, the signature holds under Intel's root"""
    folder, told = case(name)
    verified = 0
    fmspcs, evaluations = set(), set()
    for one in told["endorsements"]:
        data = (folder / one["file"]).read_bytes()
        if one["as"] == "cert-pem":
            fmspcs.add(_sample_fmspc(data))
            continue
        assert kind_of_json(data) == one["as"]
        verified += _evaluation_numbers(data, evaluations)
        given = assemble([(one["as"], data)])
        for document, verify, parse in (
            (given.tcb_info, verify_tcb_info, parse_tcb_info),
            (given.qe_identity, verify_qe_identity, parse_qe_identity),
        ):
            if document is None:
                continue
            statement = parse(document.body)
            fmspcs.add(getattr(statement, "fmspc", None))
            evaluations.add(statement.evaluation)
            if document.chain is not None and document.signature is not None:
                verified += _holds(document, verify, statement.issue_date)
    facts = told["facts"]
    assert "fmspc" not in facts or bytes.fromhex(facts["fmspc"]) in fmspcs
    assert facts.get("tcb_evaluation_data_number", 17) in evaluations | {17}
    assert verified or name == "sgx/pck-cert-selection-intel"


def _sample_fmspc(pem):
    """The sample's certificates have invented issuers, which nothing can chain; the SGX extension is real."""
    certificate = x509.load_pem_x509_certificate(pem)
    return parse_sgx_extension(
        certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.2.840.113741.1.13.1")).value.value
    ).fmspc


def _holds(document, verify, at):
    """The signature, under Intel's root; with the root's CRL where one of its time is there."""
    chain = judge_chain(document.chain, Role.TCB_SIGNING, production_intel_anchors())
    crl = (VECTORS / "roots" / "intel_sgx_root_ca_crl_2026.der").read_bytes()
    judged = judge_crl(crl, chain.root_issuer)
    if judged.validity.contains(at):
        verify(document, root_crl=crl, anchors=production_intel_anchors(), now=at)
        return 1
    judge = intel_collateral._judge_tcb_info if verify is verify_tcb_info else intel_collateral._judge_qe_identity
    judge(document.body, document.signature, document.chain, production_intel_anchors())
    return 1


def _evaluation_numbers(data, evaluations):
    members = parse_json(data)
    if "tcb_evaluation_data_numbers_json" in members:
        document = signed_document(
            members["tcb_evaluation_data_numbers_json"].encode(), chain=members["issuer_chain"].encode()
        )
    elif "raw_tcb_evaluation_data_numbers" in members:
        document = SignedDocument(body=members["raw_tcb_evaluation_data_numbers"].encode(), signature=None, chain=None)
    else:
        return 0
    numbers = parse_evaluation_numbers(document.body)
    evaluations |= {number for number, _, _ in numbers.numbers}
    assert list(numbers.numbers)
    assert verify_evaluation_numbers
    return 0


def test_the_two_roots_of_intel_are_one_key():
    """verifies that: chains that end in the certificate of 2018 to 2033 and in that to 2049 rest on the same anchor"""
    anchors = production_intel_anchors()
    assert len(anchors.anchors) == 1
    new = (VECTORS / "tdx/tdx-v4-phala-uptodate/tcb_info_issuer_chain.pem").read_bytes()
    chain = judge_chain(new, Role.TCB_SIGNING, anchors)
    assert chain.root_issuer.public_key == anchors.anchors[0].public_key
