"""The threat table is true: verifies that every attack of the demo has its row with the code registered for it, that every
code exists, and that every test named exists."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from moorline.cli.demo.play import SCENES
from moorline.cli.demo.report import ATTACKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threats.md").read_text("utf-8")
DEMO, TESTS = PAGE.split("## Made in tests only")


@cache
def generated_codes():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(re.findall(r"^\| `([^`]+)` \|", module.codes(), re.MULTILINE))


def rows(text):
    """The cells of each row of the tables in `text`, headings left out."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [row for row in cells if row[0] != "attack"]


def code_of(row):
    return re.fullmatch(r"`([^`]+)`", row[-2]).group(1)


@cache
def functions(path: Path):
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_attack_of_the_demo_has_its_row_in_order():
    assert [row[0].strip("`") for row in rows(DEMO)] == list(ATTACKS)


@pytest.mark.parametrize("row", rows(DEMO), ids=lambda row: row[0].strip("`"))
def test_the_row_names_the_code_and_the_process_of_the_demo(row):
    registered = ATTACKS[row[0].strip("`")]
    assert code_of(row) == registered.code
    assert registered.by.split("-")[0].startswith(row[-3].split()[0])


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0].strip("`")[:40])
def test_codes_and_tests_of_the_row_exist(row):
    assert code_of(row) in generated_codes()
    named = re.findall(r"`(tests/[^:`]+)::([^`]+)`", row[-1])
    assert named
    for path, function in named:
        assert function in functions(ROOT / path), f"{path} has no {function}"


def test_every_attack_is_played():
    assert {name for scene in SCENES for name in (*scene.attacks, *scene.at_once)} == set(ATTACKS)
