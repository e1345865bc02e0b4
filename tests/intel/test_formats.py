"""Exact formats, one spoiled field at a time, and heaps of files put in order."""

import base64
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.errors import Malformed, Misconfigured
from moorline.evidence.der import DerReader
from moorline.evidence.intel_collateral import parse_evaluation_numbers, parse_qe_identity
from moorline.evidence.ratls import parse_ratls_certificate
from moorline.evidence.sgx_quote import parse_sgx_quote, serialize_sgx_quote
from moorline.evidence.tdx_quote import parse_tdx_quote, serialize_tdx_quote
from moorline.policy.intel_case import CaseFile, detect, run_case
from moorline.rats import Outcome
from moorline.verification import intel_pck
from moorline.verification.intel_endorsements import assemble

SIGNATURE_AT = {"sgx": 48 + 384, "tdx": 48 + 6 + 648}
CERTIFICATION_AT = 4 + 128 + 384 + 64 + 2 + 32


def put(data, at, value):
    return data[:at] + value + data[at + len(value) :]


def spoiled(fake, code):
    """A quote of `fake` in which exactly the field of `code` is wrong, and the parser it is for."""
    sgx = fake.tee == "sgx"
    data = serialize_sgx_quote(fake.quote()) if sgx else serialize_tdx_quote(fake.quote())
    at = SIGNATURE_AT[fake.tee]
    certification = at + CERTIFICATION_AT + (0 if sgx else 6)
    changes = {
        "quote.signature_size": [(certification + 2, b"\x00\x00")],
        "quote.certification_type": [(certification, b"\x09")],
        "quote.reserved": [(at + 4 + 128 + (0 if sgx else 6) + 20, b"\x01")],
        "quote.certification_size": [(certification, b"\x01")],
        "quote.body_type": [(48, b"\x07")],
    }
    for place, value in changes[code]:
        data = put(data, place, value)
    return data, parse_sgx_quote if sgx else parse_tdx_quote


@pytest.mark.parametrize(
    "code", ["quote.signature_size", "quote.certification_type", "quote.reserved", "quote.certification_size"]
)
def test_each_field_of_a_quote_has_its_rule(intel, code):
    """verifies that: lengths, types and reserved fields of the signature section are judged, each with its own code"""
    data, parse = spoiled(intel, code)
    with pytest.raises(Malformed, match=code):
        parse(data)


def test_the_body_of_a_version_5_quote_says_what_it_is(sgx, tdx):
    """verifies that: an unknown body type, or a known one of another size, is malformed; a reserved TDX header field too"""
    sgx.version = 5
    for fake in (sgx, tdx):
        data, parse = spoiled(fake, "quote.body_type")
        with pytest.raises(Malformed, match="quote.body_type"):
            parse(data)
    data = serialize_tdx_quote(tdx.quote())
    with pytest.raises(Malformed, match="quote.body_type"):
        parse_tdx_quote(put(data, 48, b"\x02"))
    with pytest.raises(Malformed, match="quote.reserved"):
        parse_tdx_quote(put(data, 8, b"\x01"))


def test_version_4_needs_the_enclaves_report(tdx):
    """verifies that: certification data that lacks the quoting enclave's report, or does not fill its section, is bad"""
    data, at = serialize_tdx_quote(tdx.quote()), SIGNATURE_AT["tdx"] + 4 + 128
    with pytest.raises(Malformed, match="quote.certification_type"):
        parse_tdx_quote(put(data, at, b"\x05"))
    with pytest.raises(Malformed, match="quote.signature_size"):
        parse_tdx_quote(put(data, at + 2, b"\x00"))


DER = {
    "indefinite length": b"\x30\x80\x00\x00",
    "long length for a short one": b"\x04\x81\x01\x00",
    "length with leading zero": b"\x04\x82\x00\x80" + bytes(128),
    "cut": b"\x04\x05abc",
    "high tag": b"\x1f\x81\x01\x00",
}


