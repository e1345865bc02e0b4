"""TLS 1.3 streams for asyncio over pyOpenSSL memory BIOs, on TCP and unix sockets (PROTOCOLS.md 4 and 7).

Python's `ssl` has no exporter (FINDINGS.md), so OpenSSL is driven here through memory: bytes go in, bytes come out, asyncio
moves them. What is fixed and not configurable:

- TLS 1.3 only, AES-256-GCM or ChaCha20; OpenSSL's default groups, of which X25519MLKEM768 comes first;
- no resumption (no session cache, no tickets taken back, none offered) and no 0-RTT;
- keys and certificates live in memory, never in a file;
- OpenSSL's own judgement of the peer's chain is switched off, because it knows neither our roots nor our time: the caller's
  `verify` judges the certificates after the handshake and before a byte of the application is read or written.

A handshake has a deadline, a listener a bound on its connections, a stream never holds more than one read of ciphertext and
one frame of plaintext. Deadlines of single reads and writes are those of `wire.frames`, which every channel speaks.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from moorline.channel.messages import problem_frame
from moorline.errors import Misconfigured, MoorlineError, NotAuthentic, Unavailable
from moorline.wire.certificates import parse_certificate
from moorline.wire.frames import frame
from moorline.wire.keys import PrivateKey

MAX_PEER_CERTIFICATES: Final = 9
_CHUNK: Final = 64 * 1024
_RECORD: Final = 16 * 1024
_CIPHERS: Final = b"TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_CLOSE_DEADLINE_S: Final = 1.0
_LINGER_READS: Final = 64
_HANDSHAKE_RECORD: Final = b"\x16"  # RFC 8446 5.1: a TLS connection begins with a record of this type
_LOG: Final = logging.getLogger("moorline.channel.tls")

Verify = Callable[[tuple[bytes, ...]], None]
"""Judges the peer's certificates (DER, as sent, leaf first); raises MoorlineError to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsIdentity:
    """A key and its certificates, DER, leaf first; the root may be left out."""

    key: PrivateKey
    chain: tuple[bytes, ...]


def parse_address(address: str) -> tuple[str, int] | str:
    """`(host, port)` of "host:port", or the path of "unix:/path". Raises Misconfigured("address.malformed")."""
    if address.startswith("unix:"):
        return address.removeprefix("unix:")
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise Misconfigured("address.malformed", "not an address", expected='"host:port" or "unix:/path"', got=address)
    return host.strip("[]"), int(port)


