"""What a process that holds secrets switches off: core dumps, and other processes' eyes on its memory.

RLIMIT_CORE 0 keeps the kernel from writing a core file. PR_SET_DUMPABLE 0 (prctl(2)) does so too where core_pattern pipes
to a program, and gives /proc/PID/mem, environ and maps to root alone, so that another process of the same user cannot read
them. Neither helps against root on this host, who is in the provider's trusted base (docs/limitations.md). An execve(2)
undoes the latter: whoever starts a program that holds secrets has it begin with `keep_secrets`, too.
"""

from __future__ import annotations

import ctypes
import resource
from typing import Final

from moorline.errors import Misconfigured

_PR_SET_DUMPABLE: Final = 4


def keep_secrets() -> None:
    """For the start of a process. Raises Misconfigured("process.dumpable") if the kernel will not."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        outcome = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (OSError, ValueError, AttributeError) as error:
        outcome, reason = -1, type(error).__name__
    else:
        reason = str(ctypes.get_errno())
    if outcome != 0:
        raise Misconfigured(
            "process.dumpable",
            "core dumps of this process cannot be switched off",
            got=reason,
            remedy="run it on Linux, where prctl is allowed",
        )
