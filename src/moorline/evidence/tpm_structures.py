"""TPM 2.0 structures that cross the wire (TPM 2.0 Library, Part 2): public areas, signatures, PCR selections, names.

Parsers take untrusted bytes, need the whole structure and nothing after it, and raise only Malformed (`tpm.*`). What they
return is what the bytes say: no signature was verified and no key is trusted. `serialize(parse(b)) == b` throughout.
Only asymmetric keys are read (RSA, and ECC on named curves); every other object type is refused.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from moorline.errors import Malformed

ALG_RSA: Final = 0x0001
ALG_SHA1: Final = 0x0004
ALG_AES: Final = 0x0006
ALG_SHA256: Final = 0x000B
ALG_SHA384: Final = 0x000C
ALG_SHA512: Final = 0x000D
ALG_NULL: Final = 0x0010
ALG_SM3_256: Final = 0x0012
ALG_RSASSA: Final = 0x0014
ALG_RSAES: Final = 0x0015
ALG_RSAPSS: Final = 0x0016
ALG_OAEP: Final = 0x0017
ALG_ECDSA: Final = 0x0018
ALG_ECDAA: Final = 0x001A
ALG_ECC: Final = 0x0023
ALG_CFB: Final = 0x0043

CURVE_P256: Final = 0x0003
CURVE_P384: Final = 0x0004

HASH_NAMES: Final = {ALG_SHA1: "sha1", ALG_SHA256: "sha256", ALG_SHA384: "sha384", ALG_SHA512: "sha512"}
HASH_SIZES: Final = {ALG_SHA1: 20, ALG_SHA256: 32, ALG_SHA384: 48, ALG_SHA512: 64, ALG_SM3_256: 32}

FIXED_TPM: Final = 1 << 1
FIXED_PARENT: Final = 1 << 4
SENSITIVE_DATA_ORIGIN: Final = 1 << 5
USER_WITH_AUTH: Final = 1 << 6
NO_DA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18

_CURVES: Final[dict[int, ec.EllipticCurve]] = {CURVE_P256: ec.SECP256R1(), CURVE_P384: ec.SECP384R1()}
_DEFAULT_EXPONENT: Final = 65537
MAX_STRUCTURE: Final = 8192


class Cursor:
    """Reads a TPM structure from its beginning; every shortage is Malformed("tpm.truncated")."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_STRUCTURE:
            raise Malformed("tpm.too_large", "a TPM structure is too large", expected=f"<= {MAX_STRUCTURE}", got=len(data))
        self._data = data
        self._at = 0

    def integer(self, size: int) -> int:
        """An unsigned big-endian integer of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise Malformed("tpm.truncated", "a TPM structure ends too early", expected=end, got=len(self._data))
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def sized(self) -> bytes:
        """The contents of a TPM2B."""
        return self.take(self.integer(2))

    def finish(self) -> None:
        """Raises Malformed("tpm.trailing_bytes") unless everything was read."""
        if self._at != len(self._data):
            raise Malformed("tpm.trailing_bytes", "bytes follow a TPM structure", expected=self._at, got=len(self._data))


def sized(data: bytes) -> bytes:
    """`data` as a TPM2B."""
    return struct.pack(">H", len(data)) + data


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """TPMS_PCR_SELECTION: one bank and the indices chosen in it. `octets` is the bitmap as sent."""

    bank: int
    octets: bytes

    @property
    def indices(self) -> tuple[int, ...]:
        """The selected PCR indices, ascending."""
        return tuple(index for index in range(len(self.octets) * 8) if self.octets[index // 8] >> (index % 8) & 1)

    def serialize(self) -> bytes:
        """The bytes it was parsed from."""
        return struct.pack(">HB", self.bank, len(self.octets)) + self.octets


def select(bank: int, indices: tuple[int, ...]) -> PcrSelection:
    """The selection of `indices` in `bank`, in three octets as PC Client TPMs have."""
    bitmap = bytearray(3)
    for index in indices:
        bitmap[index // 8] |= 1 << (index % 8)
    return PcrSelection(bank, bytes(bitmap))


@dataclass(frozen=True, slots=True, kw_only=True)
class RsaParameters:
    """TPMS_RSA_PARMS and the modulus. `scheme_hash` is 0 where the scheme has none."""

    symmetric: tuple[int, int, int]
    scheme: int
    scheme_hash: int
    key_bits: int
    exponent: int
    modulus: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EccParameters:
    """TPMS_ECC_PARMS and the point. `kdf_hash` and `scheme_hash` are 0 where there is none."""

    symmetric: tuple[int, int, int]
    scheme: int
    scheme_hash: int
    scheme_count: int
    curve: int
    kdf: int
    kdf_hash: int
    x: bytes
    y: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """TPMT_PUBLIC of an asymmetric key, as somebody says it is. `encoded` is the exact structure (its name covers it)."""

    name_algorithm: int
    attributes: int
    policy: bytes
    parameters: RsaParameters | EccParameters
    encoded: bytes

    @property
    def name(self) -> bytes:
        """The TPM name: name algorithm and the digest of the public area (Part 1, 16)."""
        return struct.pack(">H", self.name_algorithm) + digest(self.name_algorithm, self.encoded)

    def key(self) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
        """The public key. Raises Malformed("tpm.key_unusable") where numbers or curve are no key."""
        held = self.parameters
        try:
            if isinstance(held, RsaParameters):
                exponent = held.exponent or _DEFAULT_EXPONENT
                return rsa.RSAPublicNumbers(exponent, int.from_bytes(held.modulus, "big")).public_key()
            x, y = int.from_bytes(held.x, "big"), int.from_bytes(held.y, "big")
            return ec.EllipticCurvePublicNumbers(x, y, _CURVES[held.curve]).public_key()
        except (ValueError, KeyError) as error:
            raise Malformed("tpm.key_unusable", "the public area holds no usable key", got=type(error).__name__) from None


def parse_public(data: bytes) -> Public:
    """TPMT_PUBLIC from untrusted bytes (Part 2, 12.2.4)."""
    cursor = Cursor(data)
    kind, name_algorithm, attributes = cursor.integer(2), cursor.integer(2), cursor.integer(4)
    if name_algorithm not in HASH_NAMES:
        raise Malformed("tpm.algorithm_unknown", "the name algorithm is not known", got=hex(name_algorithm))
    policy = cursor.sized()
    if kind == ALG_RSA:
        parameters: RsaParameters | EccParameters = _rsa(cursor)
    elif kind == ALG_ECC:
        parameters = _ecc(cursor)
    else:
        raise Malformed("tpm.algorithm_unknown", "not an asymmetric key", expected="RSA or ECC", got=hex(kind))
    cursor.finish()
    public = Public(name_algorithm=name_algorithm, attributes=attributes, policy=policy, parameters=parameters, encoded=data)
    if serialize_public(public) != data:
        raise Malformed("tpm.not_canonical", "the public area is not in its one encoding")
    return public


def serialize_public(public: Public) -> bytes:
    """The structure rebuilt from its fields."""
    held = public.parameters
    if isinstance(held, RsaParameters):
        kind, body = (
            ALG_RSA,
            (
                _symmetric_bytes(held.symmetric)
                + _scheme_bytes(held.scheme, held.scheme_hash)
                + struct.pack(">HI", held.key_bits, held.exponent)
                + sized(held.modulus)
            ),
        )
    else:
        count = struct.pack(">H", held.scheme_count) if held.scheme == ALG_ECDAA else b""
        kind, body = (
            ALG_ECC,
            (
                _symmetric_bytes(held.symmetric)
                + _scheme_bytes(held.scheme, held.scheme_hash)
                + count
                + struct.pack(">H", held.curve)
                + _scheme_bytes(held.kdf, held.kdf_hash)
                + sized(held.x)
                + sized(held.y)
            ),
        )
    head = struct.pack(">HHI", kind, public.name_algorithm, public.attributes)
    return head + sized(public.policy) + body


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE: RSASSA or RSAPSS with `first` the signature, ECDSA with r and s."""

    scheme: int
    hash_algorithm: int
    first: bytes
    second: bytes


