"""Messages of the device channel, PFS profile (PROTOCOLS.md 7; docs/spec/device-channel.md), inside mutual TLS 1.3.

One frame (wire.frames) a message, `CBOR([kind, message])` as in the attested session. The first frame each way is `Status`;
the client sends one again before the last is `max_age` old, and the server answers each with its own. Between them the
client sends `Request`s, one at a time, and the server answers each with a `Response`. Either end may send `Problem` and
close.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moorline.wire.access import SignedStatement
from moorline.wire.schema import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A ledger proof bundle of the sender's own standing: provider, HSM or issuing CA, and absence of its revocation.

    `access` is the word of the sender's HSM about this connection (wire.access): a device's home HSM, a function's own.
    """

    bundle: Annotated[bytes, Size(at_most=262144)]
    access: SignedStatement


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the device asks of the function; `id` rises by one from 0 on each connection."""

    id: int
    body: Annotated[bytes, Size(at_most=1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The answer to the request of the same `id`: `body`, or `problem` (errors.as_problem, CBOR) and an empty body."""

    id: int
    body: Annotated[bytes, Size(at_most=1 << 20)]
    problem: Annotated[bytes, Size(at_most=4096)] | None
