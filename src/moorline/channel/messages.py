"""Frame bodies of both channels: `CBOR([kind, message])`, and errors as they cross a connection.

`unpack` takes exactly what `pack` makes and only the kinds the caller is ready for now. A `Problem` is always understood:
it is raised as the error the peer reported, which is a statement of the peer and nothing more.
"""

from __future__ import annotations

import math
from typing import Final, TypeVar

from moorline.errors import Malformed, MoorlineError, Refused, from_problem
from moorline.wire import cbor, schema
from moorline.wire.session import Problem

T = TypeVar("T")

PROBLEM_CAP: Final = 4096
RECORD_CAP: Final = (1 << 20) + 1024
LAST_WORD: Final = (1 << 32) - 1
"""The id of the reply that ends an HPKE-only session; no call has it."""
_PARTS: Final = 2


def pack(message: object) -> bytes:
    """The frame body of a message dataclass; its kind is the class name in lower case."""
    return _head(type(message)) + schema.encode(message)


def _head(kind: type) -> bytes:
    """What the body of every message of this kind begins with: a list of two, of which the first is the name."""
    return _HEADS.get(kind) or _HEADS.setdefault(kind, b"\x82" + cbor.encode(kind.__name__.lower()))


_HEADS: Final[dict[type, bytes]] = {}  # one entry a kind of message, of which the code has so many


def unpack(kind: type[T], body: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> T:
    """The one kind of message awaited now. Untrusted input.

    Raises Malformed (`cbor.*`, `message.*`, `session.malformed`, `session.unexpected_message`), or whatever error the
    peer reported in a `Problem`.
    """
    # First as what it almost always is. Whatever is odd about it is read again, slowly, and judged there.
    head = _head(kind)
    if body.startswith(head) and len(body) <= max_bytes:
        found = schema.usual(kind, body[len(head) :], max_bytes=max_bytes)
        if found is not None:
            return found
    name, item = unpack_any(body, max_bytes=max_bytes)
    if name == kind.__name__.lower():
        return schema.from_item(kind, item)
    if name == "problem":
        raise reported(schema.from_item(Problem, item).problem)
    raise Malformed("session.unexpected_message", "this message has no place here", expected=kind.__name__.lower(), got=name)


def require_no_problem(body: bytes) -> None:
    """Where nobody vouches for a `Problem`, it is not the broker's word: raises Refused("session.unsigned_problem").

    `got` is what it says. It ends the attempt, and no function gives up its identity for it.
    """
    name, item = unpack_any(body)
    if name == "problem":
        said = reported(schema.from_item(Problem, item).problem)
        raise Refused(
            "session.unsigned_problem",
            "the session was refused by the broker, or by somebody on the way to it",
            got=f"{said.code}: {said.says}",
            remedy="see the broker's log",
        )


def unpack_any(body: bytes, *, max_bytes: int = cbor.MAX_BYTES) -> tuple[str, object]:
    """Kind and content of a frame body, the content not yet converted. Raises Malformed (`cbor.*`, `session.malformed`)."""
    item = cbor.decode(body, max_bytes=max_bytes)
    if not (isinstance(item, list) and len(item) == _PARTS and isinstance(item[0], str)):
        raise Malformed("session.malformed", "the frame is not a message", expected="[kind, message]")
    return item[0], item[1]


def encode_problem(error: MoorlineError) -> bytes:
    """An error as bytes, at most 4096 of them: what does not fit is left out, the code never."""
    problem = error.as_problem()
    plain: dict[str, str | int] = {
        name: value if isinstance(value, str) else math.ceil(value) for name, value in problem.items()
    }
    for name in ("", "got", "expected", "remedy"):
        plain.pop(name, None)
        encoded = cbor.encode(plain)
        if len(encoded) <= PROBLEM_CAP:
            return encoded
    return cbor.encode({"kind": plain["kind"], "code": plain["code"], "says": "the reason is too long to send"})


def reported(problem: bytes) -> MoorlineError:
    """The error that these bytes report; `Malformed("peer.problem_malformed")` if they report none."""
    try:
        return from_problem(cbor.decode(problem, max_bytes=PROBLEM_CAP))
    except Malformed as error:
        return Malformed("peer.problem_malformed", "the peer reported an error that cannot be read", got=error.code)


def problem_frame(error: MoorlineError) -> bytes:
    """The frame body that tells the peer why the connection ends."""
    return pack(Problem(problem=encode_problem(error)))
