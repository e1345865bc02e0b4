"""Where randomness comes from (SEC009 5.2.11). Health and rate take time: `entropy_health` and `--slow`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import cpu_flags, met, not_met, not_probed, unread
from moorline.attesters.probes.tree import State, Tree
from moorline.policy.sec009.assessment import Observation

_CURRENT: Final = "/sys/class/misc/hw_random/rng_current"
_QUALITY: Final = "/sys/class/misc/hw_random/rng_quality"
SLOW: Final = "moor host assess --slow"
CAPABILITIES: Final = ("entropy.hw_source", "entropy.health", "entropy.rate", "entropy.guest_trusted")


def probe(tree: Tree) -> Iterator[Observation]:
    """The kernel's hardware source and the processor's own instruction."""
    current, quality = tree.read(_CURRENT), tree.read(_QUALITY)
    seeds = "rdseed" in cpu_flags(tree)
    evidence = (current.shown(), quality.shown(), f"/proc/cpuinfo: rdseed {'in' if seeds else 'not in'} flags")
    name = "entropy.hw_source"
    if current.ok and current.text not in ("", "none"):
        yield met(name, f"{current.text}, quality {quality.text or 'unknown'}{', RDSEED' if seeds else ''}", *evidence)
    elif seeds:
        yield met(name, "RDSEED of the processor", *evidence)
    elif current.state in (State.DENIED, State.ODD):
        yield unread(name, current)
    else:
        yield not_met(name, "no hardware source", *evidence)
    yield not_probed("entropy.health", "1,024 samples of the raw source and two health tests take time", command=SLOW)
    yield not_probed("entropy.rate", "measuring a rate takes time", command=SLOW)
    yield not_probed(
        "entropy.guest_trusted",
        "whether a function draws inside its enclave is shown by that function's own evidence, to the broker",
        command="moor evidence collect in the function, then moor evidence appraise elsewhere",
    )
