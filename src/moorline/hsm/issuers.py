"""The issuing CAs of one HSM that can stand above a living certificate: the active one, and those before it that retire.

The active one signs certificates. A retiring one signs nothing but what its own certificates still need: CRLs and OCSP
responses, until its key retires. One that the ledger does not call active any more (RevokeIssuingCa, or a provider out of
force) signs nothing at all, and is served to nobody, for as long as the ledger says so: `looked`. No certificate is signed
before the ledger was looked at, nor when the last look is older than `Looks.last_s`: a CA may have been revoked meanwhile.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Malformed, Misconfigured, Refused, Unavailable
from moorline.hsm.keys import TokenEcKey
from moorline.hsm.token import Token
from moorline.wire import keys
from moorline.wire.certificates import Issuer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCa:
    """An issuing CA whose key is in the token under `label`; `der` is its certificate in DER."""

    label: str
    certificate: x509.Certificate
    der: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "der", self.certificate.public_bytes(serialization.Encoding.DER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """How the ledger is looked at: what was proven lasts for `last_s`, and the next look comes within `every_s`. Seconds."""

    last_s: int
    every_s: int


class Issuers:
    """What signs for issuing CAs. Safe for threads: every change puts a whole new state in place of the old one."""

    def __init__(self, token: Token, active: HeldCa, retiring: tuple[HeldCa, ...] = (), *, looks: Looks) -> None:
        self._token = token
        self._looks = looks
        self._seen: Instant | None = None
        self._turn = threading.Lock()
        self._ended: frozenset[bytes] = frozenset()
        self._known: dict[bytes, Issuer] = {}
        self._held: tuple[HeldCa, ...] = ()
        self.hold(active, retiring)

    def hold(self, active: HeldCa, retiring: tuple[HeldCa, ...]) -> None:
        """Use these from now on. Raises Misconfigured("issuing.certificate_mismatch") and changes nothing then."""
        with self._turn:
            held = (active, *retiring)
            self._known |= {one.der: issuer_of(self._token, one.label, one.certificate) for one in self._new(held)}
            self._held = held

    def _new(self, held: tuple[HeldCa, ...]) -> tuple[HeldCa, ...]:
        return tuple(one for one in held if one.der not in self._known)

    def looked(self, ended: frozenset[bytes], *, at: Instant) -> None:
        """The ledger's word of `at`: these (DER), and no others, are not active, or their provider is out of force."""
        with self._turn:
            self._ended, self._seen = ended, at

    def require_seen(self, now: Instant) -> None:
        """Raises Unavailable("issuing.not_seen") if nobody can say whether the active one still counts."""
        seen = self._seen
        if seen is None or now - seen > self._looks.last_s:
            raise Unavailable(
                "issuing.not_seen",
                "the ledger was not seen lately, so nobody knows whether the issuing CA still counts",
                expected=f"within {self._looks.last_s} s",
                remedy="ask again; if it stays so, see whether the broker reaches the ledger's authorities",
                retry_after_s=self._looks.every_s,
            )

    def active(self) -> Issuer:
        """What signs certificates. Raises Refused("issuing.ca_revoked")."""
        held = self._held[0].der
        if held in self._ended:
            raise Refused(
                "issuing.ca_revoked",
                "the ledger does not have this issuing CA as active any more",
                got=name_of(self._held[0].certificate),
                remedy="moor hsm key rotate issuing-ca, register the new one and activate it",
            )
        return self._known[held]

    def standing(self) -> tuple[Issuer, ...]:
        """Those the ledger has as active as far as is known, the one that signs certificates first."""
        known, ended = self._known, self._ended
        return tuple(known[one.der] for one in self._held if one.der not in ended)

    def held(self) -> tuple[HeldCa, ...]:
        """All, whatever the ledger says, the one that signs certificates first."""
        return self._held

    def named(self, name: str) -> Issuer:
        """The one with this id on the ledger. Raises Refused("revocation.no_such_ca")."""
        for one in self.standing():
            if name_of(one.certificate) == name:
                return one
        raise Refused("revocation.no_such_ca", "this broker has no CA of that name", got=name)


def issuer_of(token: Token, label: str, certificate: x509.Certificate) -> Issuer:
    """A certificate with its key in the token. Raises Misconfigured("issuing.certificate_mismatch")."""
    key = TokenEcKey(token, label)
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or keys.public_bytes(public) != keys.public_bytes(key.public_key()):
        raise Misconfigured(
            "issuing.certificate_mismatch",
            "the certificate is not for the key in this token",
            got=label,
            remedy="use the certificate the provider signed for this token",
        )
    return Issuer(certificate=certificate, key=key)


def name_of(certificate: x509.Certificate) -> str:
    """The id of an issuing CA's record on the ledger: its common name. Raises Malformed("issuing.no_name")."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(found) != 1:
        raise Malformed("issuing.no_name", "an issuing CA's certificate has one common name", got=len(found))
    return str(found[0].value)


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether a certificate names this CA, by subject and key, as what it was issued by (RFC 5280 4.2.1.1).

    Its signature is not looked at: for certificates this HSM itself recorded when it made them.
    """
    if certificate.issuer != ca.subject:
        return False
    above = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    named = certificate.extensions.get_extension_for_oid(ExtensionOID.AUTHORITY_KEY_IDENTIFIER).value
    return isinstance(named, x509.AuthorityKeyIdentifier) and same(named.key_identifier or b"", above.digest)
