"""Whose TPM is this? Endorsement key chains, and credential activation in software (TPM 2.0 Library, Part 1, 24).

1. The endorsement key is a restricted decryption key that never leaves its TPM.
2. A path leads from the EK certificate, over certificates the TPM brought along and ones the anchors carry, to an anchor
   that configuration names. Each step: issuer name, signature over SHA-256 or wider, CA flag, path length, key usage,
   dates, no critical extension that is not understood. There is no default anchor.
3. No certificate of the path is revoked by its maker, as far as verification.tpm_revocation can know and must.
4. The EK certificate carries the TCG extended key usage (2.23.133.8.1) and is no CA; its key is the endorsement key.
5. The attestation key is made by the TPM that holds the endorsement key: a secret sealed to the EK under the AK's name
   can be opened only by a TPM that has both (`make_credential`; the caller supplies randomness).

What this does not establish: that chip and host stand in the same place, or that the EK is not revoked later. Of a TPM that
enrolled before `revoked_above` says that (services.verifier_makers); a provider revokes one by its platform record.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.x509.oid import ExtensionOID

try:  # moved out of `modes` in cryptography 47; the TPM's outer wrapping is CFB and nothing else
    from cryptography.hazmat.decrepit.ciphers.modes import CFB
except ImportError:  # pragma: no cover - older library
    from cryptography.hazmat.primitives.ciphers.modes import CFB

from moorline.clock import Instant, to_datetime
from moorline.errors import Malformed, Misconfigured, NotAuthentic, Refused
from moorline.evidence import tpm_structures as tpm
from moorline.rats import EvidenceRoot
from moorline.verification.tpm_revocation import Revocation, judge_path, revoked_on, strong
from moorline.verification.verified import Verified
from moorline.wire.certificates import parse_certificate

EK_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")
MAX_CERTIFICATES: Final = 8
_SAN: Final = ExtensionOID.SUBJECT_ALTERNATIVE_NAME
_UNDERSTOOD: Final = (
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.CERTIFICATE_POLICIES,
    _SAN,
)
_VENDOR: Final = (
    ("gce_gcp_ek_ak_ca_root.der", "594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2"),
    ("gce_gcp_ek_ak_ca_intermediate_v3.der", "c84de8116dfaf5a908f21e810487791f5437e206d00ad8025050cca6bd2ff627"),
)
_EK_SET: Final = tpm.RESTRICTED | tpm.DECRYPT | tpm.FIXED_TPM | tpm.FIXED_PARENT | tpm.SENSITIVE_DATA_ORIGIN
_HASHES: Final[dict[int, HashAlgorithm]] = {
    tpm.ALG_SHA256: SHA256(),
    tpm.ALG_SHA384: SHA384(),
    tpm.ALG_SHA512: SHA512(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmAnchor:
    """A root certificate of a maker of TPMs (DER), what kind of root it is, and intermediates known beside it."""

    certificate: bytes
    root: EvidenceRoot
    intermediates: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndorsementKey:
    """An endorsement key whose certificate leads to an anchor. `digest` is SHA-256 of its SubjectPublicKeyInfo.

    `crls` are the digests of the revocation lists that were looked at; empty where none was.
    """

    public: tpm.Public
    digest: bytes
    certificate: bytes
    anchor: str
    crls: tuple[bytes, ...]


@cache
def vendor_anchors() -> tuple[TpmAnchor, ...]:
    """The makers whose roots are shipped and pinned here: Google's vTPMs, of root `virtual`.

    Others are configured by file.
    """
    root, intermediate = (_shipped(*file) for file in _VENDOR)
    return (TpmAnchor(certificate=root, root=EvidenceRoot.VIRTUAL, intermediates=(intermediate,)),)


def _shipped(name: str, sha256: str) -> bytes:
    data = resources.files("moorline.verification.roots").joinpath(name).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Misconfigured("anchors.vendor_root_changed", "a shipped vendor root is not the pinned one", got=name)
    return data


def endorsement_digest(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo: how platform records name an endorsement key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()


def verify_endorsement(
    ek_public: bytes,
    certificates: tuple[bytes, ...],
    *,
    anchors: tuple[TpmAnchor, ...],
    revocation: Revocation,
    now: Instant,
) -> Verified[EndorsementKey]:
    """The endorsement key `ek_public` (TPMT_PUBLIC), vouched for by an anchor. `certificates`: EK certificate first.

    Raises Malformed (`tpm.*`, `certificate.*`, `ek.certificates`, `ek.crl_*`), Refused("ek.attributes"), NotAuthentic
    (`ek.*`) and Unavailable("ek.crl_missing").
    """
    public = tpm.parse_public(ek_public)
    if public.attributes & _EK_SET != _EK_SET or public.attributes & tpm.SIGN:
        raise Refused(
            "ek.attributes",
            "the endorsement key is not a restricted decryption key of this TPM alone",
            expected="restricted, decrypt, fixedTPM, fixedParent, sensitiveDataOrigin; not sign",
            got=hex(public.attributes),
        )
    if not 0 < len(certificates) <= MAX_CERTIFICATES:
        raise Malformed(
            "ek.certificates", "no endorsement certificate, or too many", expected="1 to 8", got=len(certificates)
        )
    leaf, *brought = (parse_certificate(der) for der in certificates)
    anchor, path = _path(leaf, brought, anchors, now)
    crls = judge_path(path, revocation, known=known_authorities(anchor), root=anchor.root, now=now)
    for certificate in path[:-1]:  # an anchor is trusted for its key, not for what it says
        _require_understood(certificate)
    _require_ek_profile(leaf)
    digest = endorsement_digest(public.key())
    certified = leaf.public_key()
    if not isinstance(certified, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) or endorsement_digest(certified) != digest:
        raise NotAuthentic("ek.key_mismatch", "the certificate is for another endorsement key", expected=digest)
    held = EndorsementKey(
        public=public,
        digest=digest,
        certificate=certificates[0],
        anchor=hashlib.sha256(anchor.certificate).hexdigest(),
        crls=crls,
    )
    used = hashlib.sha256(b"".join((*(one.fingerprint(SHA256()) for one in path), *crls))).digest()
    return Verified._create(held, root=anchor.root, collateral_digest=used)  # noqa: SLF001 - this room's own type


def authority_path(
    chain: list[x509.Certificate], *, anchors: tuple[TpmAnchor, ...], now: Instant
) -> tuple[TpmAnchor, list[x509.Certificate]]:
    """The path from a maker's authority (`chain[0]`) to an anchor, which may be itself; all of it is valid now.

    Raises Malformed("ek.certificates") and NotAuthentic("ek.anchor_unknown" | "ek.certificate_*").
    """
    if not 0 < len(chain) <= MAX_CERTIFICATES:
        raise Malformed("ek.certificates", "no certificate of an authority, or too many", expected="1 to 8", got=len(chain))
    for anchor in anchors:
        if parse_certificate(anchor.certificate) == chain[0]:
            _require_dates(chain[0], now)
            return anchor, chain[:1]
    return _path(chain[0], chain[1:], anchors, now)


def endorsement_path(certificates: tuple[bytes, ...], *, anchors: tuple[TpmAnchor, ...]) -> list[x509.Certificate] | None:
    """The path of an endorsement certificate (first) to an anchor, ended certificates too; None if there is none.

    For what is asked about a TPM that was vouched for before. Raises Malformed (`certificate.*`).
    """
    leaf, *brought = (parse_certificate(der) for der in certificates)
    found = _found_path(leaf, brought, anchors)
    return None if found is None else found[1]


def revoked_above(
    certificates: tuple[bytes, ...], *, anchors: tuple[TpmAnchor, ...], crls: tuple[bytes, ...]
) -> bool | None:
    """Whether lists revoke a certificate between an endorsement key and its anchor; None if no path leads to one.

    Raises what `tpm_revocation.revoked_on` raises.
    """
    path = endorsement_path(certificates, anchors=anchors)
    return None if path is None else revoked_on(path, crls)


def known_authorities(anchor: TpmAnchor) -> list[x509.Certificate]:
    """The authorities that configuration names: an anchor, and the intermediates beside it."""
    return [parse_certificate(der) for der in (anchor.certificate, *anchor.intermediates)]


def make_credential(
    ek: tpm.Public, ak_name: bytes, credential: bytes, *, seed: bytes, ephemeral: ec.EllipticCurvePrivateKey | None = None
) -> tuple[bytes, bytes]:
    """What TPM2_ActivateCredential takes: contents of TPM2B_ID_OBJECT and of TPM2B_ENCRYPTED_SECRET (Part 1, 24.4).

    For an RSA endorsement key `seed` (as long as its name digest, fresh and secret) is encrypted to it; for an ECC one the
    seed comes from ECDH with `ephemeral` (fresh), and `seed` is not used. Raises Refused("ek.unsupported") for other keys.
    """
    held = ek.parameters
    algorithm = _HASHES.get(ek.name_algorithm)
    symmetric, bits, mode = held.symmetric
    if algorithm is None or symmetric != tpm.ALG_AES or mode != tpm.ALG_CFB or len(credential) > algorithm.digest_size:
        raise Refused("ek.unsupported", "no credential can be made for this endorsement key", expected="AES-CFB, SHA-256")
    key = ek.key()
    if isinstance(key, rsa.RSAPublicKey):
        if len(seed) != algorithm.digest_size:
            raise Malformed("ek.seed", "the seed has the wrong length", expected=algorithm.digest_size, got=len(seed))
        oaep = padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=b"IDENTITY\x00")
        secret = key.encrypt(seed, oaep)
    else:
        if ephemeral is None or ephemeral.curve.name != key.curve.name:
            raise Malformed("ek.seed", "an ephemeral key on the curve of the endorsement key is needed")
        seed, secret = _ecc_seed(ek.name_algorithm, key, ephemeral)
    storage = kdfa(ek.name_algorithm, seed, b"STORAGE", ak_name, b"", bits)
    encryptor = Cipher(algorithms.AES(storage), CFB(bytes(16))).encryptor()
    identity = encryptor.update(tpm.sized(credential)) + encryptor.finalize()
    integrity = kdfa(ek.name_algorithm, seed, b"INTEGRITY", b"", b"", algorithm.digest_size * 8)
    mac = hmac.digest(integrity, identity + ak_name, algorithm.name)
    return tpm.sized(mac) + identity, secret


def kdfa(algorithm: int, key: bytes, label: bytes, context_u: bytes, context_v: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2): SP 800-108 in counter mode; `label` without its terminating zero."""
    name = tpm.HASH_NAMES[algorithm]
    made = b""
    for counter in range(1, -(-bits // (tpm.HASH_SIZES[algorithm] * 8)) + 1):
        fixed = label + b"\x00" + context_u + context_v + struct.pack(">I", bits)
        made += hmac.digest(key, struct.pack(">I", counter) + fixed, name)
    return _first_bits(made, bits)


def kdfe(algorithm: int, shared: bytes, label: bytes, party_u: bytes, party_v: bytes, bits: int) -> bytes:
    """KDFe (Part 1, 11.4.10.3): SP 800-56A over a shared x coordinate; `label` without its terminating zero."""
    made = b""
    for counter in range(1, -(-bits // (tpm.HASH_SIZES[algorithm] * 8)) + 1):
        made += tpm.digest(algorithm, struct.pack(">I", counter) + shared + label + b"\x00" + party_u + party_v)
    return _first_bits(made, bits)


def _first_bits(made: bytes, bits: int) -> bytes:
    size = -(-bits // 8)
    spare = size * 8 - bits
    head = made[:size]
    return bytes([head[0] & (0xFF >> spare)]) + head[1:] if spare else head


def _ecc_seed(algorithm: int, key: ec.EllipticCurvePublicKey, ephemeral: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    width = (key.curve.key_size + 7) // 8
    mine, theirs = ephemeral.public_key().public_numbers(), key.public_numbers()
    x, y = mine.x.to_bytes(width, "big"), mine.y.to_bytes(width, "big")
    shared = ephemeral.exchange(ec.ECDH(), key)
    bits = tpm.HASH_SIZES[algorithm] * 8
    seed = kdfe(algorithm, shared, b"IDENTITY", x, theirs.x.to_bytes(width, "big"), bits)
    return seed, tpm.sized(x) + tpm.sized(y)


def _path(
    leaf: x509.Certificate, brought: list[x509.Certificate], anchors: tuple[TpmAnchor, ...], now: Instant
) -> tuple[TpmAnchor, list[x509.Certificate]]:
    """Every anchor is tried; the longest path is bounded by MAX_CERTIFICATES. Dates are judged on the path found."""
    found = _found_path(leaf, brought, anchors)
    if found is not None:
        for certificate in found[1]:
            _require_dates(certificate, now)
        return found
    raise NotAuthentic(
        "ek.anchor_unknown",
        "no path leads from the endorsement certificate to a configured maker of TPMs",
        expected=f"one of {len(anchors)} anchors",
        got=leaf.issuer.rfc4514_string(),
        remedy="configure the maker's root certificate, if this maker is to be trusted",
    )


def _found_path(
    leaf: x509.Certificate, brought: list[x509.Certificate], anchors: tuple[TpmAnchor, ...]
) -> tuple[TpmAnchor, list[x509.Certificate]] | None:
    for anchor in anchors:
        top = parse_certificate(anchor.certificate)
        pool = [top, *brought, *(parse_certificate(der) for der in anchor.intermediates)]
        path = _climb(leaf, pool, top)
        if path is not None:
            return anchor, path
    return None


def _climb(leaf: x509.Certificate, pool: list[x509.Certificate], top: x509.Certificate) -> list[x509.Certificate] | None:
    path = [leaf]
    while len(path) <= MAX_CERTIFICATES:
        issuer = next((one for one in pool if one not in path and _issued(path[-1], one, below=len(path) - 1)), None)
        if issuer is None:
            return None
        path.append(issuer)
        if issuer == top:
            return path
    return None


def _issued(subject: x509.Certificate, issuer: x509.Certificate, *, below: int) -> bool:
    if subject.issuer != issuer.subject or not _is_ca(issuer, below) or not strong(subject.signature_hash_algorithm):
        return False
    try:
        subject.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _is_ca(certificate: x509.Certificate, below: int) -> bool:
    """`below` counts the intermediates between this certificate and the leaf."""
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    try:
        signs = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        signs = True  # RFC 5280 4.2.1.3: without the extension every usage is allowed
    return basic.ca and signs and (basic.path_length is None or below <= basic.path_length)


def _require_dates(certificate: x509.Certificate, now: Instant) -> None:
    at = to_datetime(now)
    if at < certificate.not_valid_before_utc:
        raise NotAuthentic(
            "ek.certificate_not_yet_valid",
            "a certificate above the endorsement key begins in the future",
            expected=f">= {certificate.not_valid_before_utc}",
            got=at,
            remedy="look at this machine's clock",
        )
    if at > certificate.not_valid_after_utc:
        raise NotAuthentic(
            "ek.certificate_expired",
            "a certificate above the endorsement key has expired",
            expected=f"<= {certificate.not_valid_after_utc}",
            got=at,
        )


def _require_understood(certificate: x509.Certificate) -> None:
    unknown = [one.oid.dotted_string for one in certificate.extensions if one.critical and one.oid not in _UNDERSTOOD]
    if unknown:
        raise NotAuthentic("ek.critical_extension", "a certificate has critical rules that are not understood", got=unknown)


def _require_ek_profile(leaf: x509.Certificate) -> None:
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        basic = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound as error:
        raise NotAuthentic("ek.profile", "the endorsement certificate lacks an extension", got=error.oid._name) from None  # noqa: SLF001
    if EK_USAGE not in usages or basic.ca:
        raise NotAuthentic(
            "ek.profile", "this is no certificate of an endorsement key", expected=f"usage {EK_USAGE.dotted_string}, no CA"
        )
    try:
        leaf.extensions.get_extension_for_oid(_SAN)
    except x509.ExtensionNotFound:
        raise NotAuthentic(
            "ek.profile", "the endorsement certificate does not name maker and model", expected="SAN"
        ) from None
