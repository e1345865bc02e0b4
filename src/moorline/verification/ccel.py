"""Does a confidential guest's event log (CCEL) replay to the RTMRs of its quote? Numbered here, named in the code below.

ACPI 6.5, 5.2.34; Intel TDX Virtual Firmware Design Guide.

1. Index 1 to 4 of the log are RTMR 0 to 3, all starting at zero, extended in SHA-384. Index 0 is MRTD, which nothing
   can extend: an event there, or on another index, refuses. [ccel.register]
2. Every register that the log extends, and every one the caller names, has exactly its replayed value.
   [ccel.replay_mismatch]

A register that the log does not extend and nobody names is not judged: a guest may extend RTMR 3 for itself. Parsing is
`evidence.eventlog`; payloads are facts only where their own digest is the event's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from moorline.digest import same
from moorline.errors import NotAuthentic
from moorline.evidence.eventlog import EV_NO_ACTION, EventLog
from moorline.evidence.tpm_structures import ALG_SHA384
from moorline.verification.eventlog import replay

_REGISTERS: Final = 4
_ZERO: Final = bytes(48)


def replay_ccel(parsed: EventLog) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR 0 to 3 by the log. Raises Malformed (`eventlog.*`) and NotAuthentic("ccel.register")."""
    values = _replayed(parsed)
    return (values.get(0, _ZERO), values.get(1, _ZERO), values.get(2, _ZERO), values.get(3, _ZERO))


def verify_ccel(parsed: EventLog, rtmrs: tuple[bytes, bytes, bytes, bytes], *, registers: Collection[int]) -> None:
    """The log replays to `rtmrs`, or this raises Malformed (`eventlog.*`) or NotAuthentic (`ccel.*`).

    `rtmrs` come from a Verified quote; `registers` are those that must match even if the log says nothing of them.
    """
    values = _replayed(parsed)
    for register in sorted({*values, *registers}):
        replayed = values.get(register, _ZERO)
        if not same(rtmrs[register], replayed):
            raise NotAuthentic(
                "ccel.replay_mismatch",
                f"the event log does not replay to RTMR {register}",
                expected=rtmrs[register],
                got=replayed,
                remedy="the log was changed, or something extended the register outside of it",
            )


def _replayed(parsed: EventLog) -> dict[int, bytes]:
    for event in parsed.events:
        if event.kind != EV_NO_ACTION and not 1 <= event.pcr <= _REGISTERS:
            raise NotAuthentic("ccel.register", "an event extends no RTMR", expected="index 1 to 4", got=event.pcr)
    return {index - 1: value for index, value in replay(parsed, ALG_SHA384).items()}
