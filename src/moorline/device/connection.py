"""A device's connection to a function of another provider (PROTOCOLS.md 7; ARCHITECTURE.md, walk 3).

The device proves its own standing with a bundle it fetches from the ledger, and takes a function only if chain and bundle
show it to be an instance in good standing of the wanted service, under a contract between the two providers in force now.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from moorline.channel import device as channel
from moorline.clock import Clock
from moorline.device.enrolment import roots_pem
from moorline.device.store import DeviceStore
from moorline.errors import NotAuthentic
from moorline.ledger import peers
from moorline.ledger.client import LedgerClient
from moorline.ledger.light_client import ProvenState, verify_bundle
from moorline.verification.chains import VerifiedChain, verify_chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The function a device wants: a service of a provider, under a contract. Which instance answers does not matter."""

    provider: str
    service: str
    contract: str


Prove = Callable[[tuple[str, ...]], Awaitable[bytes]]
"""A ledger proof bundle with these keys, from wherever: it is verified here."""


@asynccontextmanager
async def connected(
    store: DeviceStore, address: str, wanted: Wanted, *, clock: Clock, deadline_s: float = 10.0
) -> AsyncIterator[channel.DeviceConnection]:
    """A connection to the wanted function at `address`, both ends judged now and again every max_age.

    Raises `device.*`, `chain.*`, `ledger.*`, `peer.*`, and whatever the function reports.
    """
    async with (
        LedgerClient(store.endpoints(), roots_pem=roots_pem(store.trust())) as ledger,
        await connect(store, address, wanted, clock=clock, prove=ledger.prove, deadline_s=deadline_s) as connection,
    ):
        yield connection


async def connect(
    store: DeviceStore, address: str, wanted: Wanted, *, clock: Clock, prove: Prove, deadline_s: float = 10.0
) -> channel.DeviceConnection:
    """As `connected`, with proofs from `prove`; the caller closes the connection."""
    trust = store.trust()
    identity = store.identity()
    own = verify_chain(identity.chain[0], identity.chain[1:], trust.roots, clock.now())

    async def bundle() -> bytes:
        highest = store.highest()  # before asking: another connection of this device may be answered in between
        made = await prove(peers.device_keys(own))
        state = verify_bundle(made, trust, now=clock.now(), highest=highest)
        store.keep_highest(state.checkpoint)
        return made

    async def judge(chain: VerifiedChain, shown: bytes) -> None:
        # Judged by age and not against our highest: its fetch and ours are two moments (docs/spec/device-channel.md).
        judge_function(verify_bundle(shown, trust, now=clock.now()), chain, wanted, grantee=own.provider_name)

    return await channel.connect(
        address,
        identity=identity,
        roots=trust.roots,
        clock=clock,
        bundle=bundle,
        judge=judge,
        max_age_s=trust.max_age_s,
        deadline_s=deadline_s,
    )


def judge_function(state: ProvenState, chain: VerifiedChain, wanted: Wanted, *, grantee: str) -> None:
    """Raises unless the peer is the wanted function, in good standing, under the contract with our own provider.

    Raises NotAuthentic("device.other_function"), `ledger.*`.
    """
    provider, _ = peers.instance_peer(state, chain)
    found = (provider, chain.spiffe_id.segments[0])
    if found != (wanted.provider, wanted.service):
        raise NotAuthentic(
            "device.other_function",
            "another function answers there",
            expected=f"{wanted.service} of {wanted.provider}",
            got=f"{found[1]} of {found[0]}",
        )
    peers.contract_between(state, wanted.contract, provider=wanted.provider, service=wanted.service, grantee=grantee)
