"""The short way of a request: for a route that is asked a thousand times a second, without the machinery of all the others.

A request takes it if it came whole in one read, its head is of the plainest kind, and its target is one that the service
answers this way. Everything else goes on to h11 and the application, which answer the same routes to the same effect: the
short way decides nothing, and what it does not understand it does not judge (RFC 9112 2.2: a head with a field that is not
listed here, transfer codings and `expect` among them, is never of the plainest kind).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

_HEAD: Final = re.compile(rb"POST (/[A-Za-z0-9/._~-]*) HTTP/1\.1\r\n((?:[A-Za-z-]+:[ \t]*[!-~][ -~]*\r\n){1,16})\r\n")
_FIELDS: Final = frozenset({b"host", b"content-length", b"content-type", b"accept", b"accept-encoding", b"user-agent"})
_KEEP: Final = (b"connection", b"keep-alive")
_MOST_DIGITS: Final = 7

Answering = Callable[[bytes], Awaitable[bytes]]
"""Takes the body and returns the body of the answer, or raises MoorlineError."""


@dataclass(frozen=True, slots=True)
class ShortWay:
    """Which targets a service answers this way: `find` names who answers a POST there, or None. Answers are `media_type`."""

    find: Callable[[str], Answering | None]
    media_type: str


def parse_whole(data: bytes) -> tuple[str, bytes] | None:
    """Target and body of the one request that `data` is, whole with nothing behind it; None if it is not such a one."""
    head = _HEAD.match(data)
    if head is None:
        return None
    length, hosts = None, 0
    for line in head[2].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length":
            digits = value.strip(b" \t")
            if length is not None or not digits.isdigit() or len(digits) > _MOST_DIGITS:
                return None
            length = int(digits)
        elif name == b"host":
            hosts += 1
        elif name not in _FIELDS and (name, value.strip(b" \t").lower()) != _KEEP:
            return None
    if hosts != 1 or length is None or len(data) - head.end() != length:
        return None
    return head[1].decode("ascii"), data[head.end() :]
