"""An HTTPS client that speaks our conventions: answers capped, problems become errors, servers checked by name.

Servers are dialled by address and checked by DNS name: the certificate must chain to the given roots and carry
`server_name` (wire.certificates.dns_name of the server's SPIFFE ID). With `server_role` it must carry the SPIFFE ID of that
name and role too, and nothing is sent to a server before it has shown that. Errors the server reports (problem+json) are
rebuilt as the typed errors they were; anything that keeps an answer from arriving is `Unavailable("peer.unreachable")`.
"""

from __future__ import annotations

import json
import os
import ssl
import stat
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from moorline.errors import Malformed, MoorlineError, NotAuthentic, Unavailable, from_problem
from moorline.nfv import Role
from moorline.wire import certificates
from moorline.wire.http_get import Answer, Query, ShortWay

# httpx imports its own command line (click, rich) wherever it can: a quarter of a second of every process that speaks HTTP.
_OWN_COMMAND_LINE: Final = "httpx._main"
if "httpx" not in sys.modules:
    sys.modules[_OWN_COMMAND_LINE] = None  # type: ignore[assignment]  # an import of it now fails, which httpx allows for
import httpx  # noqa: E402

if sys.modules.get(_OWN_COMMAND_LINE, ...) is None:
    del sys.modules[_OWN_COMMAND_LINE]

ANSWER_CAP: Final = 16 << 20
_BAD: Final = 400
PROBLEM_TYPE: Final = "application/problem+json"
CBOR_TYPE: Final = "application/cbor"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientIdentity:
    """The certificate (leaf first, then its chain) and private key a client shows; both PEM."""

    certificate_chain_pem: bytes
    private_key_pem: bytes


