"""Run cases and compare what came out with what was expected.

1. `refuse` and `malformed` match only with a code of the case's class; the two count as one outcome only where that class is
   `structure`. `undecided` matches only `undecided`, with a code of the class, and never counts as a refusal.
2. `accept` matches only if every fact that the case lists was reported, and is equal.
3. An alternate encoding must give the same outcome, class and facts; if one does not, the case does not match.
4. A case that is not run is `skipped`, with a reason of `SKIPS`. A crash of ours is `undecided` and never matches.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from moorline.cli.evidence_cases import classes
from moorline.cli.evidence_cases.case import RUNNABLE, Case, Entry, Expected, read_case
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused
from moorline.rats import Finding, Outcome

Facts: TypeAlias = dict[str, object]
Family: TypeAlias = Callable[[Case, Facts], tuple[Finding, ...]]
"""Runs a case: fills the facts as soon as they are parsed, returns the findings of policy (none in mode `authentic`), raises
MoorlineError for everything that is not acceptable."""

NOT_AN_APPRAISAL: Final = "not_an_appraisal"
UNSUPPORTED: Final = "unsupported"
SKIPS: Final = {
    NOT_AN_APPRAISAL: "known answers, claims and collateral are compared by the test suite",
    UNSUPPORTED: "this version has no verifier for the technology",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one case, as it is printed. `reason` is the reason of a skip, or says what does not match."""

    family: str
    case: str
    expected: str
    got: str
    code: str | None
    reason: str | None
    match: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    got: str
    code: str | None
    code_classes: frozenset[str]
    says: str | None
    facts: Facts
    crashed: bool = False


def find_folders(directory: Path) -> list[Path]:
    """Every folder below `directory` that has a `case.json`, sorted by path; `directory` itself counts."""
    return sorted(path.parent for path in directory.rglob("case.json") if path.is_file())


def run_folders(folders: list[Path], family_of: Callable[[Case], Family | None]) -> Iterator[Row]:
    """A row for each case, in order, as it is done. Never raises for what a case holds."""
    for folder in folders:
        try:
            case = read_case(folder)
        except Malformed as error:
            where = folder.absolute()
            yield _unreadable(where.parent.name, where.name, error)
            continue
        try:
            yield from _rows(case, family_of(case))
        except Malformed as error:  # a part of the case that is read only when it is needed, such as its alternates
            yield _unreadable(case.family, case.name, error)


def _unreadable(family: str, name: str, error: Malformed) -> Row:
    return Row(
        family=family,
        case=name,
        expected="unreadable",
        got="undecided",
        code=error.code,
        reason=str(error),
        match=False,
    )


def totals(rows: list[Row]) -> dict[str, object]:
    """Counts of all rows, and of each family."""
    families: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = families.setdefault(row.family, {"matched": 0, "mismatched": 0, "skipped": 0})
        counts[_column(row)] += 1
    overall = {name: sum(counts[name] for counts in families.values()) for name in ("matched", "mismatched", "skipped")}
    return {"cases": len(rows), **overall, "families": families}


def _column(row: Row) -> str:
    if row.got == "skipped":
        return "skipped"
    return "matched" if row.match else "mismatched"


def _rows(case: Case, family: Family | None) -> Iterator[Row]:
    if case.kind not in RUNNABLE:
        yield _skipped(case, NOT_AN_APPRAISAL)
    elif family is None:
        yield _skipped(case, UNSUPPORTED)
    elif case.per_file is None:
        yield _row(case, family)
    else:
        for entry in case.evidence:
            expected = case.per_file.get(entry.file, case.expected)
            yield _row(
                dataclasses.replace(
                    case, name=f"{case.name}:{entry.file}", evidence=(entry,), expected=expected, facts={}, per_file=None
                ),
                family,
            )


def _skipped(case: Case, reason: str) -> Row:
    return Row(
        family=case.family,
        case=case.name,
        expected=case.expected.outcome,
        got="skipped",
        code=None,
        reason=reason,
        match=False,
    )


def _row(case: Case, family: Family) -> Row:
    result = _run(case, family)
    trouble = _trouble(result, case.expected, case.facts)
    if trouble is None:
        for alternate in case.alternates:
            other = _run(_replaced(case, alternate), family)
            trouble = _trouble(other, case.expected, case.facts)
            if trouble is not None:
                result, trouble = other, f"alternate {alternate.file}: {trouble}"
                break
    return Row(
        family=case.family,
        case=case.name,
        expected=case.expected.outcome,
        got=result.got,
        code=result.code,
        reason=trouble if trouble is not None else result.says,
        match=trouble is None,
    )


