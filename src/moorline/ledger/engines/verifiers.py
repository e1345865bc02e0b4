"""Signatures verified beside the engine, in processes of their own: what is waiting is verified while a block is made.

`cryptography` keeps Python's lock while it verifies, so a thread would gain nothing. A worker is this very module run as a
program; it gets batches over its standard input, says of each signature whether it holds, and ends with its parent. It is
told a key and bytes, and knows nothing else. What it says of a signature only spares the engine from verifying it again: one
that does not hold, or was never looked at, is judged by the state machine as ever. A worker that fails is not used again.

    batch    u32 length | CBOR [[key (SPKI), algorithm, signature, bytes signed], ...]
    answer   one byte a signature, 1 if it holds; and a 1 of its own when it has started
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO, Final

import cbor2

from moorline.errors import NotAuthentic
from moorline.wire import cose, keys
from moorline.wire.cose import Sign1, VerifyingKey

_LENGTH_BYTES: Final = 4
_KEYS: Final = 4096
_HOLDS: Final = b"\x01"
_DOES_NOT: Final = b"\x00"


class Verifiers:
    """Workers, as many as there are cores beside the engine's own. Started when they are needed first."""

    def __init__(self, count: int | None = None) -> None:
        self._count = max(0, (os.cpu_count() or 1) - 1) if count is None else count
        self._workers: list[_Worker] = []
        self._starting: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether somebody can be asked. The first question starts them, and is answered no."""
        if self._starting is None and self._count:
            self._starting = asyncio.ensure_future(self._start())
        return bool(self._workers)

    async def started(self) -> None:
        """Returns when as many are there as there will be."""
        _ = self.ready
        if self._starting is not None:
            await self._starting

    @property
    def workers(self) -> int:
        """How many there are now."""
        return len(self._workers)

    async def hold(self, asked: Sequence[tuple[Sign1, VerifyingKey]]) -> list[bool]:
        """Which of these signatures are known to hold. Never raises for want of a worker: then none of them is."""
        if not self._workers or not asked:
            return [False] * len(asked)
        share = -(-len(asked) // len(self._workers))
        parts = [asked[at : at + share] for at in range(0, len(asked), share)]
        answers = await asyncio.gather(*(worker.hold(part) for worker, part in zip(self._workers, parts, strict=False)))
        self._workers = [worker for worker in self._workers if worker.alive]
        return [holds for answer in answers for holds in answer]

    async def close(self) -> None:
        """End the workers."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._workers = []

    async def _start(self) -> None:
        for _ in range(self._count):
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # without it the engine verifies alone
                self._workers.append(await _Worker.started())


class _Worker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()
        self.alive = True

    @classmethod
    async def started(cls) -> _Worker:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        try:
            await process.stdout.readexactly(1)
        except asyncio.CancelledError:
            process.kill()
            raise
        return cls(process)

    async def hold(self, asked: Sequence[tuple[Sign1, VerifyingKey]]) -> list[bool]:
        batch = cbor2.dumps([[_spki(key), key.algorithm, one.signature, cose.signed_bytes(one)] for one, key in asked])
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # then there is no answer either
            self._process.stdin.write(len(batch).to_bytes(_LENGTH_BYTES, "big") + batch)
        # Whoever does not wait for it any more leaves the answer to nobody else: it is read all the same.
        answer = await asyncio.shield(asyncio.ensure_future(self._answer(len(asked))))
        return [one == _HOLDS[0] for one in answer]

    async def _answer(self, count: int) -> bytes:
        """The next answer, whose turn comes as it was asked for; that none holds if there is none."""
        assert self._process.stdout is not None
        async with self._turn:
            try:
                return await self._process.stdout.readexactly(count)
            except (OSError, asyncio.IncompleteReadError):
                self.alive = False
                return _DOES_NOT * count

    async def close(self) -> None:
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


_SPKIS: Final[dict[bytes, bytes]] = {}


def _spki(key: VerifyingKey) -> bytes:
    found = _SPKIS.get(key.id)
    if found is None:
        if len(_SPKIS) >= _KEYS:
            _SPKIS.clear()
        found = _SPKIS[key.id] = keys.public_bytes(key.key)
    return found


# The worker ------------------------------------------------------------------------------------------------------------


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer batches until the source ends."""
    sink.write(_HOLDS)
    sink.flush()
    while True:
        head = source.read(_LENGTH_BYTES)
        if len(head) < _LENGTH_BYTES:
            return
        batch = source.read(int.from_bytes(head, "big"))
        sink.write(b"".join([_judged(*one) for one in cbor2.loads(batch)]))
        sink.flush()


def _judged(spki: bytes, algorithm: int, signature: bytes, message: bytes) -> bytes:
    try:
        keys.verify_as(algorithm, _key(spki), signature, message)
    except NotAuthentic:
        return _DOES_NOT
    return _HOLDS


@lru_cache(maxsize=_KEYS)  # bounded: one entry a key that signs transactions
def _key(spki: bytes) -> keys.PublicKey:
    return keys.parse_public(spki)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, with whom this one ends
    serve(sys.stdin.buffer, sys.stdout.buffer)
