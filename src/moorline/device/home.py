"""A device at its home HSM: its word about a connection, and the other HSM's word brought back (wire.access).

The home HSM is found where the device enrolled, and authenticated by its TLS name and chain. While it cannot be reached a
connection that is open goes on under the last statement about it, as long as that is valid (max_age at most); no new one is
made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from moorline.channel.device import Secured
from moorline.channel.tls import TlsIdentity
from moorline.clock import Clock
from moorline.device.enrolment import client_identity, roots_pem
from moorline.device.store import DeviceStore
from moorline.errors import Unavailable
from moorline.ledger.client import Endpoint
from moorline.verification.chains import VerifiedChain
from moorline.wire import schema
from moorline.wire.access import PROFILE_TLS, AccessAnswer, AccessQuestion, Connection, parse_statement
from moorline.wire.http import HttpClient

RETRY_AFTER_S: Final = 5


class Home(Protocol):
    """The home HSM, as far as a connection needs it."""

    async def ask(self, question: AccessQuestion) -> bytes:
        """Its signed statement. Raises Unavailable("access.home_unavailable") with a time to ask again."""
        ...

    async def tell(self, answer: AccessAnswer) -> None:
        """Bring it what the function's HSM said. Raises as `ask`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpsHome:
    """The home HSM over mutual TLS, under the device's certificate of now."""

    endpoint: Endpoint
    roots_pem: bytes
    identity: Callable[[], TlsIdentity]

    @classmethod
    def of(cls, store: DeviceStore) -> HttpsHome:
        """Where this device enrolled. Raises Misconfigured("device.not_provisioned")."""
        return cls(endpoint=store.home(), roots_pem=roots_pem(store.trust()), identity=store.identity)

    async def ask(self, question: AccessQuestion) -> bytes:
        """`POST /v1/access`."""
        return await self._post("/v1/access", schema.encode(question))

    async def tell(self, answer: AccessAnswer) -> None:
        """`POST /v1/access/answers`."""
        await self._post("/v1/access/answers", schema.encode(answer))

    async def _post(self, path: str, body: bytes) -> bytes:
        where, shown = self.endpoint, client_identity(self.identity())
        try:
            async with HttpClient(
                where.url, server_name=where.server_name, roots_pem=self.roots_pem, identity=shown
            ) as client:
                return await client.post_cbor(path, body)
        except Unavailable as error:
            raise Unavailable(
                "access.home_unavailable",
                "the device's home HSM does not say whether it may connect",
                expected=where.url,
                got=error.code,
                remedy="connect again when the provider's broker answers",
                retry_after_s=max(error.retry_after_s, RETRY_AFTER_S),
            ) from None


class HomeWord:
    """The home HSM's word about one connection, kept for its renewals."""

    def __init__(self, home: Home, clock: Clock) -> None:
        self._home, self._clock = home, clock
        self._statement = b""
        self._connection: Connection | None = None
        self._told = False

    @property
    def statement(self) -> bytes:
        """The newest statement, empty before the first."""
        return self._statement

    async def about(self, connection: Connection) -> bytes:
        """A statement about this connection; the last one while the home HSM is away and that one is valid."""
        try:
            self._statement = await self._home.ask(AccessQuestion(connection=connection))
        except Unavailable:
            if self._connection != connection or not self._valid():
                raise
        self._connection = connection
        return self._statement

    async def bring(self, function: bytes) -> None:
        """Bring the home HSM what the function's said. Of a connection that it was told about, the next time does."""
        try:
            await self._home.tell(AccessAnswer(home=self._statement, function=function))
        except Unavailable:
            if not self._told:
                raise
        self._told = True

    def _valid(self) -> bool:
        return bool(self._statement) and self._clock.now() <= parse_statement(self._statement).not_after


def connection_of(
    own: VerifiedChain, peer: VerifiedChain, secured: Secured, *, provider: str, service: str, contract: str
) -> Connection:
    """What the two HSMs are asked about, as this end knows it."""
    return Connection(
        device=str(own.spiffe_id),
        device_provider=own.provider_name,
        function=str(peer.spiffe_id),
        function_provider=provider,
        service=service,
        contract=contract,
        profile=PROFILE_TLS,
        post_quantum=secured.post_quantum,
        binding=secured.binding,
    )
