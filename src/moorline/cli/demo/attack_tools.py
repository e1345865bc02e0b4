"""What attackers have in common: what came of an attempt, launches as a host gets to see them, guests started by hand.

Nothing here refuses anything: codes come from the processes under attack.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric import x25519

from moorline.cli.demo import hosting, operating
from moorline.cli.demo.world import CONTRACT, HSM, ORCHESTRATOR, SERVICE, World, now
from moorline.clock import Instant
from moorline.errors import MoorlineError, Unavailable
from moorline.host_agent.guests import Guests, GuestState, active_event, refused_event
from moorline.host_agent.silicon import SiliconClient
from moorline.ledger.fetching import not_overtaken
from moorline.orchestration import grant as grants
from moorline.orchestration import intent as intents
from moorline.services.orchestrator_peers import LauncherLink
from moorline.wire import keys, launch, schema
from moorline.wire.guest import FunctionConfiguration, FunctionLaunch
from moorline.wire.launch import ChannelProfile, LaunchFields
from moorline.wire.orchestration import GuestOrder, LaunchIntent, LaunchRequest
from moorline.wire.silicon import GuestStatus, LaunchGuest

T = TypeVar("T")

GUEST_DEADLINE_S: Final = 20.0
LAUNCH_LIFE_S: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an attempt: the victim's code (None: it did not refuse), and whether the control succeeded."""

    code: str | None
    control: bool
    says: str
    unfinished: bool = False


async def refused_with(request: Awaitable[object]) -> str | None:
    """The code with which the request was refused, or None if it went through."""
    try:
        await request
    except MoorlineError as error:
        return error.code
    return None


async def once(world: World, name: str, make: Callable[[], Awaitable[T]]) -> T:
    """What `make` makes, made once in a run: several attacks share one control, and run at the same time."""
    shared: dict[str, asyncio.Future[T]] = world.facts.setdefault("shared", {})
    if name not in shared:
        shared[name] = asyncio.ensure_future(make())
    return await asyncio.shield(shared[name])


async def time_passes(until: Instant) -> None:
    """Wait, for real, until every clock of whole seconds says more than `until`."""
    await asyncio.sleep(max(0.0, until + 1.1 - time.time()))


