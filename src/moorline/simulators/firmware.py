"""The firmware simulator: plays the firmware, boot loader and kernel of a host that has a TPM but no measured boot.

It writes a boot log in the TCG crypto-agile format and an IMA list in the kernel's ASCII format, and really extends the
PCRs of the TPM with exactly those events, so that both replay to what the TPM quotes. What is simulated is that these are
measurements of this machine; the first event of each log says so: written by the firmware simulator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant
from moorline.evidence import eventlog as log
from moorline.evidence.ima import PCR, ImaEntry
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.policy.reference_values import ReferenceValues, values_of
from moorline.verification.eventlog import verify_boot
from moorline.verification.ima import boot_aggregate

EVENT_LOG: Final = "event_log.bin"
IMA_LIST: Final = "ima.txt"
LABEL: Final = "SIMULATED: written by the firmware simulator"
_BOOT_PCRS: Final = tuple(range(10))
_GLOBAL_VARIABLE: Final = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")  # EFI_GLOBAL_VARIABLE, UEFI 3.3
_IMAGE_SECURITY: Final = bytes.fromhex("cbb219d73a3d9645a3bcdad00e67656f")


@dataclass(frozen=True, slots=True, kw_only=True)
class BootProfile:
    """What a simulated host boots. The bytes stand for the images; only their digests are measured."""

    name: str
    firmware: bytes
    bootloader: bytes
    kernel: bytes
    command_line: str
    initrd: bytes
    secure_boot: bool
    files: tuple[tuple[str, bytes], ...]


GOOD: Final = BootProfile(
    name="good",
    firmware=b"SIMULATED firmware volume 1.0",
    bootloader=b"SIMULATED boot loader 2.06",
    kernel=b"SIMULATED kernel 6.1.0-40",
    command_line="/vmlinuz-6.1.0-40 root=/dev/vda1 ro lockdown=integrity module.sig_enforce=1 ima_policy=tcb",
    initrd=b"SIMULATED initrd 6.1.0-40",
    secure_boot=True,
    files=(
        ("/usr/lib/systemd/systemd", b"SIMULATED systemd"),
        ("/usr/bin/bwrap", b"SIMULATED bubblewrap"),
        ("/usr/bin/moor", b"SIMULATED host agent"),
    ),
)
CHANGED_KERNEL: Final = dataclasses.replace(
    GOOD, name="changed-kernel", kernel=b"SIMULATED kernel 6.1.0-40 with an addition nobody signed"
)
PROFILES: Final = {profile.name: profile for profile in (GOOD, CHANGED_KERNEL)}


def boot(tpm: Tpm, directory: Path, profile: BootProfile) -> None:
    """Measure one boot of `profile` into a TPM that was just started, and write both logs into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    events = boot_events(profile)
    for event in events:
        tpm.extend(event.pcr, event.digests[ALG_SHA256])
    _replace(directory / EVENT_LOG, serialize_log(events))
    _replace(directory / IMA_LIST, b"")
    aggregate = boot_aggregate(tpm.read_pcrs(ALG_SHA256, _BOOT_PCRS))
    _measure(tpm, directory, "boot_aggregate", aggregate)
    _measure(tpm, directory, "/" + LABEL.replace(" ", "_"), hashlib.sha256(LABEL.encode()).digest())
    for path, content in profile.files:
        execute(tpm, directory, path, content)


def execute(tpm: Tpm, directory: Path, path: str, content: bytes) -> None:
    """One more file is run on the host: one more IMA entry, and PCR 10 extended with it, in the kernel's order."""
    _measure(tpm, directory, path, hashlib.sha256(content).digest())


def reference_values(
    profile: BootProfile, *, name: str, not_before: Instant, not_after: Instant, files: tuple[tuple[str, bytes], ...] = ()
) -> ReferenceValues:
    """The reference values that `profile` meets and nothing else does; `files` may run beside the profile's own."""
    parsed = log.parse_event_log(serialize_log(boot_events(profile)))
    quoted = {pcr: _replayed(boot_events(profile), pcr) for pcr in _BOOT_PCRS}
    state = verify_boot(parsed, bank=ALG_SHA256, quoted=quoted, pcrs=_BOOT_PCRS)
    allowed: dict[str, tuple[bytes, ...]] = {
        path: (hashlib.sha256(content).digest(),) for path, content in (*profile.files, *files)
    }
    allowed["/" + LABEL.replace(" ", "_")] = (hashlib.sha256(LABEL.encode()).digest(),)
    return values_of(state, name=name, serial=1, not_before=not_before, not_after=not_after, files=allowed)


