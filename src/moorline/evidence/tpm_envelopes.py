"""TPM quotes in the envelopes of other projects: go-tpm-tools, go-attestation, Trustee, EnactTrust, tpm2-tools. No trust.

Each parser gives the same thing, `QuotedEvidence`: TPMS_ATTEST and TPMT_SIGNATURE as they came, PCR values by bank, a
boot log, and whatever names the key. None of it is trusted; all parsers raise only Malformed.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence.tpm_structures import ALG_SHA1, ALG_SHA256, HASH_SIZES

_MAX: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedQuote:
    """One quote: TPMS_ATTEST, TPMT_SIGNATURE, and the PCR values that came with it (empty where none did)."""

    message: bytes
    signature: bytes
    bank: int | None
    pcrs: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotedEvidence:
    """What an envelope holds; None or empty where it has no such part. `ak_public` is TPMT_PUBLIC, `ak_spki` a DER key."""

    quotes: tuple[SignedQuote, ...]
    ak_public: bytes | None
    ak_spki: bytes | None
    certificates: tuple[bytes, ...]
    event_log: bytes | None
    node_id: bytes | None


def parse_gotpm(data: bytes) -> QuotedEvidence:
    """The Attestation message of go-tpm-tools (protobuf): key, quotes, log, certificate of the key and its issuers."""
    public: bytes | None = None
    log: bytes | None = None
    quotes: list[SignedQuote] = []
    certificates: list[bytes] = []
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if (number == 1 and public is not None) or (number == 3 and log is not None):
            raise Malformed("tpm.envelope", "the attestation has a part twice", got=number)
        if number == 1:
            public = value
        elif number == 2:
            quotes.append(_gotpm_quote(value))
        elif number == 3:
            log = value
        elif number in (6, 7):
            certificates.append(value)
    if public is None or not quotes:
        raise Malformed("tpm.envelope", "the attestation lacks a key or a quote")
    return QuotedEvidence(
        quotes=tuple(quotes),
        ak_public=public,
        ak_spki=None,
        certificates=tuple(certificates),
        event_log=log,
        node_id=None,
    )


def parse_goattest(data: bytes) -> QuotedEvidence:
    """The dump of go-attestation (JSON): key, one quote, PCRs of one bank, log."""
    document = _json(data)
    key, quote, log = (_object(document, name) for name in ("AK", "Quote", "Log"))
    bank = quote.get("Alg")
    pcrs = log.get("PCRs")
    if not isinstance(bank, int) or bank not in HASH_SIZES or not isinstance(pcrs, list):
        raise Malformed("tpm.envelope", "the dump names no bank or no PCRs")
    return QuotedEvidence(
        quotes=(
            SignedQuote(
                message=_base64(quote, "Quote"),
                signature=_base64(quote, "Signature"),
                bank=bank,
                pcrs=dict(_goattest_pcr(item) for item in pcrs),
            ),
        ),
        ak_public=_base64(key, "Public"),
        ak_spki=None,
        certificates=(),
        event_log=_base64(log, "Raw"),
        node_id=None,
    )


def parse_trustee(data: bytes) -> QuotedEvidence:
    """The TPM evidence of Trustee (JSON): key as SubjectPublicKeyInfo, one quote over the SHA-256 bank."""
    document = _json(data)
    quote = _object(document, "tpm_quote")
    pcrs = quote.get("pcrs")
    if not isinstance(pcrs, list) or len(pcrs) > 32:
        raise Malformed("tpm.envelope", "the quote has no list of PCRs")
    return QuotedEvidence(
        quotes=(
            SignedQuote(
                message=_base64(quote, "message"),
                signature=_base64(quote, "signature"),
                bank=ALG_SHA256,
                pcrs={index: _hex(value) for index, value in enumerate(pcrs)},
            ),
        ),
        ak_public=None,
        ak_spki=_base64(document, "ak_public"),
        certificates=(),
        event_log=None,
        node_id=None,
    )


def parse_keylime(data: bytes) -> QuotedEvidence:
    """Keylime's quote string: `r`, then quote, signature and PCR values in base64, with colons between."""
    parts = data.strip().split(b":")
    if len(data) > _MAX or len(parts) != 3 or not parts[0].startswith(b"r"):
        raise Malformed("tpm.envelope", "not a quote of Keylime", expected="r<quote>:<signature>:<PCRs>")
    try:
        message, signature, values = (base64.b64decode(part, validate=True) for part in (parts[0][1:], *parts[1:]))
    except (binascii.Error, ValueError):
        raise Malformed("tpm.envelope", "a part of the quote is not base64") from None
    banks = parse_tpm2_tools_pcrs(values)
    if len(banks) != 1:
        raise Malformed("tpm.pcr_file", "values of more than one bank", got=len(banks))
    ((bank, pcrs),) = banks.items()
    return QuotedEvidence(
        quotes=(SignedQuote(message=message, signature=signature, bank=bank, pcrs=pcrs),),
        ak_public=None,
        ak_spki=None,
        certificates=(),
        event_log=None,
        node_id=None,
    )