@pytest.mark.parametrize("shape", DER)
def test_der_has_one_encoding(shape):
    """verifies that: BER that is not DER is malformed"""
    with pytest.raises(Malformed, match="der.malformed"):
        DerReader(DER[shape]).element()


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("integer", b"\x02\x01\x80"),
        ("integer", b"\x02\x02\x00\x01"),
        ("integer", b"\x02\x00"),
        ("boolean", b"\x01\x01\x01"),
        ("oid", b"\x06\x02\x80\x01"),
        ("oid", b"\x06\x01\x81"),
        ("sequence", b"\x31\x00"),
    ],
)
def test_der_values_have_one_encoding(method, data):
    """verifies that: integers, booleans and object identifiers in another than their only encoding are malformed"""
    with pytest.raises(Malformed, match="der.malformed"):
        getattr(DerReader(data), method)()


def test_certificates_with_evidence_are_read_exactly(tools):
    """verifies that: size, signature and NULL parameters of an RA-TLS certificate are judged"""
    algorithm = tools.der(0x30, tools.der_oid("1.2.840.10045.4.3.2"))
    strange = tools.der(0x30, tools.der_oid("1.2.840.10045.4.3.2"), tools.der(0x05, b"\x00"))
    body = tools.der(0x30, tools.der_int(1))
    for data in (
        tools.der(0x30, body, algorithm, tools.der(0x03, b"\x01\x80")),
        tools.der(0x30, body, strange, tools.der(0x03, b"\x00")),
    ):
        with pytest.raises(Malformed, match="ratls.certificate"):
            parse_ratls_certificate(data)
    with pytest.raises(Malformed, match="ratls.too_large"):
        parse_ratls_certificate(bytes(1 << 18))


def test_statements_without_a_member_are_malformed(tdx):
    """verifies that: every mandatory member of an enclave identity and of the evaluation numbers is missed"""
    whole = json.loads(tdx.qe_identity_body())
    for name in whole:
        with pytest.raises(Malformed, match="intel.qe_identity"):
            parse_qe_identity(json.dumps({key: value for key, value in whole.items() if key != name}).encode())
    for body in (b"{}", b'{"id":"TDX"}', b"[]"):
        with pytest.raises(Malformed, match="intel.evaluation_numbers"):
            parse_evaluation_numbers(body)


def forms(fake):
    """The same endorsements in every form in which they travel: a list of (kind, contents) each."""
    given = fake.endorsements()
    chain = given.tcb_info.chain
    tcb, qe = given.tcb_info, given.qe_identity
    answer = {
        name: f'{{"{member}":{document.body.decode()},"signature":"{document.signature.hex()}"}}'
        for name, member, document in (("tcb", "tcbInfo", tcb), ("qe", "enclaveIdentity", qe))
    }
    signatures = {name: der_signature(document) for name, document in (("tcb", tcb), ("qe", qe))}
    crls = [("crl-der", given.pck_crl), ("crl-hex", given.root_crl.hex().encode())]
    ca_chain = [fake.certificate("signer").decode(), fake.certificate("root").decode()]
    collateral = {
        "tcb_info": tcb.body.decode(),
        "tcb_info_signature": tcb.signature.hex(),
        "tcb_info_issuer_chain": chain.decode(),
        "qe_identity": qe.body.decode(),
        "qe_identity_signature": qe.signature.hex(),
        "qe_identity_issuer_chain": qe.chain.decode(),
        "root_ca_crl": given.root_crl.hex(),
        "pck_crl": given.pck_crl.hex(),
        "pck_crl_issuer_chain": "",
    }
    pem_crl = x509.load_der_x509_crl(given.pck_crl).public_bytes(serialization.Encoding.PEM).decode()
    return {
        "answers": [
            ("tcb-info", answer["tcb"].encode()),
            ("qe-identity", answer["qe"].encode()),
            ("chain-pem", chain),
            *crls,
        ],
        "raw": [
            ("tcb-info-raw-json", as_json(raw_tcb_info=tcb.body.decode(), signature=signatures["tcb"], ca_chain=ca_chain)),
            (
                "qe-identity-raw-json",
                as_json(raw_enclave_identity=qe.body.decode(), signature=signatures["qe"], ca_chain=ca_chain),
            ),
            ("crl-json", as_json(crl=pem_crl, ca_chain=[])),
            ("crl-der", given.root_crl),
        ],
        "responses": [
            ("pcs-response-json", as_json(tcb_info_json=answer["tcb"], issuer_chain=chain.decode())),
            ("pcs-response-json", as_json(enclave_identity_json=answer["qe"], issuer_chain=chain.decode())),
            ("pcs-response-json", as_json(crl_data=pem_crl, issuer_chain=fake.chain("signer").decode())),
            (
                "pcs-response-json",
                as_json(crl_data_base64=base64.b64encode(given.root_crl).decode(), issuer_chain=chain.decode()),
            ),
        ],
        "collateral": [
            ("collateral-json", json.dumps(collateral).encode()),
            ("tcb-info-body", tcb.body),
            ("qe-identity-body", qe.body),
        ],
    }


