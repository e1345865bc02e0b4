"""What the storage is, and whether somebody who takes it away can read it (SEC009 5.2.7, 6.18)."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.mounts import MOUNTS, mounts, root_mount
from moorline.attesters.probes.saying import met, not_met, not_probed, unread
from moorline.attesters.probes.tree import Tree, cleaned
from moorline.policy.sec009.assessment import Observation

BLOCK: Final = "/sys/block"
CAPABILITIES: Final = ("storage.encryption.host", "storage.sed.opal", "storage.type.*", "cleanup.storage.method.*")
_SKIPPED: Final = ("loop", "ram", "zram", "fd", "sr")
_JOURNALLED: Final = frozenset({"ext3", "ext4", "xfs", "jfs", "ntfs3"})
_TRANSACTIONAL: Final = frozenset({"btrfs", "zfs", "bcachefs"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p"})
_OPAL_STATUS: Final = 0x800870EC  # _IOR('p', 236, struct opal_status), include/uapi/linux/sed-opal.h
_OPAL_SUPPORTED: Final = 1
_OPAL_ENABLED: Final = 4


def probe(tree: Tree) -> Iterator[Observation]:
    """Encryption under root and swap, self-encrypting drives, kinds of storage, and how it could be erased."""
    disks = [name for name in tree.names(BLOCK) if not name.startswith(_SKIPPED)]
    encrypted = _encryption(tree)
    yield encrypted
    opal = _opal(tree, disks)
    yield opal
    yield _types(tree, disks)
    yield _erasure(tree, disks, crypt=encrypted.status.value == "met" or opal.status.value == "met")


def _rests_on_crypt(tree: Tree, device: str, depth: int = 8) -> bool:
    """Whether the block device (major:minor or name below /sys/block) lies on dm-crypt with everything under it."""
    at = f"/sys/dev/block/{device}" if ":" in device else f"{BLOCK}/{device}"
    if tree.read(f"{at}/dm/uuid").text.startswith("CRYPT-") and "VERITY" not in tree.read(f"{at}/dm/uuid").text:
        return True
    under = tree.names(f"{at}/slaves")
    return depth > 0 and bool(under) and all(_rests_on_crypt(tree, one, depth - 1) for one in under)


def _encryption(tree: Tree) -> Observation:
    name, root = "storage.encryption.host", root_mount(tree)
    if root is None:
        read = tree.read(MOUNTS, 4 << 20)
        return unread(name, read) if not read.ok else not_met(name, "no root mount is listed", read.shown())
    swaps = [line.split()[0] for line in tree.read("/proc/swaps").text.splitlines()[1:] if line.split()]
    bare = [one for one in swaps if "zram" not in one and not _swap_on_crypt(tree, one)]
    data = {one.point: one.device for one in mounts(tree) if one.point in ("/", "/var", "/var/lib") and one.kind != "tmpfs"}
    open_points = sorted(point for point, device in data.items() if not _rests_on_crypt(tree, device))
    evidence = (
        f"{MOUNTS}: / is {root.kind} on {cleaned(root.source, 60)}",
        f"/proc/swaps: {', '.join(swaps) or 'none'}",
    )
    if open_points:
        return not_met(name, f"not on dm-crypt: {', '.join(open_points)}", *evidence)
    if bare:
        return not_met(name, f"swap is not encrypted: {', '.join(bare)}", *evidence)
    return met(name, f"dm-crypt under {', '.join(sorted(data))}", *evidence)


def _swap_on_crypt(tree: Tree, path: str) -> bool:
    name = path.rpartition("/")[2]
    if path.startswith("/dev/mapper/"):
        names = [one for one in tree.names(BLOCK) if tree.read(f"{BLOCK}/{one}/dm/name").text == name]
        return bool(names) and _rests_on_crypt(tree, names[0])
    return path.startswith("/dev/dm-") and _rests_on_crypt(tree, name)


def _opal(tree: Tree, disks: list[str]) -> Observation:
    name = "storage.sed.opal"
    real = [disk for disk in disks if disk.startswith(("sd", "nvme"))]
    if not real:
        return not_met(name, "no drive that could encrypt by itself", f"{BLOCK}: {', '.join(disks) or 'no disks'}")
    if not tree.live:
        return not_probed(name, "drives are asked on the machine itself", f"{BLOCK}: {', '.join(real)}")
    states = {disk: _asked(f"/dev/{disk}") for disk in real}
    evidence = tuple(
        f"/dev/{disk}: {'cannot be asked' if flags is None else f'opal status {flags:#x}'}" for disk, flags in states.items()
    )
    if None in states.values():
        return not_probed(name, "drives are asked by root only", *evidence)
    locked = [disk for disk, flags in states.items() if flags is not None and flags & _OPAL_ENABLED]
    if len(locked) == len(real):
        return met(name, f"locking enabled on {', '.join(locked)}", *evidence)
    return not_met(name, "drives without locking", *evidence)


def _asked(device: str) -> int | None:
    """The drive's Opal flags; 0 if it is no such drive; None if it cannot be asked."""
    try:
        handle = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        flags = struct.unpack("=II", fcntl.ioctl(handle, _OPAL_STATUS, struct.pack("=II", 0, 0)))[0]
        return flags if flags & _OPAL_SUPPORTED else 0
    except OSError:
        return 0
    finally:
        os.close(handle)


def _types(tree: Tree, disks: list[str]) -> Observation:
    kinds: set[str] = set()
    evidence = []
    for disk in disks:
        rotational = tree.read(f"{BLOCK}/{disk}/queue/rotational")
        kinds |= {"block", "local", "hdd" if rotational.text == "1" else "ssd"} if rotational.ok else {"block"}
        if disk.startswith("nvme"):
            kinds.add("low_latency")
        if disk.startswith("pmem"):
            kinds.add("nvram")
        if disk.startswith("md") or tree.has(f"{BLOCK}/{disk}/md"):
            kinds.add("raid")
        evidence.append(rotational.shown())
    for mount in mounts(tree):
        kinds |= {"journalled"} if mount.kind in _JOURNALLED else set()
        kinds |= {"transactional"} if mount.kind in _TRANSACTIONAL else set()
        kinds |= {"nas", "remote"} if mount.kind in _REMOTE else set()
        kinds |= {"ram"} if mount.kind in ("tmpfs", "ramfs") and mount.point in ("/tmp", "/dev/shm") else set()  # noqa: S108
    if any(tree.read(f"{BLOCK}/{disk}/dm/uuid").text.startswith("CRYPT-") for disk in disks):
        kinds.add("key_mgmt")
    if not kinds & {"block", "nas"}:
        return not_met("storage.type.*", "no storage that lasts is shown", *evidence)
    return met("storage.type.*", ", ".join(sorted(kinds)), *evidence[:8])


def _erasure(tree: Tree, disks: list[str], *, crypt: bool) -> Observation:
    name = "cleanup.storage.method.*"
    discards = [disk for disk in disks if tree.read(f"{BLOCK}/{disk}/queue/discard_max_bytes").text not in ("", "0")]
    ways = [
        *(["purge_crypto_erase"] if crypt else []),
        *(["discard (proves nothing)"] if discards else []),
        "clear (overwriting)",
    ]
    evidence = (f"{BLOCK}: discard on {', '.join(discards) or 'no disk'}",)
    if crypt:
        return met(name, ", ".join(ways), *evidence)
    return not_met(
        name,
        "no key whose destruction would erase the data; overwriting is not proven on flash",
        *evidence,
        value=", ".join(ways),
    )
