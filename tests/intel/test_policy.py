"""The appraisal policies: a field left out refuses, a field not met refuses, strict policies accept the good twin."""

import dataclasses

import pytest

from moorline.errors import Misconfigured, Refused
from moorline.evidence.intel_collateral import TcbStatus
from moorline.policy.intel import IntelPlatformPolicy, NoneOf, Within, strict_platform_policy
from moorline.policy.intel_case import class_of
from moorline.policy.match import AtLeast, Exact, NotRequired, OneOf
from moorline.policy.sgx import SgxPolicy, appraise_sgx, require_sgx, sgx_policy_digest, strict_sgx_policy
from moorline.policy.tdx import NO_SERVICE_TD, TdxPolicy, appraise_tdx, require_tdx, strict_tdx_policy, tdx_policy_digest
from moorline.rats import Outcome
from moorline.verification.intel_collateral import NO_ENDORSEMENTS, Collateral


def machine(fake, **changes):
    policy = strict_platform_policy(
        status=Exact(TcbStatus.UP_TO_DATE), advisories=Within(frozenset()), evaluation=AtLeast(17), ppid=Exact(fake.ppid)
    )
    return dataclasses.replace(policy, **changes)


def strict(fake, **changes):
    if fake.tee == "sgx":
        policy = strict_sgx_policy(
            mr_enclave=Exact(b"\x0e" * 32), mr_signer=Exact(b"\x05" * 32), isv_svn=AtLeast(1), platform=machine(fake)
        )
    else:
        policy = strict_tdx_policy(
            mr_td=Exact(b"\x7d" * 48),
            rtmrs=tuple(Exact(bytes([number]) * 48) for number in range(4)),
            mr_config_id=Exact(bytes(48)),
            xfam=Exact(0xE7),
            mr_seam=Exact(b"\x5e" * 48),
            mr_service_td=Exact(NO_SERVICE_TD),
            platform=machine(fake),
        )
    return dataclasses.replace(policy, **changes)


def appraise(fake, verified, policy, *, simulated=True):
    function = appraise_sgx if fake.tee == "sgx" else appraise_tdx
    return function(verified, policy, simulated_allowed=simulated)


def require(fake, findings):
    (require_sgx if fake.tee == "sgx" else require_tdx)(findings)


def not_met(findings):
    return [one.code for one in findings if one.outcome is Outcome.NOT_MET]


def test_a_strict_policy_accepts_the_good_twin(intel):
    """verifies that: nothing is refused, everything is either met or named as not asked with its reason"""
    findings = appraise(intel, intel.verify(), strict(intel))
    require(intel, findings)
    assert {one.outcome for one in findings} == {Outcome.MET, Outcome.NOT_APPRAISED}
    assert all(one.expected.startswith("not required: ") for one in findings if one.outcome is Outcome.NOT_APPRAISED)


def fields_of(kind):
    return [field.name for field in dataclasses.fields(kind) if field.name != "platform"]


LEFT_OUT = [("sgx", name) for name in fields_of(SgxPolicy)] + [("tdx", name) for name in fields_of(TdxPolicy)]


@pytest.mark.parametrize(("tee", "field"), LEFT_OUT)
@pytest.mark.parametrize("nothing", [None, 0, "yes", frozenset()])
def test_silence_refuses(keys, tools, tee, field, nothing):
    """verifies that: each field that is left out, or is no demand, refuses; there are no defaults"""
    fake = tools.FakeIntel(keys, tee)
    verified = _verified(fake)
    findings = appraise(fake, verified, strict(fake, **{field: nothing}))
    assert not_met(findings) == [f"{tee}.{field}"]
    with pytest.raises(Refused, match=f"{tee}.policy_not_met"):
        require(fake, findings)
    with pytest.raises(TypeError):
        (SgxPolicy if tee == "sgx" else TdxPolicy)()


@pytest.mark.parametrize("field", fields_of(IntelPlatformPolicy))
@pytest.mark.parametrize("nothing", [None, OneOf(frozenset())])
def test_silence_about_the_machine_refuses(intel, field, nothing):
    """verifies that: the same holds for every demand on the machine, and an empty set matches nothing"""
    findings = appraise(intel, _verified(intel), strict(intel, platform=machine(intel, **{field: nothing})))
    assert not_met(findings) == [f"intel.{field}"]


_CACHE = {}


def _verified(fake):
    if fake.tee not in _CACHE:
        _CACHE[fake.tee] = fake.verify()
    return _CACHE[fake.tee]


