"""What all tests share: the option --long, their order, where shared vectors lie, and a PostgreSQL cluster."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from postgres import copied, database_url, postgres

__all__ = ["copied", "database_url", "postgres"]

HERE = Path(__file__).parent
LONGEST = ("crash", "walkthrough", "demo", "cometbft", "ledger_failures", "hsm")
"""Folders whose files take longest: they come first, so that no worker is alone with one of them at the end."""
SHARED = Path(__file__).parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests that take minutes too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=_turn)
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; ./dev test --long"))


def _turn(item):
    """When it is its folder's turn; within a folder everything stays in order."""
    folder = item.path.relative_to(HERE).parts[0]
    return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared folder is not beside this checkout")
    return SHARED
