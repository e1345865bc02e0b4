"""Every rule of the Intel procedure: the good twin holds, and one change breaks exactly that rule, by its code."""

import dataclasses

import pytest

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence.dcap_quote import CertificationData
from moorline.evidence.intel_collateral import SignedDocument, TcbStatus, parse_tcb_info
from moorline.rats import EvidenceRoot
from moorline.verification import intel_quote, sgx, tdx
from moorline.verification.intel_collateral import (
    NO_ENDORSEMENTS,
    Collateral,
    StatementMark,
    advance,
    verify_evaluation_numbers,
    verify_qe_identity,
    verify_tcb_info,
)
from moorline.verification.intel_pck import (
    IntelAnchors,
    PckCa,
    configured_anchors,
    parse_sgx_extension,
    production_intel_anchors,
)


def refused(call, *arguments, **named):
    with pytest.raises(MoorlineError) as caught:
        call(*arguments, **named)
    return caught.value.code


def test_good_evidence_holds_and_says_what_it_rests_on(intel):
    """verifies that: the good twin of everything below is authentic, of root test, with status and evaluation"""
    verified = intel.verify()
    assert verified.root is EvidenceRoot.TEST
    platform = verified.value.platform
    assert platform.status is TcbStatus.UP_TO_DATE
    assert (platform.tcb_evaluation, platform.qe_evaluation, platform.revocation_checked) == (17, 17, True)
    assert platform.advisories == frozenset()
    assert len(verified.collateral_digest) == 32


def test_what_is_needed_is_read_from_the_quote(intel):
    """verifies that: FMSPC and authority come from the quote; a quote without its chain needs what nobody has"""
    room = sgx if intel.tee == "sgx" else tdx
    needed = room.endorsements_needed(intel.quote())
    assert (needed.fmspc, needed.ca) == (intel.fmspc, PckCa.PLATFORM)
    for kind, size in ((1, 36), (2, 276), (3, 404), (4, 900)):
        intel.certification = CertificationData(kind=kind, data=bytes(size))
        with pytest.raises(Unavailable, match="intel.endorsement_missing"):
            room.endorsements_needed(intel.quote())
        assert refused(intel.verify) == "intel.endorsement_missing"


QUOTE_RULES = {
    "intel.qe_vendor": lambda f: setattr(f, "vendor", bytes(16)),
    "intel.anchor_unknown": lambda f: setattr(f, "roots", ("other root",)),
    "intel.qe_report_signature": lambda f: f.keys.__setitem__("qe signed by", f.keys["stranger"]),
    "intel.attestation_key_unbound": lambda f: setattr(f, "qe_report_data", b"\x01" * 64),
    "intel.attestation_key": lambda f: setattr(f, "attestation_public", b"\x01" * 64),
    "intel.quote_signature": lambda f: f.keys.__setitem__("quote signed by", f.keys["stranger"]),
    "intel.chain_broken": lambda f: f.keys.__setitem__("pck signed by", f.keys["stranger"]),
    "intel.fmspc_mismatch": lambda f: f.tcb_info.update(fmspc="00A1B2C3D4E6"),
    "intel.pce_mismatch": lambda f: f.tcb_info.update(pceId="0001"),
    "intel.certificate_expired": lambda f: setattr(f, "now", f.not_after + 1),
    "intel.certificate_not_yet_valid": lambda f: setattr(f, "now", f.not_before - 1),
    "intel.collateral_expired": lambda f: setattr(f, "next_update", f.now - 1),
    "intel.collateral_not_yet_valid": lambda f: setattr(f, "issued", f.now + 1),
}


@pytest.mark.parametrize("code", QUOTE_RULES)
def test_one_change_breaks_one_rule(intel, code):
    """verifies that: each rule that both TEEs share refuses, with its own code, exactly what it is for"""
    QUOTE_RULES[code](intel)
    assert refused(intel.verify) == code


