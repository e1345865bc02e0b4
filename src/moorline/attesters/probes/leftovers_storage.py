"""What a function leaves in storage that others reach: files in shared folders, and mounts of this namespace."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SHARED: Final = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run/lock"))  # noqa: S108 - what everybody shares
_MOST: Final = 500_000
_MOUNTS: Final = Path("/proc/self/mountinfo")


def files() -> set[str]:
    """Every file and folder below the shared ones that this user may list. Raises OSError for more than are looked at."""
    found: set[str] = set()
    for top in _SHARED:
        for folder, below, names in os.walk(top):
            for name in (*below, *names):
                path = f"{folder}/{name}"
                with contextlib.suppress(OSError):
                    found.add(f"file {path} inode {os.lstat(path).st_ino}")
            if len(found) > _MOST:
                raise OSError(0, "too many files")
    return found


@contextlib.contextmanager
def file() -> Iterator[str]:
    """An empty file."""
    with tempfile.NamedTemporaryFile(dir=_SHARED[0], prefix="moorline-") as own:
        yield f"file {own.name} inode {os.fstat(own.fileno()).st_ino}"


def mounts() -> set[str]:
    """What is mounted here: where, which file system, from what."""
    rows = (line.split() for line in _MOUNTS.read_text("utf-8", "replace").splitlines())
    return {f"mount {fields[4]} {' '.join(fields[fields.index('-') + 1 :][:2])}" for fields in rows}


@contextlib.contextmanager
def mount() -> Iterator[str]:
    """What is known to be mounted: /proc, in which the list itself is. Nothing is mounted, which needs root."""
    known = next((one for one in mounts() if one.startswith("mount /proc ")), None)
    if known is None or not os.path.ismount("/proc"):
        raise OSError(0, "/proc is not among the mounts")
    yield known
