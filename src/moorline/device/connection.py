"""A device's connection to a function of another provider (PROTOCOLS.md 7; ARCHITECTURE.md, walk 3).

The device proves its own standing with a bundle it fetches from the ledger, and takes a function only if chain and bundle
show it to be an instance in good standing of the wanted service, under a contract between the two providers in force now,
and the HSMs of both let this device in: its home HSM is asked about each connection, the function's answers that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from moorline.channel import device as channel
from moorline.clock import Clock
from moorline.device import tls_key
from moorline.device.enrolment import roots_pem
from moorline.device.home import Home, HomeWord, HttpsHome, connection_of
from moorline.device.store import DeviceStore
from moorline.errors import NotAuthentic
from moorline.ledger import access, peers
from moorline.ledger.client import LedgerClient
from moorline.ledger.fetching import not_overtaken
from moorline.ledger.light_client import LedgerTrust, ProvenState, verify_bundle
from moorline.nfv import Role
from moorline.verification.chains import VerifiedChain, verify_chain
from moorline.wire.access import Connection, Side, parse_statement
from moorline.wire.device import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The function a device wants: a service of a provider, under a contract. Which instance answers does not matter."""

    provider: str
    service: str
    contract: str


class Prove(Protocol):
    """Fetches a bundle about these keys, unverified; at this height, if anybody has it. `LedgerClient.prove` is one."""

    async def __call__(self, keys: tuple[str, ...], /, *, height: int = 0) -> bytes:
        """The bundle, from wherever: it is verified here."""
        ...


@asynccontextmanager
async def connected(
    store: DeviceStore, address: str, wanted: Wanted, *, clock: Clock, deadline_s: float = 10.0
) -> AsyncIterator[channel.DeviceConnection]:
    """A connection to the wanted function at `address`, both ends judged now and again every max_age.

    Raises `device.*`, `chain.*`, `ledger.*`, `peer.*`, and whatever the function reports.
    """
    async with (
        LedgerClient(store.endpoints(), roots_pem=roots_pem(store.trust())) as ledger,
        await connect(
            store,
            address,
            wanted,
            clock=clock,
            prove=ledger.prove,
            home=HttpsHome.of(store),
            deadline_s=deadline_s,
        ) as connection,
    ):
        yield connection


async def connect(
    store: DeviceStore,
    address: str,
    wanted: Wanted,
    *,
    clock: Clock,
    prove: Prove,
    home: Home,
    deadline_s: float = 10.0,
) -> channel.DeviceConnection:
    """As `connected`, with proofs from `prove` and the home HSM's word from `home`; the caller closes the connection."""
    trust = store.trust()
    await tls_key.ensure(store, clock.now())
    identity = store.identity()
    own = verify_chain(identity.chain[0], identity.chain[1:], trust.roots, clock.now())
    both = _BothHsms(trust=trust, own=own, wanted=wanted, clock=clock, home=HomeWord(home, clock))

    async def bundle() -> bytes:
        highest = store.highest()  # before asking: another connection of this device may be answered in between

        async def fetched(height: int) -> tuple[bytes, ProvenState]:
            made = await prove(peers.device_keys(own), height=height)
            return made, verify_bundle(made, trust, now=clock.now(), highest=highest)

        made, state = await not_overtaken(fetched)
        store.keep_highest(state.checkpoint)
        return made

    return await channel.connect(
        address,
        identity=identity,
        roots=trust.roots,
        clock=clock,
        bundle=bundle,
        ask_home=both.ask_home,
        judge=both.judge,
        max_age_s=trust.max_age_s,
        deadline_s=deadline_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _BothHsms:
    """One connection, as chain, ledger and the HSMs of both providers judge it."""

    trust: LedgerTrust
    own: VerifiedChain
    wanted: Wanted
    clock: Clock
    home: HomeWord

    async def ask_home(self, peer: VerifiedChain, secured: channel.Secured) -> bytes:
        """The home HSM's word, a no too: the function's HSM is to see it."""
        _require_wanted(peer, self.wanted)
        return await self.home.about(self._connection(peer, secured))

    async def judge(self, peer: VerifiedChain, status: Status, secured: channel.Secured) -> None:
        """Raises unless it is the wanted function in good standing, and both HSMs say yes.

        The function's answer is brought home before anything follows from it.
        """
        # Judged by age and not against our highest: its fetch and ours are two moments (docs/spec/device-channel.md).
        state = verify_bundle(status.bundle, self.trust, now=self.clock.now())
        judge_function(state, peer, self.wanted)
        home = parse_statement(self.home.statement)
        connection, age = self._connection(peer, secured), self.trust.max_age_s
        expected = access.Expected(side=Side.FUNCTION, connection=connection, max_age_s=age, answers=self.home.statement)
        function = access.require_about(state, status.access, expected, now=self.clock.now())
        await self.home.bring(status.access)
        access.require_allowed(home)
        access.require_allowed(function)
        require_contract(state, self.wanted, grantee=self.own.provider_name)

    def _connection(self, peer: VerifiedChain, secured: channel.Secured) -> Connection:
        wanted = self.wanted
        return connection_of(
            self.own, peer, secured, provider=wanted.provider, service=wanted.service, contract=wanted.contract
        )


def judge_function(state: ProvenState, chain: VerifiedChain, wanted: Wanted) -> None:
    """Raises unless the peer is the wanted function, in good standing.

    Raises NotAuthentic("device.other_function"), `ledger.*`.
    """
    peers.instance_peer(state, chain)
    _require_wanted(chain, wanted)


def _require_wanted(chain: VerifiedChain, wanted: Wanted) -> None:
    found = (chain.provider_name, chain.spiffe_id.segments[0])
    if chain.spiffe_id.role is not Role.SERVICE or found != (wanted.provider, wanted.service):
        raise NotAuthentic(
            "device.other_function",
            "another function answers there",
            expected=f"{wanted.service} of {wanted.provider}",
            got=f"{found[1]} of {found[0]}",
        )


def require_contract(state: ProvenState, wanted: Wanted, *, grantee: str) -> None:
    """Raises `ledger.*` unless the contract is in force between the function's provider and our own, about the service."""
    peers.contract_between(state, wanted.contract, provider=wanted.provider, service=wanted.service, grantee=grantee)
