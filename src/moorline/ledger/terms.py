"""Terms: who sequences, on the word of the people behind a quorum of authorities (docs/adr/0010). Pure.

Term 0 is the genesis' sequencer. A later term begins when a quorum of authorities gave their word for it, each because its
own operator said so (`moor ledger promote`). From its word on an authority cosigns nothing of an earlier term; the word says
what it had committed and what it had signed above that. The words of a quorum together are the term's certificate: whoever
has it knows whom to follow, and the old sequencer, when it comes back, that it is none any more.

This is no election: nobody proposes himself, nothing happens by itself, and no timer is involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from moorline.digest import tagged
from moorline.errors import NotAuthentic, Refused
from moorline.ledger.checkpoint import quorum_of
from moorline.wire import schema
from moorline.wire.schema import Bytes32, Bytes64, Size

NOTHING_HELD: Final = bytes(32)
MAX_CERTIFICATE_BYTES: Final = 64 * 1024
MAX_PROMISE_BYTES: Final = 20 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """Authority `name` follows `sequencer` in `term`.

    `height` is that of its head; `held` the header digest of the block it signed at the height after that, or zeros.
    """

    term: int
    sequencer: str
    name: str
    height: int
    held: Bytes32
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The words of a quorum for one sequencer in one term."""

    words: tuple[Word, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Asks for an authority's word and what it holds."""

    term: int
    sequencer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A word with what it speaks of: the block held, its seals, and this authority's signature line on it."""

    word: Word
    block: Annotated[bytes, Size(at_most=9 << 20)] | None
    seal: Annotated[bytes, Size(at_most=512)] | None
    line: Annotated[str, Size(at_most=512)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What an authority tells of terms: the one it follows, its certificate (none for term 0), and the word it gave last."""

    term: int
    sequencer: str
    certificate: Annotated[bytes, Size(at_most=MAX_CERTIFICATE_BYTES)] | None
    word_term: int
    word_sequencer: str


def give(
    *, ledger_id: bytes, term: int, sequencer: str, name: str, height: int, held: bytes, key: Ed25519PrivateKey
) -> Word:
    """An authority's word. The caller recorded it durably first."""
    signature = key.sign(_message(ledger_id, term, sequencer, name, height, held))
    return Word(term=term, sequencer=sequencer, name=name, height=height, held=held, signature=signature)


def verify_word(word: Word, *, ledger_id: bytes, authorities: Mapping[str, bytes]) -> None:
    """Raises NotAuthentic("ledger.word_invalid") unless the authority it names gave it."""
    public = authorities.get(word.name)
    try:
        if public is None:
            raise ValueError
        message = _message(ledger_id, word.term, word.sequencer, word.name, word.height, word.held)
        Ed25519PublicKey.from_public_bytes(public).verify(word.signature, message)
    except (InvalidSignature, ValueError):
        raise NotAuthentic("ledger.word_invalid", "this is not the word of an authority in force", got=word.name) from None


def certify(words: Sequence[Word]) -> bytes:
    """The certificate of these words."""
    return schema.encode(Certificate(words=tuple(sorted(words, key=lambda word: word.name))))


def verify_certificate(data: bytes, *, ledger_id: bytes, authorities: Mapping[str, bytes]) -> tuple[int, str]:
    """Term and sequencer that a quorum of `authorities` gave their word for.

    Raises Malformed, NotAuthentic("ledger.word_invalid"), Refused("ledger.words_missing").
    """
    words = schema.decode(Certificate, data, max_bytes=MAX_CERTIFICATE_BYTES).words
    for word in words:
        verify_word(word, ledger_id=ledger_id, authorities=authorities)
    about = {(word.term, word.sequencer) for word in words}
    names = {word.name for word in words}
    if len(about) != 1 or len(names) < quorum_of(len(authorities)) or next(iter(about))[1] not in authorities:
        raise Refused(
            "ledger.words_missing",
            "a term takes the words of a quorum for one authority in force",
            expected=f"{quorum_of(len(authorities))} of {len(authorities)}",
            got=", ".join(sorted(names)) or "none",
        )
    return next(iter(about))


def _message(ledger_id: bytes, term: int, sequencer: str, name: str, height: int, held: bytes) -> bytes:
    return tagged(
        "ledger-word", ledger_id, term.to_bytes(8, "big"), sequencer.encode(), name.encode(), height.to_bytes(8, "big"), held
    )
