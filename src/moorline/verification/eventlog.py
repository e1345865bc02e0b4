"""Whether a boot log replays to quoted PCRs, and what it booted (TCG PC Client PFP 1.05, 10).

1. Every event except EV_NO_ACTION extends its PCR, in every bank; PCR 0 starts from the startup locality the log tells.
2. In the bank that was quoted, every quoted boot PCR the caller names has exactly its replayed value.
3. Only then are events read as facts, and a payload counts as fact only where its own digest is the event's: firmware
   measures some things (images, files) by their contents and writes a description beside it, which anybody can choose.
4. Each measured event gets a component: firmware, configuration, bootloader, kernel, command line, initrd or other. The
   component of an image rests on such a description; a false one can only move an event among lists that policy all checks.
   Variables are read in PCR 7 only, before its separator, and once each: whatever runs later could extend PCR 7 with another
   "SecureBoot is on", but not before the firmware's own. (In a CC event log the register is 1: pass `variables_pcr`.)
   What Secure Boot trusts is told by name: PK, KEK, db and dbx, the keys that images were accepted under (authorities), and
   what shim measures of its own lists (MOK; PCR 14: only digests stand there, and the names are descriptions).
5. Separators (one in each of PCR 0 to 7, of value zero) and known EFI actions are marks, not components, where their digest
   proves it. A missing or repeated separator, or one that reports an error, is an anomaly, which policy judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from moorline.digest import same
from moorline.errors import Malformed, NotAuthentic, Unavailable
from moorline.evidence import eventlog as log
from moorline.evidence import uefi_variables as uefi
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
_DATABASES: Final = (
    ("PK", uefi.GLOBAL_VARIABLE),
    ("KEK", uefi.GLOBAL_VARIABLE),
    ("db", uefi.IMAGE_SECURITY_DATABASE),
    ("dbx", uefi.IMAGE_SECURITY_DATABASE),
)
_MOK_PCR: Final = 14
_DESCRIPTION: Final = 120
_MOK_LISTS: Final = (b"MokList", b"MokListX", b"MokListTrusted", b"MokSBState", b"MokDBState")


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
    """One measured thing. `description` is the beginning of the log's own words about it, trusted by nobody."""

    component: Component
    pcr: int
    kind: int
    digest: bytes
    description: bytes

    @property
    def described(self) -> str:
        """The description, cleaned for people."""
        text = self.description.rstrip(b"\x00").decode("utf-8", "replace")
        return "".join(letter if letter.isprintable() else "." for letter in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """What an image was accepted under, as firmware or shim measured it when it verified the image.

    `database` is the variable it stands in ("db", or shim's "Shim", "MokList", "SbatLevel"); `vendor` says whose.
    """

    database: str
    vendor: UUID
    value: bytes

    def certificate(self) -> bytes | None:
        """The DER certificate, where it is one: in a database behind its owner, in shim's as it is."""
        if self.vendor == uefi.IMAGE_SECURITY_DATABASE and len(self.value) > 16:
            return uefi.parse_signature(self.value, uefi.CERT_X509).data
        return self.value if self.value.startswith(b"\x30\x82") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureBootKeys:
    """What Secure Boot and shim trust, as measured.

    `databases` has PK, KEK, db and dbx, each only where its payload is proven and read; one that is missing is unknown, one
    that is empty is empty. `mok` has the digest of each of shim's lists, by the name the log gives it in PCR 14.
    """

    databases: Mapping[str, tuple[uefi.Signature, ...]]
    authorities: tuple[Authority, ...]
    mok: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class BootState:
    """What a verified log says was booted. `command_line` and `secure_boot` are None unless their payload is proven."""

    bank: int
    replayed: Mapping[int, bytes]
    measured: tuple[Measured, ...]
    command_line: str | None
    secure_boot: bool | None
    keys: SecureBootKeys
    anomalies: tuple[str, ...]

    def of(self, component: Component) -> tuple[Measured, ...]:
        """What was measured as `component`, in boot order."""
        return tuple(one for one in self.measured if one.component is component)


def replay(parsed: log.EventLog, bank: int) -> dict[int, bytes]:
    """The value of every PCR the log extends in `bank`.

    Raises Malformed("eventlog.bank_missing" | "eventlog.bank_incomplete") and Unavailable("eventlog.hash_unsupported").
    """
    if bank not in parsed.banks or bank not in HASH_SIZES:
        raise Malformed("eventlog.bank_missing", "the boot log has no such bank", expected=hex(bank))
    size = HASH_SIZES[bank]
    hashed = _hash(bank)
    values: dict[int, bytes] = {}
    for event in parsed.events:
        if event.kind == log.EV_NO_ACTION:
            continue
        digest = event.digests.get(bank)
        if digest is None:
            raise Malformed("eventlog.bank_incomplete", "an event lacks its digest in this bank", expected=hex(bank))
        before = values.get(event.pcr) or _start(parsed, event.pcr, size)
        values[event.pcr] = hashed(before + digest)
    return values


def verify_boot(
    parsed: log.EventLog, *, bank: int, quoted: Mapping[int, bytes], pcrs: Iterable[int], variables_pcr: int = 7
) -> BootState:
    """The boot state, proven by the `quoted` values of `pcrs` in `bank`.

    A PCR of `pcrs` that the log never extends must be quoted at its start value. Raises Malformed (`eventlog.*`),
    NotAuthentic("eventlog.replay_mismatch") and Unavailable("eventlog.hash_unsupported").
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
    return _boot_state(events, bank, values, variables_pcr)


def _start(parsed: log.EventLog, pcr: int, size: int) -> bytes:
    if pcr == 0:
        return bytes(size - 1) + bytes([parsed.startup_locality])
    return b"\xff" * size if pcr in range(17, 23) else bytes(size)


def _boot_state(events: list[log.Event], bank: int, values: dict[int, bytes], variables_pcr: int) -> BootState:
    measured: list[Measured] = []
    command_line: str | None = None
    variables = _variables(events, bank, variables_pcr)
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
                description=event.data[:_DESCRIPTION],
            )
        )
        if component is Component.COMMAND_LINE:
            command_line = _proven_command_line(event, bank) or command_line
    return BootState(
        bank=bank,
        replayed=values,
        measured=tuple(_direct_kernel(measured)),
        command_line=command_line,
        secure_boot=_secure_boot(variables),
        keys=_keys(events, bank, variables, variables_pcr),
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
    kernel = Measured(
        component=Component.KERNEL, pcr=last.pcr, kind=last.kind, digest=last.digest, description=last.description
    )
    return [kernel if index == applications[-1] else one for index, one in enumerate(measured)]


def _is_mark(event: log.Event, bank: int) -> bool:
    """True for a separator of value zero and for known actions, by their digest: the type alone is the host's word."""
    if event.kind == log.EV_SEPARATOR:
        return event.pcr in _SEPARATED and _proven(event, bank, bytes(4))
    is_action = event.kind in (log.EV_EFI_ACTION, log.EV_ACTION)
    return is_action and event.data.rstrip(b"\x00") in _ACTIONS and _proven(event, bank, event.data)


def _hash(bank: int) -> Callable[[bytes], bytes]:
    """The hash of a bank. SM3 is not in every OpenSSL: without it nothing can be said about such a log."""
    name = HASH_NAMES.get(bank)
    if name is not None:
        algorithm = getattr(hashlib, name)
        return lambda data: algorithm(data).digest()
    return _sm3


def _sm3(data: bytes) -> bytes:
    try:
        hashed = hashes.Hash(hashes.SM3())
    except UnsupportedAlgorithm:
        raise Unavailable(
            "eventlog.hash_unsupported",
            "the boot log can only be replayed with a hash that is missing here",
            expected="SM3",
            remedy="quote and log a SHA-256 bank, or use an OpenSSL with SM3",
        ) from None
    hashed.update(data)
    return hashed.finalize()


def _proven(event: log.Event, bank: int, payload: bytes) -> bool:
    return same(_hash(bank)(payload), event.digests[bank])


def _variables(events: list[log.Event], bank: int, pcr: int) -> dict[tuple[UUID, str], bytes]:
    """The firmware's variables that are proven, each as it was measured first and before the separator."""
    found: dict[tuple[UUID, str], bytes] = {}
    for event in events:
        if event.pcr == pcr and event.kind == log.EV_SEPARATOR:
            break
        if event.pcr == pcr and event.kind == log.EV_EFI_VARIABLE_DRIVER_CONFIG:
            variable = _proven_variable(event, bank)
            if variable is not None:
                found.setdefault((variable.vendor, variable.name), variable.value)
    return found


def _proven_variable(event: log.Event, bank: int) -> uefi.Variable | None:
    if not _proven(event, bank, event.data):
        return None
    try:
        return uefi.parse_variable(event.data)
    except Malformed:
        return None  # measured as it is, and not understood: its digest is judged, its contents are not known


def _secure_boot(variables: Mapping[tuple[UUID, str], bytes]) -> bool | None:
    """Empty, as some firmware measures the variable, is unknown."""
    value = variables.get((uefi.GLOBAL_VARIABLE, "SecureBoot"))
    return value == b"\x01" if value else None


def _keys(
    events: list[log.Event], bank: int, variables: Mapping[tuple[UUID, str], bytes], variables_pcr: int
) -> SecureBootKeys:
    databases = {name: _signatures(variables[vendor, name]) for name, vendor in _DATABASES if (vendor, name) in variables}
    authorities: list[Authority] = []
    mok: dict[str, bytes] = {}
    for event in events:
        name = event.data.rstrip(b"\x00")
        if event.pcr == variables_pcr and event.kind == log.EV_EFI_VARIABLE_AUTHORITY:
            variable = _proven_variable(event, bank)
            if variable is not None:
                authorities.append(Authority(database=variable.name, vendor=variable.vendor, value=variable.value))
        elif event.pcr == _MOK_PCR and event.kind == log.EV_IPL and name in _MOK_LISTS:
            mok.setdefault(name.decode("ascii"), event.digests[bank])
    known = {name: found for name, found in databases.items() if found is not None}
    return SecureBootKeys(databases=known, authorities=tuple(authorities), mok=mok)


def _signatures(value: bytes) -> tuple[uefi.Signature, ...] | None:
    try:
        return tuple(one for listed in uefi.parse_signature_lists(value) for one in listed.signatures)
    except Malformed:
        return None  # as in _proven_variable


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


def _anomalies(events: list[log.Event], bank: int) -> tuple[str, ...]:
    found: list[str] = []
    zero = _hash(bank)(bytes(4))
    for pcr in _SEPARATED:
        separators = [one for one in events if one.pcr == pcr and one.kind == log.EV_SEPARATOR]
        if len(separators) != 1:
            found.append(f"PCR {pcr} has {len(separators)} separators")
        elif separators[0].digests[bank] != zero:
            found.append(f"PCR {pcr} has a separator that reports an error")
    return tuple(found)
