"""Reference values of any family as signed sets of releases: dated, numbered, and kept apart release by release.

A set is a COSE_Sign1 (purpose `reference-set`) over deterministic CBOR. Its releases stand in the order in which they were
published, each with its own window; while two windows overlap, the old and the new release are both accepted, so a rolling
update raises no false alarm. When the old window ends, its values are refused with a code of their own: going back is told
apart from being unknown. A machine has to be of ONE release in all fields that ask a set: half of one and half of another is
no state that anybody released. Files measured at run time are the exception, since both versions run during an update.

1. The set is signed by a key that the policy names for it, and is of the family it is asked for. [reference.signer_unknown
   reference.family reference.missing reference.twice]
2. Its serial is not below what the policy demands, nor below the highest that was seen: an older set put back does not
   count. [reference.rollback]
3. It is in force at the time of appraisal. [reference.expired reference.not_yet_valid]
4. Releases in force at that time are accepted; none in force is no acceptance. [reference.no_release]
5. Values are compared as the policy language reads them (`policy.language`), never as texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.clock import Instant, rendered
from moorline.digest import tagged_hash
from moorline.errors import Malformed, NotAuthentic, Refused, Unavailable
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Size

PURPOSE: Final = "reference-set"
MAX_BYTES: Final = 16 << 20

Text = Annotated[str, Size(at_most=65536)]
Measurement = Annotated[bytes, Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What one release may look like. `values`: field of the policy to values in the policy language, as JSON texts.

    `files` maps a path to the digests it may have (IMA); the window is closed on both sides.
    """

    name: str
    not_before: int
    not_after: int
    values: dict[str, tuple[Text, ...]]
    files: dict[str, tuple[Measurement, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSet:
    """One signed set, as it travels; releases from old to new."""

    name: str
    family: str
    serial: int
    not_before: int
    not_after: int
    releases: tuple[Release, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedSet:
    """What a policy says about a set it uses: who may sign it, and the lowest serial that counts."""

    name: str
    signers: tuple[keys.PublicKey, ...]
    serial: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedSet:
    """A set that counts now: releases in force, and those that are over. `digest` names the signed bytes."""

    name: str
    serial: int
    current: tuple[Release, ...]
    superseded: tuple[Release, ...]
    digest: bytes


def sign(values: ReferenceSet, signer: keys.Signer) -> bytes:
    """The set as it is published. Raises Malformed("reference.order") for releases that are not in order."""
    _ordered(values)
    return cose.sign(PURPOSE, schema.encode(values), signer)


def peek(data: bytes) -> ReferenceSet:
    """The set in `data`, UNVERIFIED: to see which set it is. Raises only Malformed."""
    return schema.decode(ReferenceSet, cose.parse(PURPOSE, data, max_bytes=MAX_BYTES).payload, max_bytes=MAX_BYTES)


def accept(
    files: Iterable[bytes],
    trusted: Iterable[TrustedSet],
    *,
    family: str,
    now: Instant,
    highest: Mapping[str, int],
) -> dict[str, AcceptedSet]:
    """The sets that a policy trusts, by name, from `files`, which are not trusted; rules 1 to 4.

    `highest` is the highest serial that was seen of each name. Raises Malformed, NotAuthentic("reference.signer_unknown"),
    Refused and Unavailable("reference.missing") with the codes above. A file of a set that nobody asked for is ignored.
    """
    wanted = {one.name: one for one in trusted}
    found: dict[str, AcceptedSet] = {}
    for data in files:
        named = peek(data)
        source = wanted.get(named.name)
        if source is None:
            continue
        if named.name in found:
            raise Refused("reference.twice", "two files are of the same set", got=named.name, remedy="give the newest")
        found[named.name] = _accepted(data, source, family, now, highest.get(named.name, 0))
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise Unavailable(
            "reference.missing",
            "the policy asks a set of reference values that was not given",
            expected=", ".join(missing),
            remedy="give it with --refs",
        )
    return found


def _accepted(data: bytes, source: TrustedSet, family: str, now: Instant, highest: int) -> AcceptedSet:
    values = _verified(data, source)
    if values.family != family:
        raise Refused("reference.family", "the set is for other evidence", expected=family, got=values.family)
    floor = max(source.serial, highest)
    if values.serial < floor:
        raise Refused(
            "reference.rollback",
            "an older set of reference values was put back",
            expected=f">= {floor}",
            got=values.serial,
            remedy="give the newest set",
        )
    _in_force(values, now)
    current = tuple(one for one in values.releases if one.not_before <= now <= one.not_after)
    if not current:
        raise Refused("reference.no_release", "no release of the set is in force", got=rendered(now), remedy="publish one")
    return AcceptedSet(
        name=values.name,
        serial=values.serial,
        current=current,
        superseded=tuple(one for one in values.releases if one.not_after < now),
        digest=tagged_hash(PURPOSE, data),
    )


def _verified(data: bytes, source: TrustedSet) -> ReferenceSet:
    signed = cose.parse(PURPOSE, data, max_bytes=MAX_BYTES)
    for signer in source.signers:
        if cose.key_id(signer) == signed.key_id:
            values = schema.decode(ReferenceSet, cose.verify(signed, signer), max_bytes=MAX_BYTES)
            _ordered(values)
            return values
    raise NotAuthentic(
        "reference.signer_unknown",
        "the set is signed by a key that the policy does not name for it",
        got=signed.key_id,
        remedy="name the signer in the policy, if it is to be trusted",
    )


def _in_force(values: ReferenceSet, now: Instant) -> None:
    if now < values.not_before:
        raise Refused(
            "reference.not_yet_valid",
            "the reference values are not in force yet",
            expected=f">= {rendered(Instant(values.not_before))}",
            got=rendered(now),
        )
    if now > values.not_after:
        raise Refused(
            "reference.expired",
            "the reference values are no longer in force",
            expected=f"<= {rendered(Instant(values.not_after))}",
            got=rendered(now),
            remedy="publish a new set",
        )


def _ordered(values: ReferenceSet) -> None:
    """Releases stand from old to new, each with a name of its own: the order is what makes going back visible."""
    starts = [one.not_before for one in values.releases]
    names = {one.name for one in values.releases}
    if starts != sorted(starts) or len(names) != len(values.releases) or not values.releases:
        raise Malformed("reference.order", "the releases are not in the order of their windows, or two have one name")
