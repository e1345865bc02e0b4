"""One case folder, as its `case.json` describes it (format 1), read as strictly as evidence.

Everything raised is Malformed("case.*"): a case that cannot be read never counts as passed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from moorline.clock import Instant
from moorline.errors import Malformed

FORMAT: Final = 1
RUNNABLE: Final = frozenset({"evidence", "eventlog", "ima"})
KINDS: Final = RUNNABLE | {"collateral", "known_answer", "claims"}
OUTCOMES: Final = frozenset({"accept", "refuse", "malformed", "undecided"})
_KEYS: Final = frozenset(
    {
        "format",
        "kind",
        "mode",
        "at",
        "evidence",
        "endorsements",
        "reference",
        "inputs",
        "policy",
        "expect",
        "code_class",
        "per_file",
        "facts",
    }
)
_MAX_FILE: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the folder and what it is said to be."""

    file: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What must come out: an outcome, and the class of its code unless it is `accept`."""

    outcome: str
    code_class: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One appraisal to run. Paths are names inside `folder`; `at` is None where nothing is dated."""

    family: str
    name: str
    folder: Path
    kind: str
    mode: str
    at: Instant | None
    evidence: tuple[Entry, ...]
    endorsements: tuple[Entry, ...]
    reference: tuple[Entry, ...]
    inputs: Mapping[str, object]
    policy: Mapping[str, object]
    expected: Expected
    per_file: Mapping[str, Expected] | None
    facts: Mapping[str, object]
    contents: Mapping[str, bytes] | None = None
    """The files themselves, for a case that has no folder: one made of what a person named on the command line."""

    def read(self, file: str) -> bytes:
        """The bytes of a file of this case. Raises Malformed("case.file")."""
        if self.contents is not None:
            if file not in self.contents:
                raise Malformed("case.file", "no such file was given", got=file)
            return self.contents[file]
        if not file or "/" in file or "\\" in file or file.startswith("."):
            raise Malformed("case.file", "a case names only files of its own folder", got=file)
        path = self.folder / file
        try:
            if not path.is_file():  # neither a folder nor a pipe, which would never end
                raise Malformed("case.file", "the case names a file that is not there", got=file)
            if path.stat().st_size > _MAX_FILE:
                raise Malformed("case.file", "a file of the case is too large", got=file)
            return path.read_bytes()
        except OSError as error:
            raise Malformed("case.file", "a file of the case cannot be read", got=f"{file}: {error.strerror}") from None
        except ValueError:  # a zero byte, or half a surrogate
            raise Malformed("case.file", "a case names a file that cannot exist", got=ascii(file)) from None

    def all_of(self, hint: str) -> list[bytes]:
        """Every evidence file of a kind, in order."""
        return [self.read(entry.file) for entry in self.evidence if entry.hint == hint]

    def text(self, name: str) -> str | None:
        """An input that is a text; None where the case says nothing."""
        value = self.inputs.get(name)
        if value is None or isinstance(value, str):
            return value
        raise Malformed("case.inputs", "an input has the wrong type", expected="a text", got=name)

    def octets(self, name: str) -> bytes | None:
        """An input in hexadecimal; None where the case says nothing."""
        value = self.text(name)
        try:
            return None if value is None else bytes.fromhex(value)
        except ValueError:
            raise Malformed("case.inputs", "an input is not hexadecimal", got=name) from None

    def files(self, name: str) -> tuple[str, ...]:
        """An input that is a list of file names."""
        value = self.inputs.get(name, [])
        if isinstance(value, list) and all(isinstance(file, str) for file in value):
            return tuple(value)
        raise Malformed("case.inputs", "an input has the wrong type", expected="a list of files", got=name)

    @property
    def alternates(self) -> tuple[Entry, ...]:
        """The same evidence in other encodings."""
        return _entries(self.inputs.get("alternates", []))

    def with_evidence(self, evidence: tuple[Entry, ...]) -> Case:
        """The same case about other files of its folder."""
        return dataclasses.replace(self, evidence=evidence)

    def with_endorsements(self, endorsements: tuple[Entry, ...]) -> Case:
        """The same case with other endorsements of its folder."""
        return dataclasses.replace(self, endorsements=endorsements)


