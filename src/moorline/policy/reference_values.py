"""Reference values for hosts, and location tags: signed by those who vouch, dated, numbered, and never empty by accident.

A set is a COSE_Sign1 (purpose `reference-values`) over deterministic CBOR. It says which measurements of each boot component
and which file digests are accepted, for one PCR bank, between two instants. `serial` rises with each issue of one name, so
that an older set cannot be put back (the verifier keeps the highest it saw). Several sets add up; a digest that stands in
none is not accepted, and an empty list accepts nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final

from moorline.clock import Instant, Validity
from moorline.digest import tagged_hash
from moorline.errors import NotAuthentic, Refused
from moorline.verification.eventlog import BootState, Component
from moorline.wire import cose, keys, schema
from moorline.wire.schema import Bytes32, Size

PURPOSE: Final = "reference-values"
TAG_PURPOSE: Final = "location-tag"
MAX_BYTES: Final = 16 << 20

Measurement = Annotated[bytes, Size(at_most=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceValues:
    """One signed set, as it travels. `files` maps a path to the digests it may have."""

    name: str
    serial: int
    not_before: int
    not_after: int
    bank: int
    firmware: tuple[Measurement, ...]
    configuration: tuple[Measurement, ...]
    bootloader: tuple[Measurement, ...]
    kernel: tuple[Measurement, ...]
    command_line: tuple[Measurement, ...]
    initrd: tuple[Measurement, ...]
    other: tuple[Measurement, ...]
    files: dict[str, tuple[Measurement, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Several verified sets as one: what this verifier accepts now. `digest` names exactly these sets."""

    bank: int
    components: dict[Component, frozenset[bytes]]
    files: dict[bytes, frozenset[bytes]]
    valid: Validity
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LocationTag:
    """Where a host stands, in the words of whoever signs it; three things that are not one another.

    `location` is the jurisdiction, region and country, "EU/DE". `geographical` is a point (`policy.distance.parse_place`),
    and `logical` a path within the operator's sites, "fra1/hall2/row7/rack3". None is what the signer does not say.
    """

    host: str
    ek_digest: Bytes32
    location: Annotated[str, Size(at_most=128)]
    not_after: int
    geographical: Annotated[str, Size(at_most=64)] | None = None
    logical: Annotated[str, Size(at_most=128)] | None = None


def values_of(
    state: BootState,
    *,
    name: str,
    serial: int,
    not_before: Instant,
    not_after: Instant,
    files: dict[str, tuple[bytes, ...]],
) -> ReferenceValues:
    """Reference values taken from one verified boot, a golden host's: whatever it booted becomes what is accepted."""
    of = {component: tuple(sorted({one.digest for one in state.of(component)})) for component in Component}
    return ReferenceValues(
        name=name,
        serial=serial,
        not_before=not_before,
        not_after=not_after,
        bank=state.bank,
        firmware=of[Component.FIRMWARE],
        configuration=of[Component.CONFIGURATION],
        bootloader=of[Component.BOOTLOADER],
        kernel=of[Component.KERNEL],
        command_line=of[Component.COMMAND_LINE],
        initrd=of[Component.INITRD],
        other=of[Component.OTHER],
        files=files,
    )


def sign(values: ReferenceValues, signer: keys.Signer) -> bytes:
    """The set as it is published."""
    return cose.sign(PURPOSE, schema.encode(values), signer)


def parse_verified(data: bytes, signers: Iterable[keys.PublicKey], *, now: Instant) -> ReferenceValues:
    """The set in `data`, signed by one of `signers` and valid at `now`; `data` is untrusted.

    Raises Malformed (`cose.*`, `message.*`), NotAuthentic("reference.signer_unknown" | `signature.*`), and
    Refused("reference.not_valid_now"). It does not establish that no newer serial exists.
    """
    values = schema.decode(ReferenceValues, _payload(PURPOSE, data, signers), max_bytes=MAX_BYTES)
    if not values.not_before <= now <= values.not_after:
        raise Refused(
            "reference.not_valid_now",
            "the reference values are not valid at this time",
            expected=f"{values.not_before} to {values.not_after}",
            got=now,
            remedy="publish a new set",
        )
    return values


def merge(sets: Iterable[ReferenceValues]) -> Reference:
    """All sets as one. Raises Refused("reference.none" | "reference.banks") for no set, or sets of different banks."""
    held = sorted(sets, key=lambda one: (one.name, one.serial))
    if not held:
        raise Refused("reference.none", "there are no reference values", remedy="configure at least one signed set")
    if len({one.bank for one in held}) != 1:
        raise Refused("reference.banks", "the reference values are for different PCR banks")
    files: dict[bytes, frozenset[bytes]] = {}
    for one in held:
        for path, digests in one.files.items():
            files[path.encode()] = files.get(path.encode(), frozenset()) | frozenset(digests)
    return Reference(
        bank=held[0].bank,
        components={
            component: frozenset(digest for one in held for digest in getattr(one, component.value))
            for component in Component
        },
        files=files,
        valid=Validity(
            not_before=Instant(max(one.not_before for one in held)), not_after=Instant(min(one.not_after for one in held))
        ),
        digest=tagged_hash("reference-values", *(schema.encode(one) for one in held)),
    )


def sign_tag(tag: LocationTag, signer: keys.Signer) -> bytes:
    """A location tag as the host carries it; `tag_digest` of it goes into the TPM and the platform record."""
    return cose.sign(TAG_PURPOSE, schema.encode(tag), signer)


def tag_digest(tag: bytes) -> bytes:
    """What stands in the NV index and in the platform record: SHA-256 of the signed tag; 32 bytes."""
    return hashlib.sha256(tag).digest()


def parse_verified_tag(data: bytes, signers: Iterable[keys.PublicKey]) -> LocationTag:
    """The tag in `data`, signed by one of `signers`. Says nothing about which host shows it, nor whether it expired."""
    return schema.decode(LocationTag, _payload(TAG_PURPOSE, data, signers))


def _payload(purpose: str, data: bytes, signers: Iterable[keys.PublicKey]) -> bytes:
    signed = cose.parse(purpose, data, max_bytes=MAX_BYTES)
    for signer in signers:
        if cose.key_id(signer) == signed.key_id:
            return cose.verify(signed, signer)
    raise NotAuthentic(
        "reference.signer_unknown",
        "signed by a key that is not configured for this purpose",
        got=signed.key_id,
        remedy="configure the signer, if it is to be trusted",
    )
