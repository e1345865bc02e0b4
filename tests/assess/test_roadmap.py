"""The roadmap is the smallest there is: compared with trying every subset, on drawn worlds and on the shipped one."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.policy.sec009 import roadmap
from moorline.policy.sec009.assessment import alternatives, measure_rules
from moorline.policy.sec009.catalogue import capabilities, catalogue, data
from moorline.policy.sec009.profile import Need, profile
from moorline.policy.sec009.roadmap import Change, cheapest
from moorline.rats import Assurance

NAMES = "abcdef"


def satisfied(chosen, demands, held, others):
    have = set(held) | {name for change in chosen for name in change.provides}
    wanted = set(demands) | {name for change in chosen for name in change.requires}
    return all(one in have or others.get(one, frozenset()) & have for one in wanted)


def cost(chosen):
    return len(chosen), sum(change.weight for change in chosen), tuple(sorted(change.id for change in chosen))


def by_trying_everything(demands, held, others, available):
    fits = [
        chosen
        for size in range(len(available) + 1)
        for chosen in combinations(available, size)
        if satisfied(chosen, demands, held, others)
    ]
    return min(fits, key=cost, default=None)


@st.composite
def worlds(draw):
    some = st.frozensets(st.sampled_from(NAMES), max_size=3)
    count = draw(st.integers(1, 7))
    available = tuple(
        Change(
            id=f"c{number}",
            says="",
            how="",
            effort=draw(st.sampled_from(roadmap.EFFORTS)),
            provides=draw(some),
            requires=draw(st.frozensets(st.sampled_from(NAMES), max_size=1)),
        )
        for number in range(count)
    )
    others = {name: draw(st.frozensets(st.sampled_from(NAMES), max_size=1)) for name in draw(some)}
    return draw(some), draw(st.frozensets(st.sampled_from(NAMES), max_size=1)), others, available


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_no_smaller_or_cheaper_set_of_changes_exists(world):
    demands, held, others, available = world
    usable = roadmap._usable(set(held), others, available)
    best = by_trying_everything(demands, held, others, usable)
    if best is None:
        return  # a demand that nothing provides: what is left of it is tested below
    assert cost(cheapest(demands, held, others, available)) == cost(best)


def test_a_demand_that_nothing_provides_does_not_hide_the_rest():
    one = Change(id="one", says="", how="", effort="setting", provides=frozenset("a"), requires=frozenset())
    assert cheapest("ab", (), {}, (one,)) == {one}
    assert roadmap.impossible("ab", {}, (one,)) == {"b"}


def test_one_change_that_does_two_things_is_taken_over_two():
    both, first, second = (
        Change(id=name, says="", how="", effort=effort, provides=frozenset(provides), requires=frozenset())
        for name, effort, provides in (("both", "platform", "ab"), ("first", "command", "a"), ("second", "command", "b"))
    )
    assert cheapest("ab", (), {}, (first, second, both)) == {both}


def test_what_a_change_requires_is_in_the_roadmap_too():
    need = Need(capability="location.geo", minimum=Assurance.ASSERTED, requirements=("5.1.6",))
    assert [one.id for one in roadmap.smallest((need,), {}, {}, enrolled=False)] == ["fit-tpm", "location-tag"]
    held = {"root.tpm20.hardware": Assurance.ASSERTED}
    assert [one.id for one in roadmap.smallest((need,), held, {}, enrolled=False)] == ["location-tag"]


def test_an_empty_machine_can_be_brought_to_every_use_case():
    for case in catalogue().use_cases:
        steps = roadmap.smallest(profile(case), {}, alternatives(), enrolled=False)
        have = {name for step in steps for name in step.provides}
        for need in profile(case):
            assert ({need.capability} | alternatives().get(need.capability, frozenset())) & have, (case, need)
        for step in steps:
            assert step.requires <= have


def test_the_shipped_tables_name_what_exists():
    known = set(capabilities())
    for change in roadmap.changes().values():
        assert change.effort in roadmap.EFFORTS
        assert change.how
        assert change.provides | change.requires <= known | {roadmap.ATTESTED}, change.id
    provided = {name for change in roadmap.changes().values() for name in change.provides}
    for rule in measure_rules().values():
        assert rule.clauses or rule.services, rule.id
        for clause in rule.clauses:
            assert set(clause) <= known
            assert max(capabilities()[name].max_assurance for name in clause) >= rule.minimum
            assert set(clause) & provided, f"nothing in changes.json provides {clause}"
    assert set(measure_rules()) == {entry["id"] for entry in data("catalogue.json")["measures"]}


def test_what_a_service_fulfils_names_the_service():
    table = data("requirement_capabilities.json")["requirements"]
    for requirement in ("5.1.1", "5.1.2", "5.2.2", "5.2.4", "5.3.3"):
        assert [item["by"] for item in table[requirement]["service"]], requirement
    for measure in ("6.10", "6.11", "6.15"):
        assert measure_rules()[measure].services, measure
