"""The actors of these tests."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "hosts")]

from verdict_desk import OLD, Desk, document  # noqa: E402 - found by the path just above


@pytest.fixture
def desk(tmp_path, capsys):
    made = Desk(tmp_path, capsys)
    made.boots(OLD)
    return made


@pytest.fixture(scope="session")
def documents():
    return document
