"""Quotes of TPMs that a verifier did not enrol itself.

1.  The key is known: handed over by whoever enrolled it (`given_key`), certified up to a root of Google's
    (`certified_key`), or named by the runtime claims of an Azure guest whose hardware report holds the hash of those
    claims (`bound_key`).
2.  Scheme and hash of the signature are those of the key, or the one that the platform always uses; never what the blob
    says. SHA-1 only where the caller says so by name: `Sha1.ACCEPTED` is for old evidence of others, never for a live
    decision.
3.  The quote is a TPMS_ATTEST of type quote, its magic first, and its signature holds.
4.  qualifyingData is the nonce, all of it.
5.  Where PCR values came with it, they are exactly those selected, of one bank, and hash to the digest in the quote.

The TD report inside the HCL report of a TDX guest has no signature; the TD quote has, and both must be of one domain
(`require_same_domain`).

A vTPM is only as good as what it rests on: `root` is virtual for a cloud's certificate, and that of the hardware
evidence for a bound key. Not established here: what the PCRs mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.clock import Instant
from moorline.digest import same
from moorline.errors import Misconfigured, NotAuthentic
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.azure_vtpm import ClaimsHash, HclReport, RuntimeClaims
from moorline.evidence.tdx_quote import TdReport
from moorline.evidence.tpm_quote import Quote, parse_quote
from moorline.rats import EvidenceRoot
from moorline.verification import certificate_path
from moorline.verification.verified import Verified

_MIN_RSA_BITS: Final = 2048
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    tpm.ALG_SHA1: hashes.SHA1(),  # noqa: S303 - rule 2
    tpm.ALG_SHA256: hashes.SHA256(),
    tpm.ALG_SHA384: hashes.SHA384(),
    tpm.ALG_SHA512: hashes.SHA512(),
}
_CLAIMS_HASHES: Final = {
    ClaimsHash.SHA256: hashlib.sha256,
    ClaimsHash.SHA384: hashlib.sha384,
    ClaimsHash.SHA512: hashlib.sha512,
}
_GCE: Final = {
    "gce_tpm_ek_root_1.der": "9bd5285f8fb18502a7947e621ffd470266f49fcd3b73e19a190f690ad32a7caf",
    "gce_gcp_ek_ak_ca_root.der": "594759594b9b61524f6c8ef668f7177f7b9066bc0674f2f49fe9e052be78beb2",
}
_GCE_INTERMEDIATES: Final = {
    "gce_tpm_ek_intermediate_2.der": "5d8dbcf8c8053dd8ffad711b6219355032b7122c34cac0f90ccb49def69ec504",
    "gce_tpm_ek_intermediate_3.der": "7132b6ea71101f6c51bb58f98c3798c19b65be510eca0344318900510b593178",
    "gce_gcp_ek_ak_ca_intermediate_v3.der": "c84de8116dfaf5a908f21e810487791f5437e206d00ad8025050cca6bd2ff627",
}


class Sha1(Enum):
    """Whether a signature over SHA-1 is taken (rule 2)."""

    REFUSED = "refused"
    ACCEPTED = "accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoteKey:
    """A key whose quotes are believed, resting on `root`. `scheme` None: RSASSA, RSAPSS or ECDSA, by kind of key."""

    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    scheme: int | None
    hash_algorithm: int | None
    root: EvidenceRoot
    collateral_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedQuote:
    """A quote that holds. `pcrs` are the values it proves, empty where none came with it: then only the digest is proven."""

    quote: Quote
    bank: int
    selection: tuple[int, ...]
    pcrs: Mapping[int, bytes]


def given_key(spki: bytes, *, root: EvidenceRoot) -> QuoteKey:
    """The key in a DER SubjectPublicKeyInfo, that somebody enrolled. Raises NotAuthentic("ak.unusable")."""
    try:
        key = serialization.load_der_public_key(spki)
    except Exception as error:  # ValueError, UnsupportedAlgorithm and others
        raise NotAuthentic("ak.unusable", "not a public key", got=type(error).__name__) from None
    return QuoteKey(
        key=_usable(key), scheme=None, hash_algorithm=None, root=root, collateral_digest=hashlib.sha256(spki).digest()
    )


def given_public(ak_public: bytes, *, root: EvidenceRoot) -> QuoteKey:
    """As `given_key`, of a TPMT_PUBLIC, whose scheme binds. Raises Malformed (`tpm.*`) and NotAuthentic (`ak.*`).

    The key has to be a restricted signing key of its TPM: any other could have signed what looks like a quote.
    """
    public = tpm.parse_public(ak_public)
    needed = tpm.RESTRICTED | tpm.SIGN | tpm.FIXED_TPM | tpm.FIXED_PARENT
    if public.attributes & needed != needed or public.attributes & tpm.DECRYPT:
        raise NotAuthentic("ak.not_restricted", "the key could sign what its TPM did not make", got=hex(public.attributes))
    held = public.parameters
    return QuoteKey(
        key=_usable(public.key()),
        scheme=held.scheme,
        hash_algorithm=held.scheme_hash,
        root=root,
        collateral_digest=hashlib.sha256(public.name).digest(),
    )


def certified_key(
    ak_public: bytes, certificate: bytes, supplied: tuple[bytes, ...], *, roots: tuple[bytes, ...], now: Instant
) -> QuoteKey:
    """The key of `ak_public` (TPMT_PUBLIC), certified up to one of `roots`; all DER, only `roots` trusted.

    Raises Malformed, NotAuthentic (`ak.*`, `path.*`). A virtual TPM's certificate makes root `virtual`.
    """
    key = given_public(ak_public, root=EvidenceRoot.VIRTUAL)
    path = certificate_path.judge_path(_path(certificate, supplied, roots))
    certificate_path.in_force(path, now)
    if _spki(path.key) != _spki(key.key):
        raise NotAuthentic("ak.certificate_mismatch", "the certificate is of another key than the one that signs")
    return key


def bound_key(hcl: HclReport, claims: RuntimeClaims, *, report_data: bytes, root: EvidenceRoot) -> QuoteKey:
    """The vTPM key that `claims` names, if `report_data` of verified hardware evidence holds the hash of `hcl.claims`.

    `report_data` and `root` come from that verification. Raises NotAuthentic("vtpm.claims_mismatch", "ak.unusable").
    """
    digest = _CLAIMS_HASHES[hcl.claims_hash](hcl.claims).digest()
    if not same(report_data, digest.ljust(64, b"\x00")):
        raise NotAuthentic("vtpm.claims_mismatch", "the hardware report is not about these runtime claims")
    try:
        exponent = int.from_bytes(claims.exponent, "big")
        key = rsa.RSAPublicNumbers(exponent, int.from_bytes(claims.modulus, "big")).public_key()
    except ValueError as error:
        raise NotAuthentic("ak.unusable", "the runtime claims name no usable key", got=str(error)) from None
    return QuoteKey(
        key=_usable(key),
        scheme=tpm.ALG_RSASSA,
        hash_algorithm=tpm.ALG_SHA256,
        root=root,
        collateral_digest=hashlib.sha256(hcl.claims).digest(),
    )


def require_same_domain(hcl: HclReport, quoted: TdReport) -> None:
    """Returns if the TD report in `hcl` is the one that was quoted: report data and TDINFO (Intel TDX module ABI, TDREPORT).

    Raises NotAuthentic("vtpm.td_report_mismatch"). The parts about the TDX module are not compared: the quote has its own.
    """
    body = quoted.serialized()
    if hcl.hardware[128:192] != quoted.report_data or hcl.hardware[512:912] != body[120:520]:
        raise NotAuthentic("vtpm.td_report_mismatch", "the HCL report is of another domain than the TD quote")


def verify_foreign_quote(
    message: bytes, signature: tpm.Signature, pcrs: Mapping[int, bytes], *, key: QuoteKey, nonce: bytes, sha1: Sha1
) -> Verified[VerifiedQuote]:
    """The quote in `message`, by `key` and for `nonce`; rules 2 to 5. With no `pcrs`, only the digest is proven.

    Raises Malformed (`tpm.*`) and NotAuthentic (`tpm.*`).
    """
    quote = parse_quote(message)
    _signed(message, signature, key, sha1)
    if not same(quote.extra_data, nonce):
        raise NotAuthentic("tpm.nonce_mismatch", "the quote answers another challenge", got=quote.extra_data)
    bank, selection = _selection(quote)
    proven = {index: pcrs[index] for index in selection if index in pcrs} if pcrs else {}
    if pcrs:
        _values_hold(quote, bank, selection, proven, signature.hash_algorithm)
    facts = VerifiedQuote(quote=quote, bank=bank, selection=selection, pcrs=proven)
    return Verified._create(facts, root=key.root, collateral_digest=key.collateral_digest)  # noqa: SLF001 - here


@cache
def gce_roots() -> tuple[bytes, ...]:
    """Google's roots for keys of its virtual TPMs, DER, as shipped. Raises Misconfigured if a file is not the pinned one."""
    return tuple(_shipped(name, pinned) for name, pinned in _GCE.items())


