"""Docs are executed: a generated page that differs from the code fails, and so does a link to nowhere."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITERS = generator().writers()  # called in the tests: every worker imports this, and one runs it


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_the_generated_page_says_what_the_code_says(name):
    written = (ROOT / "docs" / "reference" / name).read_text("utf-8")
    assert written == WRITERS[name](), f"docs/reference/{name} is out of date; run ./dev docs"


def test_every_error_code_is_written_as_a_literal_where_it_is_raised():
    pattern = re.compile(r"(?:Malformed|NotAuthentic|Refused|Conflict|Unavailable|Misconfigured)\(\s*f[\"']")
    odd = [str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.py") if pattern.search(path.read_text("utf-8"))]
    assert odd == []


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_no_committed_file_names_a_registry_or_a_path_of_the_machine():
    hosts = re.compile(r"pypi\.org|pythonhosted|crates\.io|registry\.npmjs|proxy\.golang|repo\.maven|deb\.debian|/work/main")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]
    named = [
        str(path.relative_to(ROOT))
        for path in tracked
        if path.suffix in {".py", ".md", ".toml", ".lock", ".txt", ".json", ""}
        and path != Path(__file__)
        and hosts.search(path.read_text("utf-8", errors="ignore"))
    ]
    assert named == []
