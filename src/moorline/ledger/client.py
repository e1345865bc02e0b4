"""Talking to authorities: submit, prove, read. Nothing an authority answers is believed here; proofs are (light_client).

Authorities are asked in turn: one that is unreachable, or cannot answer yet, is passed over; a refusal is the answer.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, Self, TypeVar

from moorline.errors import Malformed, Misconfigured, MoorlineError, Unavailable
from moorline.ledger import anchor, batch, blocks, proof, transactions
from moorline.ledger.blocks import Receipt
from moorline.ledger.checkpoint import Checkpoint, authority_set_digest
from moorline.ledger.transactions import Action, Body, Sender
from moorline.wire import cbor
from moorline.wire.http import HttpClient
from moorline.wire.keys import Signer

T = TypeVar("T")
VALID_FOR_BLOCKS: Final = 200
FIRST_BLOCK_RETRY_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An authority: where it listens (`https://host:port`) and the DNS name its certificate carries."""

    url: str
    server_name: str

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """`url|server name`, as settings have it. Raises Misconfigured("ledger.endpoint_malformed")."""
        url, _, name = text.partition("|")
        if not url or not name:
            raise Misconfigured("ledger.endpoint_malformed", "an authority is given as url|server name", got=text)
        return cls(url=url, server_name=name)


class LedgerClient:
    """A client of several authorities of one ledger. Use as `async with`, or call `aclose`."""

    def __init__(self, endpoints: Sequence[Endpoint], *, roots_pem: bytes, timeout_s: float = 20.0) -> None:
        if not endpoints:
            raise Misconfigured("ledger.no_endpoints", "there is no authority to talk to", remedy="name at least one")
        self._timeout_s = timeout_s
        self._clients = [
            HttpClient(one.url, server_name=one.server_name, roots_pem=roots_pem, timeout_s=timeout_s) for one in endpoints
        ]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close connections."""
        for client in self._clients:
            await client.aclose()

    async def submit(self, transaction: bytes) -> Receipt:
        """The receipt, once a quorum signed; raises what the state machine says (`ledger.*`).

        The receipt is as the authority gave it: `blocks.verify_receipt` proves it.
        """
        answer = await self._first(lambda client: client.post_cbor("/v1/transactions", transaction))
        return blocks.parse_receipt(answer)

    async def submit_all(self, transactions: Sequence[bytes], *, wait: bool = True) -> list[Receipt | MoorlineError | None]:
        """As `submit` of each, several a request: its receipt, what was said instead, or None where nothing was waited for.

        One authority answers for all of a request. Those of one sender are taken in order; what rests on the effect of
        another sender's is sent when that one's receipt is there. Raises as `submit` where no authority answers at all.
        """
        found: list[Receipt | MoorlineError | None] = []
        for part in batch.split(transactions):
            target, body = f"/v1/transactions/batch{'' if wait else '?wait=false'}", batch.encode(part)
            answer = await self._first(partial(_posted, target, body))
            outcomes = batch.parse_answers(answer, len(part))
            found += [blocks.parse_receipt(one) if isinstance(one, bytes) else one for one in outcomes]
        return found

    async def prove(self, keys: Iterable[str], *, height: int = 0, known: Mapping[str, bytes] | None = None) -> bytes:
        """A proof bundle for these keys, unverified; changes of the authorities before the set `known` are left out.

        An authority that says to be behind `height` is passed over; if all are, the answer is what the last one said.
        """
        params = [("key", key) for key in keys]
        if known is not None:
            params.append(("known", authority_set_digest(known).hex()))
        behind: list[bytes] = []

        async def ask(client: HttpClient) -> bytes:
            bundle = await client.get_bytes("/v1/proof", params)
            if height and anchor.parse(proof.parse_bundle(bundle).note).checkpoint.height < height:
                behind.append(bundle)
                raise Unavailable("ledger.behind", "the authority has not taken in a block that another one has")
            return bundle

        try:
            return await self._first(ask)
        except Unavailable:
            if not behind:
                raise
            return behind[-1]

    async def checkpoint(self) -> Checkpoint:
        """The newest checkpoint of the first authority that answers: unverified, good for choosing `valid_until`."""
        return anchor.parse(await self.note()).checkpoint

    async def note(self) -> bytes:
        """The note of the newest checkpoint, unverified."""
        return await self._first(lambda client: client.get_bytes("/v1/checkpoint"))

    async def evidence(self) -> list[bytes]:
        """Evidence that any authority that can be reached has: unverified (ledger.evidence)."""
        found: list[bytes] = []
        unavailable: Unavailable | None = None
        answered = False
        for client in self._clients:
            try:
                answer = cbor.decode(await client.get_bytes("/v1/evidence"), max_bytes=16 << 20)
            except Unavailable as error:
                unavailable = error
                continue
            answered = True
            found += [one for one in answer if isinstance(one, bytes)] if isinstance(answer, list) else []
        if not answered and unavailable is not None:
            raise unavailable
        return found

    async def genesis(self) -> bytes:
        """The genesis: it is the right one if its ledger id is."""
        status = cbor.decode(await self._first(lambda client: client.get_bytes("/v1/ledger")))
        genesis = status.get("genesis") if isinstance(status, dict) else None
        if not isinstance(genesis, bytes):
            raise Malformed("ledger.status_malformed", "the authority's answer cannot be read")
        return genesis

    async def _first(self, ask: Callable[[HttpClient], Awaitable[T]]) -> T:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        while True:
            errors: list[Unavailable] = []
            for client in self._clients:
                try:
                    return await ask(client)
                except Unavailable as error:
                    errors.append(error)
            # A ledger that has just been started makes its first block as soon as a quorum is up: worth waiting for.
            starting = [error for error in errors if error.code == "ledger.no_block_yet"]
            if not starting or asyncio.get_running_loop().time() > deadline:
                raise errors[-1]
            await asyncio.sleep(FIRST_BLOCK_RETRY_S)


async def _posted(target: str, body: bytes, client: HttpClient) -> bytes:
    return await client.post_cbor(target, body)


class Submitter:
    """Signs and submits for one sender: fresh nonces, sensible validity."""

    def __init__(self, client: LedgerClient, *, sender: Sender, signer: Signer, ledger_id: bytes) -> None:
        self._client, self._sender, self._signer, self._ledger_id = client, sender, signer, ledger_id

    async def send(self, body: Body) -> Receipt:
        """The receipt of a transaction with this body; raises as `LedgerClient.submit`."""
        return await self._client.submit(transactions.sign(await self._payload(body), self._signer))

    async def send_proposal(self, action: Action) -> tuple[Receipt, str]:
        """Proposes an action: the receipt, and the proposal's id for the others to approve."""
        payload = await self._payload(transactions.propose(action))
        receipt = await self._client.submit(transactions.sign(payload, self._signer))
        return receipt, transactions.proposal_id(payload)

    async def approve(self, proposal: str) -> Receipt:
        """Approves a proposal."""
        return await self.send(transactions.Approve(proposal=proposal))

    async def _payload(self, body: Body) -> transactions.Payload:
        height = (await self._client.checkpoint()).height
        return transactions.make(
            body,
            sender=self._sender,
            ledger_id=self._ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=height + VALID_FOR_BLOCKS,
        )