class TlsStream:
    """One TLS connection after its handshake; a `wire.frames` Reader and Writer.

    `peer_certificates` are DER as the peer sent them, leaf first, empty if it sent none. Only the holder of the leaf's key
    can have made the handshake; whether the leaf means anything is for the caller's `verify`.
    """

    def __init__(
        self, connection: SSL.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer_address: str
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._writer = writer
        self.peer_address = peer_address
        self.peer_certificates: tuple[bytes, ...] = ()
        self._plain = bytearray()
        self._unsent = False

    @property
    def group(self) -> str:
        """The key agreement that was used, e.g. `X25519MLKEM768`."""
        return self._connection.get_group_name() or ""

    def export(self, label: str, context: bytes, length: int = 32) -> bytes:
        """Keying material that both ends of this very connection get, and nobody else (RFC 8446 7.5)."""
        return self._connection.export_keying_material(label.encode("ascii"), length, context)

    async def handshake(self) -> None:
        """Drive the handshake to its end. Raises NotAuthentic("tls.*") or Unavailable("peer.gone")."""
        while True:
            try:
                self._connection.do_handshake()
                break
            except SSL.WantReadError:
                await self.drain()
                await self._feed()
            except SSL.Error as error:
                with suppress(ConnectionError, Unavailable):
                    await self.drain()  # the alert that says why
                raise NotAuthentic("tls.handshake_failed", "the TLS handshake failed", got=_reason(error)) from None
        await self.drain()
        self.peer_certificates = self._certificates()

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly n bytes, or asyncio.IncompleteReadError; ConnectionResetError if TLS breaks."""
        plain = self._plain
        while len(plain) < n:
            try:
                plain += self._connection.recv(_RECORD)  # a record as a whole: every call into OpenSSL gives the lock away
            except SSL.WantReadError:
                if self._unsent:
                    await self.drain()
                try:
                    await self._feed()
                except Unavailable:
                    raise asyncio.IncompleteReadError(bytes(plain), n) from None
            except (SSL.ZeroReturnError, SSL.SysCallError):
                raise asyncio.IncompleteReadError(bytes(plain), n) from None
            except SSL.Error as error:
                message = _reason(error)
                raise ConnectionResetError(message) from None
        taken = bytes(plain[:n])
        del plain[:n]
        return taken

    def write(self, data: bytes, /) -> None:
        """Encrypt into memory; `drain` sends it. ConnectionResetError if TLS is closed."""
        self._unsent = True
        try:
            for start in range(0, len(data), _RECORD):
                self._connection.sendall(data[start : start + _RECORD])
        except SSL.Error as error:
            message = _reason(error)
            raise ConnectionResetError(message) from None

    async def drain(self) -> None:
        """Send what is encrypted, and wait until the transport took it."""
        while True:
            try:
                encrypted = self._connection.bio_read(_CHUNK)
            except SSL.WantReadError:
                break
            self._writer.write(encrypted)
            if len(encrypted) < _CHUNK:
                break  # that was all there is
        self._unsent = False
        await self._writer.drain()

    async def linger(self) -> None:
        """After the last words: let the peer read them. Closing on unread bytes would reset the connection over them."""
        with suppress(SSL.Error, ConnectionError, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                self._connection.shutdown()
                await self.drain()
                self._writer.write_eof()
                for _ in range(_LINGER_READS):
                    if not await self._reader.read(_CHUNK):
                        return

    async def aclose(self) -> None:
        """Say goodbye if the peer still listens, and close. Never raises for a peer that is gone."""
        with suppress(SSL.Error, ConnectionError, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                self._connection.shutdown()
                await self.drain()
        self._writer.close()
        with suppress(ConnectionError, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self._writer.wait_closed()

    async def _feed(self) -> None:
        data = await self._reader.read(_CHUNK)
        if not data:
            raise Unavailable("peer.gone", "the peer closed the connection")
        self._connection.bio_write(data)

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


class PlainStream:
    """A connection whose first byte was not TLS: for a protocol that brings its own protection (channel.nopfs)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b"") -> None:
        self._reader, self._writer, self._first = reader, writer, first

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly n bytes, or asyncio.IncompleteReadError."""
        taken, self._first = self._first[:n], self._first[n:]
        return taken + await self._reader.readexactly(n - len(taken))

    def write(self, data: bytes, /) -> None:
        """Queue bytes."""
        self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the peer takes them."""
        await self._writer.drain()

    async def aclose(self) -> None:
        """Close. Never raises for a peer that is gone."""
        self._writer.close()
        with suppress(ConnectionError, TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self._writer.wait_closed()


class TlsServer:
    """A listener. `address` is where it really listens, also when port 0 was asked for."""

    def __init__(self, server: asyncio.Server, address: str, connections: _Connections) -> None:
        self._server = server
        self._connections = connections
        self.address = address

    async def serve_forever(self) -> None:
        """Until cancelled."""
        await self._server.serve_forever()

    async def aclose(self) -> None:
        """Stop listening and drop every connection."""
        self._server.close()
        await self._connections.aclose()
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


async def connect(address: str, *, identity: TlsIdentity | None, verify: Verify, deadline_s: float = 10.0) -> TlsStream:
    """A connection whose server `verify` took. Raises what `verify` raises, NotAuthentic("tls.*"), Unavailable("peer.*")."""
    context = _context(identity)
    context.set_verify(SSL.VERIFY_PEER, _judged_later)
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await _dial(address)
            connection = SSL.Connection(context, None)
            connection.set_connect_state()
            return await _established(TlsStream(connection, reader, writer, address), verify)
    except ConnectionError as error:
        raise Unavailable("peer.gone", "the connection broke in the handshake", got=type(error).__name__) from None
    except TimeoutError:
        raise Unavailable("peer.timeout", "the peer did not finish in time", expected=f"within {deadline_s} s") from None


async def dial(address: str, *, deadline_s: float = 10.0) -> PlainStream:
    """A connection without TLS. Raises Unavailable (`peer.*`)."""
    try:
        async with asyncio.timeout(deadline_s):
            return PlainStream(*await _dial(address))
    except TimeoutError:
        raise Unavailable("peer.timeout", "the peer did not answer in time", expected=f"within {deadline_s} s") from None


async def listen(
    address: str,
    *,
    identity: Callable[[], TlsIdentity],
    verify: Verify | None,
    accept: Callable[[TlsStream], Awaitable[None]],
    plain: Callable[[PlainStream], Awaitable[None]] | None = None,
    max_connections: int = 256,
    handshake_deadline_s: float = 5.0,
) -> TlsServer:
    """A running listener. `verify` None asks for no client certificate; otherwise one is required and judged.

    `identity` is asked at every connection, so that a renewed certificate is used at once. `accept` owns the stream until it
    returns; then the stream is closed. Whatever one peer does, the listener goes on. `plain` takes connections that do not
    begin with a TLS handshake; without it there are none.
    """
    connections = _Connections(identity, verify, accept, plain, max_connections, handshake_deadline_s)
    where = parse_address(address)
    if isinstance(where, str):
        server = await asyncio.start_unix_server(connections.arrived, where, limit=_CHUNK)
        return TlsServer(server, address, connections)
    server = await asyncio.start_server(connections.arrived, where[0], where[1], limit=_CHUNK)
    host, port = server.sockets[0].getsockname()[:2]
    return TlsServer(server, f"{host}:{port}", connections)


class _Connections:
    """Every connection of a listener is a task here, so that there is a bound and an end."""

    def __init__(
        self,
        identity: Callable[[], TlsIdentity],
        verify: Verify | None,
        accept: Callable[[TlsStream], Awaitable[None]],
        plain: Callable[[PlainStream], Awaitable[None]] | None,
        bound: int,
        handshake_deadline_s: float,
    ) -> None:
        self._identity = identity
        self._verify = verify
        self._accept = accept
        self._plain = plain
        self._bound = bound
        self._handshake_deadline_s = handshake_deadline_s
        self._made: tuple[TlsIdentity, SSL.Context] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting: dict[asyncio.StreamWriter, None] = {}

    def arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called by asyncio for each connection. One beyond the bound takes the place of the longest handshake under way.

        So silent peers shut nobody out. If all are past their handshakes, the newcomer is closed at once.
        """
        if len(self._tasks) >= self._bound:
            if not self._greeting:
                writer.close()
                return
            self._hang_up(next(iter(self._greeting)))
        # A peer whose machine died silently must not hold its place for ever.
        carrier = writer.get_extra_info("socket")
        if carrier.family != socket.AF_UNIX:
            carrier.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._greeting[writer] = None
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _peer_name(writer)
        try:
            first = b""
            if self._plain is not None:
                async with asyncio.timeout(self._handshake_deadline_s):
                    first = await reader.readexactly(1)
                if first != _HANDSHAKE_RECORD:
                    self._greeting.pop(writer, None)
                    await self._plainly(self._plain, PlainStream(reader, writer, first))
                    return
            connection = SSL.Connection(self._current(), None)
            connection.set_accept_state()
            if first:
                connection.bio_write(first)
            stream = TlsStream(connection, reader, writer, peer)
            async with asyncio.timeout(self._handshake_deadline_s):
                await _established(stream, self._verify)
            self._greeting.pop(writer, None)
            try:
                await self._accept(stream)
            finally:
                await stream.aclose()
        except MoorlineError as error:
            _LOG.info("connection refused", extra={"code": error.code, "peer": peer})
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            _LOG.info("connection lost", extra={"code": type(error).__name__, "peer": peer})
        except Exception:  # the top of this connection's task: a fault here must not reach the others
            _LOG.exception("connection failed")
        finally:
            self._greeting.pop(writer, None)
            writer.close()

    @staticmethod
    async def _plainly(plain: Callable[[PlainStream], Awaitable[None]], stream: PlainStream) -> None:
        try:
            await plain(stream)
        finally:
            await stream.aclose()

    def _hang_up(self, writer: asyncio.StreamWriter) -> None:
        self._greeting.pop(writer, None)
        writer.transport.abort()

    def _current(self) -> SSL.Context:
        identity = self._identity()
        if self._made is None or self._made[0] is not identity:
            context = _context(identity)
            if self._verify is None:
                context.set_verify(SSL.VERIFY_NONE)
            else:
                context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _judged_later)
            self._made = (identity, context)
        return self._made[1]


async def _established(stream: TlsStream, verify: Verify | None) -> TlsStream:
    try:
        await stream.handshake()
        if verify is not None:
            if not stream.peer_certificates:
                raise NotAuthentic("tls.no_certificate", "the peer showed no certificate")
            verify(stream.peer_certificates)
    except MoorlineError as error:
        with suppress(ConnectionError, SSL.Error):
            if stream.peer_certificates:  # the handshake stands, so the refusal can be said in words
                stream.write(frame(problem_frame(error)))
                await stream.linger()
        await stream.aclose()
        raise
    except BaseException:
        stream._writer.close()  # noqa: SLF001 - cancelled or out of time: nothing more is said
        raise
    return stream


async def _dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = parse_address(address)
    try:
        if isinstance(where, str):
            return await asyncio.open_unix_connection(where, limit=_CHUNK)
        return await asyncio.open_connection(where[0], where[1], limit=_CHUNK)
    except OSError as error:
        raise Unavailable("peer.unreachable", "nobody answers there", expected=address, got=str(error)) from None


def _context(identity: TlsIdentity | None) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(_CIPHERS)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # a session that is silent holds no 34 KiB of buffers
    if identity is not None:
        leaf, *others = (parse_certificate(der) for der in identity.chain)
        _require_usual(identity.key)
        context.use_certificate(leaf)
        for certificate in others:
            context.add_extra_chain_cert(certificate)
        try:
            context.use_privatekey(identity.key)
            context.check_privatekey()
        except SSL.Error:
            raise Misconfigured("tls.identity", "the private key is not the one of the certificate") from None
    return context


def _require_usual(key: object) -> None:
    """An experimental key (ML-DSA-65) opens no connection here: no peer of ours would take its certificate."""
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise Misconfigured(
            "tls.key_unsupported",
            "no TLS is spoken with a key of this kind",
            expected="P-256, P-384, Ed25519 or RSA",
            got=type(key).__name__,
            remedy="use a key of another kind (rekey with kind p-256)",
        )


def _judged_later(_connection: SSL.Connection, _certificate: object, _error: int, _depth: int, _ok: int) -> bool:
    # Not "accept anything": `_established` runs the caller's `verify` before the stream is handed out.
    return True


def _reason(error: SSL.Error) -> str:
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return "; ".join(str(entry[2]) for entry in entries) or type(error).__name__


def _peer_name(writer: asyncio.StreamWriter) -> str:
    peer = writer.get_extra_info("peername")
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) >= 2 else "unix"


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
