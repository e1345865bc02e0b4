"""Is a Nitro attestation document authentic, current and fresh? Numbered once here, named in the code below.

Input: a parsed, untrusted document, which brings its certificates; the pinned root of AWS; the nonce of this verifier; the
time. Nothing is fetched, no clock is read.

1.  The first certificate of the bundle is the pinned root, byte for byte.                               nitro.root_unknown
2.  Leaf, bundle (last first) and root are a path of certificates by the rules of `certificate_path`.                path.*
3.  The leaf's key is P-384 and signed the document, with ES384.                                                     cose.*
4.  Every certificate of the path is valid at `now`.                                       path.expired path.not_yet_valid
5.  The document's time lies in the validity of its leaf, which AWS issues for three hours.          nitro.timestamp_outside
6.  The nonce is the expected one, or there is none and none was expected.                             nitro.nonce_mismatch

Not established here: whether debug mode, PCRs, user data or public key are acceptable: that is `policy.nitro`. Without
a nonce the document shows at most that it was made within its leaf's validity.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from moorline import digest
from moorline.clock import Instant, rendered
from moorline.errors import Misconfigured, NotAuthentic
from moorline.evidence.nitro import ES384, NitroDocument
from moorline.rats import EvidenceRoot
from moorline.verification import certificate_path, cose_signature
from moorline.verification.verified import Verified

_ROOT_FILE: Final = "aws_nitro_root_g1.der"
_ROOT_SHA256: Final = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroAnchor:
    """A root of Nitro documents, DER. Only the shipped one of AWS is of root `hardware`."""

    certificate: bytes
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroClaims:
    """What an authentic document says. Acceptable to nobody yet."""

    document: NitroDocument

    @property
    def debug(self) -> bool:
        """The enclave runs in debug mode (all-zero PCR0)."""
        return self.document.debug


@cache
def aws_anchor() -> NitroAnchor:
    """AWS's root, as shipped. Raises Misconfigured if the file is not the pinned one."""
    data = resources.files("moorline.verification.roots").joinpath(_ROOT_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != _ROOT_SHA256:
        raise Misconfigured("nitro.vendor_root_changed", "the shipped AWS root is not the pinned one", got=_ROOT_FILE)
    return NitroAnchor(certificate=data, root=EvidenceRoot.HARDWARE)


def verify_nitro(
    document: NitroDocument, *, nonce: bytes | None, anchors: tuple[NitroAnchor, ...], now: Instant
) -> Verified[NitroClaims]:
    """The claims of `document`, authentic at `now`. `nonce` None says that none was sent, and none may be there.

    Raises Malformed("path.certificate_malformed") and NotAuthentic with the codes above.
    """
    anchor = next((anchor for anchor in anchors if anchor.certificate == document.cabundle[0]), None)
    if anchor is None:  # 1
        raise NotAuthentic(
            "nitro.root_unknown",
            "the document's certificates do not start at a trusted root",
            got=hashlib.sha256(document.cabundle[0]).digest(),
        )
    path = certificate_path.judge_path((document.certificate, *reversed(document.cabundle)))  # 2
    cose_signature.verify_sign1(document.cose, path.key, allowed=frozenset({ES384}))  # 3
    certificate_path.in_force(path, now)  # 4
    made = Instant(document.timestamp_ms // 1000)
    if not path.validity[0].contains(made):  # 5
        raise NotAuthentic(
            "nitro.timestamp_outside",
            "the document's time is outside the validity of its certificate",
            expected=f"{rendered(path.validity[0].not_before)} to {rendered(path.validity[0].not_after)}",
            got=made,
        )
    if not _same_nonce(document.nonce, nonce):  # 6
        raise NotAuthentic("nitro.nonce_mismatch", "the document is not an answer to this challenge")
    collateral = digest.tagged_hash("nitro-collateral", document.certificate, *document.cabundle)
    return Verified._create(  # noqa: SLF001 - this room makes them
        NitroClaims(document=document), root=anchor.root, collateral_digest=collateral
    )


def _same_nonce(found: bytes | None, expected: bytes | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return digest.same(found, expected)
