"""Make examples/ledger-transactions.json anew: a history, and after it one good transaction of every kind with what it does.

Writes the table of docs/spec/ledger-transactions.md too. Run it when a format of the ledger changed; a test executes what it
wrote (tests/ledger/test_spec.py). Keys are made for the occasion and thrown away.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FILE = ROOT / "docs" / "spec" / "examples" / "ledger-transactions.json"
PAGE = ROOT / "docs" / "spec" / "ledger-transactions.md"


def example() -> dict[str, Any]:
    """History and cases, in hex."""
    from tests.ledger.everything import World

    from moorline.ledger import transactions
    from moorline.ledger.state import Applied

    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name) / "c")
        bodies = world.bodies()
    cases = []
    for label, body in bodies:
        data = world.signed(label, body)
        outcome, after = world.tried(label, body, nonce=transactions.parse(data).payload.nonce)
        assert isinstance(outcome, Applied), (label, body)
        kind = type(body).__name__
        cases.append(
            {
                "kind": f"Propose {body.kind}" if isinstance(body, transactions.Propose) else kind,
                "sender": f"{world.senders[label].kind.value} {world.senders[label].name}",
                "transaction": data.hex(),
                "writes": sorted(outcome.writes),
                "events": [event.kind for event in outcome.events],
                "state_root": after.root.hex(),
            }
        )
    return {
        "genesis": world.consortium.made.genesis.encode().hex(),
        "history": [{"time_ms": time_ms, "transaction": data.hex()} for time_ms, data in world.history],
        "time_ms": world.consortium.now_ms + 1000,
        "state_root": world.consortium.state.root.hex(),
        "cases": cases,
    }


def rows(found: dict[str, Any]) -> str:
    """The table of the page: one row a kind."""
    lines = ["| transaction | example sent by | writes | tells |", "|---|---|---|---|"]
    seen = set()
    for case in found["cases"]:
        if case["kind"] in seen:
            continue
        seen.add(case["kind"])
        writes = " ".join(f"`{_short(key)}`" for key in case["writes"])
        lines.append(f"| `{case['kind']}` | {case['sender']} | {writes} | {', '.join(case['events'])} |")
    return "\n".join(lines)


def _short(key: str) -> str:
    return re.sub(r"[0-9a-f]{64}", "…", key)


def main() -> int:
    """Write both."""
    found = example()
    FILE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    text = PAGE.read_text("utf-8")
    marked = re.compile(r"(<!-- every kind: begin -->\n).*(<!-- every kind: end -->)", re.DOTALL)
    assert marked.search(text) is not None, "the page has no place for the table"
    PAGE.write_text(marked.sub(lambda match: match[1] + rows(found) + "\n" + match[2], text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