def boot_events(profile: BootProfile) -> tuple[log.Event, ...]:
    """The events of one boot, in order."""
    crtm = f"{LABEL} 1.0".encode("utf-16-le") + b"\x00\x00"
    blob = struct.pack("<B", 8) + b"SIMULATE" + struct.pack("<QQ", 0, len(profile.firmware))
    secure = _variable(_GLOBAL_VARIABLE, "SecureBoot", bytes([profile.secure_boot]))
    database = _variable(_IMAGE_SECURITY, "db", b"SIMULATED signature database")
    calling = b"Calling EFI Application from Boot Option"
    command_line = profile.command_line.encode()
    kernel = f"/boot/{profile.command_line.split(maxsplit=1)[0].lstrip('/')}".encode() + b"\x00"
    return (
        _event(0, log.EV_S_CRTM_VERSION, crtm, crtm),
        _event(0, log.EV_EFI_PLATFORM_FIRMWARE_BLOB2, profile.firmware, blob),
        _event(7, log.EV_EFI_VARIABLE_DRIVER_CONFIG, secure, secure),
        _event(7, log.EV_EFI_VARIABLE_DRIVER_CONFIG, database, database),
        _event(4, log.EV_EFI_ACTION, calling, calling),
        *(_event(pcr, log.EV_SEPARATOR, bytes(4), bytes(4)) for pcr in range(8)),
        _event(4, log.EV_EFI_BOOT_SERVICES_APPLICATION, profile.bootloader, b"\\EFI\\BOOT\\BOOTX64.EFI"),
        _event(9, log.EV_IPL, profile.kernel, kernel),
        _event(8, log.EV_IPL, command_line, b"kernel_cmdline: " + command_line + b"\x00"),
        _event(9, log.EV_IPL, profile.initrd, b"/boot/initrd.img\x00"),
        *(
            _event(5, log.EV_EFI_ACTION, text, text)
            for text in (b"Exit Boot Services Invocation", b"Exit Boot Services Returned with Success")
        ),
    )


def serialize_log(events: tuple[log.Event, ...]) -> bytes:
    """A crypto-agile log with one bank, SHA-256 (TCG PC Client PFP 10.4.5)."""
    spec = b"Spec ID Event03\x00" + struct.pack("<I4BI", 0, 0, 2, 105, 2, 1) + struct.pack("<HH", ALG_SHA256, 32) + b"\x00"
    made = bytearray(struct.pack("<II20sI", 0, log.EV_NO_ACTION, bytes(20), len(spec)) + spec)
    for event in events:
        made += struct.pack("<IIIH", event.pcr, event.kind, 1, ALG_SHA256) + event.digests[ALG_SHA256]
        made += struct.pack("<I", len(event.data)) + event.data
    return bytes(made)


def _event(pcr: int, kind: int, measured: bytes, data: bytes) -> log.Event:
    return log.Event(pcr, kind, {ALG_SHA256: hashlib.sha256(measured).digest()}, data)


def _variable(guid: bytes, name: str, value: bytes) -> bytes:
    return struct.pack("<16sQQ", guid, len(name), len(value)) + name.encode("utf-16-le") + value


def _replayed(events: tuple[log.Event, ...], pcr: int) -> bytes:
    value = bytes(32)
    for event in events:
        if event.pcr == pcr:
            value = hashlib.sha256(value + event.digests[ALG_SHA256]).digest()
    return value


def _measure(tpm: Tpm, directory: Path, path: str, digest: bytes) -> None:
    """The kernel adds the entry to its list first and extends PCR 10 then, so a list can be ahead of a quote."""
    entry = ImaEntry(PCR, bytes(20), "ima-ng", "sha256", digest, path.encode(), b"")
    data = entry.template_data()
    shown = hashlib.sha1(data).hexdigest()  # noqa: S324 - the ASCII list shows SHA-1 template hashes
    line = f"{PCR} {shown} ima-ng sha256:{digest.hex()} {path}\n"
    with (directory / IMA_LIST).open("ab") as file:
        file.write(line.encode())
    tpm.extend(PCR, hashlib.sha256(data).digest())


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    os.replace(fresh, path)  # noqa: PTH105 - atomic
