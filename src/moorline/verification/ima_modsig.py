"""Appended file signatures in an IMA list (ima-modsig): PKCS #7 as the kernel's sign-file makes it (RFC 5652; ima_modsig.c).

1. The template field holds a detached SignedData of one signer (evidence.cms), versions as RFC 5652 5.1 and 5.3 say; its
   one digest algorithm is that of the signer and of the entry's d-modsig, the digest of the file without the signature.
2. The signer is a trusted key: named by subject key identifier, or by issuer and serial number, which a trusted certificate
   has; a key that was given without a certificate has no issuer, and only the signature can tell. Certificates in the
   message are not looked at: nobody can bring his own.
3. Without signed attributes (sign-file makes none) the signature is over that digest. With them the content type is id-data,
   the message digest is that digest, and the signature is over the attributes.
4. RSA PKCS #1 v1.5, or ECDSA, with the hash of 1.

It establishes that the file, without its signature, was signed by that key; not which file: paths are not signed. Whoever
got a key to sign attributes has its signature over a "file" that consists of them too (RFC 5652, 11): no program is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1

from moorline.digest import same
from moorline.errors import Malformed
from moorline.evidence import cms
from moorline.evidence.ima import ImaEntry

if TYPE_CHECKING:
    from moorline.verification.ima_signature import FileKey

_RSA: Final = "1.2.840.113549.1.1.1"
# digest OID: hash, its number in enum hash_algo, signature OIDs that agree with it
_ALGORITHMS: Final = {
    "1.3.14.3.2.26": ("sha1", 2, ("1.2.840.113549.1.1.5", "1.2.840.10045.4.1")),
    "2.16.840.1.101.3.4.2.1": ("sha256", 4, ("1.2.840.113549.1.1.11", "1.2.840.10045.4.3.2")),
    "2.16.840.1.101.3.4.2.2": ("sha384", 5, ("1.2.840.113549.1.1.12", "1.2.840.10045.4.3.3")),
    "2.16.840.1.101.3.4.2.3": ("sha512", 6, ("1.2.840.113549.1.1.13", "1.2.840.10045.4.3.4")),
}


def is_appended(entry: ImaEntry, keys: Sequence[FileKey]) -> bool:
    """True if the signature appended to the entry's file is by one of `keys`, as above. Anything malformed is False."""
    if not entry.appended_signature or not entry.appended_digest:
        return False
    try:
        message = cms.parse_detached(entry.appended_signature)
        signer = message.signers.as_list()[0]
        named = _ALGORITHMS.get(signer.digest_algorithm.algorithm.dotted_string)
        if named is None or named[0] != entry.appended_algorithm or not _is_usual(message, signer):  # 1
            return False
        digest = _signed_digest(signer, entry)
    except Malformed:
        return False
    algorithm = signer.signature_algorithm.algorithm.dotted_string
    if digest is None or algorithm not in (_RSA, *named[2]):
        return False
    return any(_is_by(one, signer, digest, named[1], algorithm) for one in keys)


def _is_usual(message: cms.SignedData, signer: cms.SignerInfo) -> bool:
    version = 3 if isinstance(signer.sid, bytes) else 1
    listed = [one.algorithm for one in message.digest_algorithms.as_list()]
    return (message.version, signer.version) == (version, version) and listed == [signer.digest_algorithm.algorithm]


def _signed_digest(signer: cms.SignerInfo, entry: ImaEntry) -> bytes | None:
    """Rule 3: what the signature is over, hashed; None where the attributes are not about this file."""
    attributes = signer.signed_attributes
    if attributes is None:
        return entry.appended_digest
    kind = cms.signed_attribute(attributes, cms.CONTENT_TYPE)
    digest = cms.signed_attribute(attributes, cms.MESSAGE_DIGEST)
    if kind != asn1.encode_der(x509.ObjectIdentifier(cms.DATA)):
        return None
    if not same(digest, asn1.encode_der(entry.appended_digest)):
        return None
    return hashlib.new(entry.appended_algorithm, asn1.encode_der(attributes)).digest()


def _is_by(one: FileKey, signer: cms.SignerInfo, digest: bytes, number: int, algorithm: str) -> bool:
    sid = signer.sid
    if isinstance(sid, bytes):
        if sid != one.subject_key:  # 2
            return False
    elif one.issued is not None and one.issued != (asn1.encode_der(sid.issuer), sid.serial):
        return False
    if one.is_rsa != (algorithm == _RSA or algorithm.startswith("1.2.840.113549.")):
        return False
    try:
        one.require(signer.signature, digest, number)  # 4
    except (InvalidSignature, ValueError):  # ValueError: a digest of the wrong length
        return False
    return True