SGX_CHANGES = {
    "debug": {"attributes": 7},
    "mr_enclave": {"mr_enclave": bytes(32)},
    "mr_signer": {"mr_signer": bytes(32)},
    "isv_svn": {"isv_svn": 0},
    "config_id": {"config_id": b"\x01" * 64},
    "isv_prod_id": {"isv_prod_id": 7},
    "isv_ext_prod_id": {"isv_ext_prod_id": b"\x01" * 16},
    "isv_family_id": {"isv_family_id": b"\x01" * 16},
    "config_svn": {"config_svn": 3},
    "attributes": {"attributes": 0x15},
    "xfrm": {"xfrm": 7},
    "misc_select": {"misc_select": 1},
}
TDX_CHANGES = {
    "debug": {"td_attributes": 1 << 28 | 1},
    "sept_ve_disable": {"td_attributes": 0},
    "migratable": {"td_attributes": 1 << 28 | 1 << 29},
    "pks": {"td_attributes": 1 << 28 | 1 << 30},
    "key_locker": {"td_attributes": 1 << 28 | 1 << 31},
    "perfmon": {"td_attributes": 1 << 28 | 1 << 63},
    "unknown_attributes": {"td_attributes": 1 << 28 | 1 << 4},
    "mr_service_td": {"mr_service_td": b"\x01" * 48},
    "xfam": {"xfam": 0x602E7},
    "mr_td": {"mr_td": bytes(48)},
    "rtmr0": {"rtmrs": (b"\xff" * 48, b"\x01" * 48, b"\x02" * 48, b"\x03" * 48)},
    "rtmr1": {"rtmrs": (b"\x00" * 48, b"\xff" * 48, b"\x02" * 48, b"\x03" * 48)},
    "rtmr2": {"rtmrs": (b"\x00" * 48, b"\x01" * 48, b"\xff" * 48, b"\x03" * 48)},
    "rtmr3": {"rtmrs": (b"\x00" * 48, b"\x01" * 48, b"\x02" * 48, b"\xff" * 48)},
    "mr_config_id": {"mr_config_id": b"\x01" * 48},
    "mr_owner": {"mr_owner": b"\x01" * 48},
    "mr_owner_config": {"mr_owner_config": b"\x01" * 48},
    "mr_seam": {"mr_seam": b"\x01" * 48},
}
GOOD_SGX = {
    "isv_prod_id": Exact(1),
    "isv_ext_prod_id": Exact(bytes(16)),
    "isv_family_id": Exact(bytes(16)),
    "config_svn": Exact(0),
    "attributes": OneOf(frozenset({5})),
    "xfrm": Exact(3),
    "misc_select": Exact(0),
}


@pytest.mark.parametrize(("tee", "field"), [("sgx", name) for name in SGX_CHANGES] + [("tdx", name) for name in TDX_CHANGES])
def test_each_demand_catches_what_it_is_for(keys, tools, tee, field):
    """verifies that: authentic evidence with one other property is refused by that rule (and by debug in the attributes)"""
    fake = tools.FakeIntel(keys, tee)
    fake.report = (SGX_CHANGES if tee == "sgx" else TDX_CHANGES)[field]
    policy = strict(fake, **(GOOD_SGX if tee == "sgx" else {"pks": Exact(value=False)}))
    codes = not_met(appraise(fake, fake.verify(), policy))
    assert f"{tee}.{field}" in codes
    assert set(codes) <= {f"{tee}.{field}", "sgx.attributes"}


def test_a_version_4_quote_cannot_show_that_no_service_domain_is_bound(tdx):
    """verifies that: MRSERVICETD of TDREPORT 1.0 is unknown, and only a policy that says why accepts that"""
    tdx.td15, tdx.version = False, 4
    verified = tdx.verify()
    assert not_met(appraise(tdx, verified, strict(tdx))) == ["tdx.mr_service_td"]
    require(tdx, appraise(tdx, verified, strict(tdx, mr_service_td=NotRequired("the module has no service domains"))))


def test_status_and_advisories_are_policy(intel):
    """verifies that: a status and its advisories are accepted only by name, and NotSupported by no demand at all"""
    intel.components[0] = 4
    old = intel.verify()
    assert not_met(appraise(intel, old, strict(intel))) == ["intel.status", "intel.advisories"]
    lax = machine(intel, status=OneOf(frozenset(TcbStatus)), advisories=Within(frozenset({"INTEL-SA-00001", "INTEL-SA-1"})))
    require(intel, appraise(intel, old, strict(intel, platform=lax)))
    rejecting = dataclasses.replace(lax, advisories=NoneOf(frozenset({"INTEL-SA-00001"})))
    assert not_met(appraise(intel, old, strict(intel, platform=rejecting))) == ["intel.advisories"]
    intel.components[0] = 1
    assert not_met(appraise(intel, intel.verify(), strict(intel, platform=lax))) == ["intel.status"]
    with pytest.raises(Misconfigured):
        NoneOf(frozenset())


def test_no_collateral_is_no_clean_bill(intel):
    """verifies that: without collateral every demand on status, advisories, evaluation and revocation refuses"""
    bare = intel.verify(endorsements=NO_ENDORSEMENTS, collateral=Collateral.NONE)
    expected = ["status", "advisories", "tcb_evaluation", "qe_evaluation", "collateral", "revocation"]
    assert not_met(appraise(intel, bare, strict(intel))) == [f"intel.{name}" for name in expected]


def test_a_simulated_root_counts_only_where_the_genesis_says_so(intel):
    """verifies that: root test refuses unless simulated_allowed"""
    assert not_met(appraise(intel, _verified(intel), strict(intel), simulated=False)) == [f"{intel.tee}.root"]


def test_a_policy_has_a_name_of_its_own(sgx, tdx):
    """verifies that: the digest changes with any demand, of the machine too"""
    digests = {
        sgx_policy_digest(strict(sgx)),
        sgx_policy_digest(strict(sgx, isv_svn=AtLeast(2))),
        sgx_policy_digest(strict(sgx, platform=machine(sgx, revocation=NotRequired("test")))),
        tdx_policy_digest(strict(tdx)),
        tdx_policy_digest(strict(tdx, perfmon=NotRequired("test"))),
    }
    assert len(digests) == 5


def test_every_rule_has_a_class():
    """verifies that: every finding a policy can make has a code class, so that vectors can be compared"""
    names = [f"sgx.{name}" for name in fields_of(SgxPolicy)] + [f"tdx.{name}" for name in fields_of(TdxPolicy)]
    names += [f"intel.{name}" for name in fields_of(IntelPlatformPolicy)]
    assert [name for name in names if class_of(name) is None] == []
