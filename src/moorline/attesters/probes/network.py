"""The switch of this host, and what of it takes time to show (SEC009 5.2.9, 5.2.6)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.attesters.probes.tree import Tree
from moorline.policy.sec009.assessment import Observation

_NET: Final = "/sys/class/net"
CAPABILITIES: Final = ("net.switch.isolated", "net.capture.ratio", "cleanup.network")


def probe(tree: Tree) -> Iterator[Observation]:
    """Bridges of the kernel and whether each port is isolated. Open vSwitch is named, not read."""
    name = "net.switch.isolated"
    bridges = [one for one in tree.names(_NET) if tree.has(f"{_NET}/{one}/bridge")]
    ports = [(bridge, port) for bridge in bridges for port in tree.names(f"{_NET}/{bridge}/brif")]
    open_ports = [port for bridge, port in ports if tree.read(f"{_NET}/{bridge}/brif/{port}/isolated").text != "1"]
    if tree.has(f"{_NET}/ovs-system"):
        yield not_probed(
            name, "Open vSwitch keeps its rules in its own database", f"{_NET}/ovs-system: there", command="ovs-vsctl show"
        )
    elif not ports:
        yield not_met(
            name, "no bridge has ports: nothing is switched for functions", f"{_NET}: {len(bridges)} bridges, no port"
        )
    elif open_ports:
        yield not_met(name, f"ports that reach each other: {', '.join(open_ports[:8])}", f"{_NET}: {len(ports)} ports")
    else:
        yield met(name, f"{len(ports)} ports of {len(bridges)} bridges, all isolated", f"{_NET}: brif/*/isolated 1")
    yield not_probed(
        "net.capture.ratio",
        "a numbered stream has to pass the point of capture, which takes time",
        command="moor host probe capture --into HOST:PORT --out HOST:PORT",
    )
    yield not_probed(
        "cleanup.network",
        "that nothing is left is shown for a function that ended, when it ends",
        command="moor host probe clean-up --snapshot FILE before it starts, and --since FILE after it ended",
    )
