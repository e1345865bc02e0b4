"""Whether a boot log replays to quoted PCRs, and what it booted (TCG PC Client PFP 1.05, 10).

1. Every event except EV_NO_ACTION extends its PCR, in every bank; PCR 0 starts from the startup locality the log tells.
2. In the bank that was quoted, every quoted boot PCR the caller names has exactly its replayed value.
3. Only then are events read as facts, and a payload counts as fact only where its own digest is the event's: firmware
   measures some things (images, files) by their contents and writes a description beside it, which anybody can choose.
4. Each measured event gets a component: firmware, configuration, bootloader, kernel, command line, initrd or other. The
   component of an image rests on such a description; a false one can only move an event among lists that policy all checks.
5. Separators (one in each of PCR 0 to 7, of value zero) and known EFI actions are marks, not components, where their digest
   proves it. A missing or repeated separator, or one that reports an error, is an anomaly, which policy judges.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic
from moorline.evidence import eventlog as log
from moorline.evidence.tpm_structures import HASH_NAMES, HASH_SIZES

_SEPARATED: Final = range(8)
_ACTIONS: Final = frozenset(
    {
        b"Calling EFI Application from Boot Option",
        b"Returning from EFI Application from Boot Option",
        b"Exit Boot Services Invocation",
        b"Exit Boot Services Returned with Success",
        b"Returning from EFI Application",
    }
)
_GRUB_COMMAND_LINE: Final = (b"kernel_cmdline: ", b"grub_kernel_cmdline ")  # upstream; Red Hat before 2.06
_INITRD_TAG: Final = 0x8F3B22EC
_LOAD_OPTIONS_TAG: Final = 0x8F3B22ED
_KERNEL_NAMES: Final = (b"vmlinuz", b"bzimage", b"kernel", b"grub_linuxefi kernel")
_INITRD_NAMES: Final = (b"initrd", b"initramfs", b"grub_linuxefi initrd")
_VARIABLE_HEAD: Final = struct.Struct("<16sQQ")


class Component(StrEnum):
    """What part of the boot an event measures."""

    FIRMWARE = "firmware"
    CONFIGURATION = "configuration"
    BOOTLOADER = "bootloader"
    KERNEL = "kernel"
    COMMAND_LINE = "command_line"
    INITRD = "initrd"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measured thing. `described` is the log's own words about it, cleaned for people and trusted by nobody."""

    component: Component
    pcr: int
    kind: int
    digest: bytes
    described: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BootState:
    """What a verified log says was booted. `command_line` and `secure_boot` are None unless their payload is proven."""

    bank: int
    replayed: Mapping[int, bytes]
    measured: tuple[Measured, ...]
    command_line: str | None
    secure_boot: bool | None
    anomalies: tuple[str, ...]

    def of(self, component: Component) -> tuple[Measured, ...]:
        """What was measured as `component`, in boot order."""
        return tuple(one for one in self.measured if one.component is component)


def replay(parsed: log.EventLog, bank: int) -> dict[int, bytes]:
    """The value of every PCR the log extends in `bank`.

    Raises Malformed("eventlog.bank_missing" | "eventlog.bank_incomplete").
    """
    name = HASH_NAMES.get(bank, "sm3")
    if bank not in parsed.banks or bank not in HASH_SIZES:
        raise Malformed("eventlog.bank_missing", "the boot log has no such bank", expected=hex(bank))
    size = HASH_SIZES[bank]
    values: dict[int, bytes] = {}
    for event in parsed.events:
        if event.kind == log.EV_NO_ACTION:
            continue
        digest = event.digests.get(bank)
        if digest is None:
            raise Malformed("eventlog.bank_incomplete", "an event lacks its digest in this bank", expected=hex(bank))
        before = values.get(event.pcr) or _start(parsed, event.pcr, size)
        values[event.pcr] = hashlib.new(name, before + digest).digest()
    return values


def verify_boot(parsed: log.EventLog, *, bank: int, quoted: Mapping[int, bytes], pcrs: Iterable[int]) -> BootState:
    """The boot state, proven by the `quoted` values of `pcrs` in `bank`.

    A PCR of `pcrs` that the log never extends must be quoted at its start value. Raises Malformed (`eventlog.*`) and
    NotAuthentic("eventlog.replay_mismatch").
    """
    values = replay(parsed, bank)
    for pcr in pcrs:
        expected = quoted.get(pcr)
        replayed = values.get(pcr) or _start(parsed, pcr, HASH_SIZES[bank])
        if expected is None or not same(expected, replayed):
            raise NotAuthentic(
                "eventlog.replay_mismatch",
                f"the boot log does not replay to the quoted PCR {pcr}",
                expected=expected,
                got=replayed,
                remedy="the log was changed, or something extended the PCR outside of it",
            )
    covered = frozenset(pcrs)
    events = [one for one in parsed.events if one.kind != log.EV_NO_ACTION and one.pcr in covered]
    return _boot_state(events, bank, values)


def _start(parsed: log.EventLog, pcr: int, size: int) -> bytes:
    if pcr == 0:
        return bytes(size - 1) + bytes([parsed.startup_locality])
    return b"\xff" * size if pcr in range(17, 23) else bytes(size)


