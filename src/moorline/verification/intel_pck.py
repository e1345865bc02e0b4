"""Chains and revocation lists under Intel's SGX root key. Numbered once here, named in the code below.

1. An anchor is a KEY. Intel issued its root as two certificates with one key (2018: until 2033, and until 2049); both
   ship as data, are pinned by SHA-256 and must hold the same key. There is no other way to get an anchor of root
   `hardware`.
2. A chain is PEM, leaf first, of exactly the certificates its role has: PCK leaf, Platform or Processor CA, root; or
   TCB signer, root. The root certificate in it must hold the pinned key and be signed by it; names open nothing.
   [intel.chain_malformed intel.anchor_unknown]
3. Every certificate is signed by the one above it with ECDSA P-256 and SHA-256. Only then is anything else in it read.
   [intel.chain_broken]
4. Names chain; issuers are CAs that may sign certificates, leaves are not; the common name is that of the role, so that
   a PCK can never sign TCB info. [intel.chain_role]
5. A PCK leaf holds the SGX extension 1.2.840.113741.1.13.1, strict DER, every part once, sixteen TCB components.
   [intel.pck_extension]
6. Dates are judged at each call, never remembered. [intel.certificate_expired intel.certificate_not_yet_valid]
7. A CRL is signed by, and named after, the very CA whose certificates it is asked about; it has no critical extension;
   it is current at `now`. [intel.crl_malformed intel.crl_issuer intel.crl_signature intel.crl_expired
   intel.crl_not_yet_valid]
8. A certificate that its CRL names is refused. [intel.revoked]

Rules 2 to 5 and the signature of rule 7 depend on bytes only, so their results are kept, bounded; a failure is never kept.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, lru_cache
from importlib import resources
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from moorline.clock import Instant, Validity, rendered
from moorline.errors import Malformed, Misconfigured, NotAuthentic, Unavailable
from moorline.evidence.der import ENUMERATED, DerReader, require_whole
from moorline.rats import EvidenceRoot

_ROOTS: Final = (
    ("intel_sgx_root_ca.der", "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"),
    ("intel_sgx_root_ca_old_issue.der", "fc64f8076d79a4fee9d1d473d74c89eb8d8fd55c5abafeabeba7366d20429404"),
)
_SGX: Final = "1.2.840.113741.1.13.1"
_ECDSA: Final = ec.ECDSA(hashes.SHA256())
_MAX_CHAIN: Final = 32768
_MAX_CRL: Final = 1 << 20
_PEM: Final = re.compile(
    rb"[\r\n]*-----BEGIN CERTIFICATE-----\r?\n([A-Za-z0-9+/=\r\n]{1,12000})-----END CERTIFICATE-----(?:\r?\n)*"
)


class Role(StrEnum):
    """What a chain is for: the common name of its leaf."""

    PCK = "Intel SGX PCK Certificate"
    TCB_SIGNING = "Intel SGX TCB Signing"


class PckCa(StrEnum):
    """Which CA issued a PCK certificate: the common name. The service has a CRL for each."""

    PLATFORM = "Intel SGX PCK Platform CA"
    PROCESSOR = "Intel SGX PCK Processor CA"


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelAnchor:
    """A root key (SubjectPublicKeyInfo, DER) and what rests on it."""

    public_key: bytes
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelAnchors:
    """All root keys one verifier trusts for SGX and TDX. There is no default; an empty set matches nothing."""

    anchors: tuple[IntelAnchor, ...]

    def plus(self, other: IntelAnchors) -> IntelAnchors:
        """Both sets, these first. A key that is already here keeps the kind it has here."""
        known = {anchor.public_key for anchor in self.anchors}
        return IntelAnchors(anchors=(*self.anchors, *(anchor for anchor in other.anchors if anchor.public_key not in known)))


@cache
def production_intel_anchors() -> IntelAnchors:
    """Intel's root key and nothing else. Raises Misconfigured if a shipped file is not the one pinned here."""
    keys: set[bytes] = set()
    for name, sha256 in _ROOTS:
        data = resources.files("moorline.verification.roots").joinpath(name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Misconfigured("anchors.vendor_root_changed", "a shipped vendor root is not the pinned one", got=name)
        keys.add(_spki(x509.load_der_x509_certificate(data).public_key()))
    (key,) = keys
    return IntelAnchors(anchors=(IntelAnchor(public_key=key, root=EvidenceRoot.HARDWARE),))


def configured_anchors(files: Sequence[bytes]) -> IntelAnchors:
    """The anchors of root certificates that configuration names (DER or PEM), all of root `test`: a file cannot claim more.

    Raises Unavailable("intel.anchor_malformed") for what is no certificate, so nothing can be decided with it, and
    NotAuthentic("intel.anchor_not_root") for one that is no self-signed CA with a P-256 key.
    """
    anchors = []
    for data in files:
        try:
            certificate = _certificate(pem_certificates(data)[0] if data.lstrip().startswith(b"-----") else data)
        except Malformed as error:
            raise Unavailable("intel.anchor_malformed", "a configured root is no certificate", got=error.says) from None
        try:
            key = certificate.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            _issued(certificate, key)
            is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except Exception as error:  # not self-signed, no CA, or a key of another kind: each has its own class
            raise NotAuthentic(
                "intel.anchor_not_root", "a configured root is no self-signed authority", got=type(error).__name__
            ) from None
        if not is_ca:
            raise NotAuthentic("intel.anchor_not_root", "a configured root is no certificate authority")
        anchors.append(IntelAnchor(public_key=_spki(key), root=EvidenceRoot.TEST))
    return IntelAnchors(anchors=tuple(anchors))


@dataclass(frozen=True, slots=True, kw_only=True)
class PckCertificate:
    """What the SGX extension of a PCK certificate says (Intel SGX PCK Certificate and CRL Profile Specification, 1.3.5).

    Believed only inside a verified chain. The last four exist in certificates of multi-package platforms only.
    """

    ppid: bytes
    components: tuple[int, ...]
    pce_svn: int
    cpu_svn: bytes
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance_id: bytes | None
    dynamic_platform: bool | None
    cached_keys: bool | None
    smt_enabled: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A CA of a chain that holds: what its CRL is judged by."""

    name: bytes
    key: ec.EllipticCurvePublicKey = field(compare=False)
    public_key: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntelChain:
    """A chain that holds, at the times in `validity` only. `ca` is None where the root issued the leaf itself."""

    role: Role
    key: ec.EllipticCurvePublicKey
    pck: PckCertificate | None
    serial: int
    ca: Issuer | None
    ca_serial: int | None
    root_issuer: Issuer
    root: EvidenceRoot
    validity: tuple[tuple[str, Validity], ...]
    digest: bytes

    def in_force(self, now: Instant) -> None:
        """Rule 6."""
        certificates_in_force(self.validity, now)


def certificates_in_force(validity: tuple[tuple[str, Validity], ...], now: Instant) -> None:
    """Rule 6, for certificates by name."""
    for name, interval in validity:
        if now < interval.not_before:
            raise NotAuthentic(
                "intel.certificate_not_yet_valid",
                f"the {name} certificate is not valid yet",
                expected=f">= {rendered(interval.not_before)}",
                got=rendered(now),
            )
        if now > interval.not_after:
            raise NotAuthentic(
                "intel.certificate_expired",
                f"the {name} certificate has expired",
                expected=f"<= {rendered(interval.not_after)}",
                got=rendered(now),
                remedy="fetch current certificates from Intel's service",
            )


# ---------------------------------------------------------------- 2 to 5: chains


@lru_cache(maxsize=1024)
def judge_chain(pem: bytes, role: Role, anchors: IntelAnchors) -> IntelChain:
    """The chain in `pem`, by rules 2 to 5. Raises Malformed and NotAuthentic (`intel.*`). Dates are not judged here."""
    ders = pem_certificates(pem)
    expected = 3 if role is Role.PCK else 2
    if len(ders) != expected:
        raise Malformed("intel.chain_malformed", "a chain of another length", expected=expected, got=len(ders))
    certificates = [_certificate(one) for one in ders]
    leaf, root = certificates[0], certificates[-1]
    anchor, root_key = _anchored(root, anchors)  # 2
    ca = certificates[1] if role is Role.PCK else None
    ca_key = _issued(ca, root_key) if ca is not None else None  # 3
    leaf_key = _issued(leaf, ca_key or root_key)
    issuers = [one for one in (ca, root) if one is not None]
    _roles(leaf, issuers, role)  # 4
    return IntelChain(
        role=role,
        key=leaf_key,
        pck=_pck(leaf) if role is Role.PCK else None,  # 5
        serial=leaf.serial_number,
        ca=None if ca is None or ca_key is None else _issuer(ca, ca_key),
        ca_serial=None if ca is None else ca.serial_number,
        root_issuer=_issuer(root, root_key),
        root=anchor.root,
        validity=_periods(certificates),
        digest=hashlib.sha256(pem).digest(),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntelAuthority:
    """A PCK authority whose chain holds, at the times in `validity` only: what its CRL is judged by."""

    ca: PckCa
    issuer: Issuer
    serial: int
    root_issuer: Issuer
    root: EvidenceRoot
    validity: tuple[tuple[str, Validity], ...]


def judge_authority(pem: bytes, anchors: IntelAnchors) -> IntelAuthority:
    """The PCK authority and root in `pem`, the issuer chain of a PCK CRL, by rules 2 to 4. Dates are not judged here."""
    ders = pem_certificates(pem)
    if len(ders) != 2:
        raise Malformed("intel.chain_malformed", "a chain of another length", expected=2, got=len(ders))
    ca, root = (_certificate(one) for one in ders)
    anchor, root_key = _anchored(root, anchors)  # 2
    key = _issued(ca, root_key)  # 3
    name = _common_name(ca)
    try:  # 4
        signs = ca.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except Exception as error:  # absent, duplicate or undecodable extensions each have their own exception class
        raise NotAuthentic("intel.chain_role", "an authority that is none", got=type(error).__name__) from None
    if not (signs and is_ca and name in set(PckCa) and ca.issuer.public_bytes() == root.subject.public_bytes()):
        raise NotAuthentic("intel.chain_role", "the issuer of the CRL is no PCK authority", got=name)
    return IntelAuthority(
        ca=PckCa(name),
        issuer=_issuer(ca, key),
        serial=ca.serial_number,
        root_issuer=_issuer(root, root_key),
        root=anchor.root,
        validity=_periods([ca, root]),
    )


def read_pck(pem: bytes) -> tuple[PckCertificate, PckCa]:
    """What the PCK certificate at the head of an UNVERIFIED chain says: what to ask Intel's service for, nothing more."""
    leaf = _certificate(pem_certificates(pem)[0])
    facts, name = _pck(leaf), _common_name(leaf, issuer=True)
    if name not in set(PckCa):
        raise Malformed("intel.chain_malformed", "the certificate is of no PCK CA", got=name)
    return facts, PckCa(name)


def pem_certificates(data: bytes) -> tuple[bytes, ...]:
    """The DER certificates in a PEM chain; one zero byte may end it. Raises Malformed("intel.chain_malformed")."""
    if len(data) > _MAX_CHAIN:
        raise Malformed("intel.chain_malformed", "the chain is too large", expected=f"<= {_MAX_CHAIN} bytes", got=len(data))
    text, at, found = data.removesuffix(b"\x00"), 0, []
    while at < len(text):
        one = _PEM.match(text, at)
        if one is None:
            raise Malformed("intel.chain_malformed", "not a chain of PEM certificates", got=f"byte {at}")
        text_64 = one.group(1).replace(b"\r", b"").replace(b"\n", b"")
        try:
            found.append(base64.b64decode(text_64, validate=True))
        except binascii.Error:
            raise Malformed("intel.chain_malformed", "a PEM certificate is not base64", got=f"byte {at}") from None
        if base64.b64encode(found[-1]) != text_64:  # unused bits that are not zero: two texts for one certificate
            raise Malformed("intel.chain_malformed", "a PEM certificate is not canonical base64", got=f"byte {at}")
        at = one.end()
    if not found:
        raise Malformed("intel.chain_malformed", "a chain without certificates")
    return tuple(found)


def _certificate(der: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        require_whole(der, certificate.signature)
    except Malformed:
        raise
    except Exception as error:  # the library has no one class for what does not decode
        raise Malformed("intel.chain_malformed", "not a certificate", got=type(error).__name__) from None
    return certificate


def _anchored(root: x509.Certificate, anchors: IntelAnchors) -> tuple[IntelAnchor, ec.EllipticCurvePublicKey]:
    try:
        key = root.public_key()
        found = _spki(key)
    except Exception:  # a key that is no point on its curve is not the pinned key: ValueError, UnsupportedAlgorithm
        key, found = None, b""
    for anchor in anchors.anchors:
        if anchor.public_key == found and isinstance(key, ec.EllipticCurvePublicKey):
            _issued(root, key)
            return anchor, key
    raise NotAuthentic(
        "intel.anchor_unknown",
        "the chain does not end in a trusted root key",
        remedy="a simulated platform is trusted only where its anchor is configured",
    )


def _periods(certificates: Sequence[x509.Certificate]) -> tuple[tuple[str, Validity], ...]:
    return tuple(
        (_common_name(one), Validity(not_before=_seconds(one, end=False), not_after=_seconds(one, end=True)))
        for one in certificates
    )


def _issued(certificate: x509.Certificate, issuer: ec.EllipticCurvePublicKey) -> ec.EllipticCurvePublicKey:
    """The key in `certificate`, which `issuer` signed. Rule 3."""
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise NotAuthentic("intel.chain_broken", "a certificate is signed with another algorithm than ECDSA-SHA256")
    try:
        issuer.verify(certificate.signature, certificate.tbs_certificate_bytes, _ECDSA)
    except InvalidSignature:
        raise NotAuthentic("intel.chain_broken", "a certificate is not signed by the one above it") from None
    try:
        key = certificate.public_key()
    except Exception as error:  # ValueError or UnsupportedAlgorithm, by what is wrong with it
        raise NotAuthentic("intel.chain_broken", "a certificate holds no usable key", got=type(error).__name__) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise NotAuthentic("intel.chain_broken", "a certificate of the chain does not hold a P-256 key")
    return key


def _roles(leaf: x509.Certificate, issuers: list[x509.Certificate], role: Role) -> None:
    try:
        below = leaf
        for issuer in issuers:
            usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
            is_ca = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            named = below.issuer.public_bytes() == issuer.subject.public_bytes()
            if not (named and is_ca and usage.key_cert_sign):
                raise NotAuthentic("intel.chain_role", "an issuer is not the authority its certificate must name")
            below = issuer
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        is_ca = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except NotAuthentic:
        raise
    except Exception as error:  # absent, duplicate or undecodable extensions and names each have their own class
        raise Malformed(
            "intel.chain_malformed", "a certificate of the chain does not decode", got=type(error).__name__
        ) from None
    if is_ca or not usage.digital_signature or _common_name(leaf) != role:
        raise NotAuthentic("intel.chain_role", "the leaf is not for this purpose", expected=role, got=_common_name(leaf))
    if role is Role.PCK and _common_name(issuers[0]) not in set(PckCa):
        raise NotAuthentic("intel.chain_role", "the issuer is no PCK authority", got=_common_name(issuers[0]))


def _issuer(certificate: x509.Certificate, key: ec.EllipticCurvePublicKey) -> Issuer:
    return Issuer(name=certificate.subject.public_bytes(), key=key, public_key=_spki(key))


def _common_name(certificate: x509.Certificate, *, issuer: bool = False) -> str:
    try:
        name = certificate.issuer if issuer else certificate.subject
        return "".join(str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME))
    except Exception as error:  # a name that does not decode
        raise Malformed("intel.chain_malformed", "a name in the chain does not decode", got=type(error).__name__) from None


def _seconds(certificate: x509.Certificate, *, end: bool) -> Instant:
    at = certificate.not_valid_after_utc if end else certificate.not_valid_before_utc
    return Instant(int(at.timestamp()))


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return b""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


# ---------------------------------------------------------------- 5: the SGX extension


def _pck(leaf: x509.Certificate) -> PckCertificate:
    try:
        found = [
            one.value.value
            for one in leaf.extensions
            if isinstance(one.value, x509.UnrecognizedExtension) and one.oid.dotted_string == _SGX
        ]
    except Exception as error:  # extensions that do not decode, or are there twice
        raise Malformed("intel.pck_extension", "the PCK certificate does not decode", got=type(error).__name__) from None
    if len(found) != 1:
        raise Malformed("intel.pck_extension", "the PCK certificate lacks the SGX extension", expected=_SGX)
    try:
        return parse_sgx_extension(found[0])
    except Malformed as error:
        raise Malformed(
            "intel.pck_extension", f"the SGX extension: {error.says}", expected=error.expected, got=error.got
        ) from None


def parse_sgx_extension(data: bytes) -> PckCertificate:
    """The SGX extension of a PCK certificate. Untrusted. Raises only Malformed (`der.malformed`, `intel.pck_extension`)."""
    parts = _parts(data, _SGX)
    tcb = _parts(_need(parts, 2), f"{_SGX}.2")
    configuration = _parts(parts[7], f"{_SGX}.7") if 7 in parts else {}
    if set(parts) - set(range(1, 8)) or set(tcb) != set(range(1, 19)) or set(configuration) - {1, 2, 3}:
        raise Malformed("intel.pck_extension", "a part of the SGX extension is unknown or missing", got=sorted(tcb))
    components = tuple(_one(tcb[number]).integer() for number in range(1, 17))
    pce_svn = _one(tcb[17]).integer()
    if max(components) > 0xFF or pce_svn > 0xFFFF:
        raise Malformed("intel.pck_extension", "an SVN is out of range", got=max(*components, pce_svn))
    return PckCertificate(
        ppid=_one(_need(parts, 1)).octets(16),
        components=components,
        pce_svn=pce_svn,
        cpu_svn=_one(tcb[18]).octets(16),
        pce_id=_one(_need(parts, 3)).octets(2),
        fmspc=_one(_need(parts, 4)).octets(6),
        sgx_type=_one(_need(parts, 5)).integer(ENUMERATED),
        platform_instance_id=_one(parts[6]).octets(16) if 6 in parts else None,
        dynamic_platform=_one(configuration[1]).boolean() if 1 in configuration else None,
        cached_keys=_one(configuration[2]).boolean() if 2 in configuration else None,
        smt_enabled=_one(configuration[3]).boolean() if 3 in configuration else None,
    )


def _parts(data: bytes, prefix: str) -> dict[int, bytes]:
    """The parts of a SEQUENCE of (OID, value), by the last arc of the OID: each once, each below `prefix`."""
    outer = DerReader(data)
    listed = outer.sequence()
    outer.finish()
    parts: dict[int, bytes] = {}
    while not listed.empty:
        pair = listed.sequence()
        head, _, last = pair.oid().rpartition(".")
        number, value = int(last), pair.element()[2]
        pair.finish()
        if head != prefix or number in parts:
            raise Malformed(
                "intel.pck_extension", "a part of the SGX extension is foreign or there twice", got=f"{head}.{last}"
            )
        parts[number] = value
    return parts


def _need(parts: dict[int, bytes], number: int) -> bytes:
    if number not in parts:
        raise Malformed("intel.pck_extension", "a part of the SGX extension is missing", expected=f"{_SGX}.{number}")
    return parts[number]


def _one(data: bytes) -> DerReader:
    return DerReader(data)


# ---------------------------------------------------------------- 7 and 8: revocation


@dataclass(frozen=True, slots=True, kw_only=True)
class IntelCrl:
    """A CRL whose signature holds, at the times in `validity` only."""

    revoked: frozenset[int]
    validity: Validity
    number: int | None
    digest: bytes


@lru_cache(maxsize=256)
def judge_crl(der: bytes, issuer: Issuer) -> IntelCrl:
    """The CRL in `der`, signed by and named after `issuer` (rule 7 without dates). Raises Malformed and NotAuthentic."""
    if len(der) > _MAX_CRL:
        raise Malformed("intel.crl_malformed", "the CRL is too large", expected=f"<= {_MAX_CRL} bytes", got=len(der))
    try:
        crl = x509.load_der_x509_crl(der)
        name, last, following = crl.issuer.public_bytes(), crl.last_update_utc, crl.next_update_utc
        revoked = frozenset(entry.serial_number for entry in crl)
        critical = any(extension.critical for extension in crl.extensions)
        numbers = [one.value.crl_number for one in crl.extensions if isinstance(one.value, x509.CRLNumber)]
        algorithm, signature, signed = crl.signature_algorithm_oid, crl.signature, crl.tbs_certlist_bytes
        require_whole(der, signature)
    except Malformed:
        raise
    except Exception as error:  # as for certificates: the library has no one class for what does not decode
        raise Malformed("intel.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None
    if critical or following is None:
        raise Malformed("intel.crl_malformed", "a CRL of another kind: partial, indirect, or without an end")
    if name != issuer.name:
        raise NotAuthentic("intel.crl_issuer", "the CRL is of another authority than the certificate's")
    try:
        issuer.key.verify(signature, signed, _ECDSA)
    except InvalidSignature:
        raise NotAuthentic("intel.crl_signature", "the CRL is not signed by the authority it names") from None
    if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise NotAuthentic("intel.crl_signature", "the CRL is signed with another algorithm than ECDSA-SHA256")
    return IntelCrl(
        revoked=revoked,
        validity=Validity(not_before=Instant(int(last.timestamp())), not_after=Instant(int(following.timestamp()))),
        number=numbers[0] if numbers else None,
        digest=hashlib.sha256(der).digest(),
    )


def not_revoked(crl: IntelCrl, *serials: int) -> None:
    """Rule 8."""
    if not crl.revoked.isdisjoint(serials):
        raise NotAuthentic("intel.revoked", "Intel revoked a certificate of the chain")


def judge_root_crl(der: bytes, anchors: IntelAnchors) -> tuple[IntelCrl, EvidenceRoot]:
    """A root's CRL without a chain: signed by one of the pinned keys (rule 7 without dates). Names open nothing."""
    try:
        name = x509.load_der_x509_crl(der).issuer.public_bytes()
    except Exception as error:  # as in judge_crl
        raise Malformed("intel.crl_malformed", "not a certificate revocation list", got=type(error).__name__) from None
    for anchor in anchors.anchors:
        key = serialization.load_der_public_key(anchor.public_key)
        assert isinstance(key, ec.EllipticCurvePublicKey)  # anchors are made of such keys
        try:
            return judge_crl(der, Issuer(name=name, key=key, public_key=anchor.public_key)), anchor.root
        except NotAuthentic:
            continue
    raise NotAuthentic("intel.crl_signature", "the CRL is not signed by a trusted root key")


def crl_in_force(crl: IntelCrl, now: Instant) -> None:
    """The dates of rule 7."""
    if now < crl.validity.not_before:
        raise NotAuthentic(
            "intel.crl_not_yet_valid",
            "the CRL is not valid yet",
            expected=rendered(crl.validity.not_before),
            got=rendered(now),
        )
    if now > crl.validity.not_after:
        raise NotAuthentic(
            "intel.crl_expired",
            "the CRL has expired",
            expected=f"<= {rendered(crl.validity.not_after)}",
            got=rendered(now),
            remedy="fetch the current CRL from Intel's service",
        )
