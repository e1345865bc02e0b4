"""Holds docs/rules.py against the source: every code exists, every test exists and is about what it is said to break."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from moorline.policy import language

ROOT = Path(__file__).parents[2]


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


RULES = module("rules").RULES
SOURCE = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
LITERALS = set(re.findall(r'"([a-z0-9_]+\.[a-z0-9_]+)"', SOURCE))
FIELDS = {
    "intel." + path.removeprefix("platform.") if path.startswith("platform.") else f"{family}.{path}"
    for family in language.FAMILIES
    for path in (*language.value_types(family), "platform.advisories")
}
"""Codes made of a policy's field: `policy.rules.judged` and `policy.intel.finding` write them."""


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, kinds)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.area}: {rule.says[:40]}")
def test_a_rule_has_codes_that_exist_and_a_test_that_breaks_it(rule):
    assert "NOT MET" not in rule.says
    codes = [] if rule.codes == "-" else rule.codes.split()
    assert [code for code in codes if code not in LITERALS | FIELDS] == []
    assert rule.tests
    for test in rule.tests.split():
        file, _, name = test.partition("::")
        assert name in functions(ROOT / "tests" / file), test
    assert rule.clause


def test_every_area_of_the_findings_is_there():
    assert {"TPM", "IMA", "Boot log", "SNP", "TDX", "TDX, SGX", "All"} <= {rule.area for rule in RULES}
