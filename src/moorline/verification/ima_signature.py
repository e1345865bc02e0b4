"""File signatures in an IMA list (ima-sig): `security.ima` of type 3, version 2 (kernel: struct signature_v2_hdr).

1. The header is 03 02, a hash algorithm, a key id of four bytes and the length of exactly what follows.
2. The hash algorithm is the one of the entry's digest: a signature is over that digest and nothing else.
3. The key id is the last four bytes of a trusted key's subject key identifier, so that no other key is tried.
4. The signature holds: RSA PKCS #1 v1.5, or ECDSA.

It establishes that the file's contents were signed, not which file: paths are not signed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from moorline.errors import NotAuthentic
from moorline.evidence.ima import ImaEntry

_HEADER: Final = struct.Struct(">BBB4sH")
_IMA_DIGSIG: Final = 3
_VERSION: Final = 2
# enum hash_algo of the kernel (include/uapi/linux/hash_info.h)
_HASHES: Final[dict[int, tuple[str, hashes.HashAlgorithm]]] = {
    2: ("sha1", hashes.SHA1()),  # noqa: S303 - judged against the algorithm of the entry, which policy chooses
    4: ("sha256", hashes.SHA256()),
    5: ("sha384", hashes.SHA384()),
    6: ("sha512", hashes.SHA512()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKey:
    """A trusted key for file signatures; `identifier` is how signatures name it."""

    identifier: bytes
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey


def load_key(spki: bytes) -> FileKey:
    """The key in a DER SubjectPublicKeyInfo. Raises NotAuthentic("ima.key_unusable") for anything but RSA and EC."""
    try:
        key = serialization.load_der_public_key(spki)
    except Exception as error:  # ValueError, UnsupportedAlgorithm and others
        raise NotAuthentic("ima.key_unusable", "not a public key", got=type(error).__name__) from None
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise NotAuthentic("ima.key_unusable", "the kernel signs files with RSA and ECDSA only", got=type(key).__name__)
    return FileKey(identifier=x509.SubjectKeyIdentifier.from_public_key(key).digest[-4:], key=key)


def is_signed(entry: ImaEntry, keys: list[FileKey]) -> bool:
    """True if the entry's signature is by one of `keys`, over the entry's digest. Anything malformed is False."""
    extra = entry.extra
    if entry.template != "ima-sig" or len(extra) <= _HEADER.size:
        return False
    kind, version, algorithm, identifier, size = _HEADER.unpack_from(extra)
    signature = extra[_HEADER.size :]
    named = _HASHES.get(algorithm)
    if kind != _IMA_DIGSIG or version != _VERSION or len(signature) != size or named is None or named[0] != entry.algorithm:
        return False
    return any(_holds(one, signature, entry.digest, named[1]) for one in keys if one.identifier == identifier)


def _holds(one: FileKey, signature: bytes, digest: bytes, algorithm: hashes.HashAlgorithm) -> bool:
    prehashed = Prehashed(algorithm)
    try:
        if isinstance(one.key, rsa.RSAPublicKey):
            one.key.verify(signature, digest, padding.PKCS1v15(), prehashed)
        else:
            one.key.verify(signature, digest, ec.ECDSA(prehashed))
    except (InvalidSignature, ValueError):  # ValueError: a digest of the wrong length
        return False
    return True
