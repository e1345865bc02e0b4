"""What a service keeps of the ledger between two starts. None of it is a proof, and none is believed as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Protocol

from moorline.errors import Malformed
from moorline.ledger.records import MAX_KEY_CHARS
from moorline.wire import schema
from moorline.wire.schema import Size

_PAGE: Final = 256
_MAX_PAGE_BYTES: Final = 128 * 1024
_Key = Annotated[str, Size(at_most=MAX_KEY_CHARS)]


class Documents(Protocol):
    """Where the newest checkpoint seen, and lists, are kept; `storage.broker_store.BrokerStore` is one."""

    def document(self, name: str) -> bytes | None:
        """Stored bytes, or None."""
        ...

    def set_document(self, name: str, value: bytes) -> None:
        """Store bytes under a name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Page:
    keys: tuple[_Key, ...]


class StoredRevocations:
    """The keys that one registrant revoked, in order, `_PAGE` of them a document; of the last one all is written again.

    Several processes may write one list: each writes a beginning of the same order, so what is there is a beginning too.
    """

    def __init__(self, documents: Documents, registrant: str) -> None:
        self._documents, self._id = documents, hashlib.sha256(registrant.encode()).hexdigest()[:32]
        self._count, self._last = 0, list[str]()

    def load(self) -> list[str]:
        """What is stored, as far as it can be read."""
        keys: list[str] = []
        page = self._page(0)
        while page:
            keys += page
            page = self._page(len(keys) // _PAGE) if len(page) == _PAGE else ()
        self._at(keys)
        return keys

    def append(self, keys: Sequence[str]) -> None:
        """Store the keys that follow. What raises has stored a part of them, and may be done again."""
        written = [*self._last, *keys]
        first = self._count // _PAGE
        for start in range(0, len(written), _PAGE):
            page = _Page(keys=tuple(written[start : start + _PAGE]))
            self._documents.set_document(self._name(first + start // _PAGE), schema.encode(page))
        self._count += len(keys)
        self._last = written[len(written) - self._count % _PAGE :]

    def forget(self) -> None:
        """What is appended from now on stands in place of what is stored."""
        self._at(())

    def _at(self, keys: Sequence[str]) -> None:
        self._count, self._last = len(keys), list(keys[len(keys) - len(keys) % _PAGE :])

    def _page(self, number: int) -> tuple[str, ...]:
        data = self._documents.document(self._name(number))
        try:
            return () if data is None else schema.decode(_Page, data, max_bytes=_MAX_PAGE_BYTES).keys[:_PAGE]
        except Malformed:
            return ()

    def _name(self, number: int) -> str:
        return f"revocations-{self._id}-{number}"
