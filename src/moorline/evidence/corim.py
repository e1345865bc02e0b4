"""CoRIM (draft-ietf-rats-corim), as far as it endorses attestation keys. No trust: a CoRIM here is unsigned or unverified.

Read: CoRIM maps under tag 501 (or 500 around it), their CoMIDs under tag 506, and in those the attest-key triples: class or
implementation id, instance, and keys as PEM (tag 554). Reference values and everything else are not read, and a reader must
not take their absence from the result for an absence in the file. A signed CoRIM (tag 18) is not opened: its signature would
have to be verified first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import eat_cbor
from moorline.evidence.eat_cbor import Encoding, Item, Tag

_UNSIGNED: Final = 501
_OUTER: Final = 500
_COMID: Final = 506
_INSTANCE: Final = 550
_PEM_KEY: Final = 554
_CLASS_IDS: Final = frozenset({560, 600})
"""Tagged bytes, and the implementation id of the first drafts."""
_MAX_CORIM: Final = 256 * 1024
_MAX_DEPTH: Final = 24
_ATTEST_KEYS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EndorsedKey:
    """A key that the CoRIM endorses, PEM; the identifiers are None where it names none."""

    pem: str
    implementation_id: bytes | None
    instance_id: bytes | None


def parse_endorsed_keys(data: bytes) -> tuple[EndorsedKey, ...]:
    """The attestation keys in a CoRIM or a CoMID, untrusted. Raises only Malformed (`corim.*`, `eat.*`)."""
    item = _decode(data)
    while isinstance(item, Tag) and item.number in (_OUTER, _UNSIGNED):
        item = item.value
    if isinstance(item, Tag):
        raise Malformed("corim.signed", "not an unsigned CoRIM", expected=f"tag {_UNSIGNED}", got=item.number)
    corim = _map(item)
    if _is_comid(corim):
        return tuple(_keys_of(corim))
    tags = corim.get(1)
    if not isinstance(tags, list) or not tags:
        raise Malformed("corim.tags", "a CoRIM holds at least one tag")
    return tuple(key for tag in tags for key in _keys_of(_comid(tag)))


def _decode(data: bytes) -> Item:
    return eat_cbor.decode(data, encoding=Encoding.ANY, max_bytes=_MAX_CORIM, max_depth=_MAX_DEPTH)


def _is_comid(document: dict[int | str, Item]) -> bool:
    return isinstance(document.get(4), dict) and isinstance(document.get(1), dict)


def _comid(tag: Item) -> dict[int | str, Item]:
    if not isinstance(tag, Tag) or tag.number != _COMID or not isinstance(tag.value, bytes):
        return {}  # a CoSWID or CoTL: endorses no key
    return _map(_decode(tag.value))


def _keys_of(comid: dict[int | str, Item]) -> list[EndorsedKey]:
    if not comid:
        return []
    triples = _map(comid.get(4)).get(_ATTEST_KEYS)
    if triples is None:
        return []
    return [key for triple in _list(triples) for key in _triple(_list(triple))]


def _triple(triple: list[Item]) -> list[EndorsedKey]:
    if len(triple) < 2:
        raise Malformed("corim.triple", "an attest-key triple is an environment and its keys")
    environment = _map(triple[0])
    instance = environment.get(1)
    described = environment.get(0)
    class_id = _map(described).get(0) if described is not None else None
    return [
        EndorsedKey(
            pem=_pem(key),
            implementation_id=_bytes(class_id, _CLASS_IDS),
            instance_id=_bytes(instance, frozenset({_INSTANCE})),
        )
        for key in _list(triple[1])
    ]


def _pem(key: Item) -> str:
    if not isinstance(key, Tag) or key.number != _PEM_KEY or not isinstance(key.value, str):
        raise Malformed("corim.key", "an endorsed key is not a PEM public key", expected=f"tag {_PEM_KEY}")
    return key.value


def _bytes(item: Item, tags: frozenset[int]) -> bytes | None:
    if item is None:
        return None
    if not isinstance(item, Tag) or item.number not in tags or not isinstance(item.value, bytes):
        raise Malformed("corim.environment", "an environment is named in a way that is not read here")
    return item.value


def _map(item: Item) -> dict[int | str, Item]:
    if not isinstance(item, dict):
        raise Malformed("corim.shape", "a part of the CoRIM is not the map it should be")
    return item


def _list(item: Item) -> list[Item]:
    if not isinstance(item, list):
        raise Malformed("corim.shape", "a part of the CoRIM is not the array it should be")
    return item
