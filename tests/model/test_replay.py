"""The model's runs happen on the engine's own code as the model says; a model with a wrong rule is told apart."""

import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tests.ledger.conftest import NAMES, NOW, consortium_at

from moorline.ledger.engines.node import Node
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore

from .quorum_model import AS_IT_IS, MUTATIONS, SHRUNK, Rules, search
from .replay import Mismatch, kind, replayed, walk

RULES = {
    "nobody Byzantine, promotion": Rules(byzantine=-1, heights=1),
    "nobody Byzantine, promotion, two heights": Rules(byzantine=-1, heights=2, names="x"),
    **{name: rules for name, rules in AS_IT_IS.items() if 4 not in rules.actors},
}


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    directory = tmp_path_factory.mktemp("blank")
    open_database(f"sqlite:///{directory / 'blank.db'}", "ledger").dispose()
    return consortium_at(directory / "consortium"), directory / "blank.db"


def replay(blank, rules, way):
    """On four new nodes, in memory where there is such a directory: nothing here waits for a disk."""
    consortium, empty = blank
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        nodes = []
        for name in NAMES:
            path = shutil.copy(empty, Path(directory) / f"{name}.db")
            nodes.append(
                Node(
                    name=name,
                    genesis=consortium.made.genesis,
                    key=consortium.authorities[name].checkpoint,
                    store=LedgerStore(open_database(f"sqlite:///{path}", "ledger")),
                    now_ms=lambda: NOW * 1000 + 2000,
                )
            )
        try:
            signers = {name: consortium.authorities[name].signer() for name in NAMES}
            replayed(rules, way, nodes, signers, NOW * 1000)
        finally:
            for node in nodes:
                node.store.close()


@pytest.mark.parametrize("name", RULES)
def test_what_the_model_does_the_engine_does_and_what_it_forbids_is_refused(blank, name):
    happened = Counter()
    for seed in range(6):
        way = walk(RULES[name], seed, length=24)
        replay(blank, RULES[name], way)
        happened.update(kind(before, after)[0] for before, after in pairwise(way))
    assert {"propose", "sign", "adopt"} <= set(happened)
    assert ("take" in happened) == RULES[name].promotes
    assert "go_on" in happened or RULES[name].heights == 1 or RULES[name].byzantine == 0


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RULES)
def test_two_hundred_runs_of_each(blank, name):
    for seed in range(100, 300):
        replay(blank, RULES[name], walk(RULES[name], seed, length=40))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_rule_parts_from_the_engine(blank, name):
    """verifies that: the run in which a mutated model breaks its invariant does not happen on the engine."""
    with pytest.raises(Mismatch):
        replay(blank, MUTATIONS[name], list(search(MUTATIONS[name]).way))


def test_a_run_of_the_right_rules_to_a_changed_set(blank):
    """verifies that: the set that x makes signs the block above x, and who was retired by x does not."""
    rules = Rules(byzantine=0, heights=2, promotes=False, after_x=SHRUNK)
    for seed in range(400):
        way = walk(rules, seed, length=60)
        if any(head.height == 2 and head.parent.name == "x" for head in way[-1].heads):
            replay(blank, rules, way)
            return
    pytest.fail("no run got that far")