def server_context(chain_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    """A TLS 1.3 server context from PEM in memory; no session tickets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    load_identity(context, chain_pem, key_pem)
    return context


def load_identity(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
    """Put a certificate and key held in memory into `context`, both or neither; the key touches no disk.

    OpenSSL would leave a context that gets a bad pair without any certificate, so the pair is tried on another one first:
    what is in use stays. Raises ssl.SSLError.
    """
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain_pem, key_pem)
    _load(context, chain_pem, key_pem)


def _load(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
    """Python's ssl loads keys from paths only, so the PEM passes through an anonymous memory file that is closed again."""
    descriptor = os.memfd_create("moorline-tls", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
        os.write(descriptor, key_pem + b"\n" + chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def client_context(
    roots_pem: bytes, identity: ClientIdentity | None, *, server: tuple[str, Role] | None = None
) -> ssl.SSLContext:
    """A TLS 1.3 client context that trusts `roots_pem` and nothing else, and to `server` (name, role) only, if given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if server is not None:
        context.sslobject_class = _knowing(*server)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    if identity is not None:
        load_identity(context, identity.certificate_chain_pem, identity.private_key_pem)
    return context


def _knowing(name: str, role: Role) -> type[ssl.SSLObject]:
    """TLS that ends the handshake, before anything is said, unless the server is who has this name in this role."""

    class Knowing(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            der = self.getpeercert(binary_form=True)
            try:
                found = certificates.spiffe_id_of(certificates.parse_certificate(der or b""))
            except MoorlineError as error:
                raise ssl.SSLCertVerificationError(f"the server shows no SPIFFE ID: {error.code}") from None
            if found.role is not role or certificates.dns_name(found) != name:
                raise ssl.SSLCertVerificationError(f"the server is {found}, and not the {role} {name}")

    return Knowing


class HttpClient:
    """Asynchronous client for one server. Use as `async with`; not for redirects, cookies or proxies."""

    def __init__(
        self,
        base_url: str,
        *,
        server_name: str,
        roots_pem: bytes,
        server_role: Role | None = None,
        identity: ClientIdentity | None = None,
        uds: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._where = uds or base_url
        server = None if server_role is None else (server_name, server_role)
        secured = base_url.startswith("https:")
        verify = client_context(roots_pem, identity, server=server) if secured else True
        self._extensions = {"sni_hostname": server_name} if secured else {}
        self._short: ShortWay | None = None
        if isinstance(verify, ssl.SSLContext) and uds is None:
            self._short = ShortWay(base_url, context=verify, server_name=server_name, timeout_s=timeout_s, cap=ANSWER_CAP)
        self._client = httpx.AsyncClient(
            base_url=base_url,
            transport=httpx.AsyncHTTPTransport(verify=verify, uds=uds, http2=False, trust_env=False),
            timeout=timeout_s,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_short()
        await self._client.__aexit__(kind, error, trace)

    async def aclose(self) -> None:
        """Close connections; for users that cannot hold an `async with`."""
        self._close_short()
        await self._client.aclose()

    def _close_short(self) -> None:
        if self._short is not None:
            self._short.close()

    async def get_json(self, path: str, params: Query | None = None) -> object:
        """The JSON value at `path`."""
        return _json(await self._get(path, params))

    async def get_bytes(self, path: str, params: Query | None = None) -> bytes:
        """The body at `path`, whatever its type."""
        return await self._get(path, params)

    async def _get(self, path: str, params: Query | None) -> bytes:
        answer = None if self._short is None else await self._short.get(path, params)
        return await self._send("GET", path, params=params) if answer is None else _good(answer)

    async def post_json(self, path: str, body: object) -> object:
        """The JSON answer to a JSON body."""
        return _json(await self._send("POST", path, json=body))

    async def post_cbor(self, path: str, body: bytes) -> bytes:
        """The body that answers a CBOR body."""
        return await self._send("POST", path, content=body, headers={"content-type": CBOR_TYPE})

    async def send(self, method: str, path: str, *, content: bytes = b"", headers: dict[str, str]) -> bytes:
        """Any other exchange (EST, DELETE): the answer's body."""
        return await self._send(method, path, content=content, headers=headers)

    async def answer(self, method: str, path: str, *, content: bytes, headers: dict[str, str]) -> Answer:
        """Any other exchange with a server that does not speak our conventions: whatever it answers, redirects too."""
        return await self._reach(method, path, content=content, headers=headers)

    async def _send(self, method: str, path: str, **arguments: object) -> bytes:
        return _good(await self._reach(method, path, **arguments))

    async def _reach(self, method: str, path: str, **arguments: object) -> Answer:
        try:
            try:
                response = await self._exchange(method, path, **arguments)
            except httpx.RemoteProtocolError:
                if method != "GET":
                    raise
                # A kept connection that the server closed just now; asking once more changes nothing there.
                response = await self._exchange(method, path, **arguments)
        except httpx.ConnectError as error:
            if _not_trusted(error):
                raise NotAuthentic(
                    "peer.tls_not_trusted",
                    "the server's certificate does not hold",
                    got=str(error),
                    remedy="check the trust file and the server's name",
                ) from None
            raise self._unreachable(error) from None
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        return Answer(status=response.status_code, headers=dict(response.headers), body=response.content)

    async def _exchange(self, method: str, path: str, **arguments: object) -> httpx.Response:
        request = self._client.build_request(method, path, extensions=self._extensions, **arguments)  # type: ignore[arg-type]
        response = await self._client.send(request, stream=True)
        try:
            response._content = await self._capped(response)  # noqa: SLF001 - httpx has no reader with a cap
        finally:
            await response.aclose()
        return response

    async def _capped(self, response: httpx.Response) -> bytes:
        parts = bytearray()
        async for part in response.aiter_bytes():
            parts += part
            if len(parts) > ANSWER_CAP:
                raise Malformed("peer.answer_too_large", "the server's answer is too large", expected=ANSWER_CAP)
        return bytes(parts)

    def _unreachable(self, error: Exception) -> Unavailable:
        return Unavailable(
            "peer.unreachable",
            f"no answer from {self._where}",
            got=f"{type(error).__name__}: {error}",
            remedy="check that the service runs and its address is right",
        )


def _good(answer: Answer) -> bytes:
    """The body; raises what a server says that refuses."""
    if answer.status < _BAD:
        return answer.body
    if answer.headers.get("content-type", "").split(";")[0] != PROBLEM_TYPE:
        raise Malformed("peer.problem_malformed", "the server refused without saying why", got=f"HTTP {answer.status}")
    raise from_problem(_json(answer.body))


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        raise Malformed("peer.answer_malformed", "the server's answer is not JSON") from None


def _not_trusted(error: BaseException) -> bool:
    """True if anywhere behind `error` stands TLS saying that the certificate does not hold."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, ssl.SSLCertVerificationError):
            return True
        behind = behind.__cause__ or behind.__context__
    return False
