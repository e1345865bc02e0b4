"""The one process that has a token open, and its doors: unix sockets at which other processes use keys by role.

SoftHSM takes no locks between processes (FINDINGS.md), so a token directory has one owner and everybody else asks it. A door
belongs to one token: what comes through it reaches no other. Who may come through is told by the kernel (SO_PEERCRED), not
by what the peer says. A provider's broker processes share a door; each tenant of a virtual HSM has its own (hsm.tenants),
and all of them enter the fair gate in front of the module.

1. A peer of another user is closed without an answer.
2. A call is parsed strictly, and must be one that the door's roles offer.
3. It waits for its turn among all tenants, then is done; the answer is the result or a problem, never a Python error.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moorline.errors import Malformed, Misconfigured, MoorlineError, Refused, Unavailable
from moorline.hsm.fairness import FairGate
from moorline.hsm.token.calls import BROKER_ROLES, DESTROY, FRAME_CAP, RANDOM_CAP, Answer, Call, Roles, require_allowed
from moorline.hsm.token.port import KeyFacts, Token
from moorline.wire import schema
from moorline.wire.frames import HEADER, frame

_PEERS_CAP: Final = 64
_BACKLOG: Final = 64
_IDLE_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end of a unix socket, as the kernel says."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A socket, who may use it, and which token and roles are behind it. `before` may refuse a call (quotas, suspension)."""

    name: str
    path: Path
    token: Token
    uids: frozenset[int]
    roles: Roles = BROKER_ROLES
    weight: int = 1
    before: Callable[[Call], None] = field(default=lambda _: None)
    after: Callable[[Call, Peer, str | None], None] = field(default=lambda _call, _peer, _code: None)
    granted: Callable[[Call], None] = field(default=lambda _: _no_grants())
    """Verifies that custodians granted the destruction of a key; raises if not. Without it nothing is granted."""


class Owner:
    """Serves doors until closed. Each connection has a thread; the fair gate bounds how many are inside the module."""

    def __init__(self, *, places: int = 4, at_most: int = 256) -> None:
        self.gate = FairGate(places, at_most=at_most)
        self._listening: dict[str, socket.socket] = {}
        self._peers: dict[str, set[socket.socket]] = {}
        self._lock = threading.Lock()

    def open(self, door: Door) -> None:
        """Listen at a door; its socket (0600) replaces one that a dead owner left. Raises Misconfigured("owner.*")."""
        door.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_dead(door.path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(door.path))
        except OSError as error:
            listening.close()
            raise Misconfigured(
                "owner.socket", "the owner's socket cannot be made", expected=door.path, got=error.strerror
            ) from None
        # Before anybody may connect. Processes of other users are told apart by `uids`, which the mode cannot do.
        door.path.chmod(0o600 if door.uids == {os.geteuid()} else 0o666)
        listening.listen(_BACKLOG)
        with self._lock:
            self._listening[door.name] = listening
            self._peers[door.name] = set()
        threading.Thread(target=self._accept, args=(door, listening), name=f"door-{door.name}", daemon=True).start()

    def shut(self, name: str) -> None:
        """Close a door and cut off whoever came through it."""
        with self._lock:
            listening = self._listening.pop(name, None)
            peers = self._peers.pop(name, set())
        if listening is not None:
            path = Path(listening.getsockname())
            _hang_up(listening)
            path.unlink(missing_ok=True)
        for peer in peers:
            _hang_up(peer)

    def close(self) -> None:
        """Shut all doors. Tokens are closed by whoever opened them."""
        for name in list(self._listening):
            self.shut(name)

    def _accept(self, door: Door, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return  # shut
            with self._lock:
                peers = self._peers.get(door.name)
                room = peers is not None and len(peers) < _PEERS_CAP
                if room and peers is not None:
                    peers.add(connection)
            if not room:
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(door, connection), daemon=True).start()

    def _serve(self, door: Door, connection: socket.socket) -> None:
        try:
            peer = peer_of(connection)
            if peer.uid not in door.uids:
                return
            connection.settimeout(_IDLE_S)
            while (data := receive(connection)) is not None:
                connection.sendall(frame(schema.encode(self._answer(door, peer, data))))
        except (OSError, MoorlineError):
            return  # a peer that went away, or does not speak this language
        finally:
            _hang_up(connection)
            with self._lock:
                self._peers.get(door.name, set()).discard(connection)

    def _answer(self, door: Door, peer: Peer, data: bytes) -> Answer:
        call = schema.decode(Call, data, max_bytes=FRAME_CAP)
        try:
            require_allowed(call, door.roles)
            if call.operation == DESTROY:
                door.granted(call)
            door.before(call)  # outside the gate: who waits for its own quota must not hold a place meanwhile
            with self.gate.place(door.name, weight=door.weight):
                answer = perform(door.token, call)
        except MoorlineError as error:
            door.after(call, peer, error.code)
            return Answer(problem=json.dumps(error.as_problem()))
        except Exception as error:  # a defect must not end the door for everybody, nor tell a peer what is inside
            door.after(call, peer, "owner.defect")
            return Answer(
                problem=json.dumps(Unavailable("owner.defect", "the owner failed", got=type(error).__name__).as_problem())
            )
        door.after(call, peer, None)
        return answer