def parse_enacttrust(data: bytes) -> QuotedEvidence:
    """EnactTrust's token: node id of 16 bytes, TPMS_ATTEST behind its length, TPMT_SIGNATURE. No PCR values."""
    if len(data) < 18:
        raise Malformed("tpm.envelope", "the token is too short", got=len(data))
    end = 18 + int.from_bytes(data[16:18], "big")
    if end >= len(data):
        raise Malformed("tpm.envelope", "the token ends within its quote", expected=end, got=len(data))
    return QuotedEvidence(
        quotes=(SignedQuote(message=data[18:end], signature=data[end:], bank=None, pcrs={}),),
        ak_public=None,
        ak_spki=None,
        certificates=(),
        event_log=None,
        node_id=data[:16],
    )


_SELECTION: Final = struct.Struct("<HB4sx")
_DIGESTS: Final = 8
_DIGEST: Final = struct.Struct("<H64s")


def parse_tpm2_tools_pcrs(data: bytes) -> dict[int, dict[int, bytes]]:
    """PCR values as tpm2-tools writes them (`tpm2_quote -o`): a TPML_PCR_SELECTION, then lists of digests, in C structs."""
    banks = _selected(data)
    values = _digests(data[4 + 16 * _SELECTION.size :])
    found: dict[int, dict[int, bytes]] = {}
    for bank, indices in banks:
        for index in indices:
            value = next(values, None)
            if value is None or len(value) != HASH_SIZES[bank]:
                raise Malformed("tpm.pcr_file", "the file has too few values, or of the wrong length", got=index)
            found.setdefault(bank, {})[index] = value
    if next(values, None) is not None:
        raise Malformed("tpm.pcr_file", "the file has more values than it selects")
    return found


def serialize_tpm2_tools_pcrs(bank: int, pcrs: Mapping[int, bytes]) -> bytes:
    """Values of one bank in the form that `parse_tpm2_tools_pcrs` reads, as `tpm2_quote -o` writes them."""
    chosen = sum(1 << index for index in pcrs).to_bytes(4, "little")
    selections = _SELECTION.pack(bank, 3, chosen) + bytes(15 * _SELECTION.size)
    values = [pcrs[index] for index in sorted(pcrs)]
    lists = [values[at : at + _DIGESTS] for at in range(0, len(values), _DIGESTS)]
    written = b"".join(
        struct.pack("<I", len(held))
        + b"".join(_DIGEST.pack(len(value), value) for value in held)
        + bytes((_DIGESTS - len(held)) * _DIGEST.size)
        for held in lists
    )
    return struct.pack("<I", 1) + selections + struct.pack("<I", len(lists)) + written


