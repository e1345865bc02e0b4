"""Whether a quote is authentic, fresh, and about exactly what was asked (TPM 2.0 Library, Part 1, 18).

1. Magic and type come before any other field, and the whole structure is consumed (evidence.tpm_quote).
2. Scheme and hash are those the verifier enrolled the key with, never those a blob names.
3. The signature is by the enrolled attestation key, which is restricted: it signs only what its TPM made.
4. qualifyingData is the challenge, all of it, compared in constant time in one encoding.
5. The selection is one bank, the one asked for, and exactly the indices asked for.
6. pcrDigest is recomputed from the values that came with it; nothing below looks at any other value.
7. resetCount, restartCount and clock never go back against what the verifier saw last (`verify_progress`).

A quote proves the state of the machine that holds the TPM. It proves nothing about which process holds a key there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Refused
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_quote import ClockInfo, NvCertification, Quote, parse_nv_certification, parse_quote
from moorline.rats import EvidenceRoot
from moorline.verification.verified import Verified

MIN_NONCE: Final = 20
_MIN_RSA_BITS: Final = 2048
_AK_SET: Final = tpm.RESTRICTED | tpm.SIGN | tpm.FIXED_TPM | tpm.FIXED_PARENT | tpm.SENSITIVE_DATA_ORIGIN
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    tpm.ALG_SHA256: hashes.SHA256(),
    tpm.ALG_SHA384: hashes.SHA384(),
    tpm.ALG_SHA512: hashes.SHA512(),
}
_ECDSA: Final = {algorithm: ec.ECDSA(chosen) for algorithm, chosen in _HASHES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationKey:
    """A key the verifier enrolled: its TPM name, the scheme and hash it must sign with, and what its enrolment rests on."""

    name: bytes
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    scheme: int
    hash_algorithm: int
    root: EvidenceRoot


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotedPcrs:
    """What a quote establishes: these values of this bank, at this clock, in this TPM."""

    ak_name: bytes
    bank: int
    pcrs: Mapping[int, bytes]
    clock: ClockInfo
    firmware_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedNv:
    """What an NV certification establishes: the contents of the index with exactly this definition."""

    ak_name: bytes
    contents: bytes
    clock: ClockInfo


@lru_cache(maxsize=4096)  # bounded: one entry a host polled by this process
def attestation_key(ak_public: bytes, root: EvidenceRoot) -> AttestationKey:
    """The key of an enrolled TPMT_PUBLIC. `root` is what the enrolment (EK chain, credential activation) rests on.

    Raises Malformed (`tpm.*`) and Refused("ak.attributes" | "ak.scheme") for keys that could sign something a TPM did not
    make. It does not establish that the key is in any TPM: enrolment does.
    """
    public = tpm.parse_public(ak_public)
    require_ak_attributes(public)
    held = public.parameters
    return AttestationKey(name=public.name, key=public.key(), scheme=held.scheme, hash_algorithm=held.scheme_hash, root=root)


def require_ak_attributes(public: tpm.Public) -> None:
    """Raises Refused unless the key is a restricted signing key that never leaves its TPM, of a strong scheme."""
    if public.attributes & _AK_SET != _AK_SET or public.attributes & tpm.DECRYPT:
        raise Refused(
            "ak.attributes",
            "the attestation key could sign something its TPM did not make, or leave it",
            expected="restricted, sign, fixedTPM, fixedParent, sensitiveDataOrigin; not decrypt",
            got=hex(public.attributes),
            remedy="create a restricted signing key",
        )
    held = public.parameters
    if isinstance(held, tpm.RsaParameters):
        strong = held.scheme in (tpm.ALG_RSASSA, tpm.ALG_RSAPSS) and held.key_bits >= _MIN_RSA_BITS
    else:
        strong = held.scheme == tpm.ALG_ECDSA
    if not strong or held.scheme_hash not in _HASHES or public.name_algorithm not in _HASHES:
        raise Refused(
            "ak.scheme",
            "the attestation key has a scheme that is not accepted",
            expected="ECDSA, or RSASSA or RSAPSS with 2048 bits; SHA-256 or longer",
            got=f"{held.scheme:#x} with {held.scheme_hash:#x}",
        )


def verify_quote(
    quoted: bytes,
    signature: bytes,
    pcrs: Mapping[int, bytes],
    *,
    key: AttestationKey,
    qualifying: bytes,
    bank: int,
    selection: tuple[int, ...],
    minimum_nonce: int = MIN_NONCE,
) -> Verified[QuotedPcrs]:
    """The PCR values of `selection` (ascending) in `bank`, proven by `key` for the challenge `qualifying`.

    All arguments before the star are untrusted. Raises Malformed (`tpm.*`), NotAuthentic (`tpm.signature_invalid`,
    `tpm.scheme_mismatch`, `tpm.nonce_mismatch`, `tpm.selection_mismatch`, `tpm.pcr_digest_mismatch`).
    """
    if len(qualifying) < minimum_nonce:
        raise Malformed(
            "tpm.nonce_too_short", "a challenge is too short to be one", expected=minimum_nonce, got=len(qualifying)
        )
    quote = parse_quote(quoted)
    _verify_signature(quoted, signature, key)
    _require_nonce(quote, qualifying)
    require_selection(quote, bank, selection)
    _require_values(quote, pcrs, bank, selection, key.hash_algorithm)
    facts = QuotedPcrs(
        ak_name=key.name, bank=bank, pcrs=dict(pcrs), clock=quote.clock, firmware_version=quote.firmware_version
    )
    return Verified._create(facts, root=key.root, collateral_digest=hashlib.sha256(key.name).digest())  # noqa: SLF001 - here


def verify_nv_certification(
    certified: bytes, signature: bytes, *, key: AttestationKey, qualifying: bytes, index: tpm.NvPublic
) -> Verified[CertifiedNv]:
    """The whole contents of the NV index with exactly the definition `index`, proven by `key` for `qualifying`.

    An index that was deleted and made again with other attributes has another name and is refused; one made again with the
    same attributes by the owner is not told apart, which is why location is graded `asserted` at most (PROTOCOLS.md 8).
    """
    found = parse_nv_certification(certified)
    _verify_signature(certified, signature, key)
    _require_nonce(found, qualifying)
    if not same(found.index_name, index.name):
        raise NotAuthentic(
            "tpm.nv_name_mismatch", "another NV index was certified", expected=index.name, got=found.index_name
        )
    if found.offset != 0 or len(found.contents) != index.size:
        raise NotAuthentic("tpm.nv_partial", "not the whole NV index was certified", expected=index.size)
    facts = CertifiedNv(ak_name=key.name, contents=found.contents, clock=found.clock)
    return Verified._create(facts, root=key.root, collateral_digest=hashlib.sha256(key.name).digest())  # noqa: SLF001 - here


def verify_progress(before: ClockInfo | None, now: ClockInfo) -> bool:
    """True if the machine booted (or is new) since `before`.

    Raises NotAuthentic("tpm.clock_regressed") if counters went back.

    A TPM that lost power without shutdown may show an earlier clock after its reset; it then says so itself (`safe`).
    """
    if before is None:
        return True
    booted = now.reset_count != before.reset_count
    regressed = (
        now.reset_count < before.reset_count
        or (not booted and now.restart_count < before.restart_count)
        or (now.clock < before.clock and (not booted or now.safe))
    )
    if regressed:
        raise NotAuthentic(
            "tpm.clock_regressed",
            "the counters of the TPM went back",
            expected=f">= {before.reset_count}/{before.restart_count}/{before.clock}",
            got=f"{now.reset_count}/{now.restart_count}/{now.clock}",
            remedy="find out whether an old state of the TPM was restored",
        )
    return booted


def require_selection(quote: Quote, bank: int, selection: tuple[int, ...]) -> None:
    """Raises NotAuthentic("tpm.selection_mismatch") unless the quote covers exactly `selection` of exactly `bank`."""
    chosen = quote.selections
    if len(chosen) != 1 or chosen[0].bank != bank or chosen[0].octets.rstrip(b"\x00") != _octets(selection):
        raise NotAuthentic(
            "tpm.selection_mismatch",
            "the quote covers other PCRs or another bank than asked for",
            expected=f"{bank:#x}:{','.join(map(str, selection))}",
            got="; ".join(f"{one.bank:#x}:{','.join(map(str, one.indices))}" for one in chosen),
        )


def _verify_signature(message: bytes, blob: bytes, key: AttestationKey) -> None:
    signature = tpm.parse_signature(blob)
    if signature.scheme != key.scheme or signature.hash_algorithm != key.hash_algorithm:
        raise NotAuthentic(
            "tpm.scheme_mismatch",
            "the signature names another scheme than the enrolled key has",
            expected=f"{key.scheme:#x}/{key.hash_algorithm:#x}",
            got=f"{signature.scheme:#x}/{signature.hash_algorithm:#x}",
        )
    try:
        if isinstance(key.key, ec.EllipticCurvePublicKey):
            numbers = int.from_bytes(signature.first, "big"), int.from_bytes(signature.second, "big")
            key.key.verify(encode_dss_signature(*numbers), message, _ECDSA[key.hash_algorithm])
        else:
            chosen = _HASHES[key.hash_algorithm]
            scheme = (
                padding.PKCS1v15()
                if key.scheme == tpm.ALG_RSASSA
                else padding.PSS(mgf=padding.MGF1(chosen), salt_length=padding.PSS.AUTO)
            )
            key.key.verify(signature.first, message, scheme, chosen)
    except InvalidSignature:
        raise NotAuthentic(
            "tpm.signature_invalid",
            "the attestation is not signed by the enrolled key",
            remedy="enrol the host again if its TPM was replaced on purpose",
        ) from None


def _require_nonce(attested: Quote | NvCertification, qualifying: bytes) -> None:
    if not same(attested.extra_data, qualifying):
        raise NotAuthentic(
            "tpm.nonce_mismatch",
            "the attestation answers another challenge",
            expected=qualifying,
            got=attested.extra_data,
            remedy="ask for a fresh challenge and quote again",
        )


def _require_values(
    quote: Quote, pcrs: Mapping[int, bytes], bank: int, selection: tuple[int, ...], hash_algorithm: int
) -> None:
    width = tpm.HASH_SIZES.get(bank)
    if tuple(sorted(pcrs)) != selection or any(len(value) != width for value in pcrs.values()):
        raise NotAuthentic(
            "tpm.selection_mismatch", "the PCR values are not those asked for", expected=selection, got=sorted(pcrs)
        )
    # Part 3, TPM2_Quote: pcrDigest is made with the hash of the signing scheme, not of the bank.
    digest = tpm.digest(hash_algorithm, b"".join([pcrs[index] for index in selection]))
    if not same(digest, quote.pcr_digest):
        raise NotAuthentic(
            "tpm.pcr_digest_mismatch", "the PCR values are not the quoted ones", expected=quote.pcr_digest, got=digest
        )


@lru_cache(maxsize=256)  # bounded: profiles choose from few selections
def _octets(selection: tuple[int, ...]) -> bytes:
    return tpm.select(0, selection).octets.rstrip(b"\x00")
