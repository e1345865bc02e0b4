"""The port: ask an endorser for an item by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from moorline.errors import Unavailable
from moorline.verification.collateral import ItemKind, ItemName


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An item as its vendor answered, untrusted, in the form of `verification.collateral_judging`; `source` is the URL."""

    name: ItemName
    data: bytes
    source: str


class Endorser(Protocol):
    """Somebody who vouches for hardware."""

    async def fetch(self, name: ItemName) -> Fetched:
        """The item. Raises Unavailable, Malformed, NotAuthentic and Misconfigured, codes `endorser.*`."""
        ...


class Endorsers:
    """Several endorsers as one: each kind of item goes to who has it."""

    def __init__(self, by_kind: Mapping[ItemKind, Endorser]) -> None:
        self._by_kind = dict(by_kind)

    async def fetch(self, name: ItemName) -> Fetched:
        """The item from the endorser of its kind. Raises Unavailable("endorser.none") if there is none."""
        endorser = self._by_kind.get(name.kind)
        if endorser is None:
            raise Unavailable("endorser.none", "nobody is configured who has this kind of item", got=name)
        return await endorser.fetch(name)
