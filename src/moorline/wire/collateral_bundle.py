"""Collateral in one signed file, for machines without a network. docs/spec/collateral-bundle.md.

A COSE_Sign1 (`wire.cose`) of content type `application/moorline.collateral-bundle` over the deterministic CBOR of `Bundle`.
The signature says who collected the items and under which tracks; it does not stand for the vendors' signatures, which are
verified again where the bundle is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.errors import Malformed, NotAuthentic
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Size

PURPOSE: Final = "collateral-bundle"
MAX_BUNDLE: Final = 64 << 20
MAX_ITEMS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledItem:
    """One item. `source` is where the signer got it, `fetched` when (seconds since 1970)."""

    name: Annotated[str, Size(at_most=256)]
    source: Annotated[str, Size(at_most=1024)]
    fetched: int
    data: Annotated[bytes, Size(at_most=4 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The payload. Names are sorted and unique."""

    version: int
    created: int
    items: Annotated[tuple[BundledItem, ...], Size(at_most=MAX_ITEMS)]


def seal(items: Sequence[BundledItem], signer: keys.Signer, *, created: int) -> bytes:
    """The signed bundle of `items`."""
    ordered = tuple(sorted(items, key=lambda item: item.name))
    return cose.sign(PURPOSE, schema.encode(Bundle(version=1, created=created, items=ordered)), signer)


def open_bundle(data: bytes, signers: Sequence[keys.PublicKey]) -> tuple[Bundle, keys.PublicKey]:
    """The bundle, and which of `signers` signed it. An empty list matches nobody.

    Raises Malformed (`cose.*`, `cbor.*`, `message.*`, `bundle.*`) and NotAuthentic (`bundle.signer_unknown`, `signature.*`).
    Does not establish that the items are authentic, current, or newer than others.
    """
    sign1 = cose.parse(PURPOSE, data, max_bytes=MAX_BUNDLE)
    key = next((one for one in signers if cose.key_id(one) == sign1.key_id), None)
    if key is None:
        raise NotAuthentic(
            "bundle.signer_unknown",
            "the bundle is signed by nobody that was named",
            expected=", ".join(cose.key_id(one).hex() for one in signers),
            got=sign1.key_id,
            remedy="get the signer's public key from whoever runs the machine that fetches, by another way than the bundle",
        )
    bundle = schema.decode(Bundle, cose.verify(sign1, key), max_bytes=MAX_BUNDLE)
    if bundle.version != 1:
        raise Malformed("bundle.version", "unknown version of a bundle", expected=1, got=bundle.version)
    if any(item.fetched > bundle.created for item in bundle.items):
        raise Malformed("bundle.dates", "an item was fetched after the bundle was made", expected=f"<= {bundle.created}")
    names = [item.name for item in bundle.items]
    if names != sorted(set(names)):
        raise Malformed("bundle.order", "the items of a bundle are sorted by name, each there once")
    return bundle, key