@pytest.mark.parametrize("edge", ["qe report half", "auth data"])
def test_the_attestation_key_is_bound_whole(intel, edge):
    """verifies that: the zero half of the enclave's report data and the authentication data are in the binding"""
    quote = intel.quote()
    if edge == "auth data":
        signature = dataclasses.replace(quote.signature, qe_auth_data=bytes(32))
        assert refused(intel.verify, dataclasses.replace(quote, signature=signature)) == "intel.attestation_key_unbound"
    else:
        intel.qe_report_data = quote.signature.qe_report.report_data[:32] + b"\x01" + bytes(31)
        assert refused(intel.verify) == "intel.attestation_key_unbound"


@pytest.mark.parametrize("missing", ["tcb_info", "qe_identity", "pck_crl", "root_crl", "signature", "chain", "all"])
def test_missing_collateral_is_neither_yes_nor_no(intel, missing):
    """verifies that: each missing piece of full collateral gives Unavailable with its own code, never a verdict"""
    given = intel.endorsements()
    if missing == "all":
        given = NO_ENDORSEMENTS
    elif missing in ("signature", "chain"):
        given = dataclasses.replace(given, tcb_info=dataclasses.replace(given.tcb_info, **{missing: None}))
    else:
        given = dataclasses.replace(given, **{missing: None})
    with pytest.raises(Unavailable, match="intel.endorsement_missing"):
        intel.verify(endorsements=given)


def test_less_collateral_is_said_in_the_claims(intel):
    """verifies that: partial, preverified and none verify what they may, and the claims say how little was looked at"""
    given = intel.endorsements(pck_crl=None)
    partial = intel.verify(endorsements=given, collateral=Collateral.PARTIAL).value.platform
    assert (partial.collateral, partial.revocation_checked, partial.status) == (
        Collateral.PARTIAL,
        False,
        TcbStatus.UP_TO_DATE,
    )
    bare = dataclasses.replace(given, tcb_info=SignedDocument(body=intel.tcb_info_body(), signature=None, chain=None))
    assert refused(intel.verify, endorsements=bare, collateral=Collateral.PARTIAL) == "intel.endorsement_missing"
    trusting = intel.verify(endorsements=bare, collateral=Collateral.PREVERIFIED).value.platform
    assert (trusting.collateral, trusting.status) == (Collateral.PREVERIFIED, TcbStatus.UP_TO_DATE)
    assert refused(intel.verify, endorsements=bare) == "intel.endorsement_missing"  # what was taken on trust stays untrusted
    none = intel.verify(endorsements=NO_ENDORSEMENTS, collateral=Collateral.NONE).value.platform
    assert (none.status, none.tcb_evaluation, none.revocation_checked) == (None, None, False)


CHAIN_RULES = {
    "intel.chain_role": [
        lambda f: f.names.update(pck="Somebody"),
        lambda f: f.names.update(ca="Intel SGX Other CA"),
        lambda f: f.is_ca.update(ca=False),
        lambda f: f.is_ca.update(pck=True),
        lambda f: f.names.update(signer="Intel SGX PCK Certificate"),
        lambda f: f.is_ca.update(signer=True),
    ],
    "intel.chain_broken": [
        lambda f: f.keys.__setitem__("ca signed by", f.keys["stranger"]),
        lambda f: f.keys.__setitem__("root signed by", f.keys["stranger"]),
        lambda f: f.keys.__setitem__("signer signed by", f.keys["stranger"]),
    ],
    "intel.pck_extension": [
        lambda f: f.components.pop(),
        lambda f: f.components.__setitem__(0, 256),
        lambda f: setattr(f, "pce_svn", 65536),
        lambda f: setattr(f, "ppid", bytes(15)),
    ],
}


@pytest.mark.parametrize(("code", "change"), [(code, change) for code, all_of in CHAIN_RULES.items() for change in all_of])
def test_chains_hold_only_for_their_purpose(intel, code, change):
    """verifies that: authority, purpose and extension of every certificate in a chain are judged"""
    change(intel)
    assert refused(intel.verify) == code


