"""Helpers of this folder and the consortium of tests/ledger can be imported by its tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "ledger"))
from apps import App


@pytest.fixture
def app(tmp_path):
    found = App(tmp_path / "app")
    yield found
    found.close()
