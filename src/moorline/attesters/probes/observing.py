"""An observer that tries to tell use from idleness by what everybody on this host can read (SEC009 5.2.5, 6.14).

1. Control: a load of this probe's own is put on the channel in windows drawn by lot. An observer that cannot tell even that
   is blind here, and says nothing about anybody.
2. Test: in windows drawn by lot the function is used, by a command that the operator gives (`use`). Concealed is what the
   observer of the control cannot tell from idleness, in windows enough to tell a plain advantage, and only if the control
   is still told afterwards.
3. Without such a command, the control is the answer: what is run here unconcealed is seen, so nothing on this host conceals.

The observer reads counters of the whole machine. Others who work on it meanwhile hide use from it and make it blind; an
attacker with better eyes (power, cache timing) sees more than it does.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.policy.sec009.assessment import Observation
from moorline.policy.sec009.observer import Told, tell_apart

_SETTLE_S: Final = 0.05
_NET: Final = Path("/sys/class/net")

_BURN: Final = "while True: pass"
_TOUCH: Final = "import time\nheld = bytearray(256 << 20)\nheld[::4096] = b'x' * len(held[::4096])\ntime.sleep(60)"
_WRITE: Final = (
    "import os, sys\nfile = os.open(sys.argv[1], os.O_WRONLY)\nwhile True:\n"
    "    os.pwrite(file, os.urandom(1 << 20), 0)\n    os.fdatasync(file)"
)
_SEND: Final = (
    "import socket, sys\nto = ('127.0.0.1', int(sys.argv[1]))\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "while True: s.sendto(bytes(1024), to)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How often the observer looks: `count` windows of each kind, `seconds` long."""

    count: int = 24
    seconds: float = 0.25


def cpu() -> float:
    """Jiffies that any processor was busy."""
    fields = [int(one) for one in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]]
    return float(sum(fields) - fields[3] - fields[4])


def ram() -> float:
    """KiB in use; a level, not a counter."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return -float(line.split()[1])
    raise OSError(0, "no MemAvailable")


def storage() -> float:
    """Sectors read or written by any disk."""
    rows = [line.split() for line in Path("/proc/diskstats").read_text("ascii").splitlines()]
    return float(sum(int(row[5]) + int(row[9]) for row in rows))


def net() -> float:
    """Bytes sent or received by any interface."""
    names = ("rx_bytes", "tx_bytes")
    return float(sum(int((one / "statistics" / name).read_text("ascii")) for one in _NET.iterdir() for name in names))


CHANNELS: Final[dict[str, Callable[[], float]]] = {"cpu": cpu, "ram": ram, "storage": storage, "net": net}
_LEVELS: Final = frozenset({"ram"})


def probe(channel: str, use: tuple[str, ...], windows: Windows) -> Observation:
    """Run control and test on one channel; raises OSError where its counters cannot be read."""
    name, read = f"conceal.{channel}", CHANNELS[channel]
    control = _control(channel, read, windows)
    said = f"control, a load of this probe: {_shown(control)}"
    if not control.apart:
        return not_probed(name, "the observer does not see even this probe's own load: it is blind on this host", said)
    if not use:
        return not_met(name, "an observer tells a load from idleness: nothing here conceals it", said)
    tested = _observe(channel, read, use, windows)
    seen = f"{' '.join(use)}: {_shown(tested)}"
    if tested.apart:
        return not_met(name, "an observer tells the use from idleness", said, seen, value=f"{tested.advantage:.2f}")
    if not tested.keen:
        return not_probed(name, "too few windows to say that nothing is seen: look at more", said, seen)
    after = _control(channel, read, windows)  # others may have begun to work meanwhile, and hide what is tested
    said = f"{said}; again: {_shown(after)}"
    if not after.apart:
        return not_probed(name, "the observer does not see this probe's own load any more: it became blind", said, seen)
    return met(name, f"advantage {tested.advantage:.2f}, unseen below {tested.blind_below:.2f}", said, seen)


def _control(channel: str, read: Callable[[], float], windows: Windows) -> Told:
    with _own_load(channel) as load:
        return _observe(channel, read, load, windows)


def _shown(told: Told) -> str:
    return f"advantage {told.advantage:.2f}, by accident {told.chance:.3g}, blind below {told.blind_below:.2f}"


def _observe(channel: str, read: Callable[[], float], load: tuple[str, ...], windows: Windows) -> Told:
    order = [False, True] * windows.count
    random.SystemRandom().shuffle(order)
    seen: dict[bool, list[float]] = {False: [], True: []}
    for used in order:
        with _running(load) if used else contextlib.nullcontext():
            time.sleep(_SETTLE_S)
            before = 0.0 if channel in _LEVELS else read()
            time.sleep(windows.seconds)
            seen[used].append(read() - before)
    return tell_apart(seen[False], seen[True])


@contextlib.contextmanager
def _running(words: tuple[str, ...]) -> Iterator[None]:
    """A command and what it starts, for one window."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _own_load(channel: str) -> Iterator[tuple[str, ...]]:
    """The probe's own load on a channel, as a command."""
    python = (sys.executable, "-I", "-S", "-c")
    if channel == "storage":
        with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
            file.truncate(1 << 20)
            yield (*python, _WRITE, file.name)
    elif channel == "net":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
            sink.bind(("127.0.0.1", 0))
            yield (*python, _SEND, str(sink.getsockname()[1]))
    else:
        yield (*python, {"cpu": _BURN, "ram": _TOUCH}[channel])
