"""The model of quorum, set change and promotion is searched entirely, and it catches rules that are wrong."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.ledger import admission, transactions
from moorline.ledger.checkpoint import quorum_of, tolerated_faults

from .quorum_model import AS_IT_IS, LARGE, MUTATIONS, Rules, broken, search, start, steps


@pytest.mark.parametrize("name", AS_IT_IS)
def test_the_rules_hold_in_every_state_there_is(name):
    """verifies that: no two blocks at one height, the old set signs its change, no promotion loses a committed block."""
    found = search(AS_IT_IS[name])
    assert found.broken is None, "\n".join(map(str, found.way))
    assert found.states > 500


@pytest.mark.parametrize("name", [name for name in AS_IT_IS if AS_IT_IS[name].heights == 2])
def test_to_commit_and_propose_in_one_step_leads_nowhere_that_two_steps_do_not(name):
    """verifies that: what a sequencer writes together could as well be written one after the other (docs/adr/0020)."""
    assert search(AS_IT_IS[name]).states == search(replace(AS_IT_IS[name], together=False)).states


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LARGE)
def test_the_rules_hold_over_two_heights(name):
    assert search(LARGE[name]).broken is None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_rule_that_is_wrong_is_caught(name):
    """verifies that: the search would notice; each mutation breaks an invariant, and the way there is a run of the model."""
    found = search(MUTATIONS[name])
    assert found.broken is not None
    assert found.way[0] == start(MUTATIONS[name])
    for before, after in zip(found.way, found.way[1:], strict=False):
        assert after in list(steps(MUTATIONS[name], before))
    assert broken(MUTATIONS[name], found.way[-1]) == found.broken


def test_a_sequencer_that_is_gone_stops_writing_and_promotion_resumes_it():
    """verifies that: the model does something: blocks are committed in both terms."""
    rules = Rules(byzantine=-1, heights=1, names="x")
    reached, waiting, seen = set(), [start(rules)], set()
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        reached.update((head.height, state.taken is not None) for head in state.heads)
        waiting.extend(steps(rules, state))
    assert {(0, True), (1, False), (1, True)} <= reached


@given(n=st.integers(2, 64))
def test_quorums_have_an_honest_authority_in_common(n):
    """verifies that: what the model rests on holds for every size a ledger can have."""
    quorum, faults = quorum_of(n), tolerated_faults(n)
    assert 2 * quorum - n >= faults + 1
    assert quorum <= n
    if n == 3 * faults + 1:
        assert quorum == n - faults  # live with f silent


@given(n=st.integers(2, 64), raised=st.integers(0, 64))
def test_no_parameter_lowers_a_threshold(n, raised):
    for action, least in (
        (transactions.RetireAuthority(name="a"), quorum_of(n)),
        (transactions.RemoveProvider(name="p"), max(2, tolerated_faults(n) + 1)),
    ):
        assert least <= admission.threshold(action, n, raised=raised) <= max(n, least)