def _boot_state(events: list[log.Event], bank: int, values: dict[int, bytes]) -> BootState:
    measured: list[Measured] = []
    command_line: str | None = None
    secure_boot: bool | None = None
    for event in events:
        if _is_mark(event, bank):
            continue
        component = _component(event)
        measured.append(
            Measured(
                component=component,
                pcr=event.pcr,
                kind=event.kind,
                digest=event.digests[bank],
                described=_described(event),
            )
        )
        if component is Component.COMMAND_LINE:
            command_line = _proven_command_line(event, bank) or command_line
        elif event.kind == log.EV_EFI_VARIABLE_DRIVER_CONFIG:
            found = _proven_secure_boot(event, bank)
            secure_boot = secure_boot if found is None else found
    return BootState(
        bank=bank,
        replayed=values,
        measured=tuple(_direct_kernel(measured)),
        command_line=command_line,
        secure_boot=secure_boot,
        anomalies=_anomalies(events, bank),
    )


def _component(event: log.Event) -> Component:
    if event.pcr in (0, 2):
        return Component.FIRMWARE
    if event.pcr in (1, 3, 5, 6, 7):
        return Component.CONFIGURATION
    if event.pcr == 4:
        return Component.BOOTLOADER
    if event.kind == log.EV_IPL and event.pcr in (8, 9):
        return _grub(event)
    if event.kind == log.EV_EVENT_TAG and event.pcr == 9 and len(event.data) >= 4:
        tag = int.from_bytes(event.data[:4], "little")
        return {_INITRD_TAG: Component.INITRD, _LOAD_OPTIONS_TAG: Component.COMMAND_LINE}.get(tag, Component.OTHER)
    return Component.COMMAND_LINE if event.pcr == 12 and event.kind == log.EV_IPL else Component.OTHER


def _grub(event: log.Event) -> Component:
    if event.pcr == 8:
        return Component.COMMAND_LINE if event.data.startswith(_GRUB_COMMAND_LINE) else Component.CONFIGURATION
    name = event.data.rstrip(b"\x00").rsplit(b"/", 1)[-1].lower()
    if name.startswith(_KERNEL_NAMES):
        return Component.KERNEL
    return Component.INITRD if name.startswith(_INITRD_NAMES) else Component.BOOTLOADER


def _direct_kernel(measured: list[Measured]) -> list[Measured]:
    """Where no boot loader measured a kernel file, the last EFI application that was started is the kernel (EFI stub)."""
    if any(one.component is Component.KERNEL for one in measured):
        return measured
    applications = [
        index for index, one in enumerate(measured) if one.pcr == 4 and one.kind == log.EV_EFI_BOOT_SERVICES_APPLICATION
    ]
    if not applications:
        return measured
    last = measured[applications[-1]]
    kernel = Measured(component=Component.KERNEL, pcr=last.pcr, kind=last.kind, digest=last.digest, described=last.described)
    return [kernel if index == applications[-1] else one for index, one in enumerate(measured)]


def _is_mark(event: log.Event, bank: int) -> bool:
    """True for a separator of value zero and for known actions, by their digest: the type alone is the host's word."""
    if event.kind == log.EV_SEPARATOR:
        return event.pcr in _SEPARATED and _proven(event, bank, bytes(4))
    is_action = event.kind in (log.EV_EFI_ACTION, log.EV_ACTION)
    return is_action and event.data.rstrip(b"\x00") in _ACTIONS and _proven(event, bank, event.data)


def _proven(event: log.Event, bank: int, payload: bytes) -> bool:
    name = HASH_NAMES.get(bank)
    return name is not None and same(hashlib.new(name, payload).digest(), event.digests[bank])


def _proven_command_line(event: log.Event, bank: int) -> str | None:
    prefix = next((one for one in _GRUB_COMMAND_LINE if event.data.startswith(one)), b"")
    raw = event.data.removeprefix(prefix) if event.pcr == 8 else event.data
    for payload in (raw, raw.removesuffix(b"\x00")):
        if _proven(event, bank, payload):
            try:
                return payload.decode("utf-16-le" if event.pcr == 12 else "utf-8").rstrip("\x00")
            except UnicodeDecodeError:
                return None
    return None


def _proven_secure_boot(event: log.Event, bank: int) -> bool | None:
    """The variable SecureBoot (UEFI_VARIABLE_DATA), where the payload is what was measured."""
    if len(event.data) < _VARIABLE_HEAD.size or not _proven(event, bank, event.data):
        return None
    _, name_length, size = _VARIABLE_HEAD.unpack_from(event.data)
    end = _VARIABLE_HEAD.size + 2 * name_length
    if name_length != len("SecureBoot") or end + size != len(event.data):
        return None
    if event.data[_VARIABLE_HEAD.size : end] != "SecureBoot".encode("utf-16-le"):
        return None
    return event.data[end:] == b"\x01" if size else None


def _anomalies(events: list[log.Event], bank: int) -> tuple[str, ...]:
    found: list[str] = []
    zero = {hashlib.new(HASH_NAMES[bank], bytes(4)).digest()} if bank in HASH_NAMES else set()
    for pcr in _SEPARATED:
        separators = [one for one in events if one.pcr == pcr and one.kind == log.EV_SEPARATOR]
        if len(separators) != 1:
            found.append(f"PCR {pcr} has {len(separators)} separators")
        elif zero and separators[0].digests[bank] not in zero:
            found.append(f"PCR {pcr} has a separator that reports an error")
    return tuple(found)


def _described(event: log.Event) -> str:
    text = event.data[:120].rstrip(b"\x00").decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "." for letter in text)
