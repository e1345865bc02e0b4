"""What a person named on the command line, read: files, folders, collateral stores, and the marks of reference values."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from moorline.errors import Misconfigured, MoorlineError
from moorline.evidence.azure_vtpm import parse_envelope, parse_hcl_report
from moorline.evidence.ratls import parse_oe_report, parse_ratls_certificate
from moorline.storage import whole_files
from moorline.verification.collateral import Need, missing, needs_of

_MAX_FILE: Final = 16 * 1024 * 1024
_DATABASES: Final = (".sqlite", ".db")


def read(files: Sequence[Path]) -> dict[str, bytes]:
    """The files by name. Raises Misconfigured("evidence.file")."""
    contents: dict[str, bytes] = {}
    for path in files:
        try:
            if path.stat().st_size > _MAX_FILE:
                raise Misconfigured(
                    "evidence.file",
                    "a file is too large",
                    expected=f"<= {_MAX_FILE} bytes",
                    got=path,
                    remedy="no evidence is that large: name another file",
                )
            contents[str(path)] = path.read_bytes()
        except OSError as error:
            raise Misconfigured(
                "evidence.file",
                "a file cannot be read",
                got=f"{path}: {error.strerror}",
                remedy="name files that are there, or leave it out",
            ) from None
    return contents


def spread(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those in folders."""
    found: list[Path] = []
    for path in paths:
        found += sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    return found


def with_collateral(files: dict[str, bytes], collateral: Path | None) -> dict[str, bytes]:
    """The files, and what `collateral` has for them: the items of a store that they need, or all files of a folder.

    A store gives exactly one item a need, so nothing that belongs to another platform gets into the appraisal. What it
    lacks is found missing by the verification, which says what it is.
    """
    if collateral is None:
        return files
    from moorline.storage.collateral_directory import is_store
    from moorline.storage.collateral_store import open_collateral

    if collateral.suffix not in _DATABASES and not is_store(collateral):
        if not collateral.is_dir():
            raise Misconfigured(
                "evidence.file",
                "neither a folder nor a collateral store",
                got=collateral,
                remedy="moor collateral fetch, or import, makes one",
            )
        return files | read(spread([collateral]))
    held = open_collateral(collateral, create=False)
    needs = needed(files)
    return files | {f"collateral:{one.name}": one.data for one in held.endorsements(needs)}


def needed(files: Mapping[str, bytes]) -> tuple[Need, ...]:
    """What the evidence among `files` needs, by its own words."""
    found: list[Need] = []
    for data in (inner for outer in files.values() for inner in _with_inner(outer)):
        try:
            found += needs_of(data)
        except MoorlineError:
            continue  # what is no evidence needs nothing; broken evidence is refused where it is appraised
    return tuple(dict.fromkeys(found))


def _with_inner(data: bytes) -> Iterator[bytes]:
    """The file itself, and the quote or report that it wraps."""
    yield data
    for inner in (_of_envelope, parse_oe_report, lambda wrapped: parse_ratls_certificate(wrapped).quote):
        with contextlib.suppress(MoorlineError):
            yield inner(data)


def _of_envelope(data: bytes) -> bytes:
    """The TD quote, or the SNP report, under an Azure vTPM."""
    evidence = parse_envelope(data)
    return parse_hcl_report(evidence.hcl).hardware if evidence.td_quote is None else evidence.td_quote


def lacking(files: Mapping[str, bytes], collateral: Path) -> tuple[Need, ...]:
    """What the evidence needs and the store has not; nothing for a folder that is no store."""
    from moorline.storage.collateral_directory import is_store
    from moorline.storage.collateral_store import open_collateral

    if collateral.suffix not in _DATABASES and not is_store(collateral):
        return ()
    return missing(needed(files), open_collateral(collateral, create=False).names())


def marks(path: Path | None) -> dict[str, int]:
    """The highest serial seen of each set of reference values; none yet where there is no such file."""
    if path is None or not path.exists():
        return {}
    try:
        held = json.loads(path.read_bytes())
        return {str(name): int(serial) for name, serial in held.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Starting again from nothing would let an older set come back.
        raise Misconfigured("evidence.marks", "the file of marks cannot be read", got=path) from None


def raise_marks(path: Path, seen: Mapping[str, int]) -> None:
    """Keep the highest of what was held and `seen`; the file is replaced as a whole."""
    held = marks(path)
    raised = held | {name: max(serial, held.get(name, 0)) for name, serial in seen.items()}
    whole_files.replace(path, (json.dumps(raised, sort_keys=True) + "\n").encode())
