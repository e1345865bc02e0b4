"""The two keys that sign certificates in a provider's HSM, and what each may sign.

The issuing CA signs X509-SVIDs of functions, devices, hosts and services; the HSM identity signs nothing but the TLS keys
of broker processes, as `spiffe://<trust domain>/hsm/<id>`. A token key cannot serve TLS (FINDINGS.md), so each process
makes a TLS key in memory and has it certified for at most an hour.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant, Validity
from moorline.errors import Refused
from moorline.hsm.issuers import HeldCa, Issuers, Looks, issued_by, issuer_of, name_of
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA
from moorline.hsm.token import Token
from moorline.nfv import Role, SpiffeId
from moorline.wire import certificates, keys
from moorline.wire.leaf_template import LeafTemplate

BACKDATE_S: Final = 60
"""Certificates begin this long before now, since peers' clocks are not ours."""
_SERIAL_BYTES: Final = 19  # RFC 5280 4.1.2.2: positive and at most 20 bytes
_SERIALS_AT_ONCE: Final = 64
_ISSUED_ROLES: Final = frozenset(Role) - {Role.HSM, Role.AUTHORITY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A certificate with the certificates above it (DER; issuer first, without the root)."""

    der: bytes
    serial: int
    chain: tuple[bytes, ...]
    not_after: Instant

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate, parsed."""
        return x509.load_der_x509_certificate(self.der)

    def pem_chain(self) -> bytes:
        """Leaf first, then the chain, PEM."""
        above = [x509.load_der_x509_certificate(der) for der in self.chain]
        return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in (self.certificate, *above))


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsKey:
    """A TLS key that lives in this process's memory, and its certificate under the HSM key."""

    key: ec.EllipticCurvePrivateKey
    leaf: Leaf

    def key_pem(self) -> bytes:
        """The private key in PKCS#8 PEM, for a TLS library in this process; it must not be written anywhere."""
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