def _selected(data: bytes) -> list[tuple[int, list[int]]]:
    if len(data) < 4 + 16 * _SELECTION.size + 4:
        raise Malformed("tpm.pcr_file", "not a file of PCR values", got=len(data))
    count = int.from_bytes(data[:4], "little")
    if not 0 < count <= 16:
        raise Malformed("tpm.pcr_file", "an impossible number of banks", got=count)
    banks: list[tuple[int, list[int]]] = []
    for position in range(count):
        bank, size, octets = _SELECTION.unpack_from(data, 4 + position * _SELECTION.size)
        if bank not in HASH_SIZES or size > 4:
            raise Malformed("tpm.pcr_file", "an unknown bank", got=hex(bank))
        banks.append((bank, [index for index in range(8 * size) if octets[index // 8] >> (index % 8) & 1]))
    return banks


def _digests(data: bytes) -> Iterator[bytes]:
    count = int.from_bytes(data[:4], "little")
    width = 4 + _DIGESTS * _DIGEST.size
    if len(data) != 4 + count * width:
        raise Malformed("tpm.pcr_file", "the lists of values are not whole", expected=4 + count * width, got=len(data))
    for position in range(count):
        start = 4 + position * width
        held = int.from_bytes(data[start : start + 4], "little")
        if held > _DIGESTS:
            raise Malformed("tpm.pcr_file", "a list has more values than fit", got=held)
        for number in range(held):
            size, value = _DIGEST.unpack_from(data, start + 4 + number * _DIGEST.size)
            if size > 64:
                raise Malformed("tpm.pcr_file", "a value is too long", got=size)
            yield value[:size]


# ---------------------------------------------------------------- protobuf, as far as it is needed


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message: varints and length-delimited fields; others are Malformed."""
    if len(data) > _MAX:
        raise Malformed("tpm.envelope", "the attestation is too large", expected=f"<= {_MAX}", got=len(data))
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2:
            if value > len(data) - at:
                raise Malformed("tpm.envelope", "a field of the attestation ends too early", got=value)
            yield key >> 3, data[at : at + value]
            at += value
        else:
            raise Malformed("tpm.envelope", "a field of the attestation has a type that it should not have", got=key & 7)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise Malformed("tpm.envelope", "a number of the attestation ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Malformed("tpm.envelope", "a number of the attestation is too long")


def _gotpm_quote(data: bytes) -> SignedQuote:
    message = signature = b""
    bank: int | None = None
    pcrs: dict[int, bytes] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            message = value
        elif number == 2 and isinstance(value, bytes):
            signature = value
        elif number == 3 and isinstance(value, bytes):
            bank, pcrs = _gotpm_pcrs(value)
    return SignedQuote(message=message, signature=signature, bank=bank, pcrs=pcrs)


def _gotpm_pcrs(data: bytes) -> tuple[int, dict[int, bytes]]:
    bank, pcrs = ALG_SHA1, {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, int):
            bank = value
        elif number == 2 and isinstance(value, bytes):
            entry = dict(_fields(value))
            index, digest = entry.get(1, 0), entry.get(2, b"")
            if not isinstance(index, int) or not isinstance(digest, bytes) or index in pcrs or index > 23:
                raise Malformed("tpm.envelope", "a PCR of the quote is not an index and a value", got=index)
            pcrs[index] = digest
    if bank not in HASH_SIZES:
        raise Malformed("tpm.envelope", "the PCRs of the quote are of an unknown bank", got=bank)
    return bank, pcrs


# ---------------------------------------------------------------- JSON


def _goattest_pcr(item: object) -> tuple[int, bytes]:
    if not isinstance(item, dict) or not isinstance(item.get("Index"), int):
        raise Malformed("tpm.envelope", "a PCR of the dump has no index")
    return item["Index"], _base64(item, "Digest")


def _json(data: bytes) -> dict[str, object]:
    if len(data) > _MAX:
        raise Malformed("tpm.envelope", "the evidence is too large", expected=f"<= {_MAX}", got=len(data))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed("tpm.envelope", "not JSON", got=type(error).__name__) from None
    if not isinstance(document, dict):
        raise Malformed("tpm.envelope", "not a JSON object")
    return document


def _object(document: Mapping[str, object], name: str) -> dict[str, object]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise Malformed("tpm.envelope", "the evidence lacks a part", expected=name)
    return value


def _base64(document: Mapping[str, object], name: str) -> bytes:
    value = document.get(name)
    try:
        return base64.b64decode(value if isinstance(value, str) else "!", validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("tpm.envelope", "a part of the evidence is not base64", expected=name) from None


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(value if isinstance(value, str) else "!")
    except ValueError:
        raise Malformed("tpm.envelope", "a PCR is not hexadecimal") from None
