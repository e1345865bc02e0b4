"""Are Intel's statements about this platform authentic, current and about this platform? Numbered once here.

1. What the caller demands is there. FULL: TCB info, quoting enclave identity, both CRLs, signatures and signers'
   chains. PARTIAL: whatever is there is verified and nothing more is asked for. PREVERIFIED: a statement without chain
   is taken as a store verified it at import. NONE: nothing is looked at. The claims say which it was, and policy
   decides. [intel.endorsement_missing]
2. A statement is signed, byte for byte, by a TCB signer whose chain ends in the SAME root key as the quote's.
   [intel.collateral_signature intel.anchor_mixed (and intel.chain_*, intel.anchor_*)]
3. The root's CRL names neither the PCK authority nor the TCB signers; the PCK authority's CRL does not name the PCK.
   [intel.revoked intel.crl_signature intel.crl_issuer]
4. Statements, their signers and CRLs are current at `now`; no grace is given: whoever wants one passes another time,
   and says so. [intel.collateral_expired intel.collateral_not_yet_valid intel.crl_expired intel.crl_not_yet_valid
   intel.certificate_*]
5. Statements are of a version that has an evaluation number, for this TEE, this FMSPC and this PCE.
   [intel.collateral_kind intel.fmspc_mismatch intel.pce_mismatch]
6. The quoting enclave is the one of the identity: MRSIGNER, ISVPRODID, MISCSELECT and ATTRIBUTES under their masks.
   [intel.qe_mismatch]

`advance` keeps a store from going back: a statement older than the one it replaces, or of a lower evaluation, is refused
(intel.collateral_rollback). Signatures depend on bytes only, so judged statements are kept, bounded; dates never are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Generic, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline import digest
from moorline.clock import Instant, Validity, rendered
from moorline.errors import NotAuthentic, Refused, Unavailable
from moorline.evidence.dcap_quote import EnclaveReport, TeeType
from moorline.evidence.intel_collateral import (
    EvaluationNumbers,
    QeIdentity,
    SignedDocument,
    TcbInfo,
    parse_evaluation_numbers,
    parse_qe_identity,
    parse_tcb_info,
)
from moorline.verification.intel_pck import (
    IntelAnchors,
    IntelChain,
    IntelCrl,
    Role,
    crl_in_force,
    judge_chain,
    judge_crl,
    not_revoked,
)

_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_TCB_INFO_VERSION: Final = 2
_QE_IDENTITY_VERSION: Final = 2
_QE_OF: Final = {TeeType.SGX: "QE", TeeType.TDX: "TD_QE"}

Statement = TypeVar("Statement", TcbInfo, QeIdentity, EvaluationNumbers)


class Collateral(StrEnum):
    """What a caller is content with; see rule 1.

    Without a QE identity nobody knows whose quoting enclave it was: a platform's provisioning enclave also certifies others.
    So anything below FULL shows that an Intel platform signed, and policy must say why that is enough.
    """

    FULL = "full"
    PARTIAL = "partial"
    PREVERIFIED = "preverified"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelEndorsements:
    """What Intel says about a platform, untrusted. CRLs are DER: that of the PCK authority, that of the root."""

    tcb_info: SignedDocument | None
    qe_identity: SignedDocument | None
    pck_crl: bytes | None
    root_crl: bytes | None


NO_ENDORSEMENTS: Final = IntelEndorsements(tcb_info=None, qe_identity=None, pck_crl=None, root_crl=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedStatement(Generic[Statement]):
    """A statement whose signature holds, at the times in `validity` and in force of `signer` only.

    `signer` is None for a statement that was taken on trust.
    """

    value: Statement
    signer: IntelChain | None
    validity: Validity
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCollateral:
    """The statements that hold for one platform now. None: not demanded, and not there."""

    tcb_info: TcbInfo | None
    qe_identity: QeIdentity | None
    revocation_checked: bool
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementMark:
    """What a store remembers of the newest statement it has had about one subject."""

    issued: Instant
    evaluation: int


def judge_collateral(
    endorsements: IntelEndorsements,
    chain: IntelChain,
    qe_report: EnclaveReport,
    tee: TeeType,
    *,
    collateral: Collateral,
    anchors: IntelAnchors,
    now: Instant,
) -> JudgedCollateral:
    """The collateral of a quote whose PCK `chain` holds. Raises Unavailable, Malformed, NotAuthentic (codes above)."""
    if collateral is Collateral.NONE:
        return JudgedCollateral(tcb_info=None, qe_identity=None, revocation_checked=False, digest=chain.digest)
    if collateral is Collateral.FULL:
        _complete(endorsements)  # 1
    trusting = collateral is Collateral.PREVERIFIED
    tcb = _judged(endorsements.tcb_info, _judge_tcb_info, anchors, trusting=trusting)  # 2
    qe = _judged(endorsements.qe_identity, _judge_qe_identity, anchors, trusting=trusting)
    statements = [one for one in (tcb, qe) if one is not None]
    signers = [one.signer for one in statements if one.signer is not None]
    for signer in signers:
        if signer.root_issuer.public_key != chain.root_issuer.public_key:
            raise NotAuthentic("intel.anchor_mixed", "quote and collateral rest on different roots")
    crls = _revocation(endorsements, chain, signers)  # 3
    _all_in_force(signers, crls, [one.validity for one in statements], now)  # 4
    if tcb is not None:
        _about(tcb.value, chain, tee)  # 5
    if qe is not None:
        _enclave(qe.value, qe_report, tee)  # 6
    return JudgedCollateral(
        tcb_info=None if tcb is None else tcb.value,
        qe_identity=None if qe is None else qe.value,
        revocation_checked=endorsements.pck_crl is not None and endorsements.root_crl is not None,
        digest=digest.tagged_hash(
            "intel-collateral",
            chain.digest,
            b"" if tcb is None else tcb.digest,
            b"" if qe is None else qe.digest,
            *(crl.digest for crl in crls),
        ),
    )


def verify_tcb_info(
    document: SignedDocument, *, root_crl: bytes, anchors: IntelAnchors, now: Instant
) -> JudgedStatement[TcbInfo]:
    """TCB info without a quote, for collateral that is verified when it is stored. Raises as `judge_collateral`."""
    return _verified(_demanded(document, _judge_tcb_info, anchors), root_crl, now)


def verify_qe_identity(
    document: SignedDocument, *, root_crl: bytes, anchors: IntelAnchors, now: Instant
) -> JudgedStatement[QeIdentity]:
    """An enclave identity without a quote, as `verify_tcb_info`."""
    return _verified(_demanded(document, _judge_qe_identity, anchors), root_crl, now)


def verify_evaluation_numbers(
    document: SignedDocument, *, root_crl: bytes, anchors: IntelAnchors, now: Instant
) -> JudgedStatement[EvaluationNumbers]:
    """The list of TCB evaluations, as `verify_tcb_info`."""
    return _verified(_demanded(document, _judge_evaluation_numbers, anchors), root_crl, now)


def advance(mark: StatementMark | None, statement: TcbInfo | QeIdentity) -> StatementMark:
    """The mark after `statement` replaced what `mark` stands for; raises Refused("intel.collateral_rollback").

    Evaluation numbers only grow, and so do issue dates of one evaluation: a vendor's cache or an attacker in between that
    serves an older statement, still within its dates, is caught here.
    """
    new = StatementMark(issued=statement.issue_date, evaluation=statement.evaluation or 0)
    if mark is not None and (new.evaluation < mark.evaluation or new.issued < mark.issued):
        raise Refused(
            "intel.collateral_rollback",
            "the statement is older than the one already held",
            expected=f">= {rendered(mark.issued)}, evaluation {mark.evaluation}",
            got=f"{rendered(new.issued)}, evaluation {new.evaluation}",
        )
    return new


def in_force(validity: Validity, now: Instant) -> None:
    """Rule 4 for one statement."""
    if now < validity.not_before:
        raise NotAuthentic(
            "intel.collateral_not_yet_valid",
            "the statement was issued in the future",
            expected=f">= {rendered(validity.not_before)}",
            got=rendered(now),
            remedy="look at the verifier's clock",
        )
    if now > validity.not_after:
        raise NotAuthentic(
            "intel.collateral_expired",
            "the statement is past its next update",
            expected=f"<= {rendered(validity.not_after)}",
            got=rendered(now),
            remedy="fetch current collateral from Intel's service",
        )


# ---------------------------------------------------------------- 1 and 2


def _complete(endorsements: IntelEndorsements) -> None:
    missing = [
        name
        for name, document in (("TCB info", endorsements.tcb_info), ("QE identity", endorsements.qe_identity))
        if document is None or document.signature is None or document.chain is None
    ]
    missing += ["PCK CRL"] if endorsements.pck_crl is None else []
    missing += ["root CRL"] if endorsements.root_crl is None else []
    if missing:
        raise missing_endorsement(", ".join(missing))


def missing_endorsement(what: str) -> Unavailable:
    """The answer where nothing can be decided without `what`."""
    return Unavailable(
        "intel.endorsement_missing",
        "an endorsement is missing, and no verdict is possible without it",
        expected=what,
        remedy="fetch it from Intel's service for this FMSPC",
    )


def _judged(
    document: SignedDocument | None,
    judge: Callable[[bytes, bytes, bytes | None, IntelAnchors], JudgedStatement[Statement]],
    anchors: IntelAnchors,
    *,
    trusting: bool,
) -> JudgedStatement[Statement] | None:
    if document is None:
        return None
    if document.chain is None and trusting:
        return judge(document.body, b"", None, anchors)
    return _demanded(document, judge, anchors)


def _demanded(
    document: SignedDocument,
    judge: Callable[[bytes, bytes, bytes | None, IntelAnchors], JudgedStatement[Statement]],
    anchors: IntelAnchors,
) -> JudgedStatement[Statement]:
    if document.signature is None or document.chain is None:
        raise missing_endorsement("the statement's signature and its signer's chain")
    return judge(document.body, document.signature, document.chain, anchors)


@lru_cache(maxsize=256)
def _judge_tcb_info(body: bytes, signature: bytes, chain: bytes | None, anchors: IntelAnchors) -> JudgedStatement[TcbInfo]:
    signer = _signer(body, signature, chain, anchors)
    info = parse_tcb_info(body)
    return _statement(info, info.issue_date, info.next_update, body, signer)


@lru_cache(maxsize=64)
def _judge_qe_identity(
    body: bytes, signature: bytes, chain: bytes | None, anchors: IntelAnchors
) -> JudgedStatement[QeIdentity]:
    signer = _signer(body, signature, chain, anchors)
    identity = parse_qe_identity(body)
    return _statement(identity, identity.issue_date, identity.next_update, body, signer)


@lru_cache(maxsize=16)
def _judge_evaluation_numbers(
    body: bytes, signature: bytes, chain: bytes, anchors: IntelAnchors
) -> JudgedStatement[EvaluationNumbers]:
    signer = _signer(body, signature, chain, anchors)
    numbers = parse_evaluation_numbers(body)
    return _statement(numbers, numbers.issue_date, numbers.next_update, body, signer)


def _signer(body: bytes, signature: bytes, chain: bytes | None, anchors: IntelAnchors) -> IntelChain | None:
    """Who signed `body`; None only for what the caller says a store verified."""
    if chain is None:
        return None
    signer = judge_chain(chain, Role.TCB_SIGNING, anchors)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        signer.key.verify(encode_dss_signature(r, s), body, _ECDSA)
    except InvalidSignature:
        raise NotAuthentic("intel.collateral_signature", "the statement is not signed by its signer") from None
    return signer


def _statement(
    value: Statement, issued: Instant, following: Instant, body: bytes, signer: IntelChain | None
) -> JudgedStatement[Statement]:
    return JudgedStatement(
        value=value,
        signer=signer,
        validity=Validity(not_before=issued, not_after=following),
        digest=hashlib.sha256(body).digest(),
    )


def _verified(judged: JudgedStatement[Statement], root_crl: bytes, now: Instant) -> JudgedStatement[Statement]:
    assert judged.signer is not None  # _demanded asked for one
    crl = judge_crl(root_crl, judged.signer.root_issuer)
    not_revoked(crl, judged.signer.serial)
    judged.signer.in_force(now)
    crl_in_force(crl, now)
    in_force(judged.validity, now)
    return judged


# ---------------------------------------------------------------- 3 and 4


def _all_in_force(signers: list[IntelChain], crls: list[IntelCrl], statements: list[Validity], now: Instant) -> None:
    for signer in signers:
        signer.in_force(now)
    for crl in crls:
        crl_in_force(crl, now)
    for validity in statements:
        in_force(validity, now)


def _revocation(endorsements: IntelEndorsements, chain: IntelChain, signers: list[IntelChain]) -> list[IntelCrl]:
    crls: list[IntelCrl] = []
    if endorsements.root_crl is not None:
        crl = judge_crl(endorsements.root_crl, chain.root_issuer)
        not_revoked(crl, *(signer.serial for signer in signers))
        if chain.ca_serial is not None:
            not_revoked(crl, chain.ca_serial)
        crls.append(crl)
    if endorsements.pck_crl is not None and chain.ca is not None:
        crl = judge_crl(endorsements.pck_crl, chain.ca)
        not_revoked(crl, chain.serial)
        crls.append(crl)
    return crls


# ---------------------------------------------------------------- 5 and 6


def _about(info: TcbInfo, chain: IntelChain, tee: TeeType) -> None:
    if info.id != tee.name or info.version < _TCB_INFO_VERSION:
        raise NotAuthentic(
            "intel.collateral_kind",
            "the TCB info is for another TEE, or too old to be judged",
            expected=f"{tee.name}, version 2 or 3",
            got=f"{info.id}, version {info.version}",
        )
    pck = chain.pck
    assert pck is not None  # a PCK chain
    if info.fmspc != pck.fmspc:
        raise NotAuthentic("intel.fmspc_mismatch", "the TCB info is for another FMSPC", expected=pck.fmspc, got=info.fmspc)
    if info.pce_id is not None and info.pce_id != pck.pce_id:
        raise NotAuthentic("intel.pce_mismatch", "the TCB info is for another PCE", expected=pck.pce_id, got=info.pce_id)


def _enclave(identity: QeIdentity, report: EnclaveReport, tee: TeeType) -> None:
    if identity.id != _QE_OF[tee] or identity.version < _QE_IDENTITY_VERSION:
        raise NotAuthentic(
            "intel.collateral_kind",
            "the identity is of another enclave, or too old to be judged",
            expected=f"{_QE_OF[tee]}, version 2",
            got=f"{identity.id}, version {identity.version}",
        )
    attributes = bytes(have & mask for have, mask in zip(report.attribute_bytes, identity.attributes_mask, strict=True))
    checks = (
        ("MRSIGNER", identity.mr_signer, report.mr_signer),
        ("ISVPRODID", identity.isv_prod_id, report.isv_prod_id),
        ("MISCSELECT", identity.misc_select, report.misc_select & identity.misc_select_mask),
        ("ATTRIBUTES", identity.attributes, attributes),
    )
    for name, expected, got in checks:
        if expected != got:
            raise NotAuthentic(
                "intel.qe_mismatch", f"the quoting enclave is not Intel's: {name}", expected=expected, got=got
            )
