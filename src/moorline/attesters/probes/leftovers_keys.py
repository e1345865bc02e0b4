"""What a function leaves among the kernel's keys (keyrings(7)), as far as this user may see them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_KEYS: Final = Path("/proc/keys")
_ADD_KEY: Final = {"x86_64": 248, "aarch64": 217, "riscv64": 217}
"""Number of the system call; libc has no function for it."""
_KEYCTL: Final = {"x86_64": 250, "aarch64": 219, "riscv64": 219}
_PROCESS_KEYRING: Final = -2
_INVALIDATE: Final = 21
_GONE_S: Final = 2.0
"""The kernel takes a key off its list a little later."""


def keys() -> set[str]:
    """Keys and keyrings: number, type and description; without the process's own keyring."""
    rows = (line.split(maxsplit=8) for line in _KEYS.read_text("utf-8", "replace").splitlines())
    return {f"key {row[0]} {row[7]} {row[8].strip()}" for row in rows if len(row) == 9 and not row[8].startswith("_pid")}


@contextlib.contextmanager
def key() -> Iterator[str]:
    """A key in the keyring of this process. Raises OSError where none can be made, or on a machine not known here."""
    add, control = _ADD_KEY.get(platform.machine()), _KEYCTL.get(platform.machine())
    if add is None or control is None:
        raise OSError(0, "the system call is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"moorline-{secrets.token_hex(8)}"
    made = libc.syscall(add, b"user", name.encode("ascii"), b"control", ctypes.c_size_t(7), _PROCESS_KEYRING)
    if made < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        yield f"key {made & 0xFFFFFFFF:08x} user {name}: 7"
    finally:
        libc.syscall(control, _INVALIDATE, made)
        until = time.monotonic() + _GONE_S
        while any(name in one for one in keys()) and time.monotonic() < until:
            time.sleep(0.01)
