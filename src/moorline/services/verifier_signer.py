"""Signatures of the verifier key, which is in the provider's token, through the broker: all of a round in one request.

The connection is kept. It is made anew after CONNECTION_S, since the certificate that authenticates it lives an hour at most
and whoever renews it replaces the files, and after any failure.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator
from typing import Final

from moorline.errors import Malformed, MoorlineError
from moorline.wire.http import HttpClient

CONNECTION_S: Final = 600.0
MOST: Final = 128
MOST_BYTES: Final = 88 * 1024
"""Messages in one request, and all of them together, before base64; a broker refuses more."""


class BrokerSigner:
    """`Sign` at the broker. `connect` makes a client with the identity that is current then."""

    def __init__(self, connect: Callable[[], HttpClient]) -> None:
        self._connect = connect
        self._client: HttpClient | None = None
        self._since = 0.0
        self._turn = asyncio.Lock()

    async def __call__(self, messages: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """A signature for each message. Raises what the broker answers, and Malformed("verifier.broker_answer")."""
        made: list[bytes] = []
        async with self._turn:
            for chosen in _requests(messages):
                made += await self._some(chosen)
        return tuple(made)

    async def _some(self, messages: list[bytes]) -> list[bytes]:
        asked = {"key": "verifier", "messages": [base64.b64encode(message).decode("ascii") for message in messages]}
        try:
            answer = await (await self._connected()).post_json("/v1/sign", asked)
        except MoorlineError:
            await self.aclose()
            raise
        try:
            assert isinstance(answer, dict)
            made = [base64.b64decode(one, validate=True) for one in answer["signatures"]]
            assert len(made) == len(messages)
        except (AssertionError, KeyError, TypeError, binascii.Error):
            raise Malformed(
                "verifier.broker_answer", "the broker's answer does not have a signature for each message"
            ) from None
        return made

    async def _connected(self) -> HttpClient:
        now = asyncio.get_running_loop().time()
        if self._client is None or now - self._since > CONNECTION_S:
            await self.aclose()
            self._client, self._since = self._connect(), now
        return self._client

    async def aclose(self) -> None:
        """Close the connection; the next call makes another."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()


def _requests(messages: tuple[bytes, ...]) -> Iterator[list[bytes]]:
    chosen: list[bytes] = []
    for message in messages:
        if chosen and (len(chosen) == MOST or sum(map(len, chosen)) + len(message) > MOST_BYTES):
            yield chosen
            chosen = []
        chosen.append(message)
    if chosen:
        yield chosen