def read_case(folder: Path) -> Case:
    """The case in `folder`; its family is the folder above. Raises only Malformed("case.*")."""
    try:
        path = folder / "case.json"
        if path.stat().st_size > _MAX_FILE:
            raise Malformed("case.undecodable", "case.json is too large", expected=f"<= {_MAX_FILE} bytes")
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Malformed("case.undecodable", "case.json cannot be read", got=type(error).__name__) from None
    if not isinstance(document, dict) or set(document) != _KEYS:
        raise Malformed("case.keys", "case.json has other keys than format 1", expected=", ".join(sorted(_KEYS)))
    known = (document["kind"] in (*KINDS,), document["mode"] in ("authentic", "policy"), document["format"] is not True)
    if document["format"] != FORMAT or not all(known):
        raise Malformed("case.format", "an unknown format, kind or mode", got=f"{document['format']} {document['kind']}")
    if document["kind"] in RUNNABLE and not document["evidence"]:
        raise Malformed("case.entries", "a case about evidence names none", expected="one file at least")
    return Case(
        family=folder.absolute().parent.name,
        name=folder.absolute().name,
        folder=folder,
        kind=document["kind"],
        mode=document["mode"],
        at=_instant(document["at"]),
        evidence=_entries(document["evidence"]),
        endorsements=_entries(document["endorsements"]),
        reference=_entries(document["reference"]),
        inputs=_object(document["inputs"]),
        policy=_policy(_object(document["policy"]), str(document["mode"])),
        expected=_expected(document),
        per_file=_per_file(document),
        facts=_object(document["facts"]),
    )


def _instant(value: object) -> Instant | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(str(value))
        if moment.tzinfo is None:
            raise ValueError
        return Instant(int(moment.timestamp()))
    except (ValueError, OverflowError):
        raise Malformed("case.at", "the time of appraisal is not RFC 3339 in UTC", got=value) from None


def _entries(value: object) -> tuple[Entry, ...]:
    if not isinstance(value, list):
        raise Malformed("case.entries", "files are listed as {file, as}")
    entries: list[Entry] = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("file"), str) or not isinstance(item.get("as"), str):
            raise Malformed("case.entries", "files are listed as {file, as}")
        entries.append(Entry(item["file"], item["as"]))
    return tuple(entries)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise Malformed("case.object", "inputs, policy and facts are objects")
    return value


def _policy(policy: dict[str, object], mode: str) -> dict[str, object]:
    """The demands, each of its type: a demand that cannot be read must not look like one that was not made."""
    if policy and mode != "policy":
        raise Malformed("case.policy", "only a case of mode policy makes demands", got=sorted(policy))
    for name, value in policy.items():
        if not _DEMANDS.get(name, _any)(value):
            raise Malformed("case.policy", "a demand has the wrong type", got=name)
    return policy


def _any(_: object) -> bool:
    return True  # the family says that it does not know the demand


def _hex_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) and _is_hex(text) for text in value.values())


def _is_hex(text: str) -> bool:
    try:
        return bytes.fromhex(text).hex() == text.lower()
    except ValueError:
        return False


def _numbers(value: object) -> bool:
    names = {"bl", "tee", "snp", "ucode", "fmc"}
    return isinstance(value, dict) and set(value) <= names and all(type(one) is int for one in value.values())


_DEMANDS: Final[Mapping[str, Callable[[object], bool]]] = {
    "allow_debug": lambda value: isinstance(value, bool),
    "accept_tcb": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "min_tcb": _numbers,
    "measurements": _hex_by_name,
    "ima_cover": lambda value: isinstance(value, str),
}


def _expected(document: Mapping[str, object]) -> Expected:
    outcome, code_class = document["expect"], document["code_class"]
    if outcome not in (*OUTCOMES,) or (code_class is None) != (outcome == "accept"):
        raise Malformed("case.expect", "expect and code_class do not fit together", got=f"{outcome} {code_class}")
    return Expected(outcome=str(outcome), code_class=None if code_class is None else str(code_class))


def _per_file(document: Mapping[str, object]) -> dict[str, Expected] | None:
    """What is expected of each file. Every file has an expectation, and every expectation its file: none goes unseen."""
    if document["per_file"] is None:
        return None
    found: dict[str, Expected] = {}
    for file, value in _object(document["per_file"]).items():
        expected = _object(value)
        if set(expected) != {"expect", "code_class"}:
            raise Malformed("case.per_file", "a file's expectation has other keys", expected="expect, code_class", got=file)
        found[file] = _expected(expected)
    listed = {entry.file for entry in _entries(document["evidence"])}
    if set(found) != listed and document["kind"] in RUNNABLE:
        raise Malformed("case.per_file", "per_file names other files than evidence", got=sorted(set(found) ^ listed))
    return found
