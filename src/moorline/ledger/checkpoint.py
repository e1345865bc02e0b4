"""Checkpoints: what a quorum of authorities signs (docs/spec/ledger-checkpoint.md).

A C2SP tlog-checkpoint in a C2SP signed note. Body: origin, number of blocks, root of the log of blocks (RFC 6962), then our
extension lines, each present once and in this order:

    moorline.ledger/<ledger id, hex>
    <size>
    <root, base64>
    height <height>                   size - 1: block 0 comes from the genesis
    time-ms <block time>              milliseconds since 1970-01-01 UTC
    state <state root, base64>        after this block
    authorities <digest, base64>      of the authority set in force after this block

Signatures: any number of C2SP tlog-cosignature/v1 lines (type 0x04), and the Ed25519 note signature (type 0x01) of whoever
made the block. Only cosignatures count towards a quorum, one an authority.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from moorline.clock import Instant
from moorline.digest import tagged_hash
from moorline.errors import Malformed, NotAuthentic
from moorline.wire import cbor

ORIGIN: Final = "moorline.ledger/"
MAX_NOTE_BYTES: Final = 16 * 1024
MAX_SIGNATURES: Final = 100
_NOTE_SIGNATURE: Final = 0x01
_COSIGNATURE: Final = 0x04
_NAME: Final = re.compile(r"[!-*,-~]+")  # printable ASCII without space and plus
_SIGNATURE_LINE: Final = re.compile(r"— ([!-*,-~]+) ([A-Za-z0-9+/=]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a ledger after one block. A value: who signed it is for `verify_note` to say."""

    ledger_id: bytes
    size: int
    root: bytes
    height: int
    time_ms: int
    state_root: bytes
    authorities: bytes

    @property
    def time(self) -> Instant:
        """Block time in whole seconds, rounded down."""
        return Instant(self.time_ms // 1000)

    def body(self) -> str:
        """The text that is signed, newline at the end."""
        return (
            f"{ORIGIN}{self.ledger_id.hex()}\n{self.size}\n{_b64(self.root)}\nheight {self.height}\ntime-ms {self.time_ms}\n"
            f"state {_b64(self.state_root)}\nauthorities {_b64(self.authorities)}\n"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteSignature:
    """One signature line: key name and `blob`, which is key id (4 bytes) and what the type says."""

    name: str
    blob: bytes

    def line(self) -> str:
        """As it stands in the note, newline at the end."""
        return f"— {self.name} {_b64(self.blob)}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A checkpoint with signature lines, parsed and not verified."""

    checkpoint: Checkpoint
    signatures: tuple[NoteSignature, ...]

    def encode(self) -> bytes:
        """The note as it travels, UTF-8."""
        return (self.checkpoint.body() + "\n" + "".join(signature.line() for signature in self.signatures)).encode()


def authority_set_digest(authorities: Mapping[str, bytes]) -> bytes:
    """What the `authorities` line holds: over names and raw checkpoint keys."""
    return tagged_hash("authority-set", cbor.encode(dict(authorities)))


def quorum_of(count: int) -> int:
    """How many of `count` = 3f+1 authorities must sign: floor(2n/3)+1."""
    return 2 * count // 3 + 1


def tolerated_faults(count: int) -> int:
    """f, how many of `count` authorities may be faulty."""
    return max(0, (count - 1) // 3)


def sign_note(checkpoint: Checkpoint, *, name: str, key: Ed25519PrivateKey) -> NoteSignature:
    """The Ed25519 note signature of a block's maker (C2SP signed-note, type 0x01)."""
    public = key.public_key().public_bytes_raw()
    return NoteSignature(name=name, blob=_key_id(name, _NOTE_SIGNATURE, public) + key.sign(checkpoint.body().encode()))


def cosign(checkpoint: Checkpoint, *, name: str, key: Ed25519PrivateKey, now: Instant) -> NoteSignature:
    """A cosignature/v1 (C2SP tlog-cosignature, type 0x04), made at `now`."""
    public = key.public_key().public_bytes_raw()
    signature = key.sign(_cosigned(checkpoint, now))
    return NoteSignature(name=name, blob=_key_id(name, _COSIGNATURE, public) + now.to_bytes(8, "big") + signature)


def parse_note(data: bytes) -> Note:
    """A note from its bytes; raises only Malformed("ledger.note_malformed"). Its signatures are not verified."""
    if len(data) > MAX_NOTE_BYTES:
        raise _malformed("it is too large")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    body, separator, rest = text.partition("\n\n")
    lines = rest.split("\n")
    if not separator or lines[-1] or len(lines) > MAX_SIGNATURES:
        raise _malformed("body, empty line and signature lines are expected")
    note = Note(checkpoint=parse_body(body + "\n"), signatures=tuple(_parse_signature(line) for line in lines[:-1]))
    if note.encode() != data:
        raise _malformed("it is not in its one encoding")
    return note


def parse_signature_line(line: str) -> NoteSignature:
    """One signature line with its newline; raises only Malformed("ledger.note_malformed")."""
    if not line.endswith("\n"):
        raise _malformed("a signature line ends with a newline")
    return _parse_signature(line[:-1])


def parse_body(text: str) -> Checkpoint:
    """A checkpoint from its body; raises only Malformed("ledger.note_malformed")."""
    lines = text.split("\n")
    if len(lines) != 8 or lines[7] or not lines[0].startswith(ORIGIN):
        raise _malformed("the body has seven lines, the first with our origin")
    checkpoint = Checkpoint(
        ledger_id=_unhex(lines[0].removeprefix(ORIGIN)),
        size=_number(lines[1]),
        root=_unb64(lines[2]),
        height=_number(_after("height ", lines[3])),
        time_ms=_number(_after("time-ms ", lines[4])),
        state_root=_unb64(_after("state ", lines[5])),
        authorities=_unb64(_after("authorities ", lines[6])),
    )
    if checkpoint.size != checkpoint.height + 1:
        raise _malformed("size is height + 1")
    if checkpoint.body() != text:
        raise _malformed("the body is not in its one encoding")
    return checkpoint


def signers(note: Note, authorities: Mapping[str, bytes]) -> dict[str, Instant]:
    """Which of `authorities` cosigned, and when they say they did.

    Raises NotAuthentic("ledger.signature_invalid") if a line of one of them does not verify, and
    NotAuthentic("ledger.signature_unknown") if a line is of nobody among them, or there twice. C2SP would pass over such
    lines; here a note says one thing in one way, and carries nothing that nobody checked.
    """
    found: dict[str, Instant] = {}
    seen: set[tuple[str, bytes]] = set()
    for signature in note.signatures:
        public = authorities.get(signature.name)
        identifier, blob = signature.blob[:4], signature.blob[4:]
        if public is None or (signature.name, identifier) in seen:
            raise _unknown(signature.name)
        seen.add((signature.name, identifier))
        if identifier == _key_id(signature.name, _NOTE_SIGNATURE, public):
            _verify(public, blob, note.checkpoint.body().encode(), signature.name)
        elif identifier == _key_id(signature.name, _COSIGNATURE, public):
            at = Instant(int.from_bytes(blob[:8], "big"))
            _verify(public, blob[8:], _cosigned(note.checkpoint, at), signature.name)
            found[signature.name] = at
        else:
            raise _unknown(signature.name)
    return found


def makers(note: Note, authorities: Mapping[str, bytes]) -> set[str]:
    """Which of `authorities` signed as the block's maker; the note is one that `signers` took."""
    return {
        signature.name
        for signature in note.signatures
        if signature.blob[:4] == _key_id(signature.name, _NOTE_SIGNATURE, authorities[signature.name])
    }


def verify_note(note: Note, authorities: Mapping[str, bytes], quorum: int) -> Checkpoint:
    """The checkpoint, now known to be cosigned by `quorum` distinct `authorities`.

    It does not establish that it is recent or the latest.
    Raises NotAuthentic("ledger.quorum_missing" | "ledger.signature_invalid" | "ledger.signature_unknown").
    """
    found = signers(note, authorities)
    if quorum < 1 or len(found) < quorum:
        raise NotAuthentic(
            "ledger.quorum_missing",
            "too few authorities signed this checkpoint",
            expected=f"{quorum} of {len(authorities)}",
            got=", ".join(sorted(found)) or "none",
            remedy="ask another authority",
        )
    return note.checkpoint


def _verify(public: bytes, signature: bytes, message: bytes, name: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise NotAuthentic("ledger.signature_invalid", "an authority's signature does not verify", got=name) from None


def _unknown(name: str) -> NotAuthentic:
    return NotAuthentic(
        "ledger.signature_unknown",
        "a signature line is of no authority in force, or is there twice",
        got=name,
        remedy="fetch the proof again; if the authorities changed, fetch the changes too",
    )


def _cosigned(checkpoint: Checkpoint, at: Instant) -> bytes:
    return f"cosignature/v1\ntime {at}\n{checkpoint.body()}".encode()


def _key_id(name: str, kind: int, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def _parse_signature(line: str) -> NoteSignature:
    match = _SIGNATURE_LINE.fullmatch(line)
    if match is None:
        raise _malformed("a signature line is a dash, a key name and base64")
    blob = _decoded(match[2])
    if len(blob) <= 4:
        raise _malformed("a signature is longer than its key id")
    return NoteSignature(name=match[1], blob=blob)


def _after(prefix: str, line: str) -> str:
    if not line.startswith(prefix):
        raise _malformed(f"a line starting with {prefix!r} is missing")
    return line[len(prefix) :]


def _number(text: str) -> int:
    if re.fullmatch(r"0|[1-9][0-9]{0,17}", text) is None:
        raise _malformed("a number is decimal without leading zeros")
    return int(text)


def _unhex(text: str) -> bytes:
    if re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise _malformed("the ledger id is 64 hex digits")
    return bytes.fromhex(text)


def _unb64(text: str) -> bytes:
    data = _decoded(text)
    if len(data) != 32:
        raise _malformed("a digest has 32 bytes")
    return data


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed("base64 is expected") from None


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _malformed(why: str) -> Malformed:
    return Malformed("ledger.note_malformed", f"the checkpoint note cannot be read: {why}")
