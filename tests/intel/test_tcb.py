"""The comparison of TCB levels: which level counts, and what comes of platform, module and enclave together."""

import pytest

from moorline.evidence.intel_collateral import TcbStatus, parse_tcb_info
from moorline.verification.intel_tcb import match_isv, match_platform, merged, relaunch

S = TcbStatus


def platform(fake, **report):
    fake.report = report
    return fake.verify().value.platform


def svn(*first):
    return bytes(first) + bytes(16 - len(first))


def test_the_first_matching_level_counts(intel):
    """verifies that: one SVN below the newest level gives the older one with its advisories; below all, NotSupported"""
    intel.components[15] = 4
    older = intel.verify().value.platform
    assert (older.status, older.advisories) == (S.OUT_OF_DATE, {"INTEL-SA-00001"})
    intel.components[3] = 3
    assert intel.verify().value.platform.status is S.NOT_SUPPORTED
    intel.components[:] = [5] * 16
    intel.pce_svn = 10
    assert intel.verify().value.platform.status is S.NOT_SUPPORTED


def test_every_component_is_compared(tdx):
    """verifies that: each of the sixteen SVNs of the certificate and each TEE TCB SVN can break the newest level"""
    info = parse_tcb_info(tdx.tcb_info_body())
    good, tee = [5] * 16, svn(3, 0, 3)
    tee = bytes([3, 3, 3]) + bytes(13)
    assert match_platform(info, good, 11, tee).status is S.UP_TO_DATE
    for at in range(16):
        assert match_platform(info, [*good[:at], 4, *good[at + 1 :]], 11, tee).status is S.OUT_OF_DATE
    assert match_platform(info, good, 11, svn(3, 3, 2)).status is S.NOT_SUPPORTED


def test_the_modules_own_svns_are_left_to_its_identity(tdx):
    """verifies that: the first two TEE TCB SVNs count for the platform only where the module has no version"""
    info = parse_tcb_info(tdx.tcb_info_body())
    assert match_platform(info, [5] * 16, 11, svn(0, 1, 3)).status is S.UP_TO_DATE
    assert match_platform(info, [5] * 16, 11, svn(3, 0, 3)).status is S.NOT_SUPPORTED


def test_the_module_is_rated_by_its_identity(tdx):
    """verifies that: an old module makes the platform out of date, one below all levels is not supported"""
    tdx.td15, tdx.version = False, 4
    tdx.modules = [tdx.module(1, 3, 2)]
    good = platform(tdx, tee_tcb_svn=svn(3, 1, 3))
    assert (good.status, good.module_status) == (S.UP_TO_DATE, S.UP_TO_DATE)
    old = platform(tdx, tee_tcb_svn=svn(2, 1, 3))
    assert (old.status, old.module_status) == (S.OUT_OF_DATE, S.OUT_OF_DATE)
    assert platform(tdx, tee_tcb_svn=svn(1, 1, 3)).status is S.NOT_SUPPORTED


def test_the_enclave_is_rated_by_its_identity(intel):
    """verifies that: an old quoting enclave makes the whole out of date, with its advisories; tcb_status stays as it was"""
    intel.qe["isv_svn"] = 5
    old = intel.verify().value.platform
    assert (old.status, old.tcb_status, old.qe_status) == (S.OUT_OF_DATE, S.UP_TO_DATE, S.OUT_OF_DATE)
    assert old.advisories == {"INTEL-SA-00002"}
    intel.qe["isv_svn"] = 4
    assert intel.verify().value.platform.status is S.NOT_SUPPORTED


MERGED = [
    (S.UP_TO_DATE, S.UP_TO_DATE, S.UP_TO_DATE),
    (S.UP_TO_DATE, S.OUT_OF_DATE, S.OUT_OF_DATE),
    (S.SW_HARDENING_NEEDED, S.UP_TO_DATE, S.SW_HARDENING_NEEDED),
    (S.SW_HARDENING_NEEDED, S.OUT_OF_DATE, S.OUT_OF_DATE),
    (S.CONFIGURATION_NEEDED, S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED),
    (S.CONFIGURATION_AND_SW_HARDENING_NEEDED, S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED),
    (S.OUT_OF_DATE, S.UP_TO_DATE, S.OUT_OF_DATE),
    (S.OUT_OF_DATE_CONFIGURATION_NEEDED, S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED),
    (S.UP_TO_DATE, S.REVOKED, S.REVOKED),
    (S.REVOKED, S.UP_TO_DATE, S.REVOKED),
    (S.REVOKED, S.NOT_SUPPORTED, S.NOT_SUPPORTED),
    (S.NOT_SUPPORTED, S.UP_TO_DATE, S.NOT_SUPPORTED),
]


