"""How good is the TCB of an Intel platform? The comparison of Intel's PCS API v4 documentation, numbered here.

1. Platform: walk the TCB levels in their order. The first in which each of the sixteen SVNs of the PCK certificate is
   at least the level's, the PCESVN too, and for TDX the TEE TCB SVNs as well, gives status, date and advisories. For
   TDX the first two TEE TCB SVNs are those of the module and are left out where TEE_TCB_SVN[1] is not 0. No level:
   NotSupported.
2. TDX module: where TEE_TCB_SVN[1] is 0 the platform's levels cover it. Otherwise its identity is the one of that
   version, and the first of its levels whose ISVSVN is not above TEE_TCB_SVN[0] gives its status. No level:
   NotSupported.
3. Quoting enclave: the first level of its identity whose ISVSVN is not above the enclave's. No level: NotSupported.
4. Merged: Revoked and NotSupported of any part win; an OutOfDate module or enclave makes the platform OutOfDate, or
   OutOfDateConfigurationNeeded where configuration was needed already. Otherwise the platform's status stands.
5. TDREPORT 1.5 says twice which TDX module it was: TEE_TCB_SVN at launch, TEE_TCB_SVN_2 now. Both are rated by rules 1, 2
   and 4. Revoked or NotSupported now wins; a domain launched out of date under a module that is good now should be
   relaunched: TDRelaunchAdvised, or TDRelaunchAdvisedConfigurationNeeded. Otherwise the status at launch stands.
6. Advisories of all matched levels are collected.

Nothing is judged: which status is acceptable is policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moorline.clock import Instant
from moorline.evidence.intel_collateral import IsvLevel, TcbInfo, TcbStatus, TdxModuleIdentity

_CONFIGURATION: Final = frozenset(
    {
        TcbStatus.CONFIGURATION_NEEDED,
        TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
        TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED,
    }
)
_FINAL: Final = (TcbStatus.NOT_SUPPORTED, TcbStatus.REVOKED)
_OUT_OF_DATE: Final = frozenset({TcbStatus.OUT_OF_DATE, TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class TcbMatch:
    """The level that matched: its status, when that TCB came out, and what is known against it."""

    status: TcbStatus
    date: Instant | None
    advisories: tuple[str, ...]


NO_LEVEL: Final = TcbMatch(status=TcbStatus.NOT_SUPPORTED, date=None, advisories=())


def match_platform(info: TcbInfo, components: Sequence[int], pce_svn: int, tee_tcb_svn: bytes | None) -> TcbMatch:
    """Rule 1. `tee_tcb_svn` is None for SGX."""
    skip = 2 if tee_tcb_svn is not None and tee_tcb_svn[1] else 0
    for level in info.levels:
        if pce_svn < level.pce_svn or not _at_least(components, level.components):
            continue
        if tee_tcb_svn is not None and not _at_least(tee_tcb_svn[skip:], (level.tdx_components or ())[skip:]):
            continue
        return TcbMatch(status=level.status, date=level.date, advisories=level.advisories)
    return NO_LEVEL


def module_identity(info: TcbInfo, version: int) -> TdxModuleIdentity | None:
    """The identity of the TDX module with this version (TEE_TCB_SVN[1]); 0 is the module that has no version."""
    if version == 0:
        return info.module
    return next((one for one in info.modules if one.version == version), None)


def match_isv(levels: Sequence[IsvLevel], isv_svn: int) -> TcbMatch:
    """Rules 2 and 3."""
    for level in levels:
        if isv_svn >= level.isv_svn:
            return TcbMatch(status=level.status, date=level.date, advisories=level.advisories)
    return NO_LEVEL


def merged(platform: TcbStatus, other: TcbStatus) -> TcbStatus:
    """Rule 4, for a platform and one other part."""
    for final in _FINAL:
        if final in (platform, other):
            return final
    if other is not TcbStatus.OUT_OF_DATE:
        return platform
    if platform in _CONFIGURATION:
        return TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED
    return TcbStatus.OUT_OF_DATE


def relaunch(launch: TcbStatus, current: TcbStatus) -> TcbStatus:
    """Rule 5, for platform and module merged, as they were at launch and as they are now."""
    if current in _FINAL:
        return current
    if launch not in _OUT_OF_DATE or current in _OUT_OF_DATE:
        return launch
    if launch in _CONFIGURATION or current in _CONFIGURATION:
        return TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    return TcbStatus.TD_RELAUNCH_ADVISED


def _at_least(have: Sequence[int], want: Sequence[int]) -> bool:
    return all(mine >= least for mine, least in zip(have, want, strict=True))
