"""`Verified[T]`: the type of a value whose evidence held. It cannot be made outside the room that verifies.

A function that takes `Verified[SnpClaims]` cannot be called with parsed bytes by mistake: there is no public constructor,
and a test walks the source to see that only `moorline.verification` calls the private one. Pattern: trio's
NoPublicConstructor.
"""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar, final

from moorline.rats import EvidenceRoot

T = TypeVar("T")


class _NoPublicConstructor(type):
    """A class of this type refuses to be called."""

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        message = f"{cls.__module__}.{cls.__qualname__} has no public constructor: it is what verification returns"
        raise TypeError(message)


@final
class Verified(Generic[T], metaclass=_NoPublicConstructor):
    """`value`, authentic, fresh and bound to the challenge it was asked for with.

    `root` says what that rests on; `collateral_digest` is SHA-256 over the endorsements used, so that a result can name
    them. It establishes nothing about whether the value is acceptable: that is policy.
    """

    __slots__ = ("_collateral_digest", "_root", "_value")
    _value: T
    _root: EvidenceRoot
    _collateral_digest: bytes

    @classmethod
    def _create(cls, value: T, *, root: EvidenceRoot, collateral_digest: bytes) -> Verified[T]:
        made: Verified[T] = object.__new__(cls)
        made._value = value
        made._root = root
        made._collateral_digest = collateral_digest
        return made

    @property
    def value(self) -> T:
        """What was verified."""
        return self._value

    @property
    def root(self) -> EvidenceRoot:
        """What the verification rests on in the end."""
        return self._root

    @property
    def collateral_digest(self) -> bytes:
        """SHA-256 over the endorsements that were used."""
        return self._collateral_digest

    def __repr__(self) -> str:
        return f"Verified({self._value!r}, root={self._root.value})"