def parse_signature(data: bytes) -> Signature:
    """TPMT_SIGNATURE from untrusted bytes (Part 2, 11.3.4)."""
    cursor = Cursor(data)
    scheme, hash_algorithm = cursor.integer(2), cursor.integer(2)
    if scheme not in (ALG_RSASSA, ALG_RSAPSS, ALG_ECDSA):
        raise Malformed("tpm.algorithm_unknown", "not a signature scheme used here", got=hex(scheme))
    if hash_algorithm not in HASH_NAMES:
        raise Malformed("tpm.algorithm_unknown", "the hash of the signature is not known", got=hex(hash_algorithm))
    first = cursor.sized()
    second = cursor.sized() if scheme == ALG_ECDSA else b""
    cursor.finish()
    return Signature(scheme, hash_algorithm, first, second)


def serialize_signature(signature: Signature) -> bytes:
    """The structure rebuilt from its fields."""
    head = struct.pack(">HH", signature.scheme, signature.hash_algorithm) + sized(signature.first)
    return head + sized(signature.second) if signature.scheme == ALG_ECDSA else head


@dataclass(frozen=True, slots=True, kw_only=True)
class NvPublic:
    """TPMS_NV_PUBLIC: an NV index as its name covers it (Part 2, 13.6)."""

    index: int
    name_algorithm: int
    attributes: int
    policy: bytes
    size: int

    @property
    def name(self) -> bytes:
        """The full name of the index; it changes with any attribute, so a redefined index has another name."""
        encoded = struct.pack(">IHI", self.index, self.name_algorithm, self.attributes)
        encoded += sized(self.policy) + struct.pack(">H", self.size)
        return struct.pack(">H", self.name_algorithm) + digest(self.name_algorithm, encoded)


