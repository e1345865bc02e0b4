"""What of the network a function leaves behind on its host: sockets, interfaces, namespaces, neighbours.

Only this network namespace is read, and the names of those that have one; what a switch or another host keeps is not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_SOCKETS: Final = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6")
_LISTS: Final = (("arp", Path("/proc/net/arp")),)
_NAMESPACES: Final = Path("/run/netns")
_CLOSED: Final = ("06", "07")
"""TIME_WAIT and CLOSE: states that end by themselves (include/net/tcp_states.h); an UDP socket unconnected is 07 too."""


@contextlib.contextmanager
def planted() -> Iterator[str]:
    """A socket of the probe's own that listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as own:
        own.bind(("127.0.0.1", 0))
        own.listen(1)
        yield f"tcp 127.0.0.1:{own.getsockname()[1]} 0.0.0.0:0"


def read() -> set[str]:
    """Every socket, neighbour, interface and named network namespace."""
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
