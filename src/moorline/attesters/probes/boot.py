"""How this machine booted: boot log, Secure Boot, kernel (SEC009 6.12, 6.13, 6.21)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed, unread, without_securityfs
from moorline.attesters.probes.tree import State, Tree
from moorline.errors import MoorlineError
from moorline.evidence import eventlog as log
from moorline.policy.sec009.assessment import Observation
from moorline.verification.eventlog import BootState, Component, replay, verify_boot

LOG: Final = "/sys/kernel/security/tpm0/binary_bios_measurements"
EFI: Final = "/sys/firmware/efi"
_GLOBAL: Final = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_BANKS: Final = (0x0C, 0x0D, 0x0B, 0x04)
"""SHA-384, SHA-512, SHA-256, SHA-1: the bank the log is replayed in, the first that it has."""
CAPABILITIES: Final = ("boot.measured", "boot.secure.enforced", "boot.kernel.identity")


def probe(tree: Tree) -> Iterator[Observation]:
    """The boot as the machine's own files tell it; nothing here is compared with a TPM's quote."""
    read = tree.read(LOG, log.MAX_LOG)
    if not read.ok:
        for capability in ("boot.measured", "boot.kernel.identity"):
            yield (
                without_securityfs(tree, capability, read)
                if read.state is State.ABSENT and tree.has("/sys/class/tpm/tpm0")
                else None
            ) or (
                not_met(capability, "no boot log: firmware measured nothing into a TPM", read.shown())
                if read.state is State.ABSENT
                else unread(capability, read)
            )
    else:
        yield from _measured(tree, read.data)
    yield _secure_boot(tree)


def _measured(tree: Tree, data: bytes) -> Iterator[Observation]:
    try:
        parsed = log.parse_event_log(data)
        bank = next((one for one in _BANKS if one in parsed.banks), parsed.banks[0])
        values = replay(parsed, bank)
        state = verify_boot(parsed, bank=bank, quoted=values, pcrs=tuple(values))
    except (MoorlineError, ValueError, IndexError) as error:
        for capability in ("boot.measured", "boot.kernel.identity"):
            yield not_met(capability, f"the boot log cannot be read as one: {error}", f"{LOG}: {len(data)} bytes")
        return
    said = f"{LOG}: {len(parsed.events)} events, PCRs {', '.join(map(str, sorted(values)))}"
    if 0 not in values or not state.of(Component.FIRMWARE):
        yield not_met("boot.measured", "the boot log holds no measurement of firmware", said)
    elif state.anomalies:
        yield not_met("boot.measured", "the boot log is not that of a whole boot: " + "; ".join(state.anomalies), said)
    else:
        yield met("boot.measured", f"{len(parsed.events)} events", said)
    yield _kernel(tree, state)


def _kernel(tree: Tree, state: BootState) -> Observation:
    release = tree.read("/proc/sys/kernel/osrelease")
    kernels, lines = state.of(Component.KERNEL), state.of(Component.COMMAND_LINE)
    evidence = (f"{LOG}: {len(kernels)} kernel and {len(lines)} command line measurements", release.shown())
    if not kernels or not lines:
        return not_met("boot.kernel.identity", "kernel and command line are not both in the boot log", *evidence)
    return met("boot.kernel.identity", f"{release.text or 'unknown release'}, {kernels[-1].digest.hex()}", *evidence)


def _secure_boot(tree: Tree) -> Observation:
    name = "boot.secure.enforced"
    if not tree.has(EFI):
        return not_met(name, "this machine did not boot through UEFI, or does not show it", f"{EFI}: absent")
    found = {}
    for variable in ("SecureBoot", "SetupMode"):
        read = tree.read(f"{EFI}/efivars/{variable}-{_GLOBAL}", 16)
        if not read.ok:
            if read.state is State.ABSENT and not tree.names(f"{EFI}/efivars"):
                return not_probed(name, "efivarfs is not mounted: mount -t efivarfs efivarfs " + EFI + "/efivars")
            if read.state is not State.ABSENT:
                return unread(name, read)
            if variable == "SecureBoot":
                return not_met(name, "this firmware has no Secure Boot", read.shown())
            continue
        if len(read.data) != 5:
            return not_probed(name, f"{read.path} is not a variable of one byte", read.shown(f"{len(read.data)} bytes"))
        found[variable] = read.data[4]
    evidence = tuple(f"{EFI}/efivars/{variable}-{_GLOBAL}: {value}" for variable, value in found.items())
    if found.get("SecureBoot") != 1:
        return not_met(name, "Secure Boot is off", *evidence, value="off")
    if found.get("SetupMode") != 0:
        return not_met(name, "the firmware is in setup mode: whoever boots can enrol keys", *evidence, value="setup mode")
    return met(name, "on", *evidence)
