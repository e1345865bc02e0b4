"""Leaf certificates of one issuer from a template: what is the same in all of them is encoded once.

A broker certifies a key in the time that a signature takes; encoding every field of every certificate anew takes longer than
that. The template is cut from a certificate which the ordinary builder made (certificates.leaf_certificate): version,
algorithm, issuer and all extensions that do not name the subject are its bytes. Serial number, validity, subject, key, the
key's identifier and the two names are encoded here, by DER's rules (X.690) and RFC 5280 4.1. A property test holds the
result against the builder's, byte for byte.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from functools import lru_cache
from typing import Final, cast

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from moorline.clock import Instant, Validity, to_datetime
from moorline.nfv import Role, SpiffeId
from moorline.wire.certificates import Issuer, Pointers, dns_name, hash_for, leaf_certificate, require_short_lived
from moorline.wire.der import TIME, UTF8, bits, integer, octets, sequence, set_of, tagged, tlv

_UTC_TIME: Final = 0x17
_EXTENSIONS: Final = 3  # [3] EXPLICIT
_DNS: Final = 0x82  # [2] IMPLICIT IA5String
_URI: Final = 0x86  # [6] IMPLICIT IA5String
_SHORT: Final = 0x80
_GENERALIZED_FROM: Final = 2050  # RFC 5280 4.1.2.5
_COMMON_NAME: Final = bytes.fromhex("0603550403")  # 2.5.4.3
_KEY_IDENTIFIER: Final = bytes.fromhex("0603551d0e")  # 2.5.29.14
_ALTERNATIVE_NAME: Final = bytes.fromhex("0603551d11")  # 2.5.29.17
_SAMPLE: Final = SpiffeId(trust_domain="template.invalid", role=Role.SERVICE, segments=("sample",))


class LeafTemplate:
    """What all leaves of one issuer have in common."""

    def __init__(self, issuer: Issuer, pointers: Pointers | None = None) -> None:
        """Signs one sample with the issuer's key, which is thrown away."""
        validity = Validity(not_before=Instant(0), not_after=Instant(1))
        sample = leaf_certificate(
            issuer.key.public_key(),
            spiffe_id=_SAMPLE,
            issuer=issuer,
            validity=validity,
            serial=1,
            pointers=pointers,
        )
        # version, serial, algorithm, issuer, validity, subject, key, extensions
        version, _, algorithm, name, _, _, _, extensions = _children(sample.tbs_certificate_bytes)
        _key_identifier, *others = _children(_children(extensions)[0])
        names = next(index for index, each in enumerate(others) if _children(each)[0] == _ALTERNATIVE_NAME)
        self._key = issuer.key
        self._hash = hash_for(issuer.key)
        self._version, self._algorithm = version, algorithm
        self._algorithm_and_issuer = algorithm + name
        self._before_names, self._after_names = b"".join(others[:names]), b"".join(others[names + 1 :])

    def leaf(self, public: bytes, *, spiffe_id: SpiffeId, validity: Validity, serial: int) -> bytes:
        """A signed certificate (DER), the same as `certificates.leaf_certificate` makes of the same facts.

        `public` is a SubjectPublicKeyInfo in DER that was parsed before; `serial` is positive. Raises
        Malformed("certificate.life") beyond one hour of life.
        """
        require_short_lived(validity)
        signed = self._signed_part(public, spiffe_id, validity, serial)
        return sequence(signed, self._algorithm, bits(self._signature(signed)))

    def _signed_part(self, public: bytes, spiffe_id: SpiffeId, validity: Validity, serial: int) -> bytes:
        times = _time(validity.not_before) + _time(validity.not_after)
        return sequence(
            self._version
            + integer(serial)
            + self._algorithm_and_issuer
            + sequence(times)
            + _subject(spiffe_id.segments[-1])
            + public
            + self._extensions(public, spiffe_id),
        )

    def _extensions(self, public: bytes, spiffe_id: SpiffeId) -> bytes:
        identifier = octets(hashlib.sha1(_key_bits(public)).digest())  # noqa: S324 - RFC 5280 4.2.1.2 (1), a name and no proof
        uri, dns = str(spiffe_id).encode("ascii"), dns_name(spiffe_id).encode("ascii")
        names = sequence(tlv(_URI, uri), tlv(_DNS, dns))
        return tagged(
            _EXTENSIONS,
            sequence(
                _extension(_KEY_IDENTIFIER, identifier)
                + self._before_names
                + _extension(_ALTERNATIVE_NAME, names)
                + self._after_names,
            ),
        )

    def _signature(self, signed: bytes) -> bytes:
        if self._hash is None:
            return cast("ed25519.Ed25519PrivateKey", self._key).sign(signed)
        return cast("ec.EllipticCurvePrivateKey", self._key).sign(signed, ec.ECDSA(self._hash))


def _extension(identifier: bytes, value: bytes) -> bytes:
    return sequence(identifier, octets(value))


def _subject(common_name: str) -> bytes:
    return sequence(set_of(sequence(_COMMON_NAME, tlv(UTF8, common_name.encode("ascii")))))


@lru_cache(maxsize=16)  # those who are certified in one second begin and end alike
def _time(at: Instant) -> bytes:
    when: datetime = to_datetime(at)
    if when.year < _GENERALIZED_FROM:
        return tlv(_UTC_TIME, when.strftime("%y%m%d%H%M%SZ").encode("ascii"))
    return tlv(TIME, when.strftime("%Y%m%d%H%M%SZ").encode("ascii"))


def _key_bits(public: bytes) -> bytes:
    """The content of the BIT STRING in a SubjectPublicKeyInfo, without the count of unused bits."""
    _, key = _children(public)
    start, _ = _header(key, 0)
    return key[start + 1 :]


def _children(der: bytes) -> list[bytes]:
    """The elements of a constructed element of our own making."""
    at, end = _header(der, 0)
    found = []
    while at < end:
        _, after = _header(der, at)
        found.append(der[at:after])
        at = after
    return found


def _header(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the element at `at` begins and ends."""
    size, start = der[at + 1], at + 2
    if size >= _SHORT:
        width = size - _SHORT
        start, size = start + width, int.from_bytes(der[start : start + width], "big")
    return start, start + size
