"""Is a CCA token authentic and bound to this challenge? Numbered once here, named in the code below.

Input: a parsed, untrusted token; the platform attestation keys (CPAK) that endorsers vouch for; the 64-byte challenge
of this verifier. Nothing is fetched; nothing in a CCA token is dated.

1.  A key is endorsed for this platform: for its instance id and implementation id, where the endorsement names them.
    Without one there is no verdict.                                                                      cca.cpak_unknown
2.  That key signed the platform token, with ES256, ES384 or ES512 and the curve that goes with it.                  cose.*
3.  The platform's challenge is the hash of the realm's key, as the claim stands, by the algorithm that the realm token
    names: so this platform vouches for this key.                                                          cca.realm_binding
4.  The realm's key is a point of P-384 and signed the realm token with ES384.                                       cose.*
5.  The realm's challenge is the expected one, all 64 bytes.                                        cca.challenge_mismatch

The token comes from the realm's own machine, so the attack that 3 prevents is the usual one: a genuine platform token
with a realm token under the attacker's key. Not established here: whether firmware, life cycle or the realm's
measurements are acceptable (`policy.cca`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline import digest
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence.cca import CcaToken, KeyAttestation, PlatformClaims, PlatformToken, RealmClaims
from moorline.rats import EvidenceRoot
from moorline.verification import cose_signature
from moorline.verification.verified import Verified

_HASHES: Final = {"sha-256": hashlib.sha256, "sha-384": hashlib.sha384, "sha-512": hashlib.sha512}
CHALLENGE_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CpakAnchor:
    """A platform attestation key, as an endorser vouches for it. `key` is a DER SubjectPublicKeyInfo.

    `instance_id` and `implementation_id` are None where the endorser did not bind the key to one device or model.
    `root` is what the endorser's word is worth; it is never taken from evidence.
    """

    key: bytes
    instance_id: bytes | None
    implementation_id: bytes | None
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class CcaClaims:
    """What an authentic token says about the platform and the realm on it."""

    platform: PlatformClaims
    realm: RealmClaims


def verify_cca(token: CcaToken, *, challenge: bytes, anchors: tuple[CpakAnchor, ...]) -> Verified[CcaClaims]:
    """The claims of `token`, authentic and bound to `challenge` (64 bytes, neither padded nor cut here).

    Raises Unavailable("cca.cpak_unknown"), Malformed and NotAuthentic with the codes above.
    """
    if len(challenge) != CHALLENGE_BYTES:
        raise Malformed("cca.expected_challenge", "the challenge of a realm is 64 bytes", got=len(challenge))
    platform, realm = token.platform.claims, token.realm.claims
    anchor = _signed_by_platform(token.platform, anchors)  # 1, 2
    bound = _HASHES[realm.public_key_hash_algorithm](realm.public_key).digest()
    if not digest.same(platform.challenge, bound):  # 3
        raise NotAuthentic("cca.realm_binding", "the platform does not vouch for the key of this realm")
    key = cose_signature.point_key(realm.point, ec.SECP384R1())
    cose_signature.verify_sign1(token.realm.cose, key, allowed=frozenset({cose_signature.ES384}))  # 4
    if not digest.same(realm.challenge, challenge):  # 5
        raise NotAuthentic("cca.challenge_mismatch", "the realm's token is not an answer to this challenge")
    return Verified._create(  # noqa: SLF001 - this room makes them
        CcaClaims(platform=platform, realm=realm), root=anchor.root, collateral_digest=_collateral(anchor)
    )


def verify_key_attestation(
    bundle: KeyAttestation, *, nonce: bytes, anchors: tuple[CpakAnchor, ...]
) -> Verified[KeyAttestation]:
    """The key in `bundle`, vouched for by its realm, which answers to `nonce`. Raises as `verify_cca`.

    The realm's challenge is the SHA-512 of the key attestation token, so nonce and key hold if the token does. Also raises
    NotAuthentic("cca.key_nonce_mismatch").
    """
    challenge = hashlib.sha512(bundle.signed).digest()
    verified = verify_cca(bundle.token, challenge=challenge, anchors=anchors)
    if not digest.same(bundle.nonce, nonce):
        raise NotAuthentic("cca.key_nonce_mismatch", "the key attestation is not an answer to this challenge")
    return Verified._create(  # noqa: SLF001 - this room makes them
        bundle, root=verified.root, collateral_digest=verified.collateral_digest
    )


def verify_platform(token: PlatformToken, *, challenge: bytes, anchors: tuple[CpakAnchor, ...]) -> Verified[PlatformClaims]:
    """The claims of a platform token by itself, bound to `challenge` (1, 2, 5). Establishes nothing about any realm."""
    anchor = _signed_by_platform(token, anchors)
    if not digest.same(token.claims.challenge, challenge):
        raise NotAuthentic("cca.platform_challenge_mismatch", "the platform token is not an answer to this challenge")
    return Verified._create(  # noqa: SLF001 - this room makes them
        token.claims, root=anchor.root, collateral_digest=_collateral(anchor)
    )


def _signed_by_platform(token: PlatformToken, anchors: tuple[CpakAnchor, ...]) -> CpakAnchor:
    fitting = [anchor for anchor in anchors if _is_for(anchor, token.claims)]
    if not fitting:
        raise Unavailable(
            "cca.cpak_unknown",
            "no attestation key is endorsed for this platform",
            got=f"instance {token.claims.instance_id.hex()}",
            remedy="give the platform's CPAK, from its manufacturer",
        )
    refusal: NotAuthentic | None = None
    for anchor in fitting:  # a device that was given a second key has two endorsements
        try:
            cose_signature.verify_sign1(
                token.cose, cose_signature.public_key(anchor.key), allowed=cose_signature.ALL_SIGNATURES
            )
        except NotAuthentic as error:
            refusal = refusal or error
        else:
            return anchor
    assert refusal is not None  # the list was not empty and none returned
    raise refusal


def _is_for(anchor: CpakAnchor, claims: PlatformClaims) -> bool:
    return anchor.instance_id in (None, claims.instance_id) and anchor.implementation_id in (None, claims.implementation_id)


def _collateral(anchor: CpakAnchor) -> bytes:
    return digest.tagged_hash("cca-collateral", anchor.key, anchor.instance_id or b"", anchor.implementation_id or b"")
