"""Is a PSA token authentic and fresh? Numbered once here, named in the code below.

Input: a parsed, untrusted token; the initial attestation keys (IAK) that endorsers vouch for; the nonce of this
verifier; the time, which matters only for keys in certificates. Nothing is fetched.

1.  A key is endorsed for this device: for its instance id and implementation id, where the endorsement names them, and
    of the token's kind, public for COSE_Sign1 and symmetric for COSE_Mac0. Without one there is no verdict. psa.iak_unknown
2.  A key in a certificate leads to a configured anchor, by the rules of `certificate_path`.            path.* psa.no_anchor
3.  The key signed the token (ES256, ES384, ES512) or made its tag (HMAC-SHA-2, full length).                        cose.*
4.  Every certificate used is valid at `now`.                                              path.expired path.not_yet_valid
5.  The nonce is the expected one.                                                                      psa.nonce_mismatch

A MAC shows nothing to third parties, and a symmetric key is as good as the copy that the verifier holds: such evidence
never has root `hardware`. Not established here: life cycle, measurements, and who asked for the token (`policy.psa`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline import digest
from moorline.clock import Instant
from moorline.errors import NotAuthentic, Unavailable
from moorline.evidence.psa import PsaClaims, PsaToken
from moorline.rats import EvidenceRoot
from moorline.verification import certificate_path, cose_signature
from moorline.verification.verified import Verified


@dataclass(frozen=True, slots=True, kw_only=True)
class IakAnchor:
    """A public attestation key, DER SubjectPublicKeyInfo; the identifiers are None where the endorser bound it to none."""

    key: bytes
    instance_id: bytes | None
    implementation_id: bytes | None
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class MacAnchor:
    """A symmetric attestation key that device and verifier share. `key` is secret, and never shown."""

    key: bytes
    instance_id: bytes | None

    def __repr__(self) -> str:
        return "MacAnchor(key=<secret>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedIak:
    """A key in a certificate. `path` is DER, untrusted: the leaf, then its issuers in order. `anchors` are DER roots."""

    path: tuple[bytes, ...]
    anchors: tuple[bytes, ...]
    root: EvidenceRoot


PsaAnchor = IakAnchor | MacAnchor | CertifiedIak

_NAMED: Final = "a key from the device's manufacturer, of the kind that the token needs"


def verify_psa(token: PsaToken, *, nonce: bytes, anchors: tuple[PsaAnchor, ...], now: Instant) -> Verified[PsaClaims]:
    """The claims of `token`, authentic and carrying `nonce`.

    Raises Unavailable("psa.iak_unknown"), Malformed and NotAuthentic with the codes above.
    """
    fitting = [anchor for anchor in anchors if _is_for(anchor, token)]
    if not fitting:  # 1
        raise Unavailable(
            "psa.iak_unknown",
            "no attestation key is endorsed for this device",
            expected="a symmetric key" if token.authenticated_by_mac else "a public key or certificate",
            got=f"instance {token.claims.instance_id.hex()}",
            remedy=f"give {_NAMED}",
        )
    anchor = _authenticated(token, fitting, now)  # 2, 3, 4
    if not digest.same(token.claims.nonce, nonce):  # 5
        raise NotAuthentic("psa.nonce_mismatch", "the token is not an answer to this challenge")
    root = EvidenceRoot.SOFTWARE if isinstance(anchor, MacAnchor) else anchor.root
    return Verified._create(  # noqa: SLF001 - this room makes them
        token.claims, root=root, collateral_digest=_collateral(anchor)
    )


def _is_for(anchor: PsaAnchor, token: PsaToken) -> bool:
    if isinstance(anchor, MacAnchor) != token.authenticated_by_mac:
        return False
    if isinstance(anchor, CertifiedIak):
        return True
    if isinstance(anchor, IakAnchor) and anchor.implementation_id not in (None, token.claims.implementation_id):
        return False
    return anchor.instance_id in (None, token.claims.instance_id)


def _authenticated(token: PsaToken, anchors: list[PsaAnchor], now: Instant) -> PsaAnchor:
    refusal: NotAuthentic | None = None
    for anchor in anchors:  # a device that was given a second key has two endorsements
        try:
            _authenticated_by(token, anchor, now)
        except NotAuthentic as error:
            refusal = refusal or error
        else:
            return anchor
    assert refusal is not None  # the list was not empty and none returned
    raise refusal


def _authenticated_by(token: PsaToken, anchor: PsaAnchor, now: Instant) -> None:
    if isinstance(anchor, MacAnchor):
        cose_signature.verify_mac0(token.cose, anchor.key, allowed=cose_signature.ALL_MACS)
    elif isinstance(anchor, IakAnchor):
        key = cose_signature.public_key(anchor.key)
        cose_signature.verify_sign1(token.cose, key, allowed=cose_signature.ALL_SIGNATURES)
    else:
        path = _certified(anchor)
        cose_signature.verify_sign1(token.cose, path.key, allowed=cose_signature.ALL_SIGNATURES)
        certificate_path.in_force(path, now)


def _certified(anchor: CertifiedIak) -> certificate_path.JudgedPath:
    if not anchor.anchors:
        raise NotAuthentic("psa.no_anchor", "no root is configured for certified attestation keys")
    refusal: NotAuthentic | None = None
    for root in anchor.anchors:
        try:
            return certificate_path.judge_path((*anchor.path, root))
        except NotAuthentic as error:
            refusal = refusal or error
    assert refusal is not None  # the tuple was not empty and none returned
    raise refusal


def _collateral(anchor: PsaAnchor) -> bytes:
    if isinstance(anchor, MacAnchor):
        return digest.tagged_hash("psa-collateral-mac", anchor.instance_id or b"")  # never a hash of the secret
    if isinstance(anchor, IakAnchor):
        return digest.tagged_hash("psa-collateral", anchor.key, anchor.instance_id or b"", anchor.implementation_id or b"")
    return digest.tagged_hash("psa-collateral-certified", *anchor.path)