NV_WRITTEN: Final = 1 << 29
_NV_OWNERWRITE: Final = 1 << 1
_NV_OWNERREAD: Final = 1 << 17
_NV_AUTHREAD: Final = 1 << 18
_NV_NO_DA: Final = 1 << 25

LOCATION_NV: Final = NvPublic(
    index=0x01800101,
    name_algorithm=ALG_SHA256,
    attributes=_NV_OWNERWRITE | _NV_OWNERREAD | _NV_AUTHREAD | _NV_NO_DA | NV_WRITTEN,
    policy=b"",
    size=32,
)
"""The one definition of the NV index that holds the digest of a host's location tag; its name is what must be certified."""


def digest(algorithm: int, data: bytes) -> bytes:
    """The hash of `data` by a TPM algorithm number; raises Malformed("tpm.algorithm_unknown")."""
    name = HASH_NAMES.get(algorithm)
    if name is None:
        raise Malformed("tpm.algorithm_unknown", "the hash algorithm is not known", got=hex(algorithm))
    return hashlib.new(name, data).digest()


def _rsa(cursor: Cursor) -> RsaParameters:
    symmetric = _symmetric(cursor)
    scheme, scheme_hash = _scheme(cursor)
    return RsaParameters(
        symmetric=symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        key_bits=cursor.integer(2),
        exponent=cursor.integer(4),
        modulus=cursor.sized(),
    )


def _ecc(cursor: Cursor) -> EccParameters:
    symmetric = _symmetric(cursor)
    scheme, scheme_hash = _scheme(cursor)
    count = cursor.integer(2) if scheme == ALG_ECDAA else 0
    curve = cursor.integer(2)
    kdf, kdf_hash = _scheme(cursor)
    return EccParameters(
        symmetric=symmetric,
        scheme=scheme,
        scheme_hash=scheme_hash,
        scheme_count=count,
        curve=curve,
        kdf=kdf,
        kdf_hash=kdf_hash,
        x=cursor.sized(),
        y=cursor.sized(),
    )


def _symmetric(cursor: Cursor) -> tuple[int, int, int]:
    algorithm = cursor.integer(2)
    if algorithm == ALG_NULL:
        return (ALG_NULL, 0, 0)
    return (algorithm, cursor.integer(2), cursor.integer(2))


def _symmetric_bytes(symmetric: tuple[int, int, int]) -> bytes:
    return struct.pack(">H", ALG_NULL) if symmetric[0] == ALG_NULL else struct.pack(">HHH", *symmetric)


def _scheme(cursor: Cursor) -> tuple[int, int]:
    scheme = cursor.integer(2)
    return (scheme, 0) if scheme in (ALG_NULL, ALG_RSAES) else (scheme, cursor.integer(2))


def _scheme_bytes(scheme: int, scheme_hash: int) -> bytes:
    if scheme in (ALG_NULL, ALG_RSAES):
        return struct.pack(">H", scheme)
    return struct.pack(">HH", scheme, scheme_hash)