@pytest.mark.parametrize("shape", ["too short", "foreign text", "not base64", "no certificate", "too long"])
def test_chains_have_one_form(intel, shape):
    """verifies that: a chain of another length or with other text in it is malformed"""
    pem = intel.chain("pck")
    shapes = {
        "too short": intel.certificate("pck") + intel.certificate("root"),
        "foreign text": b"hello\n" + pem,
        "not base64": pem.replace(b"MII", b"MI=", 1),
        "no certificate": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" * 3,
        "too long": intel.certificate("pck") + pem,
    }
    intel.certification = CertificationData(kind=5, data=shapes[shape])
    assert refused(intel.verify) == "intel.chain_malformed"


def test_a_certificate_has_one_text(intel):
    """verifies that: base64 whose unused bits are not zero is another text for the same certificate, and malformed"""
    pem = intel.chain("pck")
    while b"=\n-----END" not in pem:  # the length of a DER signature varies; one in three certificates ends in padding
        pem = intel.chain("pck")
    at = pem.index(b"=")
    loose = pem[: at - 1] + bytes([pem[at - 1] + 1]) + pem[at:]
    intel.certification = CertificationData(kind=5, data=loose)
    assert refused(intel.verify) == "intel.chain_malformed"


@pytest.mark.parametrize("unused", [1, 4, 7])
def test_a_signature_is_whole_bytes(intel, unused):
    """verifies that: a certificate or CRL whose signature has unused bits, which libraries overlook, is malformed"""
    good = intel.crl("ca")
    for size in range(68, 74):
        good_tail = bytes([0x03, size + 1, 0x00, 0x30, size - 2])
        if good_tail in good:
            at = good.rindex(good_tail) + 2
            spoiled = good[:at] + bytes([unused]) + good[at + 1 :]
            with pytest.raises(Malformed):
                intel.verify(endorsements=intel.endorsements(pck_crl=spoiled))
            return
    pytest.fail("the CRL ends in no signature")


def test_trust_is_by_key_never_by_name(intel):
    """verifies that: a root with Intel's name and serial but another key opens nothing, under production anchors neither"""
    assert refused(intel.verify, anchors=production_intel_anchors()) == "intel.anchor_unknown"
    assert refused(intel.verify, anchors=IntelAnchors(anchors=())) == "intel.anchor_unknown"
    assert len(production_intel_anchors().anchors) == 1
    both = production_intel_anchors().plus(intel.anchors)
    assert intel.verify(anchors=both).root is EvidenceRoot.TEST


def test_collateral_of_another_root_is_not_taken(keys, tools):
    """verifies that: a signer under one trusted root cannot vouch for a platform under another"""
    one, other = tools.FakeIntel(keys), tools.FakeIntel({**keys, "root": keys["other root"]})
    both = one.anchors.plus(other.anchors)
    one.verify(anchors=both)
    mixed = one.endorsements(tcb_info=other.endorsements().tcb_info)
    assert refused(one.verify, endorsements=mixed, anchors=both) == "intel.anchor_mixed"


COLLATERAL_RULES = {
    "intel.revoked": [
        lambda f: f.revoked.update(ca=[3]),
        lambda f: f.revoked.update(root=[2]),
        lambda f: f.revoked.update(root=[4]),
    ],
    "intel.crl_signature": [
        lambda f: f.keys.__setitem__("ca crl", f.keys["stranger"]),
        lambda f: f.keys.__setitem__("root crl", f.keys["stranger"]),
    ],
    "intel.crl_expired": [lambda f: f.crl_next.update(ca=f.now - 1), lambda f: f.crl_next.update(root=f.now - 1)],
    "intel.crl_not_yet_valid": [lambda f: f.crl_last.update(ca=f.now + 1), lambda f: f.crl_last.update(root=f.now + 1)],
    "intel.collateral_kind": [
        lambda f: f.qe_identity.update(id="QVE"),
        lambda f: f.qe_identity.update(id="TD_QE" if f.tee == "sgx" else "QE"),
    ],
    "intel.qe_mismatch": [
        lambda f: f.qe.update(mr_signer=bytes(32)),
        lambda f: f.qe.update(isv_prod_id=9),
        lambda f: f.qe.update(misc_select=1),
        lambda f: f.qe.update(attributes=0x13),
    ],
    "intel.tcb_info": [
        lambda f: f.tcb_info.update(tcbType=1),
        lambda f: f.tcb_info.update(version=4),
        lambda f: f.levels[0]["tcb"]["sgxtcbcomponents"].pop(),
        lambda f: f.levels[0].update(tcbStatus="Fine"),
    ],
    "intel.tcb_order": [lambda f: f.levels.reverse()],
}


