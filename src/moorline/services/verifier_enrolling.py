"""How a host enrols with an attestation authority, so that its name and its TPM belong together for good.

1. the endorsement certificate leads to a configured maker of TPMs that did not revoke it, as its current lists say, and
   the attestation key cannot sign foreign data;
2. the provider's platform record on the ledger names this endorsement key for this host, and says `simulated` exactly where
   the anchor is a simulated one;
3. neither the name nor the endorsement key belongs to another; 4. the TPM opens a credential made for both keys.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import MoorlineError, NotAuthentic
from moorline.evidence.tpm_structures import parse_public
from moorline.nfv import parse_name
from moorline.rats import EvidenceRoot
from moorline.services.host_appraisal import registered
from moorline.services.verifier_parts import Parts
from moorline.storage import verifier_chains
from moorline.storage.verifier_rounds import EnrolledHost
from moorline.storage.verifier_store import OpenEnrolment
from moorline.verification import tpm_identity, tpm_quote
from moorline.verification.verified import Verified
from moorline.wire import host as wire

_NONCE: Final = 32
_SECRET: Final = 32


async def begin(parts: Parts, name: str, request: wire.EnrolRequest) -> wire.EnrolChallenge:
    """A credential that only the TPM of both keys can open. Raises what the module's steps 1 to 3 find."""
    now = parts.clock.now()
    verified = tpm_identity.verify_endorsement(
        request.ek_public,
        request.ek_certificates,
        anchors=parts.anchors,
        revocation=await asyncio.to_thread(parts.revocation),
        now=now,
    )
    ak = parse_public(request.ak_public)
    tpm_quote.require_ak_attributes(ak)
    await _registered(parts, name, verified.value.digest, verified.root)
    parts.store.require_free(name, verified.value.digest)
    secret, enrolment = parts.random(_SECRET), parts.random(_NONCE)
    blob, sealed = _credential(parts, verified, ak.name, secret)
    expires = Instant(now + parts.terms.challenge_s)
    parts.store.open_enrolment(
        OpenEnrolment(
            enrolment=enrolment,
            host=name,
            ek_digest=verified.value.digest,
            ak_public=request.ak_public,
            root=verified.root,
            secret_digest=hashlib.sha256(secret).digest(),
            expires=expires,
            chain=verifier_chains.packed(request.ek_certificates),
        )
    )
    return wire.EnrolChallenge(enrolment=enrolment, credential_blob=blob, secret=sealed, expires=expires)


async def finish(parts: Parts, name: str, proof: wire.EnrolProof) -> wire.Enrolled:
    """The binding of name and keys, for good. Raises NotAuthentic("enrol.unknown" | "enrol.activation"), Conflict."""
    now = parts.clock.now()
    opened = parts.store.take_enrolment(proof.enrolment, now=now)
    if opened.host != name or not same(hashlib.sha256(proof.activated).digest(), opened.secret_digest):
        raise NotAuthentic(
            "enrol.activation", "the credential was not opened by the TPM it was made for", remedy="begin again"
        )
    await _registered(parts, name, opened.ek_digest, opened.root)
    bound = parts.store.enrol(
        EnrolledHost(host=name, ek_digest=opened.ek_digest, ak_public=opened.ak_public, root=opened.root, enrolled=now),
        chain=opened.chain,
    )
    return wire.Enrolled(host=name, ak_name=parse_public(bound.ak_public).name, ek_digest=bound.ek_digest)


async def _registered(parts: Parts, name: str, ek_digest: bytes, root: EvidenceRoot) -> None:
    platform = (await parts.platforms((parse_name(name, "host"),)))[name]
    if isinstance(platform, MoorlineError):
        raise platform
    registered(platform, ek_digest, root)


def _credential(
    parts: Parts, verified: Verified[tpm_identity.EndorsementKey], ak_name: bytes, secret: bytes
) -> tuple[bytes, bytes]:
    ek = verified.value.public
    key = ek.key()
    ephemeral = ec.generate_private_key(key.curve) if isinstance(key, ec.EllipticCurvePublicKey) else None
    seed = parts.random(len(ek.name) - 2)  # a name is two bytes of algorithm and its digest
    return tpm_identity.make_credential(ek, ak_name, secret, seed=seed, ephemeral=ephemeral)