def _run(case: Case, family: Family) -> _Result:
    facts: Facts = {}
    try:
        findings = family(case, facts)
    except MoorlineError as error:
        return _raised(error, _outcome(error), facts)
    except (
        Exception
    ) as error:  # the top of the runner: a defect of ours must neither stop the others nor look like a refusal
        return _Result(
            got="undecided",
            code="evidence.crashed",
            code_classes=frozenset(),
            says=f"{type(error).__name__}: {error}",
            facts=facts,
            crashed=True,
        )
    refusals = [finding for finding in findings if finding.outcome is Outcome.NOT_MET]
    if not refusals:
        return _Result(got="accept", code=None, code_classes=frozenset(), says=None, facts=facts)
    found = {classes.class_of(finding.code) for finding in refusals}
    return _Result(
        got="refuse",
        code=refusals[0].code,
        code_classes=frozenset(name for name in found if name is not None),
        says=refusals[0].says,
        facts=facts,
    )


def _outcome(error: MoorlineError) -> str:
    if isinstance(error, NotAuthentic | Refused):
        return "refuse"
    if not isinstance(error, Malformed) or (error.code.startswith("case.") and classes.class_of(error.code) is None):
        return "undecided"  # where the case itself is wrong, nothing is known about the evidence
    # What is refused for what it means, not for its form, is a refusal, whichever error says so.
    return "malformed" if classes.class_of_error(error) == "structure" else "refuse"


def _raised(error: MoorlineError, got: str, facts: Facts) -> _Result:
    name = classes.class_of_error(error)
    return _Result(
        got=got,
        code=error.code,
        code_classes=frozenset() if name is None else frozenset({name}),
        says=error.says,
        facts=facts,
    )


def _trouble(result: _Result, expected: Expected, facts: object) -> str | None:
    """What does not match, or None."""
    if result.crashed:
        return f"crashed: {result.says}"
    if not _same_outcome(result.got, expected):
        return f"{result.says or result.got}; expected {_shown(expected)}"
    if expected.code_class is not None and expected.code_class not in result.code_classes:
        return f"class {', '.join(sorted(result.code_classes)) or 'unknown'}; expected {expected.code_class}"
    return _different_fact(result, facts)


def _same_outcome(got: str, expected: Expected) -> bool:
    if expected.code_class == "structure" and {got, expected.outcome} <= {"refuse", "malformed"}:
        return True
    return got == expected.outcome


def _different_fact(result: _Result, facts: object) -> str | None:
    """Facts of evidence that is refused are compared only as far as the parser got to report them."""
    assert isinstance(facts, dict)  # case.Case says so; Mapping has no items() that mypy can see through `object`
    for name, value in facts.items():
        if name not in result.facts:
            if result.got == "accept":
                return f"fact {name} was not reported"
        elif not same_fact(result.facts[name], value):
            return f"fact {name} is {_short(result.facts[name])}; expected {_short(value)}"
    return None


def same_fact(found: object, expected: object) -> bool:
    """Equal as JSON: true is not 1, and a tuple is a list."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 160 else text[:159] + "…"


def _shown(expected: Expected) -> str:
    return expected.outcome if expected.code_class is None else f"{expected.outcome} ({expected.code_class})"


_QUOTE: Final = frozenset(
    {
        "tpm-quote-msg",
        "tpm-quote-sig",
        "tpm-quote-sig-raw",
        "tpm2-tools-pcrs",
        "azure-tpm-quote-json",
        "azure-tpm-quote-bincode",
    }
)


def _replaced(case: Case, alternate: Entry) -> Case:
    """The case with an alternate in the place of what it repeats: a TPM quote, all endorsements, or the first entry."""
    if alternate.hint == "sgx-ql-collateral-raw":
        return case.with_endorsements((alternate,))
    if alternate.hint in _QUOTE:
        rest = tuple(entry for entry in case.evidence if entry.hint not in _QUOTE)
        return case.with_evidence((*rest, alternate))
    return case.with_evidence((alternate, *case.evidence[1:]))
