"""File signatures in an IMA list (ima-sig, ima-sigv2, ima-modsig): `security.ima` (kernel: struct signature_v2_hdr).

1. The header is 03 02 (over the digest of the contents) or 06 03 (over an fs-verity digest, in the kernel's ima_file_id), a
   hash algorithm, a key id of four bytes and the length of exactly what follows. Which of the two it is must agree with the
   type of the entry's digest.
2. The hash algorithm is the one of the entry's digest: a signature is over that digest and nothing else.
3. The key id is the last four bytes of a trusted key's subject key identifier, so that no other key is tried.
4. The signature holds: RSA PKCS #1 v1.5, or ECDSA.
5. An ima-modsig entry may have such a signature, one that is appended to the file (verification.ima_modsig), or both.

It establishes that the file's contents were signed, not which file: paths are not signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from moorline.errors import NotAuthentic
from moorline.evidence.ima import ImaEntry
from moorline.verification.ima_modsig import is_appended

_Usable = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

_HEADER: Final = 9  # type, version, hash; four bytes of key id; two of length, big endian
_VERITY_DIGSIG: Final = 6
_FORMS: Final = {"": (3, 2), "ima": (3, 2), "verity": (_VERITY_DIGSIG, 3)}  # type and version by type of digest
_SIGNED: Final = frozenset({"ima-sig", "ima-sigv2", "ima-modsig"})
_RSA: Final = 1
_ECDSA: Final = 2
_PADDING: Final = padding.PKCS1v15()
# enum hash_algo of the kernel (include/uapi/linux/hash_info.h)
_HASHES: Final = {
    number: (name, (_PADDING, Prehashed(algorithm)), (ec.ECDSA(Prehashed(algorithm)),))
    for number, name, algorithm in (
        (2, "sha1", hashes.SHA1()),  # noqa: S303 - judged against the algorithm of the entry, which policy chooses
        (4, "sha256", hashes.SHA256()),
        (5, "sha384", hashes.SHA384()),
        (6, "sha512", hashes.SHA512()),
    )
}

_NAMED: Final = {  # what rules 1 and 2 allow: type of the entry's digest, header, the digest's hash
    (digest_type, bytes((kind, version, number)), named[0]): named
    for digest_type, (kind, version) in _FORMS.items()
    for number, named in _HASHES.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKey:
    """A trusted key for file signatures; `identifier` is how signatures name it, the end of `subject_key`.

    `issued` is issuer (DER) and serial number of its certificate, None for a key that was given without one.
    `verify` is the key's own; after signature and digest it takes what `_HASHES` holds at `scheme`. What a key is has been
    asked once, when it was loaded: asking an abstract class takes longer than everything else but the signature.
    """

    identifier: bytes
    subject_key: bytes
    issued: tuple[bytes, int] | None
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    verify: Callable[..., None]
    scheme: int

    @property
    def is_rsa(self) -> bool:
        """Whether it is an RSA key, not an ECDSA one."""
        return self.scheme == _RSA

    def require(self, signature: bytes, digest: bytes, algorithm: int) -> None:
        """Raises what the library raises unless `signature` is over `digest`. `algorithm` is a number of enum hash_algo."""
        self.verify(signature, digest, *_HASHES[algorithm][self.scheme])


def load_key(spki: bytes) -> FileKey:
    """The key in a DER SubjectPublicKeyInfo. Raises NotAuthentic("ima.key_unusable") for anything but RSA and EC."""
    try:
        key = serialization.load_der_public_key(spki)
    except Exception as error:  # ValueError, UnsupportedAlgorithm and others
        raise NotAuthentic("ima.key_unusable", "not a public key", got=type(error).__name__) from None
    return _file_key(key, x509.SubjectKeyIdentifier.from_public_key, None)


def load_certificate(der: bytes) -> FileKey:
    """The key in a certificate, by the identifier that the certificate gives it, as the kernel's keyrings do.

    Neither dates nor issuer are judged: whoever trusts the certificate trusts the key. Raises
    NotAuthentic("ima.key_unusable").
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        key, issued = certificate.public_key(), (certificate.issuer.public_bytes(), certificate.serial_number)
        found = [one.value for one in certificate.extensions if isinstance(one.value, x509.SubjectKeyIdentifier)]
    except Exception as error:  # as above, and what extensions raise
        raise NotAuthentic("ima.key_unusable", "not a certificate", got=type(error).__name__) from None
    return _file_key(key, lambda key: found[0] if found else x509.SubjectKeyIdentifier.from_public_key(key), issued)


def _file_key(
    key: PublicKeyTypes, identify: Callable[[_Usable], x509.SubjectKeyIdentifier], issued: tuple[bytes, int] | None
) -> FileKey:
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise NotAuthentic("ima.key_unusable", "the kernel signs files with RSA and ECDSA only", got=type(key).__name__)
    scheme = _RSA if isinstance(key, rsa.RSAPublicKey) else _ECDSA
    named = identify(key).digest
    return FileKey(identifier=named[-4:], subject_key=named, issued=issued, key=key, verify=key.verify, scheme=scheme)


def is_signed(entry: ImaEntry, keys: list[FileKey]) -> bool:
    """True if the entry's signature is by one of `keys`, over the entry's digest. Anything malformed is False."""
    extra = entry.extra
    if entry.appended_signature and is_appended(entry, keys):  # 5
        return True
    if entry.template not in _SIGNED or len(extra) <= _HEADER:
        return False
    named = _NAMED.get((entry.digest_type, extra[:3], entry.algorithm))
    identifier, signature = extra[3:7], extra[_HEADER:]
    if named is None or len(signature) != extra[7] << 8 | extra[8]:
        return False
    digest = entry.digest
    if extra[0] == _VERITY_DIGSIG:
        digest = hashlib.new(named[0], extra[:1] + extra[2:3] + digest).digest()
    for one in keys:
        if one.identifier == identifier:
            try:
                one.verify(signature, digest, *named[one.scheme])
            except (InvalidSignature, ValueError):  # ValueError: a digest of the wrong length
                continue
            return True
    return False