@pytest.mark.parametrize(
    ("code", "change"), [(code, change) for code, all_of in COLLATERAL_RULES.items() for change in all_of]
)
def test_collateral_is_judged_in_every_part(intel, code, change):
    """verifies that: revocation, dates, kind, enclave identity and levels refuse with their own code"""
    if code == "intel.tcb_info":
        intel.levels = [intel.level()]
        intel.levels[0]["tcb"]["sgxtcbcomponents"] = [{"svn": 5} for _ in range(16)]
    change(intel)
    assert refused(intel.verify) == code


def test_a_statement_of_another_signer_or_text_is_refused(intel):
    """verifies that: the signature covers the exact bytes, and only the named signer's counts"""
    good = intel.endorsements()
    changed = dataclasses.replace(good.tcb_info, body=good.tcb_info.body + b" ")
    assert refused(intel.verify, endorsements=dataclasses.replace(good, tcb_info=changed)) == "intel.collateral_signature"
    swapped = dataclasses.replace(good.qe_identity, signature=good.tcb_info.signature)
    assert refused(intel.verify, endorsements=dataclasses.replace(good, qe_identity=swapped)) == "intel.collateral_signature"


def test_a_crl_of_the_wrong_authority_says_nothing(intel):
    """verifies that: the root's CRL in place of the PCK authority's is refused, so an empty list cannot stand in"""
    swapped = intel.endorsements(pck_crl=intel.crl("root"))
    assert refused(intel.verify, endorsements=swapped) == "intel.crl_issuer"
    assert refused(intel.verify, endorsements=intel.endorsements(root_crl=b"\x30\x00")) == "intel.crl_malformed"


def test_tcb_info_of_the_other_tee_is_refused(keys, tools):
    """verifies that: TDX TCB info does not serve an SGX quote, nor the other way round"""
    one, other = tools.FakeIntel(keys, "sgx"), tools.FakeIntel(keys, "tdx")
    for quote, collateral in ((one, other), (other, one)):
        given = quote.endorsements(tcb_info=collateral.endorsements().tcb_info)
        assert refused(quote.verify, endorsements=given) == "intel.collateral_kind"


@pytest.mark.parametrize("change", [{"mr_signer_seam": b"\x01" * 48}, {"seam_attributes": b"\x01" + bytes(7)}])
def test_a_foreign_tdx_module_is_refused(tdx, change):
    """verifies that: MRSIGNERSEAM and SEAMATTRIBUTES must be those of the module's identity, by version or without one"""
    tdx.report = dict(change)
    assert refused(tdx.verify) == "tdx.module_mismatch"
    tdx.report["tee_tcb_svn"] = bytes([3, 0, 3]) + bytes(13)
    assert refused(tdx.verify) == "tdx.module_mismatch"


def test_an_unknown_tdx_module_is_refused(tdx):
    """verifies that: a module version without an identity in TCB info refuses"""
    tdx.report = {"tee_tcb_svn": bytes([3, 2, 3]) + bytes(13)}
    assert refused(tdx.verify) == "tdx.module_unknown"


def test_every_byte_of_report_data_counts(intel, tools):
    """verifies that: all 64 bytes are compared, and an expectation is neither padded nor cut"""
    quote, given = intel.quote(), intel.endorsements()
    for at in range(64):
        wrong = bytearray(tools.REPORT_DATA)
        wrong[at] ^= 1
        with pytest.raises(NotAuthentic, match=f"{intel.tee}.report_data_mismatch"):
            intel.verify(quote, given, report_data=bytes(wrong))
    with pytest.raises(Malformed, match="intel.expected_report_data"):
        intel.verify(quote, given, report_data=tools.REPORT_DATA[:63])