def perform(token: Token, call: Call) -> Answer:
    """Do one call. Raises what the token raises, and Refused("token.not_offered")."""
    work = _PERFORMS.get(call.operation)
    if work is None:
        raise Refused("token.not_offered", "there is no such operation", got=call.operation)
    done = work(token, call)
    if isinstance(done, bytes):
        return Answer(data=done)
    if isinstance(done, int):
        return Answer(number=int(done))
    return Answer(facts=done or ())


def _random(token: Token, call: Call) -> bytes:
    if not 0 < call.number <= RANDOM_CAP:
        raise Malformed("owner.call", "so many random bytes are not given out", expected=f"1..{RANDOM_CAP}", got=call.number)
    return token.random(call.number)


def _destroyed(token: Token, label: str) -> None:
    token.destroy_secret(label)
    token.destroy_key(label)


def _no_grants() -> None:
    raise Refused(
        "token.not_granted",
        "this owner knows no custodians; no long-lived key is destroyed through it",
        remedy="set custody, provider and hsm in token.toml",
    )


_PERFORMS: Final[Mapping[str, Callable[[Token, Call], bytes | int | tuple[KeyFacts, ...] | None]]] = {
    "random": _random,
    "inspect": lambda token, _: token.inspect(),
    "generate_ec_key": lambda token, call: token.generate_ec_key(
        call.label, derive="derive" in call.flags, recoverable="recoverable" in call.flags
    ),
    "generate_wrapping_key": lambda token, call: token.generate_wrapping_key(
        call.label, recoverable="recoverable" in call.flags
    ),
    DESTROY: lambda token, call: _destroyed(token, call.label),
    "import_mac_key": lambda token, call: token.import_mac_key(call.label, call.data),
    "agree": lambda token, call: token.agree(call.label, call.data, call.into),
    "destroy_secret": lambda token, call: token.destroy_secret(call.label),
    "destroy_key": lambda token, call: token.destroy_key(call.label),
    "ec_point": lambda token, call: token.ec_point(call.label),
    "ecdsa": lambda token, call: token.ecdsa(call.label, call.data),
    "mac": lambda token, call: token.mac(call.label, call.data),
    "seal": lambda token, call: token.seal(call.label, call.data, call.bound_to),
    "unseal": lambda token, call: token.unseal(call.label, call.data, call.bound_to),
    "has_secret": lambda token, call: token.has_secret(call.label),
    "has_key": lambda token, call: token.has_key(call.label),
    "counter": lambda token, call: token.counter(call.label),
    "advance": lambda token, call: token.advance(call.label),
}


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end, as the kernel says (unix(7), SO_PEERCRED)."""
    layout = struct.Struct("3i")
    pid, uid, gid = layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return Peer(pid=pid, uid=uid, gid=gid)


def receive(connection: socket.socket) -> bytes | None:
    """One frame, or None where the peer ended between frames. Raises Malformed or OSError."""
    header = _exactly(connection, HEADER)
    if header is None:
        return None
    size = int.from_bytes(header, "big")
    if size > FRAME_CAP:
        raise Malformed("frame.too_large", "the peer announced too large a frame", expected=f"<= {FRAME_CAP}", got=size)
    body = _exactly(connection, size)
    if body is None:
        raise Malformed("frame.truncated", "the peer closed the connection inside a frame")
    return body


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        more = connection.recv(size - len(found))
        if not more:
            return None
        found += more
    return bytes(found)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _remove_dead(path: Path) -> None:
    """Remove the socket of an owner that died. Raises Misconfigured("owner.running") if one answers."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise Misconfigured(
        "owner.running", "another process owns this token already", got=path, remedy="ask it, or stop it first"
    )
