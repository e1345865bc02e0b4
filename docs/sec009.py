"""SEC009, item by item: requirement or measure -> capabilities -> probe or check -> test -> status.

The rows stand in sec009.txt, `item | status | check | test` a line; `page()` makes docs/reference/sec009-status.md of them and of
the tables that ship in policy/sec009 (docs/generate.py calls it). tests/docs/test_sec009_status.py holds every row against
the source. An item without a row is shown as not met: nobody has to remember to say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

STATUSES: Final = ("checked", "asserted", "declared", "not met")
"""checked: a verifier refuses by evidence. asserted: the host's own word. declared: people's. In this order, the best counts."""


class Row(NamedTuple):
    """One row. `check` is a module, function or class of the package; `test` a path below tests/, two colons and a function."""

    item: str
    status: str
    check: str
    test: str


def _read(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        if line:
            item, status, check, test = line.split(" | ")
            yield Row(item, status, check, test)


ROWS: Final = tuple(_read((Path(__file__).parent / "sec009.txt").read_text("utf-8")))


def items() -> dict[str, str]:
    """Every requirement and measure of the catalogue with its title, and parts of them that rows speak of."""
    from moorline.policy.sec009.catalogue import data

    raw = data("catalogue.json")
    found = {}
    for entry in (*raw["requirements"], *raw["measures"]):
        found[entry["id"]] = entry["title"]
        # A part of a clause has a line of its own where a row speaks of it; the clause's line speaks of the rest.
        parts = entry.get("subclauses", {})
        found |= {part: title for part, title in parts.items() if any(row.item == part for row in ROWS)}
    return found


def capabilities_of(item: str) -> list[str]:
    """What meets the item: capabilities of a host or service, as the shipped tables say; services without a name of their own."""
    from moorline.policy.sec009.assessment import measure_rules
    from moorline.policy.sec009.catalogue import data

    table = data("requirement_capabilities.json")["requirements"].get(item)
    if table is not None:
        named = [f"`{one['capability']}`" for one in table["host"]]
        named += [f"`{one['capability']}` ({one['by']})" if one["capability"] else one["by"] for one in table["service"]]
        return list(dict.fromkeys(named))
    rule = measure_rules().get(item)
    if rule is None and item.count(".") > 1:
        return capabilities_of(item.rpartition(".")[0])
    if rule is None:
        return []
    return [" or ".join(f"`{name}`" for name in clause) for clause in rule.clauses] + list(rule.services)


def status_of(item: str) -> str:
    """The best status of the item's rows; `not met` without any."""
    said = [row.status for row in ROWS if row.item == item]
    return min(said, key=STATUSES.index, default="not met")


def page(head: str) -> str:
    """The page."""
    from moorline.attesters.probes.machine import PROBES

    counts = [status_of(item) for item in items()]
    parts = [
        head,
        "# SEC009 status\n\nEvery requirement (clause 5) and measure (clause 6) of ETSI GR NFV-SEC 009, the capabilities that meet it, what "
        "looks\nat it here, and the test that shows it. `checked` is by evidence that a verifier can refuse; `asserted` is the host's own\n"
        "word; `declared` is people's; an item that nothing here looks at is `not met`. What a status does not cover is in\n"
        "[limitations](../limitations.md).\n\n",
        ", ".join(f"{counts.count(status)} {status}" for status in STATUSES) + f", of {len(counts)}.\n",
        "\n| item | title | status | capabilities or services | check | test |\n|---|---|---|---|---|---|\n",
    ]
    for item, title in items().items():
        rows = [row for row in ROWS if row.item == item]
        checks = "<br>".join(f"`{row.check.removeprefix('moorline.')}` ({row.status})" for row in rows) or "none"
        tests = "<br>".join(f"`tests/{row.test}`" for row in rows) or "none"
        named = ", ".join(capabilities_of(item)) or "-"
        parts.append(f"| {item} | {title} | **{status_of(item)}** | {named} | {checks} | {tests} |\n")
    parts.append(
        "\n## Capabilities and their probes\n\nWhat `moor host assess` reads of each; above `asserted` is an attestation authority's to show.\n\n"
        "| capability | probe | best level of the model | evidence |\n|---|---|---|---|\n"
    )
    from moorline.policy.sec009.catalogue import capabilities

    probes = {name: probe.noun for probe in PROBES for name in probe.capabilities}
    for name, model in capabilities().items():
        probe = f"`attesters.probes.{probes[name]}`" if name in probes else "derived from the measures"
        evidence = model.evidence.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        parts.append(f"| `{name}` | {probe} | {model.max_assurance.word} | {evidence} |\n")
    return "".join(parts)
