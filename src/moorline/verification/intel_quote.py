"""Is an Intel quote authentic? What SGX and TDX share, numbered once here.

Input: a parsed, untrusted quote; untrusted endorsements; the 64 bytes of report data that this verifier expects; pinned
root keys; the time. Nothing is fetched, no clock is read.

1.  The quoting enclave's vendor is Intel. [intel.qe_vendor]
2.  Certification data is a PCK chain (type 5); types 1 to 4 only name one. [intel.endorsement_missing]
3.  The PCK chain ends in a pinned root key (`intel_pck`, rules 2 to 5). [intel.chain_* intel.anchor_unknown
    intel.pck_*]
4.  The PCK signed the quoting enclave's report. [intel.qe_report_signature]
5.  That report's data is SHA-256 of attestation key and authentication data, then 32 zero bytes.
    [intel.attestation_key_unbound]
6.  The attestation key signed header and body. [intel.attestation_key intel.quote_signature]
7.  Every certificate of the chain is in force at `now`. [intel.certificate_expired intel.certificate_not_yet_valid]
8.  The collateral that the caller demands holds and is about this platform (`intel_collateral`, all rules).
9.  The TCB is matched (`intel_tcb`) and reported; only policy judges it.
10. All 64 bytes of report data equal the expected ones, compared in constant time. [sgx.report_data_mismatch
    tdx.report_data_mismatch]

Not established here: whether the code, its attributes or its TCB are acceptable: that is `policy.sgx` and `policy.tdx`.
Freshness is that of `report_data`. Steps that depend on bytes only are kept (see the modules); a warm verification costs
two P-256 verifications (4 and 6) and little else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline import digest
from moorline.clock import Instant
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence.dcap_quote import PCK_CHAIN, QuoteHeader, QuoteSignature, TeeType
from moorline.evidence.intel_collateral import TcbStatus
from moorline.verification.intel_collateral import Collateral, JudgedCollateral, missing_endorsement
from moorline.verification.intel_pck import IntelAnchors, IntelChain, PckCa, PckCertificate, Role, judge_chain, read_pck
from moorline.verification.intel_tcb import TcbMatch, match_isv, merged

INTEL_QE_VENDOR: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_CERTIFICATION: Final = {
    1: "the PCK certificate of a plain PPID",
    2: "the PCK certificate of an RSA-2048 encrypted PPID",
    3: "the PCK certificate of an RSA-3072 encrypted PPID",
    4: "the issuers of the PCK certificate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelNeeded:
    """What to ask Intel's service for, by UNVERIFIED evidence: TCB info of `fmspc`, QE identity, CRLs of `ca` and root."""

    tee: TeeType
    fmspc: bytes
    ca: PckCa


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelPlatform:
    """What an authentic quote and its collateral say about the machine.

    `tcb_status` is the platform's, merged with the TDX module's for TDX; `status` merges the quoting enclave's too. A
    status is None where no collateral said anything: then nothing is known about the TCB, and only a policy that does not
    ask accepts that.
    """

    pck: PckCertificate
    collateral: Collateral
    tcb_status: TcbStatus | None
    module_status: TcbStatus | None
    qe_status: TcbStatus | None
    status: TcbStatus | None
    advisories: frozenset[str]
    tcb_date: Instant | None
    tcb_evaluation: int | None
    qe_evaluation: int | None
    revocation_checked: bool


def endorsements_needed(header: QuoteHeader, signature: QuoteSignature) -> IntelNeeded:
    """What a verifier needs for a quote. Raises Unavailable("intel.endorsement_missing") if its chain is not in it."""
    pck, ca = read_pck(_chain_bytes(signature))
    return IntelNeeded(tee=header.tee_type, fmspc=pck.fmspc, ca=ca)


def judge_quote(
    header: QuoteHeader, signed: bytes, signature: QuoteSignature, *, anchors: IntelAnchors, now: Instant
) -> IntelChain:
    """Steps 1 to 7: the PCK chain of a quote whose signatures hold."""
    if header.qe_vendor_id != INTEL_QE_VENDOR:  # 1
        raise NotAuthentic(
            "intel.qe_vendor", "the quoting enclave is of another vendor", expected=INTEL_QE_VENDOR, got=header.qe_vendor_id
        )
    chain = judge_chain(_chain_bytes(signature), Role.PCK, anchors)  # 2 and 3, remembered
    _qe_report_holds(signature, chain)  # 4
    bound = hashlib.sha256(signature.attestation_key + signature.qe_auth_data).digest() + bytes(32)
    if signature.qe_report.report_data != bound:  # 5
        raise NotAuthentic("intel.attestation_key_unbound", "the quoting enclave does not vouch for the attestation key")
    try:
        _point(signature.attestation_key).verify(_encoded(signature.signature), signed, _ECDSA)  # 6
    except InvalidSignature:
        raise NotAuthentic("intel.quote_signature", "the quote is not signed by its attestation key") from None
    chain.in_force(now)  # 7
    return chain


def same_report_data(expected: bytes, got: bytes) -> bool:
    """Step 10. Raises Malformed("intel.expected_report_data") for an expectation of another length than 64 bytes."""
    if len(expected) != 64:
        raise Malformed(
            "intel.expected_report_data",
            "the expected report data is neither padded nor cut here",
            expected="64 bytes",
            got=len(expected),
        )
    return digest.same(expected, got)


def platform_claims(
    chain: IntelChain,
    judged: JudgedCollateral,
    *,
    collateral: Collateral,
    qe_isv_svn: int,
    platform: TcbMatch | None,
    module: TcbMatch | None,
    tcb_status: TcbStatus | None,
) -> IntelPlatform:
    """Step 9: what is known about the machine, all parts merged."""
    identity = judged.qe_identity
    enclave = None if identity is None else match_isv(identity.levels, qe_isv_svn)
    status = tcb_status
    if status is not None and enclave is not None:
        status = merged(status, enclave.status)
    pck = chain.pck
    assert pck is not None  # a PCK chain
    found = [one for one in (platform, module, enclave) if one is not None]
    return IntelPlatform(
        pck=pck,
        collateral=collateral,
        tcb_status=tcb_status,
        module_status=None if module is None else module.status,
        qe_status=None if enclave is None else enclave.status,
        status=status,
        advisories=frozenset(advisory for one in found for advisory in one.advisories),
        tcb_date=None if platform is None else platform.date,
        tcb_evaluation=None if judged.tcb_info is None else judged.tcb_info.evaluation,
        qe_evaluation=None if identity is None else identity.evaluation,
        revocation_checked=judged.revocation_checked,
    )


def _chain_bytes(signature: QuoteSignature) -> bytes:
    certification = signature.certification
    if certification.kind != PCK_CHAIN:
        raise missing_endorsement(_CERTIFICATION[certification.kind])
    return certification.data


def _qe_report_holds(signature: QuoteSignature, chain: IntelChain) -> None:
    try:
        chain.key.verify(_encoded(signature.qe_report_signature), signature.qe_report.serialized(), _ECDSA)
    except InvalidSignature:
        raise NotAuthentic(
            "intel.qe_report_signature", "the quoting enclave's report is not signed by the PCK of the platform"
        ) from None


def _encoded(raw: bytes) -> bytes:
    return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))


@lru_cache(maxsize=1024)
def _point(raw: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + raw)
    except ValueError:
        raise NotAuthentic("intel.attestation_key", "the attestation key is no point on P-256") from None
