"""What of the network a function leaves behind on its host (SEC009 5.2.8): sockets, interfaces, namespaces, associations.

`held` is taken before the function starts, and again after it ended; what is there then and was not before is a leftover.
Each time a socket of the probe's own has to be found in it (the positive control): a view that misses it misses others too.
A busy host has new things of its own: `about` says which count, by an address, a port or a name.
Only this network namespace is read, and the names of those that have one; what a switch or another host keeps is not.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.errors import Unavailable
from moorline.policy.sec009.assessment import Observation

CAPABILITY: Final = "cleanup.network"
_SOCKETS: Final = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6")
_LISTS: Final = (("arp", Path("/proc/net/arp")),)
_NAMESPACES: Final = Path("/run/netns")
_CLOSED: Final = ("06", "07")
"""TIME_WAIT and CLOSE: states that end by themselves (include/net/tcp_states.h); an UDP socket unconnected is 07 too."""


def held() -> frozenset[str]:
    """What is there now, one line a thing. Raises Unavailable("leftovers.control") if the probe's own socket is not seen."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as own:
        own.bind(("127.0.0.1", 0))
        own.listen(1)
        mine = f"tcp 127.0.0.1:{own.getsockname()[1]} 0.0.0.0:0"
        found = _read()
    if mine not in found:
        raise Unavailable(
            "leftovers.control",
            "the probe does not see its own socket",
            remedy="run it on the host, in its first network namespace",
        )
    return frozenset(found - {mine})


def probe(before: Collection[str], about: Collection[str] = ()) -> Observation:
    """What there is now and was not before, as an observation; of all of it, or of what names something of `about`."""
    new = held() - frozenset(before)
    left = sorted(one for one in new if not about or any(name in one for name in about))
    if left:
        said = "; ".join(left[:8])
        return not_met(CAPABILITY, f"{len(left)} things are left: {said}", f"before: {len(before)} things")
    if not before:
        return not_probed(CAPABILITY, "nothing was there before: this is no snapshot")
    return met(CAPABILITY, "nothing is left", f"before: {len(before)} things; its own socket was found each time")


def _read() -> set[str]:
    found: set[str] = set()
    for kind in _SOCKETS:
        for fields in _rows(Path(f"/proc/net/{kind}")):
            if len(fields) > 3 and (kind.startswith("udp") or fields[3] not in _CLOSED):
                found.add(f"{kind} {_shown(fields[1])} {_shown(fields[2])}")
    for name, path in _LISTS:
        found |= {f"{name} {' '.join(fields[:4])}" for fields in _rows(path)}
    for name, folder in (("interface", Path("/sys/class/net")), ("namespace", _NAMESPACES)):
        if folder.is_dir():
            found |= {f"{name} {one.name}" for one in folder.iterdir()}
    return found


def _shown(text: str) -> str:
    """Address and port of a line of /proc/net: words of four bytes in the order of this machine."""
    address, _, port = text.partition(":")
    try:
        words = bytes.fromhex(address)
        raw = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
        return f"{ipaddress.ip_address(raw)}:{int(port, 16)}"
    except ValueError:
        return text


def _rows(path: Path) -> list[list[str]]:
    """The lines of a table below its head; none where the kernel has no such table."""
    try:
        return [line.split() for line in path.read_text("utf-8", "replace").splitlines()[1:]]
    except OSError:
        return []
