"""An appraisal on disk, whole: what was asked, every file, the policy, the reference values, the verdict and its token.

    appraisal.json     time, nonce, report data; files and reference values by name and SHA-256; this version's number
    files/<sha256>     evidence, endorsements, policy and reference values, as they came
    verdict.json       what came out
    token.jwt          the signed EAR, if one was made

Reading compares every file with its SHA-256, so what is appraised again is what was appraised. A record is not a secret, and
not signed: who keeps it can replace it whole. The token is what others can hold against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from moorline.errors import Malformed, Misconfigured

FORMAT: Final = 1
_KEYS: Final = frozenset(
    {"format", "version", "at", "nonce", "report_data", "policy", "files", "references", "highest", "audience"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One appraisal. `policy` and `references` are the documents as they were given."""

    at: int
    nonce: str | None
    report_data: str | None
    policy: bytes | None
    files: Mapping[str, bytes]
    references: Mapping[str, bytes]
    highest: Mapping[str, int]
    audience: str
    verdict: Mapping[str, Any]
    token: str | None


def write(directory: Path, record: Record) -> None:
    """Write the record into a folder that is new. Raises Misconfigured("evidence.store")."""
    try:
        (directory / "files").mkdir(mode=0o700, parents=True, exist_ok=False)
        document = {
            "format": FORMAT,
            "version": metadata.version("moorline"),
            "at": record.at,
            "nonce": record.nonce,
            "report_data": record.report_data,
            "policy": None if record.policy is None else _kept(directory, record.policy),
            "files": {name: _kept(directory, data) for name, data in record.files.items()},
            "references": {name: _kept(directory, data) for name, data in record.references.items()},
            "highest": dict(record.highest),
            "audience": record.audience,
        }
        (directory / "verdict.json").write_text(json.dumps(record.verdict, indent=1) + "\n")
        if record.token is not None:
            (directory / "token.jwt").write_text(record.token + "\n")
        # Last: a folder without it is no record, so one that was cut short is seen as that.
        (directory / "appraisal.json").write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise Misconfigured(
            "evidence.store",
            "the record cannot be written",
            got=f"{directory}: {error.strerror}",
            remedy="name a new folder",
        ) from None


def read(directory: Path) -> Record:
    """The record in a folder. Raises Malformed("evidence.record" | "evidence.record_changed")."""
    try:
        document = json.loads((directory / "appraisal.json").read_bytes())
        if set(document) != _KEYS or document["format"] != FORMAT:
            raise _broken("appraisal.json has other keys, or another format")
        token = directory / "token.jwt"
        policy = document["policy"]
        return Record(
            at=int(document["at"]),
            nonce=document["nonce"],
            report_data=document["report_data"],
            policy=None if policy is None else _fetched(directory, "policy", policy),
            files={name: _fetched(directory, name, one) for name, one in document["files"].items()},
            references={name: _fetched(directory, name, one) for name, one in document["references"].items()},
            highest={str(name): int(serial) for name, serial in document["highest"].items()},
            audience=str(document["audience"]),
            verdict=dict(json.loads((directory / "verdict.json").read_bytes())),
            token=token.read_text("ascii").strip() if token.exists() else None,
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        # any other shape than ours gives one of these while it is taken apart
        raise _broken(type(error).__name__) from None


def _kept(directory: Path, data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    (directory / "files" / name).write_bytes(data)
    return name


def _fetched(directory: Path, name: str, digest: str) -> bytes:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise _broken(f"{name}: not a SHA-256")
    data = (directory / "files" / digest).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise Malformed("evidence.record_changed", "a file of the record is not the one that was appraised", got=name)
    return data


def _broken(got: str) -> Malformed:
    return Malformed(
        "evidence.record", "not a record of an appraisal", got=got, remedy="name the folder that holds appraisal.json"
    )
