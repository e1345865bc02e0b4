"""HTTPS to a vendor: whole answers within a size and a time, failures by whose fault they are, and asking again.

1. HTTPS only, against the machine's roots or the ones given; plain HTTP to this machine itself is allowed, for a mirror or a
   test. TLS keeps what is asked for private; authenticity comes from the vendors' signatures. [endorser.url
   endorser.not_trusted]
2. No redirects, no cookies, no compression, no proxy from the environment.
3. An answer has `answer_cap` bytes at most and arrives within `deadline_s` in all, so that a server which sends one byte a
   second is one that does not answer. [endorser.answer_too_large endorser.timeout]
4. 429, 503 and other 5xx, and answers that do not arrive, are asked for again as `pacing` says.
   [endorser.rate_limited endorser.unavailable endorser.unreachable]
5. 404 and 410 are answers: the vendor has no such item. [endorser.not_found endorser.gone] Everything else that is no 200 is
   our fault or makes no sense. [endorser.request_refused endorser.answer_malformed]
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from moorline.clock import Clock
from moorline.endorsers.pacing import Pacing, retry_after
from moorline.errors import Malformed, Misconfigured, MoorlineError, NotAuthentic, Unavailable

_OK: Final = 200
_TOO_MANY: Final = 429
_UNAVAILABLE: Final = 503
_NOT_FOUND: Final = 404
_GONE: Final = 410
_LOCAL: Final = "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much and how long one answer may be."""

    answer_cap: int = 4 << 20
    connect_s: float = 10.0
    deadline_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A 200. Header names are in lower case."""

    body: bytes
    headers: Mapping[str, str]
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a client takes from its process: time, a clock that never jumps, sleep, and a number in [0, 1) for jitter."""

    clock: Clock
    monotonic: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    jitter: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Where a URL is really asked for, and what has to be said besides."""

    url: str
    headers: Mapping[str, str]


class VendorHttp:
    """One vendor's server. Use one for a process: it keeps the pace.

    `reach` takes the place of number 1: it says where a URL leads, or refuses it (endorsers.tpm_makers).
    """

    def __init__(
        self,
        base_url: str,
        *,
        surroundings: Surroundings,
        roots_pem: bytes | None = None,
        pacing: Pacing | None = None,
        limits: Limits | None = None,
        reach: Callable[[str], Awaitable[Reached]] | None = None,
    ) -> None:
        self._base = _allowed(base_url) if reach is None else base_url
        self._reach = reach
        self._around = surroundings
        self._pacing = pacing or Pacing()
        self._limits = limits or Limits()
        self._turn = asyncio.Lock()
        self._last: float | None = None
        self._tls = _context(roots_pem)

    async def get(self, path: str, params: Mapping[str, str]) -> Answer:
        """The answer to one GET, asked for again where that can help. Raises the codes above."""
        attempt = 0
        while True:
            try:
                return await self._once(path, params)
            except Unavailable as error:
                if error.code in ("endorser.not_found", "endorser.gone"):
                    raise
                asked = error.retry_after_s if error.code == "endorser.rate_limited" and error.retry_after_s > 0 else None
                pause = self._pacing.pause_s(attempt, jitter=self._around.jitter(), retry_after_s=asked)
                if pause is None:
                    raise
            attempt += 1
            await self._around.sleep(pause)

    async def _once(self, path: str, params: Mapping[str, str]) -> Answer:
        await self._own_turn()
        url = f"{self._base}{path}"
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                return await self._exchange(url, params)
        except (TimeoutError, httpx.TimeoutException):
            raise Unavailable(
                "endorser.timeout",
                "the vendor's answer did not arrive in time",
                expected=f"<= {self._limits.deadline_s} s",
                got=url,
                retry_after_s=0,
            ) from None
        except httpx.TransportError as error:
            raise _no_answer(url, error) from None

    async def _own_turn(self) -> None:
        async with self._turn:
            now = self._around.monotonic()
            if self._last is not None and now < self._last + self._pacing.interval_s:
                await self._around.sleep(self._last + self._pacing.interval_s - now)
            self._last = self._around.monotonic()

    async def _exchange(self, url: str, params: Mapping[str, str]) -> Answer:
        reached = Reached(url=url, headers={}) if self._reach is None else await self._reach(url)
        transport = httpx.AsyncHTTPTransport(verify=self._tls, http2=False, trust_env=False)
        timeout = httpx.Timeout(self._limits.deadline_s, connect=self._limits.connect_s)
        headers = {"accept-encoding": "identity", "user-agent": "moorline", **reached.headers}
        async with (
            httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False, headers=headers) as client,
            client.stream("GET", reached.url, params=dict(params) or None) as response,
        ):
            if response.status_code != _OK:
                raise self._refusal(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Malformed("endorser.answer_malformed", "the vendor compressed an answer that must not be")
            body = await self._capped(response)
            return Answer(body=body, headers=dict(response.headers), url=str(response.request.url))

    async def _capped(self, response: httpx.Response) -> bytes:
        parts = bytearray()
        async for part in response.aiter_raw():
            parts += part
            if len(parts) > self._limits.answer_cap:
                raise Malformed(
                    "endorser.answer_too_large", "the vendor's answer is too large", expected=self._limits.answer_cap
                )
        return bytes(parts)

    def _refusal(self, response: httpx.Response) -> MoorlineError:
        status, url = response.status_code, str(response.request.url)
        said = response.headers.get("error-code") or response.headers.get("error-message")
        got = f"HTTP {status}" + (f", {said}" if said else "") + f" from {url}"
        wait = retry_after(response.headers.get("retry-after"), self._around.clock.now())
        if status in (_TOO_MANY, _UNAVAILABLE) and (status == _TOO_MANY or wait is not None):
            return Unavailable(
                "endorser.rate_limited",
                "the vendor asks for patience",
                got=got,
                remedy="ask again later, fetch fewer items at once, or use a mirror",
                retry_after_s=0 if wait is None else wait,
            )
        if status == _NOT_FOUND:
            return Unavailable(
                "endorser.not_found",
                "the vendor knows no such item",
                got=got,
                remedy="check chip id, product, TCB or FMSPC; a pre-production platform is not known to its vendor",
            )
        if status == _GONE:
            return Unavailable(
                "endorser.gone",
                "the vendor no longer has this item",
                got=got,
                remedy="ask for a newer TCB evaluation",
            )
        if status >= 500:
            return Unavailable("endorser.unavailable", "the vendor cannot answer now", got=got, retry_after_s=0)
        if 400 <= status < 500:
            return Misconfigured("endorser.request_refused", "the vendor refuses the request as we make it", got=got)
        return Malformed("endorser.answer_malformed", "an answer that is neither the item nor a refusal", got=got)


def _no_answer(url: str, error: httpx.TransportError) -> MoorlineError:
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, ssl.SSLCertVerificationError):
            return NotAuthentic(
                "endorser.not_trusted",
                "the vendor's TLS certificate does not hold",
                got=f"{url}: {behind.verify_message}",
                remedy="look for an intercepting proxy, and at this machine's clock and roots",
            )
        behind = behind.__cause__ or behind.__context__
    return Unavailable(
        "endorser.unreachable",
        "no answer from the vendor",
        got=f"{url}: {type(error).__name__}: {error}",
        remedy="check the network, or carry a bundle from a machine that has one: moor collateral export",
        retry_after_s=0,
    )


def _allowed(base_url: str) -> str:
    try:
        parsed = httpx.URL(base_url)
    except httpx.InvalidURL:
        raise Misconfigured("endorser.url", "not a URL", got=base_url) from None
    if parsed.scheme == "https" and parsed.host and not parsed.query and not parsed.userinfo:
        return base_url.rstrip("/")
    if parsed.scheme == "http" and _is_this_machine(parsed.host):
        return base_url.rstrip("/")
    raise Misconfigured("endorser.url", "a vendor is asked over HTTPS", expected="https://...", got=base_url)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == _LOCAL


def _context(roots_pem: bytes | None) -> ssl.SSLContext:
    if roots_pem is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError):
        raise Misconfigured("endorser.roots", "the roots for the vendor's server are no certificates in PEM") from None
    return context
