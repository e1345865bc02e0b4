"""Is an SGX quote authentic, current and bound to this challenge? The procedure is `intel_quote`; this adds SGX's own rules.

1. The quote is an SGX quote; steps 1 to 9 of `intel_quote`, with the SGX statements (`SGX` TCB info, identity `QE`).
2. All 64 bytes of the enclave's report data are the expected ones. [sgx.report_data_mismatch]
3. RA-TLS: the evidence in a certificate binds the certificate's own key: the first half of the report data is the hash
   of it that the certificate's form demands, the other half zero; and that key signed the certificate.
   [ratls.key_unbound ratls.key_unsupported ratls.signature_invalid]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from moorline.clock import Instant
from moorline.errors import NotAuthentic
from moorline.evidence.dcap_quote import EnclaveReport, TeeType
from moorline.evidence.ratls import RatlsEvidence, RatlsForm, parse_ratls_certificate
from moorline.evidence.sgx_quote import SgxQuote, parse_sgx_quote
from moorline.verification import intel_quote
from moorline.verification.intel_collateral import Collateral, IntelEndorsements, judge_collateral
from moorline.verification.intel_pck import IntelAnchors
from moorline.verification.intel_quote import IntelNeeded, IntelPlatform
from moorline.verification.intel_tcb import match_platform
from moorline.verification.verified import Verified

_ECDSA_SHA256: Final = "1.2.840.10045.4.3.2"
_ECDSA_SHA384: Final = "1.2.840.10045.4.3.3"
_RSA_SHA256: Final = "1.2.840.113549.1.1.11"
_RSA_SHA384: Final = "1.2.840.113549.1.1.12"
_HASHES: Final = {
    _ECDSA_SHA256: hashes.SHA256(),
    _RSA_SHA256: hashes.SHA256(),
    _ECDSA_SHA384: hashes.SHA384(),
    _RSA_SHA384: hashes.SHA384(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SgxClaims:
    """What an authentic quote says: the enclave's report, and the platform it ran on."""

    report: EnclaveReport
    platform: IntelPlatform


def endorsements_needed(quote: SgxQuote) -> IntelNeeded:
    """What to fetch for `quote`, by its own untrusted words. Raises Unavailable("intel.endorsement_missing"), Malformed."""
    return intel_quote.endorsements_needed(quote.header, quote.signature)


def verify_sgx(
    quote: SgxQuote,
    endorsements: IntelEndorsements,
    *,
    report_data: bytes,
    collateral: Collateral,
    anchors: IntelAnchors,
    now: Instant,
) -> Verified[SgxClaims]:
    """The claims of `quote`, authentic and bound to `report_data` (all 64 bytes, from the verifier's own state).

    Raises Unavailable, Malformed and NotAuthentic with the codes of `intel_quote`. Does not judge acceptability.
    """
    chain = intel_quote.judge_quote(quote.header, quote.signed(), quote.signature, anchors=anchors, now=now)
    qe_report = quote.signature.qe_report
    judged = judge_collateral(endorsements, chain, qe_report, TeeType.SGX, collateral=collateral, anchors=anchors, now=now)
    pck = chain.pck
    assert pck is not None  # a PCK chain
    platform = None
    if judged.tcb_info is not None:
        platform = match_platform(judged.tcb_info, pck.components, pck.pce_svn, None)
    if not intel_quote.same_report_data(report_data, quote.report.report_data):
        raise NotAuthentic(
            "sgx.report_data_mismatch",
            "the quote is not bound to this challenge",
            remedy="ask for a new quote; one made for another session or nonce cannot be used",
        )
    claims = SgxClaims(
        report=quote.report,
        platform=intel_quote.platform_claims(
            chain,
            judged,
            collateral=collateral,
            qe_isv_svn=qe_report.isv_svn,
            platform=platform,
            module=None,
            tcb_status=None if platform is None else platform.status,
        ),
    )
    return Verified._create(claims, root=chain.root, collateral_digest=judged.digest)  # noqa: SLF001 - this room makes them


def verify_ratls(
    certificate: bytes,
    endorsements: IntelEndorsements,
    *,
    collateral: Collateral,
    anchors: IntelAnchors,
    now: Instant,
) -> Verified[SgxClaims]:
    """The claims of the evidence in a DER `certificate`, bound to the certificate's own key (rule 3).

    Freshness is that of the TLS handshake in which the key is proven; the certificate's names and dates mean nothing.
    Raises as `verify_sgx`.
    """
    evidence = parse_ratls_certificate(certificate)
    quote = parse_sgx_quote(evidence.quote)
    verified = verify_sgx(
        quote, endorsements, report_data=quote.report.report_data, collateral=collateral, anchors=anchors, now=now
    )
    key = _public_key(evidence)
    if not intel_quote.same_report_data(_binding(evidence, key), quote.report.report_data):
        raise NotAuthentic("ratls.key_unbound", "the evidence is about another key than the certificate's")
    _self_signed(evidence, key)
    return verified


def _public_key(evidence: RatlsEvidence) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    try:
        key = serialization.load_der_public_key(evidence.public_key)
    except Exception as error:  # ValueError or UnsupportedAlgorithm, by what is wrong with it
        raise NotAuthentic(
            "ratls.key_unsupported", "the certificate's key cannot be used", got=type(error).__name__
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise NotAuthentic("ratls.key_unsupported", "the certificate's key is neither EC nor RSA", got=type(key).__name__)
    return key


def _binding(evidence: RatlsEvidence, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    if evidence.form is RatlsForm.GRAMINE:
        hashed = evidence.public_key
    else:
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        hashed = pem + b"\x00"
    return hashlib.sha256(hashed).digest() + bytes(32)


def _self_signed(evidence: RatlsEvidence, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> None:
    algorithm = _HASHES.get(evidence.signature_algorithm)
    elliptic = evidence.signature_algorithm in (_ECDSA_SHA256, _ECDSA_SHA384)
    if algorithm is None or elliptic != isinstance(key, ec.EllipticCurvePublicKey):
        raise NotAuthentic(
            "ratls.key_unsupported", "the certificate is signed with an unknown algorithm", got=evidence.signature_algorithm
        )
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(evidence.signature, evidence.signed, ec.ECDSA(algorithm))
        else:
            key.verify(evidence.signature, evidence.signed, padding.PKCS1v15(), algorithm)
    except InvalidSignature:
        raise NotAuthentic("ratls.signature_invalid", "the certificate is not signed by its own key") from None
