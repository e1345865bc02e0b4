"""Whether a TPM maker revoked a certificate between an endorsement key and its anchor (RFC 5280, 5 and 6.3).

1. A CRL is decoded whole: version 2, an end, nothing after its signature. It is a complete and direct one: no list of
   changes, no list of some certificates only, no entries of other issuers. Anything critical that is not understood refuses.
2. It counts for the certificates of the authority that it names and whose key signed it; that authority is a CA that may
   sign CRLs. A list in the name of an authority on the path that no such authority signed refuses: somebody forged it.
3. Of several lists by one authority the newest counts. It is in force at `now`: both its dates are judged.
4. A serial number that stands in it is revoked, whatever the reason: an endorsement key is not held back and let go again.
5. A list is demanded of every issuer that configuration knows (an anchor, an intermediate beside it) and of every other
   issuer whose certificate says where its list is. What is left are authorities inside the chip, which publish none: they
   are revoked by the authority above them. Where the demand is waived for a root, with a reason, lists that are there count
   all the same.

Not established: that a list is the newest its maker has published. The store that keeps it (storage.collateral_store) never
goes back, and `nextUpdate` bounds how long a newer one can be kept away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import CRLEntryExtensionOID, ExtensionOID

from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence.der import require_whole
from moorline.rats import EvidenceRoot

MAX_CRL: Final = 4 << 20
MAX_CRLS: Final = 256
MAX_URLS: Final = 4
"""Addresses of one authority's list that are looked at."""
_MAX_NUMBER: Final = 1 << 160  # RFC 5280 5.2.3
_RETRY_S: Final = 300.0  # somebody has to get the list first
_PARTIAL: Final = (ExtensionOID.DELTA_CRL_INDICATOR, ExtensionOID.ISSUING_DISTRIBUTION_POINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The CRLs at hand (DER, untrusted, of any authority), and for which roots a missing one is no obstacle, each with why.

    `Revocation(crls=(), not_required={})` demands what it does not have, and so refuses everybody.
    """

    crls: tuple[bytes, ...]
    not_required: Mapping[EvidenceRoot, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmCrl:
    """A decoded CRL, not yet known to be anybody's. `digest` is SHA-256 of what was signed."""

    parsed: x509.CertificateRevocationList
    issuer: bytes
    validity: Validity
    number: int | None
    digest: bytes

    def position(self) -> tuple[int, int]:
        """What makes one list newer than another of the same authority."""
        return self.validity.not_before, -1 if self.number is None else self.number


@lru_cache(maxsize=32)  # bounded: a verifier reads the same few lists at each enrolment
def parse_tpm_crl(der: bytes) -> TpmCrl:
    """Rule 1. Raises only Malformed("ek.crl_malformed" | "ek.crl_partial" | "ek.crl_indirect")."""
    if len(der) > MAX_CRL:
        raise Malformed("ek.crl_malformed", "the CRL is too large", expected=f"<= {MAX_CRL} bytes", got=len(der))
    try:
        crl = x509.load_der_x509_crl(der)
        require_whole(der, crl.signature)
        extensions = list(crl.extensions)
        last, following = crl.last_update_utc, crl.next_update_utc
        foreign = any(
            one.oid == CRLEntryExtensionOID.CERTIFICATE_ISSUER or one.critical for entry in crl for one in entry.extensions
        )
        issuer, signed = crl.issuer.public_bytes(), crl.tbs_certlist_bytes
        numbers = [one.value.crl_number for one in extensions if isinstance(one.value, x509.CRLNumber)]
    except Exception as error:  # the library has no one class for what does not decode
        raise Malformed("ek.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None
    scope = next((one.value for one in extensions if isinstance(one.value, x509.IssuingDistributionPoint)), None)
    if foreign or (scope is not None and scope.indirect_crl):
        raise Malformed("ek.crl_indirect", "the CRL lists certificates of other authorities than its issuer")
    if any(one.critical or one.oid in _PARTIAL for one in extensions):
        raise Malformed("ek.crl_partial", "the CRL is not the whole list of its issuer", expected="no deltas, no scope")
    if following is None:
        raise Malformed("ek.crl_malformed", "the CRL has no end", expected="nextUpdate")
    if any(not 0 <= number < _MAX_NUMBER for number in numbers):
        raise Malformed("ek.crl_malformed", "a CRL number that RFC 5280 does not allow", expected="0 to 20 octets")
    validity = Validity(not_before=Instant(int(last.timestamp())), not_after=Instant(int(following.timestamp())))
    digest = hashlib.sha256(signed).digest()
    return TpmCrl(parsed=crl, issuer=issuer, validity=validity, number=numbers[0] if numbers else None, digest=digest)


def is_by(crl: TpmCrl, issuer: x509.Certificate) -> bool:
    """Rule 2: `issuer` is the authority that the CRL names, may sign CRLs, and signed this one."""
    hashed = crl.parsed.signature_hash_algorithm
    if crl.issuer != issuer.subject.public_bytes() or not _may_sign(issuer) or not strong(hashed):
        return False
    try:
        return crl.parsed.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # other keys: TypeError
    except (InvalidSignature, ValueError, TypeError):
        return False


def strong(algorithm: hashes.HashAlgorithm | None) -> bool:
    """SHA-256 or wider. Signatures over SHA-1 count for nothing: two certificates can have the same one."""
    return isinstance(algorithm, hashes.SHA256 | hashes.SHA384 | hashes.SHA512)


def in_force(crl: TpmCrl, now: Instant) -> None:
    """The dates of rule 3. Raises NotAuthentic("ek.crl_not_yet_valid" | "ek.crl_stale")."""
    if now < crl.validity.not_before:
        raise NotAuthentic(
            "ek.crl_not_yet_valid",
            "a TPM maker's CRL begins in the future",
            expected=f">= {rendered(crl.validity.not_before)}",
            got=rendered(now),
            remedy="look at this machine's clock",
        )
    if now > crl.validity.not_after:
        raise NotAuthentic(
            "ek.crl_stale",
            "a TPM maker's CRL has ended",
            expected=f"<= {rendered(crl.validity.not_after)}",
            got=rendered(now),
            remedy="get the maker's newest list: moor collateral add, or import a newer bundle",
        )


def judge_path(
    path: Sequence[x509.Certificate],
    revocation: Revocation,
    *,
    known: Collection[x509.Certificate],
    root: EvidenceRoot,
    now: Instant,
) -> tuple[bytes, ...]:
    """Rules 2 to 5 over `path`, leaf first, anchor last; digests of the lists that were looked at.

    `known` are the authorities from configuration; a certificate renewed for the same name and key is the same. Raises
    Malformed as `parse_tpm_crl`, NotAuthentic("ek.crl_signature" | "ek.crl_not_yet_valid" | "ek.crl_stale" | "ek.revoked")
    and Unavailable("ek.crl_missing").
    """
    if len(revocation.crls) > MAX_CRLS:
        raise Malformed("ek.crl_malformed", "too many CRLs", expected=f"<= {MAX_CRLS}", got=len(revocation.crls))
    lists = [parse_tpm_crl(der) for der in revocation.crls]
    configured = {item_subject(one) for one in known}
    used: list[bytes] = []
    for subject, issuer in pairwise(path):
        newest = _newest(lists, issuer)
        if newest is None:
            if root not in revocation.not_required and (item_subject(issuer) in configured or _names_a_list(subject)):
                raise Unavailable(
                    "ek.crl_missing",
                    "it is not known whether a certificate above the endorsement key was revoked",
                    expected="a CRL of the maker's authority",
                    got=issuer.subject.rfc4514_string(),
                    remedy="moor collateral add the list of this authority, or state why it is not required",
                    retry_after_s=_RETRY_S,
                )
            continue
        in_force(newest, now)
        if _lists(newest, subject):
            raise NotAuthentic(
                "ek.revoked",
                "the TPM's maker revoked a certificate above the endorsement key",
                got=f"serial {subject.serial_number:x} of {issuer.subject.rfc4514_string()}",
            )
        used.append(newest.digest)
    return tuple(used)


def revoked_on(path: Sequence[x509.Certificate], crls: Sequence[bytes]) -> bool:
    """Whether a certificate of `path` (leaf first, anchor last) stands in the newest list of its issuer, ended or not.

    A list that is missing, or that another authority of the same name signed, revokes nothing here and takes nothing back:
    `judge_path` is what demands lists. Raises Malformed as `parse_tpm_crl`.
    """
    lists = [parse_tpm_crl(der) for der in crls]
    for subject, issuer in pairwise(path):
        newest = max((one for one in lists if is_by(one, issuer)), key=TpmCrl.position, default=None)
        if newest is not None and _lists(newest, subject):
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ListPoint:
    """Where an authority says its list is: `urls` are one list each, `chain` is the authority and those above it."""

    chain: tuple[x509.Certificate, ...]
    urls: tuple[str, ...]


def list_points(path: Sequence[x509.Certificate]) -> tuple[ListPoint, ...]:
    """The distribution points that a verified path (leaf first, anchor last) names, an entry for each issuer that has any.

    Points of other issuers, and of some reasons only, are left out: such lists are refused (rule 1).
    """
    return tuple(
        ListPoint(chain=tuple(path[number + 1 :]), urls=urls)
        for number, subject in enumerate(path[:-1])
        if (urls := _urls(subject))
    )


def item_subject(issuer: x509.Certificate) -> str:
    """How a store names the list of an authority: SHA-256 of its name and its key, so that a new key is a new name."""
    key = issuer.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(issuer.subject.public_bytes() + key).hexdigest()


def _newest(lists: Iterable[TpmCrl], issuer: x509.Certificate) -> TpmCrl | None:
    name = issuer.subject.public_bytes()
    named = [one for one in lists if one.issuer == name]
    signed = [one for one in named if is_by(one, issuer)]
    if named and not signed:
        raise NotAuthentic(
            "ek.crl_signature",
            "a CRL in the name of a TPM maker's authority is not signed by it",
            got=issuer.subject.rfc4514_string(),
        )
    return max(signed, key=TpmCrl.position, default=None)


def _may_sign(issuer: x509.Certificate) -> bool:
    try:
        basic = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as absent:
        return absent.oid == ExtensionOID.KEY_USAGE and basic.ca  # RFC 5280 4.2.1.3: without it every usage is allowed
    return basic.ca and usage.crl_sign


def _lists(crl: TpmCrl, subject: x509.Certificate) -> bool:
    return crl.parsed.get_revoked_certificate_by_serial_number(subject.serial_number) is not None


def _urls(certificate: x509.Certificate) -> tuple[str, ...]:
    points = [
        point for one in certificate.extensions if isinstance(one.value, x509.CRLDistributionPoints) for point in one.value
    ]
    whole = [point.full_name or () for point in points if point.crl_issuer is None and point.reasons is None]
    names = (name.value for full in whole for name in full if isinstance(name, x509.UniformResourceIdentifier))
    return tuple(dict.fromkeys(names))[:MAX_URLS]


def _names_a_list(certificate: x509.Certificate) -> bool:
    return any(isinstance(one.value, x509.CRLDistributionPoints) for one in certificate.extensions)