class IssuingCa:
    """Signs X509-SVIDs of one trust domain with the key in the token. Randomness of serial numbers is the token's."""

    def __init__(  # noqa: PLR0913 - what a CA is, one parameter each
        self,
        token: Token,
        *,
        certificate: x509.Certificate,
        above: tuple[bytes, ...],
        trust_domain: str,
        life_s: int,
        looks: Looks,
        published: str | None = None,
        label: str = ISSUING_CA,
        retiring: tuple[HeldCa, ...] = (),
    ) -> None:
        """`above` is the provider's and the authority's certificate (DER); `published` the URL below which CRL and OCSP are.

        `label` is the key in the token. `retiring` are issuing CAs before this one, still above leaves that live. Nothing is
        issued before `issuers.looked` was told of a look at the ledger.
        """
        self._token = token
        self._above = above
        self.issuers = Issuers(token, HeldCa(label=label, certificate=certificate), retiring, looks=looks)
        self._trust_domain = trust_domain
        self._published = None if published is None else published.rstrip("/")
        self._ready: tuple[certificates.Issuer, tuple[bytes, ...], LeafTemplate] | None = None
        self._serials = _Serials(token)
        self._life_s = min(life_s, certificates.LEAF_MAX_LIFE_S - BACKDATE_S)

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Issuing CA, provider, authority; DER."""
        return (self.issuers.held()[0].der, *self._above)

    def chain_of(self, certificate: bytes) -> tuple[bytes, ...]:
        """What is above a certificate (DER) that this HSM issued: its own issuing CA, also a retiring one; then the rest."""
        held = self.issuers.held()
        if len(held) == 1:
            return self.chain
        leaf = certificates.parse_certificate(certificate)
        found = next((one for one in held if issued_by(leaf, one.certificate)), held[0])
        return (found.der, *self._above)

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """All issuing CAs under which a leaf can be alive, then provider and authority; DER."""
        return (*self.living, *self._above)

    @property
    def living(self) -> tuple[bytes, ...]:
        """All issuing CAs (DER) that count on the ledger as far as is known, the one that signs first."""
        return tuple(der_of(one.certificate) for one in self.issuers.standing())

    @property
    def above(self) -> tuple[bytes, ...]:
        """Provider and authority; DER."""
        return self._above

    @property
    def issuer(self) -> certificates.Issuer:
        """Certificate and token key of the active one. Raises Refused("issuing.ca_revoked")."""
        return self.issuers.active()

    def issue(self, public: bytes, spiffe_id: SpiffeId, now: Instant) -> Leaf:
        """An X509-SVID for a key (SubjectPublicKeyInfo, DER) that was made here or parsed before.

        That the holder of `public` is `spiffe_id` is the caller's to know. Raises Refused("issuing.ca_revoked"), and
        "issuing.not_ours" for another trust domain, or a role that is not issued here; Unavailable("issuing.not_seen").
        """
        if spiffe_id.trust_domain != self._trust_domain or spiffe_id.role not in _ISSUED_ROLES:
            raise Refused(
                "issuing.not_ours",
                "this issuing CA does not name that",
                expected=f"spiffe://{self._trust_domain}/...",
                got=str(spiffe_id),
            )
        self.issuers.require_seen(now)
        issuer, ready = self.issuers.active(), self._ready
        if ready is None or ready[0] is not issuer:
            template = LeafTemplate(issuer, self._pointers(issuer))
            ready = self._ready = (issuer, (der_of(issuer.certificate), *self._above), template)
        _, chain, template = ready
        return _leaf(template, chain, public, spiffe_id, self._serials.next(), _from(now, self._life_s))

    def _pointers(self, issuer: certificates.Issuer) -> certificates.Pointers | None:
        if self._published is None:
            return None
        base, name = self._published, name_of(issuer.certificate)
        return certificates.Pointers(crl=f"{base}/crl/{name}.crl", ocsp=f"{base}/ocsp", issuer=f"{base}/ca/{name}.cer")


class HsmIdentity:
    """The HSM's own key: certifies TLS keys of its broker processes, and signs as the HSM towards peers."""

    def __init__(
        self,
        token: Token,
        *,
        certificate: x509.Certificate,
        above: tuple[bytes, ...],
        spiffe_id: SpiffeId,
        label: str = HSM_IDENTITY,
    ) -> None:
        self._token = token
        self._above = above
        self.label = label
        self.spiffe_id = spiffe_id
        self._issuer, self._chain = _signing(token, label, certificate, above)
        self.signer: keys.Signer = keys.KeySigner(self._issuer.key)

    def adopt(self, label: str, certificate: x509.Certificate) -> None:
        """Be another key in the token from now on. TLS keys that the one before certified live out their hour."""
        following, chain = _signing(self._token, label, certificate, self._above)
        self.label, self._issuer, self._chain, self.signer = label, following, chain, keys.KeySigner(following.key)

    @property
    def issuer(self) -> certificates.Issuer:
        """Certificate and token key, for the CRL about TLS keys of brokers."""
        return self._issuer

    @property
    def chain(self) -> tuple[bytes, ...]:
        """HSM, provider, authority; DER."""
        return self._chain

    def certify_tls(self, now: Instant, *, life_s: int) -> TlsKey:
        """A fresh TLS key in memory with its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        life_s = min(life_s, certificates.LEAF_MAX_LIFE_S - BACKDATE_S)
        public, serial = keys.public_bytes(key.public_key()), serial_number(self._token.random(_SERIAL_BYTES))
        leaf = _leaf(LeafTemplate(self._issuer), self._chain, public, self.spiffe_id, serial, _from(now, life_s))
        return TlsKey(key=key, leaf=leaf)


class _Serials:
    """Serial numbers, drawn from the token's generator many at a time: each is handed out once."""

    def __init__(self, token: Token) -> None:
        self._token = token
        self._turn = threading.Lock()
        self._drawn: list[int] = []

    def next(self) -> int:
        with self._turn:
            if not self._drawn:
                block = self._token.random(_SERIAL_BYTES * _SERIALS_AT_ONCE)
                self._drawn = [serial_number(block[at : at + _SERIAL_BYTES]) for at in range(0, len(block), _SERIAL_BYTES)]
            return self._drawn.pop()


def serial_number(random: bytes) -> int:
    """A positive serial number of at most 20 bytes from 19 random ones."""
    return int.from_bytes(b"\x01" + random[: _SERIAL_BYTES - 1], "big")


def key_digest(public: bytes) -> bytes:
    """SHA-256 of SubjectPublicKeyInfo (DER)."""
    return hashlib.sha256(public).digest()


def _from(now: Instant, life_s: int) -> Validity:
    return Validity(not_before=Instant(now - BACKDATE_S), not_after=Instant(now + life_s))


def _leaf(
    template: LeafTemplate, chain: tuple[bytes, ...], public: bytes, spiffe_id: SpiffeId, serial: int, validity: Validity
) -> Leaf:
    der = template.leaf(public, spiffe_id=spiffe_id, validity=validity, serial=serial)
    return Leaf(der=der, serial=serial, chain=chain, not_after=validity.not_after)


def _signing(
    token: Token, label: str, certificate: x509.Certificate, above: tuple[bytes, ...]
) -> tuple[certificates.Issuer, tuple[bytes, ...]]:
    return issuer_of(token, label, certificate), (der_of(certificate), *above)


def require_fits(token: Token, label: str, certificate: x509.Certificate) -> None:
    """Raises Misconfigured("issuing.certificate_mismatch") unless a certificate is for this key in the token."""
    issuer_of(token, label, certificate)


def der_of(certificate: x509.Certificate) -> bytes:
    """A certificate in DER."""
    return certificate.public_bytes(serialization.Encoding.DER)
