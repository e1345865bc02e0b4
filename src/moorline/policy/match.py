"""What a policy can demand of one value: `Exact | AtLeast | OneOf | AllBits | NotRequired(reason)`, and nothing less.

There is no default and no empty demand: an empty `OneOf` matches nothing, a value that evidence does not have matches
nothing, a field that a policy leaves out refuses. Not to ask is a decision, so it is written down with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from moorline.errors import Misconfigured

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exact(Generic[T]):
    """Equal to `value`."""

    value: T


@dataclass(frozen=True, slots=True)
class OneOf(Generic[T]):
    """A member of `values`. The empty set matches nothing."""

    values: frozenset[T]


@dataclass(frozen=True, slots=True)
class AtLeast(Generic[T]):
    """Not below `minimum`: by `at_least` where the value has one (component by component), by `>=` otherwise."""

    minimum: T


@dataclass(frozen=True, slots=True)
class AllBits:
    """Every bit of `mask` is set."""

    mask: int


@dataclass(frozen=True, slots=True)
class NotRequired:
    """Whatever it is, or none. The reason is shown with every result; without one the policy cannot be made."""

    reason: str

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise Misconfigured("policy.no_reason", "a demand that is dropped needs its reason", remedy="say why")


Match = Exact[T] | OneOf[T] | AtLeast[T] | AllBits | NotRequired


def meets(value: object, demand: object) -> bool:  # noqa: PLR0911 - one return a kind of demand
    """True if `value` meets `demand`. None meets nothing but NotRequired; an unknown demand, or none, is met by nothing."""
    if isinstance(demand, NotRequired):
        return True
    if value is None:
        return False
    if isinstance(demand, Exact):
        return type(value) is type(demand.value) and value == demand.value
    if isinstance(demand, OneOf):
        return value in demand.values
    if isinstance(demand, AllBits):
        return isinstance(value, int) and value & demand.mask == demand.mask
    if isinstance(demand, AtLeast):
        return _at_least(value, demand.minimum)
    return False


def shown(value: object) -> str:  # noqa: PLR0911 - one return a kind of demand
    """A value or a demand in words, for findings; bytes as hex. Demands never hold secrets."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Exact):
        return shown(value.value)
    if isinstance(value, OneOf):
        return "one of {" + ", ".join(sorted(shown(option) for option in value.values)) + "}"
    if isinstance(value, AtLeast):
        return f">= {shown(value.minimum)}"
    if isinstance(value, AllBits):
        return f"all bits of {value.mask:#x}"
    if isinstance(value, NotRequired):
        return f"not required: {value.reason}"
    return "nothing" if value is None else str(value)


def _at_least(value: object, minimum: object) -> bool:
    if type(value) is not type(minimum):
        return False
    compare = getattr(value, "at_least", None)
    if compare is not None:
        return bool(compare(minimum))
    if isinstance(value, int) and isinstance(minimum, int):
        return value >= minimum
    if isinstance(value, tuple) and isinstance(minimum, tuple):
        return value >= minimum
    return False