def as_json(**members):
    return json.dumps(members).encode()


def der_signature(document):
    r, s = int.from_bytes(document.signature[:32], "big"), int.from_bytes(document.signature[32:], "big")
    return list(encode_dss_signature(r, s))


@pytest.mark.parametrize("form", ["answers", "raw", "responses", "collateral"])
def test_every_form_of_collateral_serves(intel, form):
    """verifies that: collateral in each of its forms, in any order, gives the same verdict as the pieces themselves"""
    files = forms(intel)[form]
    for order in (files, files[::-1]):
        assert intel.verify(endorsements=assemble(order)).value.platform.tcb_evaluation == 17
    for kind, data in files:
        assert kind.startswith(("chain", "crl")) or detect(data) == kind


def test_contradicting_files_are_ambiguous(tdx):
    """verifies that: two TCB infos, two signatures or two CRLs for one place are refused: nobody can say which was meant"""
    files = forms(tdx)["answers"]
    tdx.tcb_info["tcbEvaluationDataNumber"] = 18
    for other in (("tcb-info-body", tdx.tcb_info_body()), ("crl-der", tdx.crl("ca"))):
        with pytest.raises(Malformed, match="intel.ambiguous"):
            assemble([*files, other])


def test_a_case_from_files(intel):
    """verifies that: run_case finds kinds by content, applies policy words, and reports facts where policy refuses too"""
    serialize = serialize_sgx_quote if intel.tee == "sgx" else serialize_tdx_quote
    intel.debug = True
    evidence = [CaseFile(name="quote", hint=None, data=serialize(intel.quote()))]
    endorsements = [CaseFile(name=kind, hint=kind, data=data) for kind, data in forms(intel)["collateral"]]
    terms = {"evidence": evidence, "endorsements": endorsements, "at": intel.now, "anchors": intel.anchors}
    words = {"allow_debug": False, "accept_tcb": ["UpToDate"]}
    inputs = {"collateral": "full"}
    result = run_case(**terms, mode="policy", inputs=inputs, policy=words, simulated_allowed=True)
    assert [one.code for one in result.findings if one.outcome is Outcome.NOT_MET] == [f"{intel.tee}.debug"]
    assert result.facts["debug"] is True
    lax = run_case(**terms, mode="policy", inputs=inputs, policy=words | {"allow_debug": True}, simulated_allowed=True)
    assert lax.first_refusal() is None
    assert (
        run_case(**terms, mode="policy", inputs=inputs, policy={"allow_debug": True}).first_refusal().code.endswith(".root")
    )
    for wrong in (
        {"mode": "other"},
        {"inputs": {}},
        {"inputs": {"collateral": "full", "report_data_hex": "xy"}},
        {"policy": {"unknown": 1}},
        {"policy": {"accept_tcb": ["Fine"]}},
        {"policy": {"measurements": {"unknown": "00"}}},
    ):
        with pytest.raises(Misconfigured, match="case.inputs"):
            run_case(**{**terms, "mode": "policy", "inputs": inputs, "policy": words, **wrong})
    with pytest.raises(Malformed, match="case.evidence"):
        run_case(**{**terms, "evidence": evidence * 2}, mode="authentic", inputs=inputs, policy={})


def test_a_changed_vendor_root_stops_everything(monkeypatch):
    """verifies that: a shipped root that is not the pinned one is never an anchor"""
    (name, _), other = intel_pck._ROOTS
    monkeypatch.setattr(intel_pck, "_ROOTS", ((name, "00" * 32), other))
    with pytest.raises(Misconfigured, match="anchors.vendor_root_changed"):
        intel_pck.production_intel_anchors.__wrapped__()
