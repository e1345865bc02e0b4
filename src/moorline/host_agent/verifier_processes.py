"""The processes of one verifier, as its hosts reach them: any of them answers, and the next is asked where one does not.

They share a database (services.verifier_watch), so a challenge of one is answered at another, and a host that lost its
process goes on where it was. Each must prove to be that verifier before it is told anything: its certificate carries the
verifier's name and its SPIFFE ID of role `verifier` (wire.http, `server_role`). One that does not is an error and not a
reason to look further: somebody sits where a verifier should.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moorline.errors import Unavailable


class Poster(Protocol):
    """Whatever takes a message of wire.host and gives the answer: a client of one process, or all of them."""

    async def post_cbor(self, path: str, body: bytes) -> bytes:
        """The body that answers a CBOR body."""
        ...


class VerifierProcesses:
    """All processes of one verifier as one, in the order in which they are asked after the one that answered last."""

    def __init__(self, clients: Sequence[Poster]) -> None:
        self._clients, self._now = tuple(clients), 0

    async def post_cbor(self, path: str, body: bytes) -> bytes:
        """What the first that can says. Raises Unavailable, of the last one asked, where none can; and what is answered."""
        for _ in self._clients[1:]:
            try:
                return await self._clients[self._now].post_cbor(path, body)
            except Unavailable:
                self._now = (self._now + 1) % len(self._clients)
        return await self._clients[self._now].post_cbor(path, body)
