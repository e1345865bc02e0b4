"""Revocation lists of TPM makers, from where their authorities say they are (RFC 5280, 4.2.1.13).

1. What is asked for are the addresses in certificates of a verified path: nobody else's word sends this machine anywhere.
2. Only `http`, as makers publish their lists: a list is signed, and TLS to its address would need a list itself. No user, no
   fragment; port 80 unless private addresses are allowed. Others are left out. [endorser.no_list_address]
3. The name is looked up once, and what is connected to is one of the addresses found, so that no second answer leads
   elsewhere. If any of them is not a public one, none is asked, unless that is allowed: a certificate must not make this
   machine ask its own neighbours. [endorser.private_address endorser.unreachable]
4. Size, time, pace and asking again are those of `transport`; a redirect is no answer. The addresses of one authority are
   asked in their order until one answers with a list in DER.

That the list is the authority's, current and not older than the one before is judged where it is stored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.endorsers.pacing import Pacing
from moorline.endorsers.port import Fetched
from moorline.endorsers.transport import Limits, Reached, Surroundings, VendorHttp
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.verification.collateral import ItemKind, ItemName
from moorline.verification.collateral_judging import packed_crl
from moorline.verification.tpm_revocation import MAX_CRL, MAX_CRLS, MAX_URLS, ListPoint, item_subject, parse_tpm_crl

Lookup = Callable[[str, int], Awaitable[tuple[str, ...]]]
"""The IP addresses of a host name; raises OSError."""
_PORT: Final = 80
_LEADS_ELSEWHERE: Final = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 addresses that carry an IPv4 one, which may be private."""


async def looked_up(host: str, port: int) -> tuple[str, ...]:
    """What the machine's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(one[4][0]) for one in found))


def named(points: Iterable[ListPoint]) -> dict[ItemName, ListPoint]:
    """The points by the name of their list in a store, MAX_CRLS at most, and MAX_URLS addresses of each."""
    found: dict[ItemName, ListPoint] = {}
    for point in points:
        name = ItemName(kind=ItemKind.TPM_CRL, subject=item_subject(point.chain[0]))
        before = found.get(name)
        urls = point.urls if before is None else tuple(dict.fromkeys((*before.urls, *point.urls)))
        if before is not None or len(found) < MAX_CRLS:
            found[name] = ListPoint(chain=point.chain, urls=urls[:MAX_URLS])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What leaves this machine: `private` allows addresses that are not public, for a mirror of lists inside a site."""

    private: bool
    lookup: Lookup = looked_up

    async def reach(self, url: str) -> Reached:
        """Number 3 of the module."""
        parsed = httpx.URL(url)
        port = parsed.port or _PORT
        try:
            addresses = await self.lookup(parsed.host, port)
        except OSError as error:
            raise Unavailable(
                "endorser.unreachable",
                "the name of a maker's server is not known here",
                got=f"{url}: {error}",
                remedy="check the network, or carry a bundle from a machine that has one: moor collateral export",
                retry_after_s=0,
            ) from None
        hidden = [one for one in addresses if not is_public(one)]
        if (hidden and not self.private) or not addresses:
            raise Refused(
                "endorser.private_address",
                "the address of a maker's list leads to no public address",
                expected="a public address",
                got=f"{url}: {', '.join(hidden)}",
                remedy="--allow-private, if the maker's lists are mirrored there",
            )
        host = f"{parsed.host}:{parsed.port}" if parsed.port else parsed.host
        return Reached(url=str(parsed.copy_with(host=addresses[0])), headers={"host": host})

    def allows(self, url: str) -> bool:
        """Number 2 of the module."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            return False
        plain = parsed.scheme == "http" and bool(parsed.host) and not parsed.userinfo and not parsed.fragment
        return plain and (self.private or (parsed.port or _PORT) == _PORT)


class TpmMakers:
    """Makers of TPMs as one endorser, for the lists of these points."""

    def __init__(self, points: Iterable[ListPoint], *, door: Door, surroundings: Surroundings, pacing: Pacing) -> None:
        self._points, self._door = named(points), door
        self._around, self._pacing = surroundings, pacing
        self._servers: dict[str, VendorHttp] = {}

    @property
    def names(self) -> tuple[ItemName, ...]:
        """The lists that can be asked for."""
        return tuple(self._points)

    async def fetch(self, name: ItemName) -> Fetched:
        """As the port says; what the last address answered is raised where none had the list."""
        point = self._points.get(name)
        urls = [] if point is None else [url for url in point.urls if self._door.allows(url)]
        if point is None or not urls:
            raise Unavailable(
                "endorser.no_list_address",
                "no certificate says where this list can be had over http",
                expected="http://... in a CRL distribution point",
                got=name if point is None else ", ".join(point.urls),
                remedy="get it from the maker, and: moor collateral add; --allow-private, if it is a mirror at another port",
            )
        failure: MoorlineError | None = None
        for url in urls:
            try:
                return await self._fetched(name, point, url)
            except MoorlineError as error:
                failure = error
        assert failure is not None  # there was an address
        raise failure

    async def _fetched(self, name: ItemName, point: ListPoint, url: str) -> Fetched:
        parsed = httpx.URL(url)
        base = f"http://{parsed.netloc.decode('ascii')}"
        answer = await self._server(base).get(parsed.raw_path.decode("ascii"), {})
        parse_tpm_crl(answer.body)
        return Fetched(name=name, data=packed_crl(answer.body, _pem(point.chain)), source=url)

    def _server(self, base: str) -> VendorHttp:
        found = self._servers.get(base)
        if found is None:
            limits = Limits(answer_cap=MAX_CRL)
            found = VendorHttp(base, surroundings=self._around, pacing=self._pacing, limits=limits, reach=self._door.reach)
            self._servers[base] = found
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole internet's; anything that is none, or is not known to be, is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif any(found in network for network in _LEADS_ELSEWHERE):
            return False
    return found.is_global and not found.is_multicast


def _pem(chain: Sequence[x509.Certificate]) -> str:
    return "".join(one.public_bytes(Encoding.PEM).decode("ascii") for one in chain)