def sha256(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


# Launches, as a host gets to see them ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Minted:
    """A genuine launch for one more instance, as the host gets to see it."""

    fields: LaunchFields
    token: bytes
    configuration: bytes


async def mint(world: World, instance: str, *, life_s: int = LAUNCH_LIFE_S, chip: bytes | None = None) -> Minted:
    """A launch of `instance` on h1, intended with alpha's orchestrator key; raises why the launcher enclave grants none.

    `chip` is h1's registered one unless given.
    """
    trust = world.consortium.trust
    configuration = function_configuration(world, contracts=(CONTRACT,))
    registered = hosting.host(world, "h1").chip
    assert registered is not None
    reply_key = x25519.X25519PrivateKey.generate()
    intent = LaunchIntent(
        ledger_id=trust.ledger_id,
        provider="alpha",
        orchestrator=ORCHESTRATOR,
        tenant=operating.TENANT,
        service=SERVICE,
        package_digest=world.facts["package_digest"],
        configuration_digest=sha256(configuration),
        measurement=world.facts["measurement"],
        instance=instance,
        generation=1,
        host="h1",
        chip=registered.chip_id if chip is None else chip,
        hsm=HSM,
        profile=ChannelProfile.TLS,
        not_after=now() + life_s,
        reply_key=reply_key.public_key().public_bytes_raw(),
    )
    signed = intents.sign(intent, keys.KeySigner(world.facts["intent_key"]))
    link = LauncherLink(world.facts["launcher_address"])

    async def answered(height: int) -> grants.Granted:
        bundle = await world.ledger.prove(intents.keys_to_prove(intent), height=height)
        reply = await link.exchange(schema.encode(LaunchRequest(intent=signed, bundle=bundle)))
        return grants.verify_reply(
            reply, signed, intent, reply_key, roots=trust.roots, trust_domain=world.alpha.trust_domain, now=now()
        )

    granted = await not_overtaken(answered)
    return Minted(fields=granted.fields, token=granted.token, configuration=configuration)


def function_configuration(world: World, *, contracts: tuple[str, ...]) -> bytes:
    """A function's configuration, as a host hands it over."""
    trust = world.consortium.trust
    return schema.encode(
        FunctionConfiguration(
            trust=trust.encode(),
            provider="alpha",
            hsm=HSM,
            service=SERVICE,
            contracts=contracts,
            max_age_s=trust.max_age_s,
            settings={},
        )
    )


def order_of(world: World, minted: Minted, name: str) -> GuestOrder:
    """What the host of a genuine launch is to start, whole and unharmed; `name` is the host's own word for the guest."""
    return GuestOrder(
        instance=name,
        entry=operating.FUNCTION_ENTRY,
        host_data=launch.commitment(minted.fields),
        launch=schema.encode(FunctionLaunch(launch_fields=launch.encode_fields(minted.fields), token=minted.token)),
        package=world.facts["csar"],
        configuration=minted.configuration,
        memory_mib=256,
        pids=64,
        relays={"broker": world.alpha.sessions},
        publish=True,
    )


# Guests, started by the administrator of a machine, who has root and the silicon's socket -------------------------------


class DebuggingSilicon(SiliconClient):
    """The silicon as a host uses it that wants to read its guests' memory."""

    async def launch(self, request: LaunchGuest) -> GuestStatus:
        """As asked, with the debug bit of the guest policy."""
        return await super().launch(dataclasses.replace(request, debug=True))


@dataclass(slots=True, kw_only=True)
class Started:
    """A guest that went active (`problem` None; it runs until `end`) or gave up."""

    problem: MoorlineError | None
    state: GuestState
    guests: Guests

    @property
    def code(self) -> str | None:
        """Why it gave up."""
        return None if self.problem is None else self.problem.code

    async def end(self) -> None:
        """Stop the guest."""
        await self.guests.stop(self.state.instance)


async def started(world: World, order: GuestOrder, *, machine: str = "h1", debug: bool = False) -> Started:
    """Start a guest on a machine's silicon, past orchestrator and host agent, and wait for what it says."""
    guests = _guests(world, machine, debug=debug)
    await guests.start(order)
    deadline = asyncio.get_running_loop().time() + GUEST_DEADLINE_S
    while asyncio.get_running_loop().time() < deadline:
        state = await guests.state(order.instance)
        problem = refused_event(state)
        if problem is not None or active_event(state) is not None:
            return Started(problem=problem, state=state, guests=guests)
        await asyncio.sleep(0.05)
    await guests.stop(order.instance)
    raise Unavailable("demo.guest_silent", "the guest said nothing", remedy="read guest.log", got=order.instance)


async def tried(world: World, order: GuestOrder, *, machine: str = "h1", debug: bool = False) -> str | None:
    """As `started`, and stop it; the code with which it was refused, None if it went active."""
    guest = await started(world, order, machine=machine, debug=debug)
    await guest.end()
    return guest.code


def _guests(world: World, machine: str, *, debug: bool) -> Guests:
    known: dict[str, Guests] = world.facts.setdefault("attackers", {})
    name = f"{machine}-debug" if debug else machine
    if name not in known:
        socket = hosting.silicon_socket(world, machine)
        silicon = DebuggingSilicon(socket) if debug else SiliconClient(socket)
        known[name] = Guests(world.stage.path("attacker", name), silicon, publish="127.0.0.1")
    return known[name]


async def collect(world: World, machine: str, *, report_data: bytes, host_data: bytes = bytes(32)) -> tuple[bytes, bytes]:
    """What a machine's silicon says about a guest that asks for a report over `report_data`: report, certificates."""
    name = f"collector-{sha256(report_data).hex()[:8]}"
    shared = world.stage.path("attacker", name)
    (shared / "report_data.bin").write_bytes(report_data)
    client = SiliconClient(hosting.silicon_socket(world, machine))
    await client.launch(
        LaunchGuest(
            op="launch",
            name=name,
            entry="moorline.attesters.collect",
            host_data=host_data,
            shared=str(shared),
            debug=False,
            memory_mib=256,
            pids=32,
        )
    )
    deadline = asyncio.get_running_loop().time() + GUEST_DEADLINE_S
    while (status := await client.status(name)).state == "running":
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable("demo.guest_slow", "the collecting guest did not end")
        await asyncio.sleep(0.05)
    if status.exit_code != 0:
        log = (shared / "guest.log").read_text("utf-8", errors="replace")[-300:]
        raise Unavailable("demo.guest_failed", "the collecting guest failed", got=log)
    return (shared / "outblob.bin").read_bytes(), (shared / "auxblob.bin").read_bytes()
