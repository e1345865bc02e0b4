"""The short way of a GET: a kept TLS connection, one write, one head of the plainest kind. Everything else is the library's.

What a broker asks ledger and verifier for each new session costs httpx, with its requests, pools and streams, several times
what the answer's verification does. So a GET over HTTPS is tried here first. Whatever is not the plain case (a server that
cannot be reached or is not trusted, a connection closed meanwhile, a transfer coding, a field that is not understood to be
harmless, a body over the cap) is left to the library, which asks again and says what is wrong: `get` then returns None. A
GET changes nothing at the server, so asking twice is allowed (RFC 9110 9.2.2). Only a deadline is final.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

from moorline.errors import Unavailable

HEAD_CAP: Final = 16 * 1024
_IDLE_MAX: Final = 8
_HEAD: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) [ -~]*\r\n((?:[A-Za-z0-9-]+:[\t -~]*\r\n){1,32})\r\n")
_NO_BODY: Final = frozenset({204, 205, 304})
_NOT_PLAIN: Final = frozenset({"transfer-encoding", "content-encoding", "upgrade", "trailer", "set-cookie", "location"})
_MOST_DIGITS: Final = 9

Query = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered: status, headers with names in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a plain answer: a body of `length` bytes follows, and then the next answer if the connection is `kept`."""

    status: int
    headers: dict[str, str]
    length: int
    kept: bool


def parse_head(data: bytes) -> Head | None:
    """The head that `data` is, with its empty line; None if it is not of the plainest kind. Untrusted; never raises."""
    found = _HEAD.fullmatch(data)
    if found is None or int(found[1]) in _NO_BODY:
        return None
    headers: dict[str, str] = {}
    for line in found[2].decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name = name.lower()
        if name in headers or name in _NOT_PLAIN:
            return None
        headers[name] = value.strip(" \t")
    length, connection = headers.get("content-length", ""), headers.get("connection", "keep-alive").lower()
    if not length.isdigit() or len(length) > _MOST_DIGITS or connection not in ("keep-alive", "close"):
        return None
    return Head(int(found[1]), headers, int(length), connection == "keep-alive")


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ShortWay:
    """Kept connections to one HTTPS server, used from one event loop."""

    def __init__(self, base_url: str, *, context: ssl.SSLContext, server_name: str, timeout_s: float, cap: int) -> None:
        """`cap` is the most bytes of a body; `timeout_s` is how long nothing may come."""
        base = urlsplit(base_url)
        self._host, self._port = base.hostname or "", base.port or 443
        self._prefix, self._authority = base.path.rstrip("/"), base.netloc
        self._context, self._server_name = context, server_name
        self._timeout_s, self._cap = timeout_s, cap
        self._idle: list[_Connection] = []
        self._closed = False

    async def get(self, path: str, query: Query | None = None) -> Answer | None:
        """The answer, or None where the library must ask. Raises Unavailable("peer.unreachable") at the deadline."""
        if self._closed:
            return None
        try:
            async with asyncio.timeout(self._timeout_s) as silence:
                connection = self._kept() or await self._opened()
                return await self._exchanged(connection, self._request(path, query), silence)
        except TimeoutError:
            raise Unavailable(
                "peer.unreachable",
                f"no answer from https://{self._authority}",
                got=f"nothing within {self._timeout_s} s",
                remedy="check that the service runs and its address is right",
            ) from None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return None

    def close(self) -> None:
        """Close what is kept; from now on nothing goes this way."""
        self._closed = True
        while self._idle:
            _drop(self._idle.pop())

    def _request(self, path: str, query: Query | None) -> bytes:
        asked = f"?{urlencode(query)}" if query else ""
        target = quote(f"{self._prefix}{path}", safe="/?=&%:@!$'()*+,;~") + asked
        return f"GET {target} HTTP/1.1\r\nHost: {self._authority}\r\nAccept: */*\r\n\r\n".encode("ascii")

    def _kept(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            reader, writer = connection
            # Bytes behind the last answer would be taken for the next one.
            unasked = reader._buffer  # type: ignore[attr-defined]  # noqa: SLF001 - a reader does not say what it holds
            if not (unasked or reader.at_eof() or writer.is_closing()):
                return connection
            _drop(connection)
        return None

    async def _opened(self) -> _Connection:
        return await asyncio.open_connection(
            self._host, self._port, ssl=self._context, server_hostname=self._server_name, limit=HEAD_CAP
        )

    async def _exchanged(self, connection: _Connection, request: bytes, silence: asyncio.Timeout) -> Answer | None:
        reader, writer = connection
        kept = False
        try:
            writer.write(request)
            head = parse_head(await reader.readuntil(b"\r\n\r\n"))
            if head is None or head.length > self._cap:
                return None
            body = await self._body(reader, head.length, silence)
            kept = head.kept and not self._closed and len(self._idle) < _IDLE_MAX
            return Answer(status=head.status, headers=head.headers, body=bytes(body))
        finally:
            if kept:
                self._idle.append(connection)
            else:
                _drop(connection)

    async def _body(self, reader: asyncio.StreamReader, length: int, silence: asyncio.Timeout) -> bytearray:
        body = bytearray()
        while len(body) < length:
            part = await reader.read(length - len(body))
            if not part:
                raise asyncio.IncompleteReadError(bytes(body), length)
            body += part
            silence.reschedule(asyncio.get_running_loop().time() + self._timeout_s)
        return body


def _drop(connection: _Connection) -> None:
    with suppress(RuntimeError):  # its event loop is gone, and the connection with it
        connection[1].transport.abort()
