"""Probes that take seconds, run by `moor host assess --slow` only: the rate and the health of the entropy source.

The hardware source of the kernel hands out conditioned bytes as a rule; the health tests of SP 800-90B are about raw noise.
So they are met only over samples that the operator says are raw (`noise`); over the kernel's device a failure counts, and a
pass is `not_probed` with what was seen.
"""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation
from moorline.policy.sec009.noise import START_UP, Health, appraise, control

DEVICE: Final = "/dev/hwrng"
_DEADLINE_S: Final = 10.0
_BLOCK: Final = 16
_CLAIM: Final = 1.0
"""Bits of entropy claimed for a byte: the lowest usual claim, so the widest cut-offs (31 and 325)."""


def probe(tree: Tree, noise: Path | None) -> Iterator[Observation]:
    """Rate and health, from the kernel's device or from `noise`."""
    source = Path(DEVICE) if noise is None else noise
    if noise is None and not tree.live:
        for name in ("entropy.rate", "entropy.health"):
            yield not_probed(name, "the device is asked on the machine itself, or samples are given with --noise")
        return
    try:
        samples, took, worst = _samples(source)
    except OSError as error:
        for name in ("entropy.rate", "entropy.health"):
            yield not_probed(name, f"{source}: {(error.strerror or 'cannot be read').lower()}")
        return
    rate = f"{len(samples) / max(took, 1e-6):.0f} bytes/s, p99 {worst * 1000:.2f} ms for {_BLOCK} bytes"
    if noise is not None:
        yield not_probed("entropy.rate", "samples from a file have no rate")
    elif len(samples) < START_UP:
        yield not_met("entropy.rate", f"{len(samples)} bytes in {took:.1f} s", f"{source}: {rate}", value=rate)
    else:
        yield met("entropy.rate", rate, f"{source}: {len(samples)} bytes read")
    yield _health(source, appraise(samples, entropy=_CLAIM), raw=noise is not None)


def _health(source: Path, seen: Health, *, raw: bool) -> Observation:
    said = (
        f"{source}: {seen.samples} samples, repetition {seen.repetition} of {seen.repetition_cutoff}, "
        f"proportion {seen.proportion} of {seen.proportion_cutoff}"
    )
    if not control():
        return not_probed("entropy.health", "the tests do not find a source that is stuck or biased on purpose", said)
    if not seen.healthy:
        return not_met("entropy.health", "a health test of SP 800-90B failed, or there were too few samples", said)
    if not raw:
        return not_probed(
            "entropy.health", "the tests pass, over conditioned bytes; raw noise is given with --noise FILE", said
        )
    return met("entropy.health", "repetition and proportion tests pass over samples said to be raw", said)


def _samples(source: Path) -> tuple[bytes, float, float]:
    """Up to START_UP * 4 bytes, the seconds it took, and the 99th percentile of a read of 16 bytes."""
    handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(handle).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
            raise OSError(0, "is neither a file nor a device")
        data, times, start = b"", [], time.monotonic()
        while len(data) < START_UP * 4 and time.monotonic() - start < _DEADLINE_S:
            begun = time.monotonic()
            select.select([handle], [], [], _DEADLINE_S)
            try:
                part = os.read(handle, _BLOCK)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            if not part:
                break
            data += part
            times.append(time.monotonic() - begun)
        worst = sorted(times)[int(len(times) * 0.99)] if times else 0.0
        return data, time.monotonic() - start, worst
    finally:
        os.close(handle)
