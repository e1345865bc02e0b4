"""Where secrets of tests are looked for, and in which forms."""

import base64
from pathlib import Path


def forms(secret: bytes) -> dict[str, bytes]:
    """A secret as it is, and as programs write bytes: hex, base64 wherever it begins, and Python's own quoting."""
    return {
        "raw": secret,
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        "repr": repr(secret)[2:-1].encode(),
        **{f"base64 {shift}": _core(base64.b64encode(bytes(shift) + secret), shift) for shift in range(3)},
        **{f"base64url {shift}": _core(base64.urlsafe_b64encode(bytes(shift) + secret), shift) for shift in range(3)},
    }


def _core(encoded: bytes, shift: int) -> bytes:
    """What stays the same of an encoding whatever stands before and after."""
    return encoded.rstrip(b"=")[4 if shift else 0 : -1]


def command_lines() -> bytes:
    """Every command line on this machine, now."""
    return _read(Path("/proc").glob("[0-9]*/cmdline"))


def environment(pids: list[int]) -> bytes:
    """What these processes were started with."""
    return _read(Path(f"/proc/{pid}/environ") for pid in pids)


def family(pid: int) -> list[int]:
    """A process and all that came of it."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(one) for task in tasks for one in (task / "children").read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def runs(pid: int, word: str) -> bool:
    """Whether this stands in the process's command line."""
    return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()


def dumps_core(pid: int) -> bool:
    """Whether the kernel would write a core of it: both of its limits say."""
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in limits if line.startswith("Max core file size")).split()[4:6] != ["0", "0"]


def _read(paths) -> bytes:
    found = b""
    for path in paths:
        try:
            found += path.read_bytes()
        except OSError:  # it has ended
            continue
    return found
