"""IMA lists: replayed, compared with a PCR 10 where the case has one, covered by reference values or signatures."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Final

from moorline.cli.evidence_cases.case import Case
from moorline.cli.evidence_cases.compare import Facts
from moorline.cli.evidence_cases.families.eventlog import expected_pcrs
from moorline.errors import NotAuthentic, Unavailable
from moorline.evidence.ima import ImaEntry, parse_binary, parse_ima
from moorline.evidence.tpm_structures import ALG_SHA1, HASH_NAMES
from moorline.rats import Finding, Outcome
from moorline.verification.ima import initial, verify_entries, verify_ima

HINTS: Final = frozenset({"ima-ascii", "ima-binary"})
_BANKS: Final = {name: bank for bank, name in HASH_NAMES.items()}


def run(case: Case, facts: Facts) -> tuple[Finding, ...]:
    """The findings of one case (`compare.Family`)."""
    entry = case.evidence[0]
    data = case.read(entry.file)
    binary = entry.hint == "ima-binary"
    entries = parse_binary(data) if binary else parse_ima(data)
    facts.update(list_facts(entries))
    bank = _bank(case)
    given = expected_pcrs(case).get(HASH_NAMES[bank], {}).get(10)
    covered = _covered(case, entries) if case.mode == "policy" else ()
    try:
        # Without a value from outside the list is only held against itself: its own sum stands in for the quote.
        quoted = running(entries, bank) if given is None else given
        if binary:
            verify_entries(initial(bank), entries, bank=bank, quoted=quoted)
        else:
            verify_ima(initial(bank), data, bank=bank, quoted=quoted)
    except NotAuthentic as error:
        if not covered:
            raise
        return (*covered, _broken(error))
    return covered


def _bank(case: Case) -> int:
    """The bank that is named, or the one that values are expected in; where nothing is expected any bank will do."""
    expected = sorted(expected_pcrs(case))
    named = case.text("pcr_bank") or (expected[0] if len(expected) == 1 else None if expected else "sha1")
    bank = _BANKS.get(named or "")
    if bank is None:
        raise Unavailable("material.unsupported", "the case names no bank that is known", got=named)
    return bank


def _broken(error: NotAuthentic) -> Finding:
    """What is wrong with the list itself, beside what is wrong with its entries."""
    return Finding(code=error.code, outcome=Outcome.NOT_MET, claim="executables", says=error.says, got=error.got)


def list_facts(entries: tuple[ImaEntry, ...]) -> Facts:
    """What a list says: how long it is, and what it adds up to in the SHA-1 bank."""
    return {
        "entries": len(entries),
        "templates": sorted({entry.template for entry in entries}),
        "violations": sum(entry.violation for entry in entries),
        "pcr10_sha1": running(entries, ALG_SHA1).hex(),
    }


def running(entries: tuple[ImaEntry, ...], bank: int) -> bytes:
    """PCR 10 after all entries. In the SHA-1 bank the template hashes stand in the list."""
    name = HASH_NAMES[bank]
    size = hashlib.new(name).digest_size
    value = bytes(size)
    for entry in entries:
        if entry.violation:
            extension = b"\xff" * size
        elif len(entry.template_hash) == size:
            extension = entry.template_hash
        else:
            extension = hashlib.new(name, entry.template_data()).digest()
        value = hashlib.new(name, value + extension).digest()
    return value


def _covered(case: Case, entries: tuple[ImaEntry, ...]) -> tuple[Finding, ...]:
    cover = case.policy.get("ima_cover")
    if set(case.policy) != {"ima_cover"} or cover not in ("allow_list", "signature", "either"):
        raise Unavailable("material.policy_unsupported", "a demand that is not understood here", got=sorted(case.policy))
    allowed, excluded = _allow_list(case)
    signed = _signatures(case) if cover in ("signature", "either") else None
    findings: list[Finding] = []
    for entry in entries:
        path = entry.path.decode("utf-8", "replace")
        if any(pattern.match(path) for pattern in excluded):
            continue
        listed = cover != "signature" and entry.digest.hex() in allowed.get(path, frozenset())
        if listed:
            continue
        if signed is not None and (entry.extra or entry.appended_signature):
            findings += _finding(entry, path, "ima.signature_invalid", covered=signed(entry))
        else:
            findings += _finding(entry, path, "ima.not_covered", covered=False)
    return tuple(findings)


def _finding(entry: ImaEntry, path: str, code: str, *, covered: bool) -> list[Finding]:
    if covered:
        return []
    return [
        Finding(
            code=code,
            outcome=Outcome.NOT_MET,
            claim="executables",
            says=f"{path} is covered by no reference value and no trusted signature",
            got=f"{entry.algorithm}:{entry.digest.hex()}",
            remedy="add the file to the reference values, or remove it from the host",
        )
    ]


def _allow_list(case: Case) -> tuple[dict[str, frozenset[str]], list[re.Pattern[str]]]:
    """Digests by path, and patterns of paths that are not appraised, of a Keylime runtime policy."""
    digests: dict[str, frozenset[str]] = {}
    patterns: list[re.Pattern[str]] = []
    for entry in case.reference:
        if entry.hint != "keylime-runtime-policy":
            raise Unavailable("material.unsupported", "a kind of reference that is not read here", got=entry.hint)
        try:
            document = json.loads(case.read(entry.file))
            digests |= {path: frozenset(values) for path, values in document["digests"].items()}
            patterns += [re.compile(pattern) for pattern in document["excludes"]]
        except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
            raise Unavailable(
                "material.reference_undecodable", "the reference values cannot be read", got=type(error).__name__
            ) from None
    return digests, patterns


def _signatures(case: Case) -> Callable[[ImaEntry], bool]:
    """A check of file signatures under the keys of the endorsements."""
    from moorline.cli.evidence_cases import material
    from moorline.verification import ima_signature

    keys = [
        ima_signature.load_key(material.spki(case.read(entry.file)))
        for entry in case.endorsements
        if entry.hint == "public-key-pem"
    ]
    keys += [
        ima_signature.load_certificate(der)
        for entry in case.endorsements
        if entry.hint in ("cert-der", "cert-pem")
        for der in material.certificates(case.read(entry.file))
    ]
    return lambda entry: ima_signature.is_signed(entry, keys)
