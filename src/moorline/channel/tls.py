"""TLS 1.3 for the channels: connect, listen, and what both give (channel.stream; settings in channel.identity).

A handshake has a deadline, a listener a bound on its connections, and every read and write of a frame a deadline of its own.
"""

from __future__ import annotations

import asyncio

from moorline.channel import identity as identities
from moorline.channel.address import dialled, parse_address
from moorline.channel.identity import TlsIdentity, Verify
from moorline.channel.listener import TlsServer, listen
from moorline.channel.plain import PlainStream
from moorline.channel.stream import TlsStream, established
from moorline.errors import Unavailable

__all__ = [
    "PlainStream",
    "TlsIdentity",
    "TlsServer",
    "TlsStream",
    "Verify",
    "connect",
    "dial",
    "listen",
    "parse_address",
]


async def connect(address: str, *, identity: TlsIdentity | None, verify: Verify, deadline_s: float = 10.0) -> TlsStream:
    """A connection whose server `verify` took. Raises what `verify` raises, NotAuthentic("tls.*"), Unavailable("peer.*")."""
    context = identities.of_client(identity)
    try:
        async with asyncio.timeout(deadline_s):
            stream = TlsStream(context, await dialled(address), address, client=True)
            return await established(stream, verify, deadline_s)
    except ConnectionError as error:
        raise Unavailable("peer.gone", "the connection broke in the handshake", got=type(error).__name__) from None
    except TimeoutError:
        raise Unavailable("peer.timeout", "the peer did not finish in time", expected=f"within {deadline_s} s") from None


async def dial(address: str, *, deadline_s: float = 10.0) -> PlainStream:
    """A connection without TLS. Raises Unavailable (`peer.*`)."""
    try:
        async with asyncio.timeout(deadline_s):
            return PlainStream(*await asyncio.open_connection(sock=await dialled(address)))
    except TimeoutError:
        raise Unavailable("peer.timeout", "the peer did not answer in time", expected=f"within {deadline_s} s") from None
