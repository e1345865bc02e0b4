"""The secure log of a service that is no broker: shown to its broker, which signs it, and exported to operators.

When a service starts, and whenever an operator asks, the whole log is read from the database; in between only what is new,
after a look whether the entry it ended with is still there. So whoever removes an entry behind a running service is found
when somebody asks or when the service starts again, and whoever cuts off the end within CHECKPOINT_EVERY_S. The broker
compares and raises the alarm (services.broker_audit): a service is not asked to judge its own database.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response

from moorline.audit import log as secure_log
from moorline.audit import merkle
from moorline.audit.export import byte_string, split
from moorline.errors import Malformed, MoorlineError, Unavailable
from moorline.nfv import Role
from moorline.services import http
from moorline.wire.http import HttpClient

CHECKPOINT_EVERY_S: Final = 30.0
SEQUENCE_TYPE: Final = "application/cbor-seq"
PAGE_BYTES: Final = 8 << 20
_BATCH: Final = 4096
_NOTHING: Final = (-1, b"")
_NUMBER_BYTES: Final = 8


class ReadRows(Protocol):
    """A store's `audit_rows`: numbers and encoded entries from a number on, as they stand in the database."""

    def __call__(self, *, first: int, limit: int) -> tuple[tuple[int, bytes], ...]:
        """At most `limit` of them, in order."""
        ...


BrokerClient = Callable[[], Awaitable[AbstractAsyncContextManager[HttpClient]]]
"""A connection to the provider's broker, with this service's identity."""


class ServiceLog:
    """One service's log, and how far its broker has signed it."""

    def __init__(self, *, name: str, read: ReadRows, broker: BrokerClient) -> None:
        self.name = name
        self.read = read
        self._broker = broker
        self._leaves: list[bytes] = []
        self._last = _NOTHING
        self._turn = asyncio.Lock()

    async def checkpoint(self, *, whole: bool = True) -> int:
        """Have the log signed as it stands in the database; its size. Raises what the broker answers (`audit.*`)."""
        async with self._turn:
            await asyncio.to_thread(self._bring_up, whole=whole)
            if not self._leaves:
                return 0
            size = len(self._leaves)
            async with await self._broker() as client:
                known = await client.get_json("/v1/audit/checkpoint")
                signed = _size(known)
                proof: tuple[bytes, ...] = ()
                if 0 < signed < size:
                    proof = await asyncio.to_thread(merkle.consistency_proof, self._leaves, signed)
                await client.post_json(
                    "/v1/audit/checkpoint",
                    {
                        "log": self.name,
                        "size": size,
                        "root": (await asyncio.to_thread(merkle.root, self._leaves)).hex(),
                        "head": secure_log.entry_digest(self._last[1]).hex(),
                        "proof": [node.hex() for node in proof],
                    },
                )
            return size

    async def keep(self, told: Callable[[MoorlineError], None]) -> None:
        """Have the log signed now and whenever it grew, until cancelled. `told` hears of each failure and why."""
        signed, whole = 0, True
        while True:
            try:
                newest = await asyncio.to_thread(self.read, first=signed, limit=1)
                if newest or whole:
                    signed, whole = await self.checkpoint(whole=whole), False
            except MoorlineError as error:
                told(error)
            await asyncio.sleep(CHECKPOINT_EVERY_S)

    def _bring_up(self, *, whole: bool) -> None:
        """The leaves of what the database holds. An entry that is not where it was makes everything be read again."""
        if whole or (self._leaves and self.read(first=self._last[0], limit=1) != (self._last,)):
            self._leaves, self._last = [], _NOTHING
        while True:
            rows = self.read(first=self._last[0] + 1, limit=_BATCH)
            if rows:
                self._leaves.extend(secure_log.leaves_of([data for _, data in rows]))
                self._last = rows[-1]
            if len(rows) < _BATCH:
                return


def add_routes(app: FastAPI, log: ServiceLog, *, trust_domain: str) -> None:
    """`POST /v1/audit/checkpoint` and `GET /v1/audit/export`, for operators of the own trust domain."""

    @app.post("/v1/audit/checkpoint")
    async def checkpoint(request: Request) -> dict[str, object]:
        """Read the whole log and have the broker sign it now."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        return {"log": log.name, "size": await log.checkpoint()}

    @app.get("/v1/audit/name")
    async def name(request: Request) -> dict[str, str]:
        """The name of this service's log."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        return {"log": log.name}

    @app.get("/v1/audit/export")
    async def export(request: Request, first: int = 0, size: int = 0) -> Response:
        """Entries from number `first` up to `size`, as many as one answer holds: a CBOR sequence of byte strings."""
        http.require(request, Role.OPERATOR, trust_domain=trust_domain)
        return await asyncio.to_thread(page_response, log.read, first, size)


def page_response(read: ReadRows, first: int, size: int) -> Response:
    """One page of entries below number `size`. The last byte string is the number to go on from, eight bytes."""
    if first < 0 or size < 0:
        raise Malformed("audit.request", "first and size are not negative", got=f"{first}, {size}")
    parts: list[bytes] = []
    held, after = 0, first
    # Entries go out as they stand in the database, also one that somebody changed: whoever verifies the file names it.
    for number, data in read(first=first, limit=_BATCH):
        if number >= size or held > PAGE_BYTES:
            break
        parts.append(byte_string(data))
        held, after = held + len(data), number + 1
    parts.append(byte_string((after if parts else size).to_bytes(_NUMBER_BYTES, "big")))
    return Response(b"".join(parts), media_type=SEQUENCE_TYPE)


def parse_page(page: bytes) -> tuple[list[bytes], int]:
    """Entries of a page and the number to go on from. Raises only Malformed (`audit.*`)."""
    items, cut = split(page)
    if cut or not items or len(items[-1]) != _NUMBER_BYTES:
        raise Malformed("audit.page_malformed", "the service's answer is not a page of its log")
    return items[:-1], int.from_bytes(items[-1], "big")


@contextlib.asynccontextmanager
async def kept(log: ServiceLog, told: Callable[[MoorlineError], None]) -> AsyncIterator[None]:
    """Run `log.keep` for as long as the block lasts."""
    task = asyncio.ensure_future(log.keep(told))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _size(answer: object) -> int:
    if not isinstance(answer, dict) or not isinstance(answer.get("size"), int) or answer["size"] < 0:
        raise Unavailable("audit.broker_answer", "the broker's answer about a checkpoint cannot be read")
    return int(answer["size"])
