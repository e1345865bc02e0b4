"""Holds docs/sec009.py against the source: checks, probes and tests exist; an item with none is not met."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from moorline.attesters.probes.machine import DERIVED, PROBES
from moorline.policy.sec009 import roadmap
from moorline.policy.sec009.catalogue import capabilities

ROOT = Path(__file__).parents[2]


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


STATUS = module("sec009")


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, kinds)}


def resolved(dotted):
    """The module, function or class a dotted name stands for; raises if there is none."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for name in parts[size:]:
            found = getattr(found, name)
        return found
    raise LookupError(dotted)


@pytest.mark.parametrize("row", STATUS.ROWS, ids=lambda row: f"{row.item}-{row.check.rpartition('.')[2]}")
def test_a_row_names_a_check_and_a_test_that_exist(row):
    assert row.item in STATUS.items()
    assert row.status in STATUS.STATUSES[:-1]
    assert resolved(row.check) is not None
    file, _, name = row.test.partition("::")
    assert name in functions(ROOT / "tests" / file)


def test_a_probe_checks_nothing():
    """What a host says of itself is asserted at most, on this page too."""
    assert [
        row for row in STATUS.ROWS if row.check.startswith("moorline.attesters.probes") and row.status == "checked"
    ] == []


def test_an_item_without_a_row_is_shown_as_not_met():
    shown = dict(re.findall(r"^\| ([56]\.[\d.]+) \|.*?\*\*([a-z ]+)\*\*", STATUS.page(""), flags=re.MULTILINE))
    assert set(shown) == set(STATUS.items())
    for item in STATUS.items():
        if not [row for row in STATUS.ROWS if row.item == item]:
            assert shown[item] == "not met"


def test_every_capability_has_a_probe_or_is_derived():
    spoken = {name for probe in PROBES for name in probe.capabilities}
    assert set(capabilities()) - spoken == {DERIVED}


def test_every_table_item_has_capabilities_or_services():
    framing = {item for item in STATUS.items() if item.startswith("5.0")}
    assert [item for item in STATUS.items() if item not in framing and not STATUS.capabilities_of(item)] == []


def test_every_command_that_is_recommended_exists():
    """`moor noun verb` in what probes and changes tell people to run."""
    from moorline.cli import NOUNS

    sources = [path.read_text("utf-8") for path in (ROOT / "src/moorline/attesters/probes").glob("*.py")]
    texts = [*sources, *(change.how for change in roadmap.changes().values())]
    named = {match for text in texts for match in re.findall(r"\bmoor ([a-z][a-z-]+) ([a-z][a-z-]+)", text)}
    assert ("host", "assess") in named
    for noun, verb in sorted(named):
        assert noun in NOUNS, (noun, verb)
        if noun == "init":
            continue
        import typer

        app = importlib.import_module(f"moorline.cli.{noun.replace('-', '_')}").app
        assert verb in getattr(typer.main.get_command(app), "commands", {}), (noun, verb)
