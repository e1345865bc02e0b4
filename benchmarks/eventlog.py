"""Boot logs of 120 events parsed and replayed a second, every log new, against its bare hashes in the same run.

The log is made by the firmware simulator's writer: a boot with 120 events, its variables and its real sizes of payload. A real
log of ../shared/vectors is measured beside it where that is present. Keylime reads boot logs with the external program
tpm2_eventlog, one process a log; where that is not installed, it is skipped by name.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moorline.evidence import eventlog as log
from moorline.evidence.tpm_structures import ALG_SHA256
from moorline.simulators import firmware
from moorline.verification.eventlog import replay, verify_boot

EVENTS, EACH, ROUNDS = 120, 200, 7
REAL = Path(__file__).parents[1].parent / "shared" / "vectors" / "eventlog" / "gce-ubuntu-2404-amd-sevsnp" / "eventlog.bin"


def made() -> bytes:
    events = list(firmware.boot_events(firmware.GOOD))
    for index in range(EVENTS - len(events)):
        data = b"grub_cmd: set variable_%d=value of a line in grub.cfg\x00" % index
        events.append(log.Event(8, log.EV_IPL, {ALG_SHA256: hashlib.sha256(data).digest()}, data))
    return firmware.serialize_log(tuple(events))


def whole(data: bytes) -> Callable[[], object]:
    values = replay(log.parse_event_log(data), ALG_SHA256)
    pcrs = sorted(values)
    return lambda: verify_boot(log.parse_event_log(bytes(bytearray(data))), bank=ALG_SHA256, quoted=values, pcrs=pcrs)


def bare(data: bytes) -> Callable[[], None]:
    digests = [one.digests[ALG_SHA256] for one in log.parse_event_log(data).events if one.kind != log.EV_NO_ACTION]

    def extends() -> None:
        value = bytes(32)
        for digest in digests:
            value = hashlib.sha256(value + digest).digest()

    return extends


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(EACH):
        call()
    return time.perf_counter() - started


def external(data: bytes) -> Callable[[], object] | None:
    program = shutil.which("tpm2_eventlog")
    if program is None:
        print("skipped: keylime==7.14.0 reads boot logs with tpm2_eventlog, which is not installed here")
        return None
    path = Path(tempfile.mkdtemp()) / "log"
    path.write_bytes(data)
    return lambda: subprocess.run([program, str(path)], check=True, capture_output=True)


def measure(name: str, data: bytes, *, peer: bool) -> None:
    count = len(log.parse_event_log(data).events)
    ours, hashes = whole(data), bare(data)
    theirs = external(data) if peer else None
    times: dict[str, list[float]] = {"ours": [], "bare": [], "peer": []}
    for _ in range(ROUNDS):
        times["ours"].append(seconds(ours))
        times["bare"].append(seconds(hashes))
        if theirs is not None:
            started = time.perf_counter()
            theirs()
            times["peer"].append((time.perf_counter() - started) * EACH)
    ours_rate, bare_rate = (EACH / statistics.median(times[one]) for one in ("ours", "bare"))
    print(
        f"{f'{name}, {count} events, {len(data)} bytes':<56}{ours_rate:>9,.0f}/s   {ours_rate / bare_rate:.2f} of bare extends"
    )
    if times["peer"]:
        rate = EACH / statistics.median(times["peer"])
        print(f"{'tpm2_eventlog, as keylime calls it':<56}{rate:>9,.0f}/s   ours {ours_rate / rate:.0f} x")


def main() -> int:
    measure("boot log parsed, replayed and read", made(), peer=False)
    if REAL.is_file():
        measure("a real one (Ubuntu 24.04, two banks)", REAL.read_bytes(), peer=True)
    else:
        print("skipped: ../shared/vectors is not here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
