"""Reference values of files, release by release: old, then old and new, then new.

While hosts are updated one after the other both versions run, so both are accepted; from the end of the overlap only the new
one is. A host that goes back to the old package after that runs files that are in no release in force, and is refused: a
downgrade is not an update that is late.

1. The first release opens at `at`.
2. An update closes every release that is in force `overlap_s` after `at`, and opens the next one at `at`. Windows that end
   earlier anyway stay as they are; nothing is ever opened again, and no window begins before the one before it.
3. `changed` are the files of the packages that were updated, and only these: the next release is the last one with these
   paths replaced. `complete` are all files there are. (A path that an updated package no longer has stays accepted under
   `changed`; take `complete` to be rid of it.)
4. The serial rises with every update. A release that is over keeps its name, window and values, and loses its files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Final

from moorline.clock import Instant, rendered
from moorline.errors import Refused
from moorline.evidence.debian import DebianPackage, also_at
from moorline.evidence.ima import ImaEntry
from moorline.policy.reference_sets import ReferenceSet, Release
from moorline.policy.reference_values import ReferenceValues

FAMILY: Final = "tpm"
Files = Mapping[str, Iterable[bytes]]


def files_of_packages(packages: Iterable[DebianPackage], *, executable_only: bool = False) -> dict[str, tuple[bytes, ...]]:
    """Every path at which a file of these packages can be measured, with the digests it may have."""
    found: dict[str, set[bytes]] = {}
    for package in packages:
        for path, file in package.files.items():
            if executable_only and not file.executable and ".so" not in path.rpartition("/")[2]:
                continue
            for name in also_at(path):
                found.setdefault(name, set()).add(file.digest)
    return {path: tuple(sorted(digests)) for path, digests in sorted(found.items())}


def files_of_list(entries: Iterable[ImaEntry]) -> dict[str, tuple[bytes, ...]]:
    """What a golden host measured. boot_aggregate is the boot's and not a file; a violation is nobody's reference value."""
    found: dict[str, set[bytes]] = {}
    for entry in entries:
        if entry.violation or entry.path == b"boot_aggregate" or not entry.path.startswith(b"/"):
            continue
        found.setdefault(entry.path.decode("utf-8", "backslashreplace"), set()).add(entry.digest)
    return {path: tuple(sorted(digests)) for path, digests in sorted(found.items())}


def first(name: str, release: str, files: Files, *, at: Instant, until: Instant) -> ReferenceSet:
    """A set with one release. Raises Refused("refs.no_files" | "refs.window")."""
    made = _release(release, files, at, until)
    return ReferenceSet(name=name, family=FAMILY, serial=1, not_before=at, not_after=until, releases=(made,))


def updated(
    before: ReferenceSet,
    release: str,
    files: Files,
    *,
    at: Instant,
    until: Instant,
    overlap_s: int,
    changed: bool,
) -> ReferenceSet:
    """The next issue of a set. Raises Refused("refs.no_files" | "refs.window" | "refs.release_known" | "refs.family")."""
    if before.family != FAMILY:
        raise Refused("refs.family", "the set is for other evidence", expected=FAMILY, got=before.family)
    if release in {one.name for one in before.releases}:
        raise Refused("refs.release_known", "the set has a release of this name", got=release, remedy="give it another name")
    last = before.releases[-1]
    if at < last.not_before or overlap_s < 0:
        raise Refused(
            "refs.window",
            "an update begins no earlier than the release before it, and its overlap is not negative",
            expected=f">= {rendered(Instant(last.not_before))}",
            got=rendered(at),
        )
    merged = {**{path: tuple(digests) for path, digests in last.files.items()}, **dict(files)} if changed else files
    if not dict(files):
        raise Refused("refs.no_files", "nothing was given that could be accepted", remedy="give packages or a golden host")
    end = at + overlap_s
    # Files of a release that is over are asked for by nobody any more, and would make every set larger than the one before.
    closed = tuple(
        dataclasses.replace(one, not_after=min(one.not_after, end), files=one.files if one.not_after >= at else {})
        for one in before.releases
    )
    made = _release(release, merged, at, until)
    return ReferenceSet(
        name=before.name,
        family=FAMILY,
        serial=before.serial + 1,
        not_before=before.not_before,
        not_after=max(until, before.not_after),
        releases=(*closed, dataclasses.replace(made, values=last.values)),
    )


def in_force(values: ReferenceSet, *, at: Instant, bank: int) -> ReferenceValues:
    """What an attestation authority accepts at `at`, as its own kind of set: the files of every release in force.

    It ends when the first of these releases ends, so that the old one does not live on in it; components of the boot are in
    another set. Raises Refused("reference.no_release").
    """
    current = [one for one in values.releases if one.not_before <= at <= one.not_after]
    if not current:
        raise Refused("reference.no_release", "no release of the set is in force", got=rendered(at), remedy="publish one")
    files: dict[str, set[bytes]] = {}
    for one in current:
        for path, digests in one.files.items():
            files.setdefault(path, set()).update(digests)
    return ReferenceValues(
        name=values.name,
        serial=values.serial,
        not_before=max(one.not_before for one in current),
        not_after=min(one.not_after for one in current),
        bank=bank,
        firmware=(),
        configuration=(),
        bootloader=(),
        kernel=(),
        command_line=(),
        initrd=(),
        other=(),
        files={path: tuple(sorted(digests)) for path, digests in sorted(files.items())},
    )


def as_document(values: ReferenceSet) -> dict[str, object]:
    """The set as people read and sign it (`policy.reference_text` reads it back)."""
    import json

    return {
        "name": values.name,
        "family": values.family,
        "serial": values.serial,
        "not_before": rendered(Instant(values.not_before)),
        "not_after": rendered(Instant(values.not_after)),
        "releases": [
            {
                "name": one.name,
                "not_before": rendered(Instant(one.not_before)),
                "not_after": rendered(Instant(one.not_after)),
                "values": {path: [json.loads(value) for value in held] for path, held in one.values.items()},
                "files": {path: [digest.hex() for digest in digests] for path, digests in one.files.items()},
            }
            for one in values.releases
        ],
    }


def _release(name: str, files: Files, at: Instant, until: Instant) -> Release:
    if until <= at:
        raise Refused("refs.window", "a release ends after it begins", expected=f"> {rendered(at)}", got=rendered(until))
    held = {path: tuple(digests) for path, digests in files.items()}
    if not held:
        raise Refused("refs.no_files", "nothing was given that could be accepted", remedy="give packages or a golden host")
    return Release(name=name, not_before=at, not_after=until, values={}, files=held)
