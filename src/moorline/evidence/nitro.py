"""AWS Nitro Enclaves evidence: the attestation document of the Nitro Security Module. No trust, no crypto.

Format: COSE_Sign1, tagged 18 or untagged, with the rules of the AWS documentation ("Verifying the root of trust", step 1):

1. the array, the map and its strings may have indefinite lengths and numbers need not be shortest: AWS fixes no encoding,
   and what is signed is kept as it came (`cose.payload`, `cose.protected`);
2. module_id, digest, timestamp, pcrs, certificate and cabundle are there, public_key, user_data and nonce may be absent or
   null, and nothing else is;
3. digest is SHA384; timestamp is positive; there are 1 to 32 PCRs of 32, 48 or 64 bytes, indices 0 to 31; certificates have
   1 to 1,024 bytes; public_key has 1 to 1,024, user_data and nonce at most 512.

An all-zero PCR0 means debug mode: the enclave's console is open to the host, and no PCR says anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence import eat_cbor
from moorline.evidence.eat_cbor import Cose, Encoding, Item

MAX_DOCUMENT: Final = 16 * 1024
"""The NSM's own limit for a response is 16 KiB."""

ES384: Final = -35
_MANDATORY: Final = frozenset({"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"})
_OPTIONAL: Final = frozenset({"public_key", "user_data", "nonce"})
_MAX_CERTIFICATE: Final = 1024
_MAX_BUNDLE: Final = 16
_PCR_SIZES: Final = (32, 48, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class NitroDocument:
    """An attestation document, untrusted. `timestamp_ms` is milliseconds since the epoch, UTC.

    `cabundle` is DER, the root first, as AWS orders it; `certificate` is the leaf. Optional members are None when absent or
    null: AWS makes no difference.
    """

    cose: Cose
    module_id: str
    timestamp_ms: int
    pcrs: dict[int, bytes]
    certificate: bytes
    cabundle: tuple[bytes, ...]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def debug(self) -> bool:
        """PCR0 is all zero: the enclave runs in debug mode. A document without PCR0 counts as debug: nothing is measured."""
        return not any(self.pcrs.get(0, b""))


def parse_document(data: bytes) -> NitroDocument:
    """The document in `data`, untrusted. Raises only Malformed (`eat.*`, `nitro.*`)."""
    cose = eat_cbor.parse_cose(
        data, encoding=Encoding.ANY, tags=frozenset({None, eat_cbor.TAG_SIGN1}), max_bytes=MAX_DOCUMENT
    )
    payload = eat_cbor.decode(cose.payload, encoding=Encoding.ANY, max_bytes=MAX_DOCUMENT)
    if not isinstance(payload, dict):
        raise Malformed("nitro.shape", "an attestation document is a map")
    names = set(payload)
    if not names >= _MANDATORY:
        missing = ", ".join(sorted(_MANDATORY - {str(name) for name in names}))
        raise Malformed("nitro.member_missing", "the document lacks a mandatory member", expected=missing)
    if names - _MANDATORY - _OPTIONAL:
        raise Malformed("nitro.member_unknown", "the document has a member nobody knows", got=sorted(map(str, names)))
    if payload["digest"] != "SHA384":
        raise Malformed("nitro.digest", "unknown digest of the PCRs", expected="SHA384", got=payload["digest"])
    return NitroDocument(
        cose=cose,
        module_id=_module(payload["module_id"]),
        timestamp_ms=_timestamp(payload["timestamp"]),
        pcrs=_pcrs(payload["pcrs"]),
        certificate=_certificate(payload["certificate"]),
        cabundle=_bundle(payload["cabundle"]),
        public_key=_optional(payload, "public_key", low=1, high=1024),
        user_data=_optional(payload, "user_data", low=0, high=512),
        nonce=_optional(payload, "nonce", low=0, high=512),
    )


def _module(value: Item) -> str:
    if not isinstance(value, str) or not value:
        raise Malformed("nitro.module_id", "module_id is a text, not empty")
    return value


def _timestamp(value: Item) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 63:
        raise Malformed("nitro.timestamp", "timestamp is milliseconds since the epoch")
    return value


def _pcrs(value: Item) -> dict[int, bytes]:
    if not isinstance(value, dict) or not 1 <= len(value) <= 32:
        raise Malformed("nitro.pcrs", "pcrs is a map of 1 to 32 registers")
    registers: dict[int, bytes] = {}
    for index, digest in value.items():
        if not isinstance(index, int) or not 0 <= index < 32:
            raise Malformed("nitro.pcrs", "the index of a PCR is 0 to 31", got=index)
        if not isinstance(digest, bytes) or len(digest) not in _PCR_SIZES:
            raise Malformed("nitro.pcrs", "a PCR is a digest of 32, 48 or 64 bytes", got=index)
        registers[index] = digest
    return registers


def _certificate(value: Item) -> bytes:
    if not isinstance(value, bytes) or not 1 <= len(value) <= _MAX_CERTIFICATE:
        raise Malformed("nitro.certificate", "a certificate is a byte string", expected=f"1 to {_MAX_CERTIFICATE} bytes")
    return value


def _bundle(value: Item) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_BUNDLE:
        raise Malformed("nitro.cabundle", "cabundle is an array of certificates", expected=f"1 to {_MAX_BUNDLE}")
    return tuple(_certificate(entry) for entry in value)


def _optional(payload: dict[int | str, Item], name: str, *, low: int, high: int) -> bytes | None:
    value = payload.get(name)
    if value is None:
        return None
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        raise Malformed("nitro.member_size", f"{name} is a byte string", expected=f"{low} to {high} bytes")
    return value
