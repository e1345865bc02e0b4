"""COSE_Sign1 (RFC 9052 4.2), tagged, with our rules on top.

The protected header holds exactly: 1 (algorithm), 3 (content type, `application/moorline.<purpose>`), 4 (key id: SHA-256 of
the SubjectPublicKeyInfo), and optionally 33 (x5chain, RFC 9360, leaf first). The unprotected header is empty. The external
additional data is the domain string of the purpose, so a signature for one purpose never serves another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cbor2

from moorline.digest import domain
from moorline.errors import Malformed, NotAuthentic
from moorline.wire import cbor, keys

_TAG: Final = b"\xd2"  # CBOR tag 18
_ALGORITHM: Final = 1
_CONTENT_TYPE: Final = 3
_KEY_ID: Final = 4
_X5CHAIN: Final = 33
_PARTS: Final = 4
_TYPES: Final[list[type]] = [bytes, dict, bytes, bytes]
MAX_CHAIN: Final = 8
_SHORT_HEADER: Final = 256
_ONE_BYTE: Final = 0x58  # a byte string whose length is in one byte more, at least 24; 0x59: in two, at least 256
_TWO_BYTES: Final = 0x59
_SHORTEST: Final = 24
_ARRAY_AND_BYTES: Final = bytes((0x84, _ONE_BYTE))
_EMPTY_MAP: Final = 0xA0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign1:
    """A parsed COSE_Sign1: untrusted until `verify` was called with a key one has reason to trust."""

    purpose: str
    algorithm: int
    key_id: bytes
    x5chain: tuple[bytes, ...]
    protected: bytes
    payload: bytes
    signature: bytes


def key_id(key: keys.PublicKey) -> bytes:
    """SHA-256 of the key's SubjectPublicKeyInfo; 32 bytes."""
    return hashlib.sha256(keys.public_bytes(key)).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyingKey:
    """A key with what follows from it, for who verifies many messages by it."""

    key: keys.PublicKey
    algorithm: int
    id: bytes


def verifying_key(key: keys.PublicKey) -> VerifyingKey:
    """The key, its one algorithm and its id."""
    return VerifyingKey(key=key, algorithm=keys.algorithm_of(key), id=key_id(key))


def sign(purpose: str, payload: bytes, signer: keys.Signer, *, x5chain: tuple[bytes, ...] = ()) -> bytes:
    """The tagged COSE_Sign1 of `payload` for `purpose`. `x5chain` is DER certificates, leaf first."""
    header: dict[int, object] = {
        _ALGORITHM: signer.algorithm,
        _CONTENT_TYPE: _content_type(purpose),
        _KEY_ID: key_id(signer.public_key()),
    }
    if x5chain:
        header[_X5CHAIN] = list(x5chain)
    protected = cbor.encode(header)
    signature = signer.sign(_to_be_signed(purpose, protected, payload))
    return _TAG + cbor.encode([protected, {}, payload, signature])


