"""A token that another process owns, used over that process's socket (token.owner). The same port, the same errors."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from moorline.errors import Malformed, MoorlineError, Unavailable, from_problem
from moorline.hsm.token.calls import DESTROY, FRAME_CAP, Answer, Call
from moorline.hsm.token.owner import receive
from moorline.hsm.token.port import KeyFacts
from moorline.wire import schema
from moorline.wire.frames import frame

_KEPT: Final = 8
_ANSWER_S: Final = 30.0
_UNREPEATABLE: Final = frozenset({"advance", "generate_ec_key", "generate_wrapping_key", "import_mac_key", "agree"})


class RemoteToken:
    """A token behind an owner's door (port.Token). Thread-safe: connections are kept and shared.

    An owner that went away is Unavailable("token.owner_gone"); when it is back the next call finds it. A call that changes
    nothing is repeated once over a fresh connection, others are not: the caller cannot know whether they were done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: queue.LifoQueue[socket.socket] = queue.LifoQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The token can be used again afterwards."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def random(self, size: int) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="random", number=size)).data

    def generate_ec_key(self, label: str, *, derive: bool = False, recoverable: bool = False) -> bytes:
        """As the port says, for roles that the door lets be made."""
        flags = (*(("derive",) if derive else ()), *(("recoverable",) if recoverable else ()))
        return self._ask(Call(operation="generate_ec_key", label=label, flags=flags)).data

    def ec_point(self, label: str) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="ec_point", label=label)).data

    def ecdsa(self, label: str, digest: bytes) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="ecdsa", label=label, data=digest)).data

    def agree(self, label: str, peer_point: bytes, into: str) -> None:
        """As the port says."""
        self._ask(Call(operation="agree", label=label, data=peer_point, into=into))

    def generate_wrapping_key(self, label: str, *, recoverable: bool = False) -> None:
        """As the port says, for roles that the door lets be made."""
        self._ask(Call(operation="generate_wrapping_key", label=label, flags=("recoverable",) if recoverable else ()))

    def seal(self, label: str, plaintext: bytes, bound_to: bytes) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="seal", label=label, data=plaintext, bound_to=bound_to)).data

    def unseal(self, label: str, sealed: bytes, bound_to: bytes) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="unseal", label=label, data=sealed, bound_to=bound_to)).data

    def import_mac_key(self, label: str, value: bytes) -> None:
        """As the port says."""
        self._ask(Call(operation="import_mac_key", label=label, data=value))

    def mac(self, label: str, message: bytes) -> bytes:
        """As the port says."""
        return self._ask(Call(operation="mac", label=label, data=message)).data

    def has_secret(self, label: str) -> bool:
        """As the port says."""
        return bool(self._ask(Call(operation="has_secret", label=label)).number)

    def has_key(self, label: str) -> bool:
        """As the port says."""
        return bool(self._ask(Call(operation="has_key", label=label)).number)

    def destroy_secret(self, label: str) -> None:
        """As the port says."""
        self._ask(Call(operation="destroy_secret", label=label))

    def destroy_key(self, label: str) -> None:
        """As the port says."""
        self._ask(Call(operation="destroy_key", label=label))

    def destroy_granted(self, label: str, grant: bytes) -> None:
        """Destroy a long-lived key for which a quorum of custodians gave its word; the owner verifies it.

        `grant` is an encoded hsm.approvals.Grant. Raises `approval.*`, Refused("token.not_granted").
        """
        self._ask(Call(operation=DESTROY, label=label, data=grant))

    def inspect(self) -> tuple[KeyFacts, ...]:
        """As the port says."""
        return self._ask(Call(operation="inspect")).facts

    def counter(self, label: str) -> int:
        """As the port says."""
        return self._ask(Call(operation="counter", label=label)).number

    def advance(self, label: str) -> int:
        """As the port says."""
        return self._ask(Call(operation="advance", label=label)).number

    # -- the socket -----------------------------------------------------------------------------------------------------

    def _ask(self, call: Call) -> Answer:
        data = frame(schema.encode(call))
        try:
            connection, fresh = self._idle.get_nowait(), False
        except queue.Empty:
            connection, fresh = self._connect(), True
        try:
            body = _exchange(connection, data)
        except (OSError, Malformed):
            connection.close()
            self.close()  # the others lead to the same owner
            if fresh or call.operation in _UNREPEATABLE:
                raise self._gone() from None
            connection = self._connect()
            try:
                body = _exchange(connection, data)
            except (OSError, Malformed):
                connection.close()
                raise self._gone() from None
        if self._idle.qsize() < _KEPT:
            self._idle.put(connection)
        else:
            connection.close()
        return _answer(body)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_ANSWER_S)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise self._gone() from None
        return connection

    def _gone(self) -> Unavailable:
        return Unavailable(
            "token.owner_gone",
            "the process that owns the token does not answer",
            expected=self._path,
            remedy="start it: moor hsm serve; it answers processes of its own user only",
        )


def _exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    body = receive(connection)
    if body is None:
        raise OSError
    return body


def _answer(body: bytes) -> Answer:
    answer = schema.decode(Answer, body, max_bytes=FRAME_CAP)
    if answer.problem is not None:
        raise _problem(answer.problem)
    return answer


def _problem(text: str) -> MoorlineError:
    try:
        return from_problem(json.loads(text))
    except ValueError:
        return from_problem(None)
