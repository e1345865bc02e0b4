"""Nonces of transactions that were applied and could still be valid: an immutable set that forgets by height. Pure.

A nonce is remembered with the last block its transaction could stand in. What came lately is a small map that each block
copies; it is folded into the large one when it has grown, so that a block costs what is in it and not what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_RECENT: Final = 4096


@dataclass(frozen=True, slots=True)
class Nonces(Mapping[bytes, int]):
    """Nonce id to the last block its transaction could stand in; those of blocks up to `height` are forgotten."""

    _height: int
    _settled: dict[bytes, int]
    _recent: dict[bytes, int]

    @classmethod
    def of(cls, nonces: Mapping[bytes, int], *, height: int) -> Nonces:
        """Those of `nonces` that still matter after the block at `height`."""
        return cls(height, {nonce: until for nonce, until in nonces.items() if until > height}, {})

    def after(self, height: int, used: Mapping[bytes, int]) -> Nonces:
        """As it is after the block at `height`, in which `used` were."""
        recent = {**self._recent, **used}
        if len(recent) <= _RECENT:
            return Nonces(height, self._settled, recent)
        return Nonces.of({**self._settled, **recent}, height=height)

    def __contains__(self, nonce: object) -> bool:
        return isinstance(nonce, bytes) and self._until(nonce) > self._height

    def __getitem__(self, nonce: bytes) -> int:
        until = self._until(nonce)
        if until <= self._height:
            raise KeyError(nonce)
        return until

    def __iter__(self) -> Iterator[bytes]:
        for part in (self._settled, self._recent):
            yield from (nonce for nonce, until in part.items() if until > self._height)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _until(self, nonce: bytes) -> int:
        until = self._recent.get(nonce)
        return self._settled.get(nonce, -1) if until is None else until
