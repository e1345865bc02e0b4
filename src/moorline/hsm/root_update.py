"""The next root, introduced by the present one and back (RFC 4210 4.4; RFC 9483 4.3.2): what CMP clients are told of it.

newWithNew   the next root, self-signed
newWithOld   the next root's key under the present root: who trusts the present one comes to trust the next
oldWithNew   the present root's key under the next root: who trusts the next verifies what is under the present

Whoever takes it has to verify it himself; `verify` is what a broker does before it tells anybody. That devices are told of
a next root does not make the ledger take it: a genesis names its roots for good.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from moorline.clock import Instant, Validity
from moorline.digest import same
from moorline.errors import Misconfigured
from moorline.wire import certificates, der
from moorline.wire.certificates import Issuer


@dataclass(frozen=True, slots=True, kw_only=True)
class RootUpdate:
    """Three certificates, DER."""

    new_with_new: bytes
    new_with_old: bytes
    old_with_new: bytes

    def content(self) -> bytes:
        """RootCaKeyUpdateContent (RFC 9480 2.14), DER."""
        return der.sequence(self.new_with_new, der.tagged(0, self.new_with_old), der.tagged(1, self.old_with_new))

    def pem(self) -> bytes:
        """The three, PEM, in this order."""
        ders = (self.new_with_new, self.new_with_old, self.old_with_new)
        loaded = (x509.load_der_x509_certificate(one) for one in ders)
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in loaded)


def introduce(old: Issuer, new: Issuer, *, now: Instant, serials: tuple[int, int]) -> RootUpdate:
    """Cross-certificates between two roots: each ends with the root whose key it certifies."""
    with_old = certificates.cross_certificate(new.certificate, issuer=old, validity=_until(new, now), serial=serials[0])
    with_new = certificates.cross_certificate(old.certificate, issuer=new, validity=_until(old, now), serial=serials[1])
    made = (one.public_bytes(serialization.Encoding.DER) for one in (new.certificate, with_old, with_new))
    return RootUpdate(**dict(zip(("new_with_new", "new_with_old", "old_with_new"), made, strict=True)))


def verify(pem: bytes, roots: tuple[bytes, ...]) -> RootUpdate:
    """What a file says of the next root. Raises Misconfigured("root_update.not_one") unless all three fit."""
    try:
        new, with_old, with_new = x509.load_pem_x509_certificates(pem)
        new.verify_directly_issued_by(new)
        old = next(one for one in map(x509.load_der_x509_certificate, roots) if _same_key(one, with_new))
        with_old.verify_directly_issued_by(old)
        with_new.verify_directly_issued_by(new)
        assert _same_key(new, with_old)
        assert not _same_key(new, old)
    except Exception as error:  # ValueError, TypeError, InvalidSignature, StopIteration: all say that it is none
        raise Misconfigured(
            "root_update.not_one",
            "the file does not lead from a root of this consortium to another one",
            expected="newWithNew, newWithOld, oldWithNew in PEM",
            got=type(error).__name__,
            remedy="take root-update.pem of moor crl renew-root",
        ) from None
    found = (one.public_bytes(serialization.Encoding.DER) for one in (new, with_old, with_new))
    return RootUpdate(**dict(zip(("new_with_new", "new_with_old", "old_with_new"), found, strict=True)))


def _until(root: Issuer, now: Instant) -> Validity:
    return Validity(not_before=now, not_after=Instant(int(root.certificate.not_valid_after_utc.timestamp())))


def _same_key(one: x509.Certificate, other: x509.Certificate) -> bool:
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return same(one.public_key().public_bytes(*form), other.public_key().public_bytes(*form))