@cache
def gce_intermediates() -> tuple[bytes, ...]:
    """Google's intermediates, DER: not trusted, only there to complete a path."""
    return tuple(_shipped(name, pinned) for name, pinned in _GCE_INTERMEDIATES.items())


def _shipped(name: str, sha256: str) -> bytes:
    data = resources.files("moorline.verification.roots").joinpath(name).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Misconfigured("vtpm.vendor_root_changed", "a shipped certificate is not the pinned one", got=name)
    return data


def _usable(key: object) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key
    raise NotAuthentic("ak.unusable", "the key is not RSA of 2048 bits or elliptic", got=type(key).__name__)


def _signed(message: bytes, signature: tpm.Signature, key: QuoteKey, sha1: Sha1) -> None:
    elliptic = isinstance(key.key, ec.EllipticCurvePublicKey)
    schemes = {key.scheme} if key.scheme else {tpm.ALG_ECDSA} if elliptic else {tpm.ALG_RSASSA, tpm.ALG_RSAPSS}
    weak = signature.hash_algorithm == tpm.ALG_SHA1 and sha1 is Sha1.REFUSED
    other_hash = key.hash_algorithm is not None and signature.hash_algorithm != key.hash_algorithm
    if signature.scheme not in schemes or signature.hash_algorithm not in _HASHES or weak or other_hash:
        raise NotAuthentic(
            "tpm.scheme_mismatch",
            "the signature is of a scheme or hash that is not accepted for this key",
            got=f"{signature.scheme:#x}/{signature.hash_algorithm:#x}",
        )
    chosen = _HASHES[signature.hash_algorithm]
    try:
        if isinstance(key.key, ec.EllipticCurvePublicKey):
            numbers = int.from_bytes(signature.first, "big"), int.from_bytes(signature.second, "big")
            key.key.verify(encode_dss_signature(*numbers), message, ec.ECDSA(chosen))
        elif signature.scheme == tpm.ALG_RSASSA:
            key.key.verify(signature.first, message, padding.PKCS1v15(), chosen)
        else:
            pss = padding.PSS(mgf=padding.MGF1(chosen), salt_length=padding.PSS.AUTO)
            key.key.verify(signature.first, message, pss, chosen)
    except InvalidSignature:
        raise NotAuthentic("tpm.signature_invalid", "the quote is not signed by this key") from None