def parse(purpose: str, data: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> Sign1:
    """The parts of a COSE_Sign1 made for `purpose`; raises only Malformed (`cose.*`, `cbor.*`). Establishes no trust."""
    if not data.startswith(_TAG):
        raise Malformed("cose.not_sign1", "not a tagged COSE_Sign1", expected="CBOR tag 18")
    if len(data) <= max_bytes:
        parts = _split(data)
        if parts is not None:
            return _read(purpose, *parts)
    item = cbor.decode_unordered(data[1:], max_bytes=max_bytes)
    if not _plain(item):
        item = cbor.decode(data[1:], max_bytes=max_bytes)
    if not (isinstance(item, list) and len(item) == _PARTS):
        raise Malformed("cose.not_sign1", "a COSE_Sign1 is an array of four")
    protected, unprotected, payload, signature = item
    if not (isinstance(protected, bytes) and isinstance(payload, bytes) and isinstance(signature, bytes)):
        raise Malformed("cose.not_sign1", "protected header, payload and signature are byte strings")
    if unprotected != {}:
        raise Malformed("cose.header", "the unprotected header must be empty")
    return _read(purpose, protected, payload, signature)


def _split(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Protected header, payload and signature of a message as almost all are: each length in one byte, the payload's in two.

    None for all others, and for whatever is not in its one encoding: they are read, or refused, as CBOR.
    """
    try:
        at = 4 + data[3]
        if data[1:3] != _ARRAY_AND_BYTES or data[3] < _SHORTEST or data[at] != _EMPTY_MAP:
            return None
        begin, length = at + 3, data[at + 2]
        if data[at + 1] == _TWO_BYTES and length:
            begin, length = at + 4, length << 8 | data[at + 3]
        elif data[at + 1] != _ONE_BYTE or length < _SHORTEST:
            return None
        end = begin + length
        if data[end] != _ONE_BYTE or data[end + 1] < _SHORTEST or len(data) != end + 2 + data[end + 1]:
            return None
    except IndexError:
        return None
    return data[4:at], data[begin:end], data[end + 2 :]


def _read(purpose: str, protected: bytes, payload: bytes, signature: bytes) -> Sign1:
    known = _known_header if len(protected) <= _SHORT_HEADER else _header
    algorithm, named_key, chain = known(purpose, protected)
    return Sign1(
        purpose=purpose,
        algorithm=algorithm,
        key_id=named_key,
        x5chain=chain,
        protected=protected,
        payload=payload,
        signature=signature,
    )


def _plain(item: object) -> bool:
    """Whether this is three byte strings around an empty map: nothing in it has an order."""
    return type(item) is list and list(map(type, item)) == _TYPES and not item[1]


def _header(purpose: str, protected: bytes) -> tuple[int, bytes, tuple[bytes, ...]]:
    """Algorithm, key id and chain of a protected header; raises Malformed."""
    header = cbor.decode(protected)
    if not isinstance(header, dict) or not {_ALGORITHM, _CONTENT_TYPE, _KEY_ID} <= set(header):
        raise Malformed("cose.header", "the protected header lacks a field", expected="1, 3, 4 and optionally 33")
    if set(header) - {_ALGORITHM, _CONTENT_TYPE, _KEY_ID, _X5CHAIN}:
        raise Malformed("cose.header", "the protected header has an unknown field", got=sorted(map(str, header)))
    chain = header.get(_X5CHAIN, [])
    algorithm, named_key = header[_ALGORITHM], header[_KEY_ID]
    if not isinstance(algorithm, int) or not isinstance(named_key, bytes):
        raise Malformed("cose.header", "algorithm is an integer and key id is bytes")
    if not isinstance(chain, list) or len(chain) > MAX_CHAIN or any(not isinstance(der, bytes) for der in chain):
        raise Malformed("cose.header", "x5chain is a list of certificates", expected=f"<= {MAX_CHAIN}")
    if header[_CONTENT_TYPE] != _content_type(purpose):
        raise Malformed(
            "cose.purpose", "signed for another purpose", expected=_content_type(purpose), got=header[_CONTENT_TYPE]
        )
    return algorithm, named_key, tuple(chain)


_known_header = lru_cache(maxsize=1024)(_header)
"""Who signs often sends the same header each time. Bounded: short headers only; a refusal is not kept."""


def verify(sign1: Sign1, key: keys.PublicKey | VerifyingKey) -> bytes:
    """The payload, now known to be signed by `key` for the purpose. Raises NotAuthentic (`cose.*`, `signature.*`).

    It does not establish whose key it is, nor that the message is fresh.
    """
    known = key if isinstance(key, VerifyingKey) else verifying_key(key)
    if sign1.algorithm != known.algorithm:
        raise NotAuthentic(
            "cose.algorithm",
            "the message names another algorithm than its key has",
            expected=known.algorithm,
            got=sign1.algorithm,
        )
    if sign1.key_id != known.id:
        raise NotAuthentic("cose.key_id", "the message names another key", expected=known.id, got=sign1.key_id)
    message = signed_bytes(sign1)
    keys.verify_as(known.algorithm, known.key, sign1.signature, message)
    return sign1.payload


def signed_bytes(sign1: Sign1) -> bytes:
    """What the signature is over (RFC 9052 4.4)."""
    return _to_be_signed(sign1.purpose, sign1.protected, sign1.payload)


def _content_type(purpose: str) -> str:
    return f"application/moorline.{purpose}"


_domain = lru_cache(maxsize=256)(domain)  # bounded: one entry a purpose, which are constants of the code


def _to_be_signed(purpose: str, protected: bytes, payload: bytes) -> bytes:
    return cbor2.dumps(["Signature1", protected, _domain(purpose), payload])  # no map, so nothing to sort
