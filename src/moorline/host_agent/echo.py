"""Round trips: a host that signs nonces as fast as it can, and a landmark that times them (policy.distance).

One UDP datagram there (magic and a nonce of 32 bytes), one back (magic, the nonce's signature). The host signs with an
Ed25519 key of its own, since a TPM takes milliseconds and a millisecond is 150 km. The landmark stops its clock when the
datagram is there and verifies afterwards; a wrong answer counts for nothing. The answer is shorter than the question, so
that the host is no amplifier.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from moorline.digest import domain
from moorline.errors import Unavailable
from moorline.wire import keys

_ASK: Final = b"moor-echo?1"
_ANSWER: Final = b"moor-echo!1"
_NONCE: Final = 32
_PAD: Final = 128
"""Bytes of a question; an answer (magic and 64) is shorter."""
_CONTEXT: Final = domain("distance-echo")


def echo_key_digest(key: ed25519.Ed25519PublicKey) -> bytes:
    """What a measurement names the answering key by: SHA-256 of its SubjectPublicKeyInfo."""
    return hashlib.sha256(keys.public_bytes(key)).digest()


def answer(listening: socket.socket, key: ed25519.Ed25519PrivateKey, *, until: Callable[[], bool]) -> int:
    """Answer questions on a bound UDP socket until `until` says so (asked twice a second); how many were answered."""
    listening.settimeout(0.5)
    answered = 0
    while not until():
        try:
            data, peer = listening.recvfrom(_PAD + 1)
            if len(data) != _PAD or not data.startswith(_ASK):
                continue
            listening.sendto(_ANSWER + key.sign(_CONTEXT + data[len(_ASK) : len(_ASK) + _NONCE]), peer)
            answered += 1
        except OSError:  # a timeout is one, and so is a peer that went away
            continue
    return answered


def round_trip_ns(address: tuple[str, int], key: ed25519.Ed25519PublicKey, *, tries: int, wait_s: float = 1.0) -> int:
    """The shortest round trip in which the host answered with its key. Raises Unavailable("distance.no_answer")."""
    best: int | None = None
    family, _, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect(resolved)
        for _ in range(tries):
            took = _asked(asking, key, wait_s)
            best = took if best is None or (took is not None and took < best) else best
    if best is None:
        raise Unavailable(
            "distance.no_answer", "the host does not answer with this key", got=f"{address[0]}:{address[1]}",
            remedy="moor host locate answer, on the host; and let the datagrams pass",
        )  # fmt: skip
    return best


def _asked(asking: socket.socket, key: ed25519.Ed25519PublicKey, wait_s: float) -> int | None:
    nonce = secrets.token_bytes(_NONCE)
    question = (_ASK + nonce).ljust(_PAD, b"\x00")
    begun = time.monotonic_ns()
    end = begun + int(wait_s * 1e9)
    try:
        asking.send(question)
        while (left := end - time.monotonic_ns()) > 0:
            asking.settimeout(left / 1e9)
            data = asking.recv(_PAD + 1)
            took = time.monotonic_ns() - begun
            if data.startswith(_ANSWER):
                try:
                    key.verify(data[len(_ANSWER) :], _CONTEXT + nonce)
                except InvalidSignature:
                    continue  # late, or somebody else's: the right one may still come
                return took
    except OSError:  # a timeout is one
        return None
    return None
