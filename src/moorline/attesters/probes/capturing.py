"""Counts what a point of capture delivers: a numbered stream of datagrams goes in, and its copies come out here.

The sender and the counter are one process, so nobody's clock matters: `into` is an address whose traffic the point of
capture takes (a function's, a mirrored port's), `out` is where it delivers its copies. A datagram is SIZE bytes: a random
run, its number, and padding; what is of another run is not counted.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

from moorline.attesters.probes.saying import met, not_met, not_probed
from moorline.errors import Unavailable
from moorline.policy.sec009 import capture
from moorline.policy.sec009.assessment import Observation

CAPABILITY: Final = "net.capture.ratio"
SIZE: Final = 256
_HEAD: Final = struct.Struct(">16sQ")
_GAPS: Final = 8
_QUIET_S: Final = 1.0
"""Nothing came for so long after the last was sent: nothing more will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What is sent: `count` numbers, `rate` datagrams a second."""

    count: int = 5000
    rate: float = 2000.0


def probe(into: tuple[str, int], out: tuple[str, int], stream: Stream) -> Observation:
    """The observation of one run. Raises Unavailable("capture.address") where an address cannot be used."""
    run = os.urandom(16)
    left_out = capture.gaps(stream.count, _GAPS, run[0])
    try:
        with _datagrams() as counter, _datagrams() as sender:
            counter.bind(out)
            counter.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            received = _stream(sender, counter, into, run, stream, left_out)
    except OSError as error:
        raise Unavailable(
            "capture.address", "the stream cannot be sent or counted", got=error, remedy="give addresses of this machine"
        ) from None
    return judge(capture.appraise(received, count=stream.count, left_out=left_out))


def judge(seen: capture.Capture) -> Observation:
    """What a count says of the capability."""
    said = f"{seen.captured} of {seen.sent} captured, {seen.repeated} twice, {seen.late} late, {_GAPS} numbers left out"
    value = f"{seen.ratio:.6f}"
    if not seen.control_held:
        return not_probed(
            CAPABILITY, "the count did not find the numbers that were never sent: it counts something else", said
        )
    if seen.captured == 0:
        return not_probed(CAPABILITY, "nothing came out: is this where the point of capture delivers?", said)
    if seen.lost:
        first = ", ".join(map(str, seen.lost[:5]))
        return not_met(CAPABILITY, f"{len(seen.lost)} datagrams were lost, first {first}", said, value=value)
    return met(CAPABILITY, value, said)


def _datagrams() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _stream(
    sender: socket.socket,
    counter: socket.socket,
    into: tuple[str, int],
    run: bytes,
    stream: Stream,
    left_out: frozenset[int],
) -> list[int]:
    counter.settimeout(0)
    received: list[int] = []
    began = time.monotonic()
    for number in range(stream.count):
        if number not in left_out:
            sender.sendto(_HEAD.pack(run, number).ljust(SIZE, b"\0"), into)
        _drain(counter, run, received)
        wait = began + number / stream.rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)
    last = time.monotonic()
    while time.monotonic() - last < _QUIET_S:
        before = len(received)
        _drain(counter, run, received)
        if len(received) > before:
            last = time.monotonic()
        time.sleep(0.01)
    return received


def _drain(counter: socket.socket, run: bytes, received: list[int]) -> None:
    while True:
        try:
            data = counter.recv(SIZE * 2)
        except BlockingIOError:
            return
        if len(data) == SIZE and data[:16] == run:
            received.append(_HEAD.unpack_from(data)[1])
