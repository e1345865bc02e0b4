"""An HSM's certificate as `wire.certificates` writes it, known by its bytes. Pure.

Apart from serial number, times, key, key identifiers, address and signature there is one way such a certificate can look,
and almost every one that comes in looks like that. So its bytes are compared with that one form, and what is free in between
is taken out, without a list of extensions being built first. Whatever differs, be it right or wrong, is `None`, and
ledger.issuance goes the long way, which takes the same certificates and has the words for the others. What is taken here is
a part of what is taken there; tests/ledger/test_hsm_certificate.py compares the two. It is here for what it saves, measured
side by side: 76 us of CPU a certificate, of which the signature's verification is 72, where the library's objects take 170.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from moorline.clock import Instant
from moorline.nfv import SpiffeId
from moorline.wire import certificates

_SHORT: Final = 0x80
"""Lengths below are one byte; names and addresses with longer ones are not for here."""
_COMMON_NAME_CHARS: Final = 64
_ECDSA_SHA256: Final = "300a06082a8648ce3d040302"
_UTC_TIME: Final = (  # of a day that every year has, in the half of the century in which nobody wonders about two digits
    rb"([0-4][0-9](?:(?:0[1-9]|1[0-2])(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])(?:29|30)|(?:0[13578]|1[02])31)"
    rb"(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]Z)"
)


def _exactly(digits: str) -> bytes:
    return re.escape(bytes.fromhex(digits))


# What stands in one pair of brackets is free, or its length; `recognised` names them in order and compares the lengths.
_FORM: Final = re.compile(
    _exactly("3082")
    + rb"(..)("  # all of it; what is signed, from here on
    + _exactly("3082")
    + rb"(..)"
    + _exactly("a00302010202")  # version 3, serial number
    + rb"(.)(.{1,20}?)"
    + _exactly(_ECDSA_SHA256)
    + rb"(\x30.{1,126}?)"  # issuer
    + _exactly("301e170d")
    + _UTC_TIME
    + _exactly("170d")
    + _UTC_TIME
    + rb"(\x30.{1,126}?)("  # subject, public key
    + _exactly("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
    + rb".{64})"
    + rb"\xa3\x81(.)\x30\x81(.)"  # extensions: key identifier, basic constraints, key usage, names, address, issuer's key
    + _exactly("301d0603551d0e04160414")
    + rb".{20}"
    + _exactly("30120603551d130101ff040830060101ff020100300e0603551d0f0101ff040403020186")
    + rb"(\x30.{1,126}?)\x30(.)"
    + _exactly("06082b0601050507010b04")
    + rb"(.)\x30(.)\x30(.)"
    + _exactly("06082b0601050507300586")
    + rb"(.)([ -~]{1,99}?)"
    + _exactly("301f0603551d23041830168014")
    + rb".{20})"
    + _exactly(_ECDSA_SHA256)
    + rb"\x03(.)\x00(.{8,80})",
    re.DOTALL,
)
_AROUND_NAMES_AND_ADDRESS: Final = 31 + 20 + 16 + 30 + 33  # the extensions in order, the address's without its characters
_P: Final = 0xFFFFFFFF_00000001_00000000_00000000_00000000_FFFFFFFF_FFFFFFFF_FFFFFFFF
_B: Final = 0x5AC635D8_AA3A93E7_B3EBBD55_769886BC_651D06B0_CC53B0F6_3BCE3C3E_27D2604B


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """What is free in such a certificate, untrusted: nobody has verified `signature` over `signed` yet.

    `issuer` is the issuer's name in DER, `spki` the key it certifies, the times are UTCTime.
    """

    issuer: bytes
    not_before: bytes
    not_after: bytes
    spki: bytes
    signed: bytes
    signature: bytes

    def in_force(self, at: Instant) -> bool:
        """Whether it counts at this time; before 2000 and after 2049 the answer is no."""
        return self.not_before <= _utc_time(at) <= self.not_after


def recognised(der: bytes, expected: SpiffeId) -> Recognised | None:
    """The parts of a certificate for `expected` that is in the one form; None for any other bytes.

    It is then version 3 in DER, signed by ECDSA with SHA-256, a CA of path length 0 whose key is on P-256, with exactly the
    names and the address metadata an HSM has. It says nothing about who issued it, whether its time has come, or whether
    the names in `expected` are ones that may be given.
    """
    found = _FORM.fullmatch(der)
    if found is None:
        return None
    size, signed, inner, digits, serial, issuer, before, after, subject, spki, outer, extensions, names, *rest = (
        found.groups()
    )
    *address_sizes, address, bits, signature = rest
    listed = _AROUND_NAMES_AND_ADDRESS + len(names) + len(address)
    lengths = size + inner + digits + outer + extensions + b"".join(address_sizes) + bits
    if (
        lengths != _lengths(der, signed, serial, listed, len(address), signature)
        or not _positive(serial)
        or subject != _subject(expected.segments[-1])
        or names != _names(str(expected), certificates.dns_name(expected))
        or not _on_curve(spki)
    ):
        return None
    return Recognised(issuer=issuer, not_before=before, not_after=after, spki=spki, signed=signed, signature=signature)


def _lengths(der: bytes, signed: bytes, serial: bytes, listed: int, address: int, signature: bytes) -> bytes:
    """The lengths as DER has them, in the order of the form; empty where one does not fit its place."""
    if listed + 3 > 0xFF:
        return b""
    parts = (len(serial), listed + 3, listed, address + 28, address + 16, address + 14, address + 12, address)
    return b"%b%b%b%c" % (
        (len(der) - 4).to_bytes(2, "big"),
        (len(signed) - 4).to_bytes(2, "big"),
        bytes(parts),
        len(signature) + 1,
    )


def _positive(serial: bytes) -> bool:
    """Whether a serial number of at most 20 octets is positive, and in its shortest form."""
    return 0 < serial[0] < _SHORT or (serial[0] == 0 and len(serial) > 1 and serial[1] >= _SHORT)


def _subject(common_name: str) -> bytes:
    """A name of one common name, UTF8String."""
    text, size = common_name.encode(), len(common_name)
    if size > _COMMON_NAME_CHARS:
        return b""
    return b"\x30%c\x31%c\x30%c\x06\x03\x55\x04\x03\x0c%c%b" % (size + 11, size + 9, size + 7, size, text)


def _names(uri: str, dns: str) -> bytes:
    """The extension with the alternative names."""
    size = len(uri) + len(dns) + 4
    if size + 11 >= _SHORT:
        return b""
    return b"\x30%c\x06\x03\x55\x1d\x11\x04%c\x30%c\x86%c%b\x82%c%b" % (
        size + 9,
        size + 2,
        size,
        len(uri),
        uri.encode(),
        len(dns),
        dns.encode(),
    )


def _on_curve(spki: bytes) -> bool:
    """Whether an uncompressed point is one of P-256 (SP 800-186 3.2.1.3), which has no others to beware of (cofactor 1)."""
    x, y = int.from_bytes(spki[-64:-32], "big"), int.from_bytes(spki[-32:], "big")
    return x < _P and y < _P and (y * y - (x * x - 3) * x - _B) % _P == 0


@lru_cache(maxsize=4)  # the time of the block
def _utc_time(at: Instant) -> bytes:
    found = datetime.fromtimestamp(at, UTC)
    return found.strftime("%y%m%d%H%M%SZ").encode() if 2000 <= found.year < 2050 else b""
