"""What a verifier must not get wrong, item by item: the rule, its codes, the clause, and the test that breaks it.

The rows stand in rules.txt; `page()` makes docs/reference/rules.md of them (docs/generate.py calls it).
tests/docs/test_rules.py holds every row against the source: each code is raised or found there, and each test exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple


class Rule(NamedTuple):
    """One row. `codes` are separated by spaces; `test` is a path below tests/, two colons and a function."""

    area: str
    says: str
    codes: str
    clause: str
    test: str


def _read(text: str) -> Iterator[Rule]:
    """The rows of rules.txt: `# area`, then `rule | codes | clause | test` a line; a dash is nothing."""
    area = ""
    for line in text.splitlines():
        if line.startswith("# "):
            area = line[2:]
        elif line:
            says, codes, clause, test = line.split(" | ")
            yield Rule(area, says, codes, clause, test)


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
                test = "" if rule.test == "-" else f"`tests/{rule.test}`"
                parts.append(f"| {rule.says} | {codes} | {rule.clause} | {test} |\n")
    return "".join(parts)