def _selection(quote: Quote) -> tuple[int, tuple[int, ...]]:
    if len(quote.selections) != 1:
        raise NotAuthentic("tpm.selection_mismatch", "the quote does not cover exactly one bank", got=len(quote.selections))
    chosen = quote.selections[0]
    return chosen.bank, chosen.indices


def _values_hold(
    quote: Quote, bank: int, selection: tuple[int, ...], pcrs: Mapping[int, bytes], hash_algorithm: int
) -> None:
    width = tpm.HASH_SIZES.get(bank)
    if tuple(sorted(pcrs)) != selection or any(len(value) != width for value in pcrs.values()):
        raise NotAuthentic("tpm.selection_mismatch", "the PCR values are not those of the quote", expected=selection)
    digest = tpm.digest(hash_algorithm, b"".join(pcrs[index] for index in selection))
    if not same(digest, quote.pcr_digest):
        raise NotAuthentic("tpm.pcr_digest_mismatch", "the PCR values are not the quoted ones", expected=quote.pcr_digest)


def _spki(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _path(leaf: bytes, supplied: tuple[bytes, ...], roots: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Leaf, issuers and root in order, by names; whether they hold together is for `certificate_path` to say."""
    path = [leaf]
    named = [(der, certificate_path.parsed(der)) for der in (*roots, *supplied)]
    for _ in range(certificate_path.MAX_PATH):
        issuer = certificate_path.parsed(path[-1]).issuer
        above = next((der for der, one in named if one.subject == issuer and der not in path), None)
        if above is None:
            break
        path.append(above)
        if above in roots:
            return tuple(path)
    raise NotAuthentic("ak.chain", "the key's certificate leads to no trusted root", expected="a root of the cloud")
