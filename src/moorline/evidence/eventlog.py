"""The boot event log of the TCG PC Client profile: crypto-agile (TCG_PCR_EVENT2) and the older SHA-1 form.

The log is untrusted: whoever runs the host wrote it. It becomes evidence only when its digests replay to quoted PCRs
(verification.eventlog), and a payload only where its own digest equals the event's. Parsing is total: sizes are compared
with what is left before anything is read, counts are capped, and every failure is Malformed (`eventlog.*`). A tail of
nothing but 0xff or 0x00, as firmware leaves it in an ACPI log area, ends the log; it could extend nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from moorline.errors import Malformed
from moorline.evidence.tpm_structures import ALG_SHA1, HASH_SIZES

MAX_LOG: Final = 1 << 20
MAX_EVENTS: Final = 16384
_MAX_BANKS: Final = 8
_PADDING: Final = (0x00, 0xFF)

EV_POST_CODE: Final = 0x01
EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EV_ACTION: Final = 0x05
EV_EVENT_TAG: Final = 0x06
EV_S_CRTM_CONTENTS: Final = 0x07
EV_S_CRTM_VERSION: Final = 0x08
EV_IPL: Final = 0x0D
EV_EFI_VARIABLE_DRIVER_CONFIG: Final = 0x80000001
EV_EFI_VARIABLE_BOOT: Final = 0x80000002
EV_EFI_BOOT_SERVICES_APPLICATION: Final = 0x80000003
EV_EFI_ACTION: Final = 0x80000007
EV_EFI_PLATFORM_FIRMWARE_BLOB: Final = 0x80000008
EV_EFI_PLATFORM_FIRMWARE_BLOB2: Final = 0x8000000A
EV_EFI_VARIABLE_AUTHORITY: Final = 0x800000E0

_SPEC_ID: Final = b"Spec ID Event03\x00"
_STARTUP_LOCALITY: Final = b"StartupLocality\x00"
_LEGACY_HEAD: Final = struct.Struct("<II20sI")
_EVENT2_HEAD: Final = struct.Struct("<III")
_ALGORITHM: Final = struct.Struct("<HH")
_SPEC_HEAD: Final = struct.Struct("<16sI4BI")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Event:
    """One event: the PCR it extends, its type, a digest for each bank, and data that explains it (or lies about it).

    Firmware exists that leaves out the digests of banks it does not use; replay refuses such a bank, parsing does not.
    """

    pcr: int
    kind: int
    digests: dict[int, bytes]
    data: bytes


@dataclass(frozen=True, slots=True)
class EventLog:
    """A parsed log.

    `banks` are TPM hash algorithms in the order the log declares them; the Spec ID event is not in `events`.
    """

    crypto_agile: bool
    banks: tuple[int, ...]
    events: tuple[Event, ...]

    @property
    def startup_locality(self) -> int:
        """The locality of TPM2_Startup as the log tells it: 0, or what the first StartupLocality event says."""
        for event in self.events:
            if event.kind == EV_NO_ACTION and event.data.startswith(_STARTUP_LOCALITY):
                return event.data[len(_STARTUP_LOCALITY)] if len(event.data) == len(_STARTUP_LOCALITY) + 1 else 0
        return 0


def parse_event_log(data: bytes) -> EventLog:
    """The events of a boot log from untrusted bytes; raises only Malformed (`eventlog.*`). Establishes nothing."""
    if len(data) > MAX_LOG:
        raise Malformed("eventlog.too_large", "the boot log is too large", expected=f"<= {MAX_LOG} bytes", got=len(data))
    first, at = _legacy(data, 0)
    if first.kind != EV_NO_ACTION or not first.data.startswith(_SPEC_ID):
        return EventLog(crypto_agile=False, banks=(ALG_SHA1,), events=_events(data, 0, None))
    sizes = _spec_id(first.data)
    return EventLog(crypto_agile=True, banks=tuple(sizes), events=_events(data, at, sizes))


def _events(data: bytes, at: int, sizes: dict[int, int] | None) -> tuple[Event, ...]:
    events: list[Event] = []
    while at < len(data):
        if data[at] in _PADDING and not data[at:].strip(data[at : at + 1]):
            break
        if len(events) == MAX_EVENTS:
            raise Malformed("eventlog.too_many_events", "the boot log has too many events", expected=f"<= {MAX_EVENTS}")
        event, at = _legacy(data, at) if sizes is None else _agile(data, at, sizes)
        events.append(event)
    return tuple(events)


def _legacy(data: bytes, at: int) -> tuple[Event, int]:
    if at + _LEGACY_HEAD.size > len(data):
        raise _truncated(at)
    pcr, kind, digest, size = _LEGACY_HEAD.unpack_from(data, at)
    at += _LEGACY_HEAD.size
    return Event(pcr, kind, {ALG_SHA1: digest}, _payload(data, at, size)), at + size


def _agile(data: bytes, at: int, sizes: dict[int, int]) -> tuple[Event, int]:
    if at + _EVENT2_HEAD.size > len(data):
        raise _truncated(at)
    pcr, kind, count = _EVENT2_HEAD.unpack_from(data, at)
    at += _EVENT2_HEAD.size
    if count > len(sizes):
        raise Malformed("eventlog.digests", "an event has more digests than the log has banks", got=count)
    digests: dict[int, bytes] = {}
    for _ in range(count):
        if at + _U16.size > len(data):
            raise _truncated(at)
        (algorithm,) = _U16.unpack_from(data, at)
        at += _U16.size
        width = sizes.get(algorithm)
        if width is None or algorithm in digests:
            raise Malformed(
                "eventlog.digests", "an event has a digest of an undeclared or repeated bank", got=hex(algorithm)
            )
        digests[algorithm] = _payload(data, at, width)
        at += width
    if at + _U32.size > len(data):
        raise _truncated(at)
    (size,) = _U32.unpack_from(data, at)
    at += _U32.size
    return Event(pcr, kind, digests, _payload(data, at, size)), at + size


def _spec_id(data: bytes) -> dict[int, int]:
    """The declared banks and their digest sizes (TCG_EfiSpecIDEvent, PC Client PFP 10.4.5.1)."""
    if len(data) < _SPEC_HEAD.size:
        raise Malformed("eventlog.spec_id", "the Spec ID event is too short", got=len(data))
    count = _SPEC_HEAD.unpack_from(data)[-1]
    at = _SPEC_HEAD.size
    if not 0 < count <= _MAX_BANKS or len(data) < at + count * _ALGORITHM.size + 1:
        raise Malformed("eventlog.spec_id", "the Spec ID event declares no plausible number of banks", got=count)
    sizes: dict[int, int] = {}
    for _ in range(count):
        algorithm, size = _ALGORITHM.unpack_from(data, at)
        at += _ALGORITHM.size
        if algorithm in sizes or size != HASH_SIZES.get(algorithm, size) or not 0 < size <= 64:
            raise Malformed("eventlog.spec_id", "the Spec ID event declares an impossible bank", got=hex(algorithm))
        sizes[algorithm] = size
    if len(data) != at + 1 + data[at]:
        raise Malformed("eventlog.spec_id", "the Spec ID event has the wrong length", expected=at + 1 + data[at])
    return sizes


def _payload(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        raise _truncated(at)
    return data[at : at + size]


def _truncated(at: int) -> Malformed:
    return Malformed("eventlog.truncated", "the boot log ends inside an event", got=f"event at byte {at}")
