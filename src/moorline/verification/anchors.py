"""What verification starts from: pinned vendor roots, and simulated ones that configuration names by file.

1. Production anchors are AMD's ARK certificates, one a product line, shipped with the package and checked against the
   SHA-256 written here. There is no other way to get an anchor of root `hardware`.
2. Anchors read from a file are of root `test`, always: the file has no field to claim more.
3. A simulated anchor is one by membership in such a set. No name, subject or key pattern is looked at anywhere.
4. There is no default: every verifier is given its `AnchorSet`, and an empty set matches nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Final

from moorline.errors import Malformed, Misconfigured
from moorline.evidence.snp import Product
from moorline.rats import EvidenceRoot
from moorline.wire import schema

_Der = Annotated[bytes, schema.Size(at_most=8192)]

_VENDOR: Final = {
    Product.MILAN: (
        ("amd_milan_ark.der", "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
        ("amd_milan_ask.der", "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b"),
        ("amd_milan_asvk.der", "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5"),
    ),
    Product.GENOA: (
        ("amd_genoa_ark.der", "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
        ("amd_genoa_ask.der", "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521"),
        ("amd_genoa_asvk.der", "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372"),
    ),
    Product.TURIN: (
        ("amd_turin_ark.der", "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"),
        ("amd_turin_ask.der", "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185"),
        ("amd_turin_asvk.der", "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c"),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpAnchor:
    """The AMD root key of one product line. `ark` and `intermediates` (ASK, ASVK) are DER; only `ark` is trusted."""

    product: Product
    ark: bytes
    intermediates: tuple[bytes, ...]
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorSet:
    """All anchors that one verifier trusts. Hashable, so that verified chains can be kept per set."""

    snp: tuple[SnpAnchor, ...]

    def plus(self, other: AnchorSet) -> AnchorSet:
        """Both sets, these first. A root that is already here keeps the kind it has here."""
        known = {anchor.ark for anchor in self.snp}
        return AnchorSet(snp=(*self.snp, *(anchor for anchor in other.snp if anchor.ark not in known)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedAnchor:
    """One anchor in an anchors file."""

    product: Product
    ark: _Der
    intermediates: tuple[_Der, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedAnchors:
    """The anchors file that a simulated manufacturer writes: deterministic CBOR of this. `simulated` must be true."""

    version: int
    simulated: bool
    snp: tuple[SimulatedAnchor, ...]


@cache
def production_anchors() -> AnchorSet:
    """AMD's roots and nothing else. Raises Misconfigured if a shipped file is not the one pinned here."""
    return AnchorSet(
        snp=tuple(
            SnpAnchor(
                product=product,
                ark=_shipped(*files[0]),
                intermediates=tuple(_shipped(*file) for file in files[1:]),
                root=EvidenceRoot.HARDWARE,
            )
            for product, files in _VENDOR.items()
        )
    )


def parse_anchor_file(data: bytes) -> AnchorSet:
    """The simulated anchors in `data`, all of root `test`. The file is trusted configuration; its form is not.

    Raises Malformed (`cbor.*`, `message.*`, `anchors.version`) and Malformed("anchors.not_simulated") for a file that does
    not say what it is.
    """
    file = schema.decode(SimulatedAnchors, data)
    if file.version != 1:
        raise Malformed("anchors.version", "unknown version of an anchors file", expected=1, got=file.version)
    if not file.simulated:
        raise Malformed(
            "anchors.not_simulated",
            "an anchors file can only hold simulated anchors",
            remedy="vendor roots come with the package; there is no file for them",
        )
    return AnchorSet(
        snp=tuple(
            SnpAnchor(product=item.product, ark=item.ark, intermediates=item.intermediates, root=EvidenceRoot.TEST)
            for item in file.snp
        )
    )


def serialize_anchor_file(anchors: tuple[SimulatedAnchor, ...]) -> bytes:
    """The anchors file with `anchors`; `parse_anchor_file` reads it."""
    return schema.encode(SimulatedAnchors(version=1, simulated=True, snp=anchors))


def _shipped(name: str, sha256: str) -> bytes:
    data = resources.files("moorline.verification.roots").joinpath(name).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Misconfigured("anchors.vendor_root_changed", "a shipped vendor root is not the pinned one", got=name)
    return data
