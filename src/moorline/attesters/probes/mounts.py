"""File systems that cannot be written, or only be added to (SEC009 6.8, 6.9)."""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from moorline.attesters.probes.saying import arguments, met, not_met, not_probed, unread
from moorline.attesters.probes.tree import Tree, cleaned
from moorline.policy.sec009.assessment import Observation

CAPABILITIES: Final = ("fs.root.readonly", "fs.audit.writeonly")
MOUNTS: Final = "/proc/self/mountinfo"
_GET_FLAGS: Final = 0x80086601
_APPEND: Final = 0x20
_AUDIT: Final = ("/var/log/audit/audit.log", "/var/log/audit", "/var/log/journal", "/var/log/syslog", "/var/log/messages")
_REMOTE: Final = re.compile(r"^\s*[^#\s].*(@@?[\w.\[(-]|type=\"om(fwd|relp)\")")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of mountinfo."""

    device: str
    point: str
    options: frozenset[str]
    kind: str
    source: str


def mounts(tree: Tree) -> tuple[Mount, ...]:
    """The mounts of this process; lines of another shape are left out."""
    found = []
    for line in tree.read(MOUNTS, 4 << 20).text.splitlines():
        left, dash, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if dash and len(fields) >= 6 and len(tail) >= 2:
            found.append(
                Mount(
                    device=fields[2],
                    point=_unescaped(fields[4]),
                    options=frozenset(fields[5].split(",")),
                    kind=tail[0],
                    source=_unescaped(tail[1]),
                )
            )
    return tuple(found)


def root_mount(tree: Tree) -> Mount | None:
    """What is mounted at `/` (the last one counts: it covers the others)."""
    return next((one for one in reversed(mounts(tree)) if one.point == "/"), None)


def probe(tree: Tree) -> Iterator[Observation]:
    """Root and audit logs."""
    yield _root(tree)
    yield _audit(tree)


def _root(tree: Tree) -> Observation:
    name, root = "fs.root.readonly", root_mount(tree)
    read = tree.read(MOUNTS, 4 << 20)
    if root is None:
        return not_met(name, "no root mount is listed", read.shown()) if read.ok else unread(name, read)
    said = f"{MOUNTS}: / is {root.kind} on {cleaned(root.source, 60)} {'ro' if 'ro' in root.options else 'rw'}"
    identity = tree.read(f"/sys/dev/block/{root.device}/dm/uuid")
    roothash = arguments(tree).get("roothash") or arguments(tree).get("dm_mod.create")
    if "ro" not in root.options:
        return not_met(name, "the root file system is writable", said, value="rw")
    if identity.text.startswith("CRYPT-VERITY"):
        hashed = f"/proc/cmdline: roothash {'given' if roothash else 'not given'}"
        return met(name, "read-only over dm-verity", said, identity.shown(), hashed)
    return met(
        name,
        "mounted read-only; root can remount it",
        said,
        improve="put it on dm-verity, with roothash= on the command line",
    )


def _audit(tree: Tree) -> Observation:
    name = "fs.audit.writeonly"
    sinks = _sinks(tree)
    present = [path for path in _AUDIT if tree.has(path)]
    evidence = (f"remote sinks: {', '.join(sinks) or 'none'}", f"audit files: {', '.join(present) or 'none'}")
    if not present:
        return not_met(name, "there are no audit files where they are looked for", *evidence)
    if not sinks:
        return not_met(name, "no copy of the log leaves this machine", *evidence)
    appended = {path: _append_only(tree, path) for path in present}
    if any(value is True for value in appended.values()):
        return met(name, "append-only, and sent to a remote sink", *evidence)
    if None in appended.values():
        return not_probed(name, "whether audit files are append-only can be read by root, on the machine itself", *evidence)
    return not_met(name, "audit files can be changed and truncated", *evidence)


def _sinks(tree: Tree) -> list[str]:
    files = [
        "/etc/rsyslog.conf",
        *(f"/etc/rsyslog.d/{one}" for one in tree.names("/etc/rsyslog.d") if one.endswith(".conf")),
    ]
    found = [path for path in files if any(_REMOTE.match(line[:1000]) for line in tree.read(path).text.splitlines())]
    upload = "/etc/systemd/journal-upload.conf"
    if any(line.startswith("URL=") and len(line) > 4 for line in tree.read(upload).text.splitlines()):
        found.append(upload)
    return found


def _append_only(tree: Tree, path: str) -> bool | None:
    """Whether a file has the append-only attribute; None if that cannot be asked."""
    try:
        handle = os.open(tree.where(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        answer = fcntl.ioctl(handle, _GET_FLAGS, struct.pack("L", 0))
    except OSError:
        return None
    finally:
        os.close(handle)
    return bool(struct.unpack("L", answer)[0] & _APPEND)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8) & 0xFF), text)