@pytest.mark.parametrize(("one", "other", "both"), MERGED)
def test_the_status_lattice(one, other, both):
    """verifies that: statuses of two parts merge as Intel's verifier merges them, and the worst never gets better"""
    assert merged(one, other) is both


def test_relaunch_is_advised_only_where_the_loaded_module_is_good(tdx):
    """verifies that: a domain launched under an old module that now runs a good one should relaunch; nothing else is"""
    tdx.modules = [tdx.module(1, 3, 2), tdx.module(3, 3, 2)]
    for good in (svn(3, 1, 3), svn(3, 3, 3), svn(4, 3, 3)):
        assert platform(tdx, tee_tcb_svn=svn(2, 1, 3), tee_tcb_svn_2=good).status is S.TD_RELAUNCH_ADVISED
    assert platform(tdx, tee_tcb_svn=svn(2, 1, 3), tee_tcb_svn_2=svn(2, 1, 3)).status is S.OUT_OF_DATE
    assert platform(tdx, tee_tcb_svn=svn(3, 1, 3), tee_tcb_svn_2=svn(2, 1, 3)).status is S.UP_TO_DATE
    tdx.levels[0]["tcbStatus"] = "ConfigurationNeeded"
    configuration = platform(tdx, tee_tcb_svn=svn(2, 1, 3), tee_tcb_svn_2=svn(3, 1, 3))
    assert configuration.status is S.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    tdx.qe["isv_svn"] = 5
    assert platform(tdx, tee_tcb_svn=svn(2, 1, 3), tee_tcb_svn_2=svn(3, 1, 3)).status is S.OUT_OF_DATE_CONFIGURATION_NEEDED


@pytest.mark.parametrize("loaded", [svn(1, 1, 3), svn(3, 2, 3), svn(3, 1, 2), svn(2, 0, 3)])
def test_a_module_that_is_loaded_now_and_not_supported_wins(tdx, loaded):
    """verifies that: a current module below all levels, or of an unknown version, makes the whole NotSupported"""
    tdx.modules = [tdx.module(1, 3, 2)]
    for launched in (svn(3, 1, 3), svn(2, 1, 3)):
        assert platform(tdx, tee_tcb_svn=launched, tee_tcb_svn_2=loaded).status is S.NOT_SUPPORTED


def test_the_relaunch_table():
    """verifies that: the advice is given for an out-of-date launch under a good present only, and Revoked now always wins"""
    good = (S.UP_TO_DATE, S.SW_HARDENING_NEEDED, S.CONFIGURATION_NEEDED, S.CONFIGURATION_AND_SW_HARDENING_NEEDED)
    advised, configuration = S.TD_RELAUNCH_ADVISED, S.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    assert [relaunch(S.OUT_OF_DATE, now) for now in good] == [advised, advised, configuration, configuration]
    assert {relaunch(S.OUT_OF_DATE_CONFIGURATION_NEEDED, now) for now in good} == {configuration}
    for now in (S.REVOKED, S.NOT_SUPPORTED):
        assert {relaunch(launch, now) for launch in (*good, S.OUT_OF_DATE, S.REVOKED)} == {now}
    for launch in (*good, S.REVOKED, S.NOT_SUPPORTED):
        assert {relaunch(launch, now) for now in (*good, S.OUT_OF_DATE)} == {launch}
    assert relaunch(S.OUT_OF_DATE, S.OUT_OF_DATE) is S.OUT_OF_DATE


def test_no_level_is_not_supported(tdx):
    """verifies that: an empty walk never ends in a status that policy could accept"""
    assert match_isv((), 99).status is S.NOT_SUPPORTED
