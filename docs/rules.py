"""What a verifier must not get wrong, item by item: the rule, its codes, the clause, and the test that breaks it.

The rows stand in rules.txt; `page()` makes docs/reference/rules.md of them (docs/generate.py calls it).
tests/docs/test_rules.py holds every row against the source: each code is raised or found there, and each test exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple


class Rule(NamedTuple):
    """One row. `codes` and `tests` are separated by spaces; a test is a path below tests/, two colons and a function."""

    area: str
    says: str
    codes: str
    clause: str
    tests: str


def _read(text: str) -> Iterator[Rule]:
    """The rows of rules.txt: `# area`, then `rule | codes | clause | tests` a line; a dash is nothing."""
    area = ""
    for line in text.splitlines():
        if line.startswith("# "):
            area = line[2:]
        elif line:
            says, codes, clause, tests = line.split(" | ")
            yield Rule(area, says, codes, clause, tests)


RULES: Final = tuple(_read((Path(__file__).parent / "rules.txt").read_text("utf-8")))


def page(head: str) -> str:
    """The page: a table an area."""
    parts = [
        head,
        "# Rules of verification and appraisal\n\n",
        "Each row was a real bug in somebody's verifier. The test breaks the rule on purpose and looks for the code.\n",
    ]
    for area in dict.fromkeys(rule.area for rule in RULES):
        parts.append(f"\n## {area}\n\n| rule | codes | clause | test that breaks it |\n|---|---|---|---|\n")
        for rule in RULES:
            if rule.area == area:
                codes = "" if rule.codes == "-" else ", ".join(f"`{code}`" for code in rule.codes.split())
                tests = ", ".join(f"`tests/{test}`" for test in rule.tests.split())
                parts.append(f"| {rule.says} | {codes} | {rule.clause} | {tests} |\n")
    return "".join(parts)
