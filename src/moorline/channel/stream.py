"""TLS 1.3 streams of frames on asyncio, by pyOpenSSL on the socket itself (PROTOCOLS.md 4 and 7).

Python's `ssl` has no exporter (FINDINGS.md), so OpenSSL is driven here. It reads and writes the descriptor; the event loop
only says when there is something to read, or room to write. So nothing is read before somebody asks for it, but for the rest
of a record: a stream holds one frame of plaintext, and what the peer sends beyond that waits in the kernel, or at the peer.
What a peer sends is looked at in the callback in which it came; the task that waits is woken by a whole frame only.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar, cast

from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from moorline.channel.identity import Verify
from moorline.channel.messages import problem_frame
from moorline.channel.patience import Patience
from moorline.errors import MoorlineError, NotAuthentic, Unavailable
from moorline.wire import frames

MAX_PEER_CERTIFICATES: Final = 9
_CHUNK: Final = 64 * 1024
_RECORD: Final = 16 * 1024
_CLOSE_DEADLINE_S: Final = 1.0
_LINGER_READS: Final = 64
_HANDSHAKE_RECORD: Final = b"\x16"  # RFC 8446 5.1: a TLS connection begins with a record of this type
_NO_ERRNO: Final = -1
T = TypeVar("T")


class TlsStream:
    """One TLS connection of frames (wire.frames).

    `peer_certificates` are DER as the peer sent them, leaf first, empty if it sent none. Only the holder of the leaf's key
    can have made the handshake; whether the leaf means anything is for the caller's `verify`. One task reads at a time;
    while it does not, `patience` is for what it does instead.
    """

    def __init__(self, context: SSL.Context, carrier: socket.socket, peer_address: str, *, client: bool = False) -> None:
        """Over a socket that never blocks, and is the stream's from now on."""
        self._loop = asyncio.get_running_loop()
        self._carrier, self._number = carrier, carrier.fileno()
        self._connection = SSL.Connection(context, carrier)
        self._client = client
        if client:
            self._connection.set_connect_state()
        else:
            self._connection.set_accept_state()
        self.peer_address = peer_address
        self.peer_certificates: tuple[bytes, ...] = ()
        self.patience = Patience(self._loop)
        self._plain, self._unsent = bytearray(), bytearray()
        self._waiter: asyncio.Future[object] | None = None
        self._advance: Callable[[], object] = _nothing
        self._listening = self._closed = False
        self._room: asyncio.Event | None = None

    @property
    def group(self) -> str:
        """The key agreement that was used, e.g. `X25519MLKEM768`."""
        return self._connection.get_group_name() or ""

    def export(self, label: str, context: bytes, length: int = 32) -> bytes:
        """Keying material that both ends of this very connection get, and nobody else (RFC 8446 7.5)."""
        return self._connection.export_keying_material(label.encode("ascii"), length, context)

    async def begins_tls(self, deadline_s: float) -> bool:
        """Whether the peer's first byte is one of TLS; it is not taken. Raises TimeoutError, ConnectionError."""
        return await self._until(self._peek, deadline_s) == _HANDSHAKE_RECORD

    async def handshake(self, deadline_s: float) -> None:
        """The handshake, as a whole. Raises NotAuthentic("tls.*"), Unavailable("peer.gone"), TimeoutError."""
        if self._client:
            self._shake()  # the first words are the client's
        await self._until(self._shake, deadline_s)
        self.peer_certificates = self._certificates()

    async def read_frame(self, *, cap: int = frames.DEFAULT_CAP, deadline_s: float) -> bytes:
        """One frame's body. Raises Malformed("frame.*"), Unavailable("peer.*")."""
        whole = frames.taken(self._plain, cap=cap)
        if whole is not None:
            return whole
        try:
            return await self._until(partial(self._frame, cap), deadline_s)
        except EOFError:
            raise frames.truncated() from None
        except TimeoutError:
            raise frames.silent(deadline_s) from None
        except ConnectionError as error:
            raise frames.broken(error) from None

    async def write_frame(self, body: bytes, *, deadline_s: float) -> None:
        """Send one frame and wait until it left. Raises Unavailable("peer.*")."""
        try:
            self.write(frames.frame(body))
            if self._unsent:
                async with asyncio.timeout(deadline_s):
                    await self.drain()
        except TimeoutError:
            raise frames.blocked(deadline_s) from None
        except ConnectionError as error:
            raise frames.broken(error) from None

    def write(self, data: bytes, /) -> None:
        """Send, and keep what the socket does not take yet; `drain` waits for that. ConnectionError if TLS is closed."""
        if self._closed:
            message = "the connection is closed"
            raise ConnectionResetError(message)
        if self._unsent:
            self._unsent += data
            return
        sent = self._send(data)
        if sent < len(data):
            self._unsent += data[sent:]
            self._loop.add_writer(self._number, self._writable)

    async def drain(self) -> None:
        """Wait until all is sent. Raises ConnectionError."""
        while self._unsent:
            if self._room is None:
                self._room = asyncio.Event()
            await self._room.wait()
            if self._closed:
                message = "the connection was closed before all was sent"
                raise ConnectionAbortedError(message)

    async def linger(self) -> None:
        """After the last words: let the peer read them. Closing on unread bytes would reset the connection over them."""
        if self._closed:
            return
        with suppress(SSL.Error, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self.drain()
                self._connection.shutdown()
                self._carrier.shutdown(socket.SHUT_WR)
                await self._until(partial(self._unheard, iter(range(_LINGER_READS))), _CLOSE_DEADLINE_S)

    def forget_unread(self) -> None:
        """As `linger` of a peer with whom there is no TLS to end, without waiting: what has come is read and thrown away."""
        with suppress(OSError):
            for _ in range(_LINGER_READS):
                if not self._carrier.recv(_CHUNK):
                    return

    async def aclose(self) -> None:
        """Say goodbye if the peer still listens, and close. Never raises for a peer that is gone."""
        if self._closed:
            return
        with suppress(SSL.Error, TimeoutError, OSError):
            if self._unsent:
                async with asyncio.timeout(_CLOSE_DEADLINE_S):
                    await self.drain()
            self._connection.shutdown()
        self.close()

    def close(self) -> None:
        """Close at once; who waits gets ConnectionError. Nothing of TLS is done to this descriptor's number any more."""
        if self._closed:
            return
        self._closed = True
        self.patience.close()
        self._loop.remove_writer(self._number)
        self._deafen()
        self._carrier.close()
        if self._room is not None:
            self._room.set()
        self._end_wait(ConnectionAbortedError("the connection was closed from this end"))

    def released(self) -> socket.socket:
        """The socket, for whoever goes on without TLS on it; this stream is no more."""
        carrier = self._carrier.dup()
        self.close()
        return carrier

    # What waits, and what happens at the socket ------------------------------------------------------------------------

    async def _until(self, advance: Callable[[], T | None], deadline_s: float) -> T:
        """What `advance` gives, tried whenever there is something to read. Raises what it raises, and TimeoutError."""
        if self._closed:
            message = "the connection is closed"
            raise ConnectionResetError(message)
        waiter: asyncio.Future[object] = self._loop.create_future()
        self._waiter, self._advance = waiter, advance
        self.patience.begin(deadline_s, self._too_late)
        if not self._listening:
            self._listening = True
            self._loop.add_reader(self._number, self._readable)
        try:
            return cast("T", await waiter)  # from `advance`
        finally:
            self.patience.end()
            self._waiter, self._advance = None, _nothing

    def _readable(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._deafen()  # nobody asks: the peer's bytes stay where they are
            return
        try:
            found = self._advance()
        except Exception as error:  # whatever it is, it is the waiting task's
            waiter.set_exception(error)
            return
        if found is not None:
            waiter.set_result(found)

    def _writable(self) -> None:
        try:
            while self._unsent:
                sent = self._send(bytes(self._unsent[:_RECORD]))
                if not sent:
                    return
                del self._unsent[:sent]
        except ConnectionError:
            self.close()
            return
        self._loop.remove_writer(self._number)
        if self._room is not None:
            self._room.set()
            self._room = None
        if self._waiter is not None:
            self._readable()  # what is waited for may have been waiting for room itself

    def _deafen(self) -> None:
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._number)

    def _too_late(self) -> None:
        self._end_wait(TimeoutError())

    def _end_wait(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    # OpenSSL -----------------------------------------------------------------------------------------------------------

    def _peek(self) -> bytes | None:
        with suppress(BlockingIOError):
            return self._carrier.recv(1, socket.MSG_PEEK)
        return None

    def _unheard(self, reads: Iterator[int]) -> bool | None:
        """True at the end of what the peer sends, or of our patience; until then it is thrown away as it comes."""
        with suppress(BlockingIOError):
            return not self._carrier.recv(_CHUNK) or next(reads, None) is None or None
        return None

    def _shake(self) -> bool | None:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.WantWriteError:
            self._loop.add_writer(self._number, self._writable)
            return None
        except SSL.SysCallError:
            raise Unavailable("peer.gone", "the peer closed the connection") from None
        except SSL.Error as error:
            raise NotAuthentic("tls.handshake_failed", "the TLS handshake failed", got=_reason(error)) from None
        return True

    def _frame(self, cap: int) -> bytes | None:
        while True:
            try:
                self._plain += self._connection.recv(_RECORD)  # a record as a whole
            except SSL.WantReadError:
                return None
            except SSL.WantWriteError:
                self._loop.add_writer(self._number, self._writable)
                return None
            except SSL.ZeroReturnError:
                raise EOFError from None
            except SSL.SysCallError as error:
                if error.args[0] == _NO_ERRNO:  # an end without a goodbye
                    raise EOFError from None
                raise ConnectionResetError(*error.args) from None
            except SSL.Error as error:
                raise ConnectionResetError(_reason(error)) from None
            whole = frames.taken(self._plain, cap=cap)
            if whole is not None:
                return whole

    def _send(self, data: bytes) -> int:
        """How many bytes of `data` were encrypted and taken by the socket."""
        sent = 0
        try:
            while sent < len(data):
                sent += self._connection.send(data[sent : sent + _RECORD])
        except (SSL.WantWriteError, SSL.WantReadError):
            pass
        except SSL.Error as error:
            raise ConnectionResetError(_reason(error)) from None
        return sent

    def _certificates(self) -> tuple[bytes, ...]:
        # OpenSSL's server side leaves the leaf in the chain under TLS 1.3 too; the leaf is taken from its own call anyway.
        leaf = self._connection.get_peer_certificate(as_cryptography=True)
        if leaf is None:
            return ()
        chain = self._connection.get_peer_cert_chain(as_cryptography=True) or []
        if len(chain) > MAX_PEER_CERTIFICATES:
            raise NotAuthentic(
                "chain.too_long", "the peer sent too many certificates", expected=MAX_PEER_CERTIFICATES, got=len(chain)
            )
        first = leaf.public_bytes(Encoding.DER)
        others = [certificate.public_bytes(Encoding.DER) for certificate in chain]
        return (first, *(der for der in others if der != first))


async def established(stream: TlsStream, verify: Verify | None, deadline_s: float) -> TlsStream:
    """The stream once its handshake stands and `verify` took the peer. Raises what refuses, after the peer was told."""
    try:
        await stream.handshake(deadline_s)
        if verify is not None:
            if not stream.peer_certificates:
                raise NotAuthentic("tls.no_certificate", "the peer showed no certificate")
            verify(stream.peer_certificates)
    except MoorlineError as error:
        if stream.peer_certificates:  # the handshake stands, so the refusal can be said in words
            with suppress(ConnectionError):
                stream.write(frames.frame(problem_frame(error)))
                await stream.linger()
        stream.forget_unread()
        await stream.aclose()
        raise
    except BaseException:
        stream.close()  # cancelled or out of time: nothing more is said
        raise
    return stream


async def tell(stream: TlsStream, error: MoorlineError) -> None:
    """The peer learns why the connection ends, if it still listens."""
    with suppress(MoorlineError):
        await stream.write_frame(problem_frame(error), deadline_s=_CLOSE_DEADLINE_S)
        await stream.linger()


def _nothing() -> None:
    return None


def _reason(error: SSL.Error) -> str:
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return "; ".join(str(entry[2]) for entry in entries) or type(error).__name__