def test_dates_are_never_remembered(intel):
    """verifies that: evidence verified once is judged anew at another time, from the same caches"""
    quote, given = intel.quote(), intel.endorsements()
    intel.verify(quote, given)
    assert refused(intel.verify, quote, given, now=intel.next_update + 1) in (
        "intel.collateral_expired",
        "intel.crl_expired",
    )
    intel.verify(quote, given)


def test_collateral_without_a_quote(tdx, tools):
    """verifies that: a store can verify statements at import, with dates and revocation"""
    given, crl = tdx.endorsements(), tdx.crl("root")
    assert verify_tcb_info(given.tcb_info, root_crl=crl, anchors=tdx.anchors, now=tdx.now).value.evaluation == 17
    assert verify_qe_identity(given.qe_identity, root_crl=crl, anchors=tdx.anchors, now=tdx.now).value.id == "TD_QE"
    when = tools.stamp(tools.NOW)
    numbers = tdx.signed(
        f'{{"id":"TDX","issueDate":"{when}","nextUpdate":"{when}","tcbEvalNumbers":'
        f'[{{"tcbEvaluationDataNumber":17,"tcbRecoveryEventDate":"{when}","tcbDate":"{when}"}}]}}'.encode()
    )
    judged = verify_evaluation_numbers(numbers, root_crl=crl, anchors=tdx.anchors, now=tdx.now)
    assert judged.value.numbers[0][0] == 17
    tdx.revoked["root"] = [4]
    assert (
        refused(verify_tcb_info, given.tcb_info, root_crl=tdx.crl("root"), anchors=tdx.anchors, now=tdx.now)
        == "intel.revoked"
    )


def test_collateral_never_goes_back(tdx):
    """verifies that: a statement older than the one held, or of a lower evaluation, is refused though within its dates"""
    info = parse_tcb_info(tdx.tcb_info_body())
    mark = advance(None, info)
    assert advance(mark, info) == mark
    for newer in (StatementMark(issued=mark.issued + 1, evaluation=17), StatementMark(issued=mark.issued, evaluation=18)):
        with pytest.raises(Refused, match="intel.collateral_rollback"):
            advance(newer, info)


EXTENSION = {
    "a part twice": lambda t, good: t.der(0x30, good[4:], t.part(1, t.der(0x04, bytes(16)))),
    "a foreign part": lambda t, good: t.der(0x30, good[4:], t.part(1, t.der(0x04, bytes(16)), "1.2.3")),
    "an unknown part": lambda t, good: t.der(0x30, good[4:], t.part(9, t.der(0x04, bytes(16)))),
    "bytes after it": lambda t, good: good + b"\x00",
    "nothing": lambda t, good: b"",
}


@pytest.mark.parametrize("shape", EXTENSION)
def test_the_sgx_extension_has_one_form(tdx, tools, shape):
    """verifies that: every part of the extension stands once, and nothing else does"""
    good = tdx.sgx_extension()
    assert parse_sgx_extension(good).fmspc == tdx.fmspc
    with pytest.raises(Malformed):
        parse_sgx_extension(EXTENSION[shape](tools, good))


def test_the_vendor_is_intel():
    """verifies that: the vendor's UUID is Intel's, as published with the quote format"""
    assert intel_quote.INTEL_QE_VENDOR.hex() == "939a7233f79c4ca9940a0db3957f0607"


def test_configured_roots_are_roots_and_only_tests(intel):
    """verifies that: a root from a file is root test; another certificate refuses, no certificate decides nothing"""
    anchors = configured_anchors([intel.certificate("root")])
    assert intel.verify(anchors=anchors).root is EvidenceRoot.TEST
    for who in ("ca", "pck"):
        assert refused(configured_anchors, [intel.certificate(who)]) == "intel.anchor_not_root"
    for data in (b"", b"\x30\x00", b"-----BEGIN"):
        with pytest.raises(Unavailable, match="intel.anchor_malformed"):
            configured_anchors([data])
