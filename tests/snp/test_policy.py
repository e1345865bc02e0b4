"""Appraisal: every field must be given, every field can refuse, and what is not asked is said."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.errors import Misconfigured, Refused
from moorline.evidence.snp import Product, SigningKey, TcbVersion
from moorline.policy.match import AllBits, AtLeast, Exact, NotRequired, OneOf, meets, shown
from moorline.policy.snp import SnpPolicy, appraise_snp, policy_digest, require_snp, strict_policy
from moorline.rats import AR4SI_CLAIMS, Outcome

FIELDS = [field.name for field in dataclasses.fields(SnpPolicy)]


def _policy(world) -> SnpPolicy:
    """A policy that demands something of every field, and that the evidence of this world meets."""
    return SnpPolicy(
        product=OneOf(frozenset({Product.MILAN})),
        signer=Exact(SigningKey.VCEK),
        chip_id=OneOf(frozenset({world.chip.chip_id})),
        measurement=Exact(world.measurement),
        host_data=Exact(world.host_data),
        debug=Exact(value=False),
        migration_agent=Exact(value=False),
        smt_allowed=Exact(value=True),
        platform_smt=Exact(value=True),
        single_socket=Exact(value=False),
        abi=AtLeast((1, 0)),
        vmpl=Exact(0),
        reported_tcb=AtLeast(world.chip.tcb),
        committed_tcb=AtLeast(world.chip.tcb),
        launch_tcb=AtLeast(world.chip.tcb),
        guest_svn=AtLeast(0),
        family_id=Exact(bytes(16)),
        image_id=Exact(bytes(16)),
        id_key_digest=Exact(bytes(48)),
        author_key_digest=Exact(b"\3" * 48),
        platform_info=AllBits(1 << 5),
        launch_mitigations=AllBits(0b1),
        current_mitigations=AllBits(0b1),
        revocation=Exact(value=False),
    )


def _good(world):
    return world.verify(
        world.report(5, signer_info=1, author_key_digest=b"\3" * 48, launch_mit_vector=0b11, current_mit_vector=0b01)
    )


def _outcomes(world, policy, verified=None, *, simulated_allowed=True):
    findings = appraise_snp(verified or _good(world), policy, simulated_allowed=simulated_allowed)
    return {finding.code: finding.outcome for finding in findings}


def test_evidence_that_meets_everything_is_accepted(world):
    findings = appraise_snp(_good(world), _policy(world), simulated_allowed=True)
    assert {finding.outcome for finding in findings} == {Outcome.MET}
    assert {finding.claim for finding in findings} <= set(AR4SI_CLAIMS)
    assert [finding.code for finding in findings] == ["snp.root", *(f"snp.{name}" for name in FIELDS)]
    require_snp(findings)


@pytest.mark.parametrize("name", FIELDS)
def test_leaving_a_field_out_refuses(world, name):
    """Verifies that: silence is never a yes, for every field there is."""
    given_fields = {field: getattr(_policy(world), field) for field in FIELDS if field != name}
    with pytest.raises(TypeError):
        SnpPolicy(**given_fields)
    silent = dataclasses.replace(_policy(world), **{name: None})
    outcomes = _outcomes(world, silent)
    assert outcomes.pop(f"snp.{name}") is Outcome.NOT_MET
    assert set(outcomes.values()) == {Outcome.MET}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("demand", [OneOf(frozenset()), Exact("something else"), AtLeast("zzz"), True])
def test_every_field_can_refuse(world, name, demand):
    outcomes = _outcomes(world, dataclasses.replace(_policy(world), **{name: demand}))
    assert outcomes.pop(f"snp.{name}") is Outcome.NOT_MET
    assert set(outcomes.values()) == {Outcome.MET}, "one demand is judged by itself"


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_not_asked_is_said(world, name):
    relaxed = dataclasses.replace(_policy(world), **{name: NotRequired("because of a test")})
    findings = {finding.code: finding for finding in appraise_snp(_good(world), relaxed, simulated_allowed=True)}
    assert findings[f"snp.{name}"].outcome is Outcome.NOT_APPRAISED
    assert "because of a test" in findings[f"snp.{name}"].expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("debug", {"policy_bit": 19}),
        ("migration_agent", {"policy_bit": 18}),
        ("single_socket", {"policy_bit": 20}),
        ("vmpl", {"vmpl": 1}),
        ("measurement", {"measurement": bytes(48)}),
        ("host_data", {"host_data": bytes(32)}),
        ("chip_id", {"chip_id": bytes(64)}),
        ("committed_tcb", {"committed_tcb": 0}),
        ("launch_tcb", {"launch_tcb": 0}),
        ("platform_smt", {"platform_info": 1 << 5}),
        ("platform_info", {"platform_info": 1}),
        ("author_key_digest", {"signer_info": 0}),
        ("id_key_digest", {"id_key_digest": b"\1" * 48}),
        ("launch_mitigations", {"launch_mit_vector": 0b10}),
        ("current_mitigations", {"current_mit_vector": 0}),
    ],
)
def test_evidence_that_differs_in_one_thing_is_refused_for_it(world, name, changes):
    base = {"signer_info": 1, "author_key_digest": b"\3" * 48, "launch_mit_vector": 0b11, "current_mit_vector": 0b01}
    if "policy_bit" in changes:
        guest = world.guest().policy
        changes = {"policy": dataclasses.replace(guest, raw=guest.raw | 1 << changes["policy_bit"])}
    outcomes = _outcomes(world, _policy(world), world.verify(world.report(5, **{**base, **changes})))
    assert [code for code, outcome in outcomes.items() if outcome is Outcome.NOT_MET] == [f"snp.{name}"]


def test_a_fact_that_the_report_version_has_not_refuses(world):
    outcomes = _outcomes(world, _policy(world), world.verify(world.report(3)))
    assert outcomes["snp.launch_mitigations"] is Outcome.NOT_MET
    assert outcomes["snp.current_mitigations"] is Outcome.NOT_MET


def test_a_simulated_root_counts_only_where_the_ledger_allows_it(world):
    assert _outcomes(world, _policy(world), simulated_allowed=False)["snp.root"] is Outcome.NOT_MET
    assert _outcomes(world, _policy(world))["snp.root"] is Outcome.MET


def test_require_names_the_first_rule_that_was_not_met(world):
    policy = dataclasses.replace(_policy(world), host_data=Exact(bytes(32)), debug=Exact(value=True))
    with pytest.raises(Refused) as refusal:
        require_snp(appraise_snp(_good(world), policy, simulated_allowed=True))
    assert refusal.value.code == "snp.policy_not_met"
    assert refusal.value.got.startswith("snp.host_data: ")
    with pytest.raises(Refused):
        require_snp(())


def test_the_strict_policy_takes_a_guest_of_ours_and_refuses_its_debug_twin(world):
    policy = strict_policy(
        measurement=Exact(world.measurement),
        host_data=Exact(world.host_data),
        chip_id=Exact(world.chip.chip_id),
        product=Exact(Product.MILAN),
        minimum_tcb=AtLeast(world.chip.tcb),
    )
    require_snp(appraise_snp(world.verify(), policy, simulated_allowed=True))
    silicon = world.silicon()
    debug = silicon.signed(silicon.unsigned_report(world.guest(debug=True), world.report_data))
    assert _outcomes(world, policy, world.verify(debug))["snp.debug"] is Outcome.NOT_MET
    other = strict_policy(
        measurement=Exact(world.measurement),
        host_data=Exact(world.host_data),
        chip_id=Exact(world.chip.chip_id),
        product=Exact(Product.MILAN),
        minimum_tcb=AtLeast(dataclasses.replace(world.chip.tcb, microcode=255)),
    )
    assert policy_digest(policy) != policy_digest(other)
    assert _outcomes(world, other, world.verify())["snp.launch_tcb"] is Outcome.NOT_MET


@given(st.none() | st.integers() | st.binary() | st.text() | st.booleans())
def test_nothing_but_a_demand_is_met(value):
    for demand in (None, True, 1, "any", object(), OneOf(frozenset())):
        assert not meets(value, demand)
    assert meets(value, NotRequired("test"))


def test_demands_are_met_by_equal_kinds_only():
    assert meets(1, Exact(1))
    assert not meets(True, Exact(1)), "a bool is not a number here"  # noqa: FBT003 - the value under test
    assert not meets(None, Exact(None))
    assert meets((1, 2), AtLeast((1, 1)))
    assert not meets(b"2", AtLeast(b"1")), "bytes have no order that means anything"
    assert not meets("a", AllBits(0))
    tcb = TcbVersion(boot_loader=1, tee=1, snp=1, microcode=1, fmc=None)
    assert meets(tcb, AtLeast(tcb))
    assert not meets(1, AtLeast(tcb))


def test_a_dropped_demand_needs_its_reason():
    with pytest.raises(Misconfigured):
        NotRequired("  ")


def test_demands_are_shown_in_words():
    assert shown(OneOf(frozenset({b"\1", b"\2"}))) == "one of {01, 02}"
    assert shown(AtLeast(3)) == ">= 3"
    assert shown(AllBits(5)) == "all bits of 0x5"
    assert shown(None) == "nothing"
    assert shown(Exact("x")) == "x"
