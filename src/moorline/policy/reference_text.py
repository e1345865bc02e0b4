"""A set of reference values as people write it, before it is signed (`reference_sets`).

    name: edge-functions
    family: snp
    serial: 8
    not_before: 2026-11-01T00:00:00Z
    not_after: 2027-02-01T00:00:00Z
    releases:                                   # from old to new; windows overlap while an update is rolled out
      - name: "1.4"
        not_before: 2026-09-01T00:00:00Z
        not_after: 2026-11-30T00:00:00Z
        values: {measurement: [4f1c...], reported_tcb: [{boot_loader: 9, tee: 0, snp: 22, microcode: 213}]}
        files: {}
      - name: "1.5"
        ...

Values are written as in policies, and every one is read as the field of the family it is for before the set is signed. A
release says every field that policies ask this set for: one it leaves out is met by nothing.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

from moorline.errors import Misconfigured
from moorline.policy import language
from moorline.policy.notation import read_document
from moorline.policy.reference_sets import ReferenceSet, Release

_MAX_BYTES: Final = 128 << 20
_MAX_NODES: Final = 4_000_000
"""A machine has tens of thousands of files, each with its digests, in every release that is kept."""
_SET: Final = frozenset({"name", "family", "serial", "not_before", "not_after", "releases"})
_RELEASE: Final = frozenset({"name", "not_before", "not_after", "values", "files"})


def parse_reference_set(data: bytes) -> ReferenceSet:
    """The set in `data`. Raises Misconfigured (`document.*`, `reference_text.*`, `policy_file.value`)."""
    document = read_document(data, max_bytes=_MAX_BYTES, max_nodes=_MAX_NODES)
    _shape(document, _SET, "the set")
    family = document["family"]
    if family not in language.FAMILIES or type(document["serial"]) is not int or not isinstance(document["releases"], list):
        raise _unreadable(f"family is one of {', '.join(language.FAMILIES)}, serial a number, releases a list")
    kinds = language.value_types(family)
    return ReferenceSet(
        name=str(document["name"]),
        family=family,
        serial=document["serial"],
        not_before=_instant(document["not_before"]),
        not_after=_instant(document["not_after"]),
        releases=tuple(_release(one, kinds) for one in document["releases"]),
    )


def _release(written: Any, kinds: dict[str, object]) -> Release:  # noqa: ANN401 - as a person wrote it
    _shape(written, _RELEASE, "a release")
    values, files = written["values"], written["files"]
    if not isinstance(values, dict) or not isinstance(files, dict):
        raise _unreadable("values and files of a release are mappings")
    return Release(
        name=str(written["name"]),
        not_before=_instant(written["not_before"]),
        not_after=_instant(written["not_after"]),
        values={str(path): _values(str(path), kinds, one) for path, one in values.items()},
        files={str(path): _digests(str(path), one) for path, one in files.items()},
    )


def _values(path: str, kinds: dict[str, object], written: object) -> tuple[str, ...]:
    if path not in kinds:
        raise _unreadable(f"{path} is no field of this family")
    if not isinstance(written, list) or not written:
        raise _unreadable(f"{path} has a list of values that is not empty")
    for one in written:
        language.value_of(path, kinds[path], one)
    return tuple(json.dumps(one, sort_keys=True) for one in written)


def _digests(path: str, written: object) -> tuple[bytes, ...]:
    if not isinstance(written, list) or not written:
        raise _unreadable(f"{path} has a list of digests that is not empty")
    return tuple(language.value_of(path, bytes, one) for one in written)


def _instant(written: object) -> int:
    try:
        moment = datetime.fromisoformat(str(written))
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise _unreadable(f"times are RFC 3339 with their zone: {written}")
    return int(moment.timestamp())


def _shape(written: object, keys: frozenset[str], what: str) -> None:
    if not isinstance(written, dict) or set(written) != keys:
        raise _unreadable(f"{what} has exactly {', '.join(sorted(keys))}")


def _unreadable(expected: str) -> Misconfigured:
    return Misconfigured("reference_text.unreadable", "the reference values cannot be read", expected=expected)
