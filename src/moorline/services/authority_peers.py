"""The other authorities, reached over HTTPS with this one's certificate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from moorline.ledger import batch, ceremony, records
from moorline.ledger.batch import Outcome
from moorline.ledger.engines.node import Node
from moorline.ledger.engines.proposal import Peer
from moorline.ledger.genesis import Genesis
from moorline.services.http import TlsIdentity
from moorline.wire.certificates import dns_name
from moorline.wire.http import ClientIdentity, HttpClient

TLS_RENEWAL_S: Final = 1800
PEER_TIMEOUT_S: Final = 3.0
SUBMIT_TIMEOUT_S: Final = 20.0


class HttpPeer:
    """Another authority over HTTPS with this one's certificate; a client is made anew before its certificate ends."""

    def __init__(self, address: str, *, server_name: str, roots_pem: bytes, identity: Callable[[], TlsIdentity]) -> None:
        self.address = address
        self._server_name, self._roots_pem, self._identity = server_name, roots_pem, identity
        self._clients: dict[float, HttpClient] = {}
        self._closing: set[asyncio.Future[None]] = set()
        self._made = 0.0

    async def cosign(self, proposal: bytes) -> str:
        """Its signature line for an encoded proposal."""
        answer = await self._client(PEER_TIMEOUT_S).post_cbor("/v1/cosign", proposal)
        return answer.decode("utf-8", errors="replace")

    async def announce(self, committed: bytes) -> None:
        """Tell it of a committed block."""
        await self._client(PEER_TIMEOUT_S).post_cbor("/v1/blocks", committed)

    async def block(self, height: int) -> bytes:
        """Its committed block at a height."""
        return await self._client(PEER_TIMEOUT_S).get_bytes(f"/v1/blocks/{height}")

    async def note(self) -> bytes:
        """The note of its head."""
        return await self._client(PEER_TIMEOUT_S).get_bytes("/v1/checkpoint")

    async def submit(self, transaction: bytes) -> bytes:
        """Hand it a transaction."""
        return await self._client(SUBMIT_TIMEOUT_S).post_cbor("/v1/transactions?forwarded=true", transaction)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool) -> list[Outcome]:
        """Hand it several transactions."""
        target = f"/v1/transactions/batch?forwarded=true&wait={str(wait).lower()}"
        answer = await self._client(SUBMIT_TIMEOUT_S).post_cbor(target, batch.encode(transactions))
        return batch.parse_answers(answer, len(transactions))

    async def manifest(self) -> bytes:
        """The manifest of its head."""
        return await self._client(SUBMIT_TIMEOUT_S).get_bytes("/v1/snapshot")

    async def chunk(self, first: int) -> bytes:
        """Records of its state from a subtree on."""
        return await self._client(SUBMIT_TIMEOUT_S).get_bytes(f"/v1/snapshot/{first}")

    async def standing(self) -> bytes:
        """Whom it follows."""
        return await self._client(PEER_TIMEOUT_S).get_bytes("/v1/term")

    async def promise(self, request: bytes) -> bytes:
        """Its operator's word and what it holds."""
        return await self._client(SUBMIT_TIMEOUT_S).post_cbor("/v1/words", request)

    def _client(self, timeout_s: float) -> HttpClient:
        if self._clients and time.monotonic() - self._made > TLS_RENEWAL_S:
            for client in self._clients.values():
                closing = asyncio.ensure_future(_close_later(client))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            self._clients.clear()
        if timeout_s not in self._clients:
            shown = self._identity()
            self._clients[timeout_s] = HttpClient(
                f"https://{self.address}",
                server_name=self._server_name,
                roots_pem=self._roots_pem,
                identity=ClientIdentity(certificate_chain_pem=shown.chain_pem, private_key_pem=shown.key_pem),
                timeout_s=timeout_s,
            )
            self._made = time.monotonic()
        return self._clients[timeout_s]


async def _close_later(client: HttpClient) -> None:
    """Close when no request can be in flight any more."""
    await asyncio.sleep(SUBMIT_TIMEOUT_S)
    await client.aclose()


class Peers(Mapping[str, Peer]):
    """The other authorities in force, at the addresses the ledger has for them: admission and retirement show at once."""

    def __init__(self, node: Node, identity: Callable[[], TlsIdentity]) -> None:
        self._node, self._identity = node, identity
        self._known: dict[str, HttpPeer] = {}

    def __getitem__(self, name: str) -> Peer:
        record = records.parse(records.AuthorityRecord, self._node.head.state.records[records.authority_key(name)])
        known = self._known.get(name)
        if known is None or known.address != record.address:
            known = self._known[name] = HttpPeer(
                record.address,
                server_name=server_name(self._node.genesis, name),
                roots_pem=ceremony.pem_of(self._node.genesis.roots),
                identity=self._identity,
            )
        return known

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._node.authorities() if name != self._node.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def server_name(found: Genesis, name: str) -> str:
    """The DNS name of an authority's TLS certificate."""
    return dns_name(ceremony.authority_id(found.consortium_domain, name))
