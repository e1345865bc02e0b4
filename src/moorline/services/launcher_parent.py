"""The process around the launcher enclave: it has the silicon start the guest, relays bytes, and knows no secret.

It belongs to a host that is not trusted. The ticket it passes on is worth something only to a guest of the measurement and
chip it names; intents and grants pass through it signed, tokens sealed. When it stops, its guest stops: a launcher that
comes back is another launcher, with a new ticket.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from moorline.digest import tagged_hash
from moorline.errors import MoorlineError, Refused, Unavailable
from moorline.host_agent.guests import Guests, GuestState, active_event, refused_event
from moorline.host_agent.silicon import SiliconClient
from moorline.services import metrics
from moorline.services.condition import Condition, told
from moorline.services.process import announce_ready
from moorline.wire import schema
from moorline.wire.guest import LauncherLaunch
from moorline.wire.orchestration import GuestOrder

ENTRY: Final = "moorline.services.launcher"
_POLL_S: Final = 0.1
_LIFE_POLL_S: Final = 1.0
_START_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """launcher.toml. `listen` is where intents are taken (`ip:port`, `unix:/path`); `broker` the HSM's session port."""

    provider: str
    """The provider's name on the ledger."""
    hsm: str
    """The HSM that admits the launcher."""
    name: str
    """The guest's name on this machine."""
    listen: str
    """Where intents are taken: address:port or unix:/path."""
    state: Path
    """Directory of the guest."""
    silicon: str
    """The secure processor: unix:/path of its socket."""
    broker: str
    """The HSM's session port, address:port."""
    ticket: Path
    """The provider's one-time ticket (moor launcher ticket)."""
    trust: Path
    """The ledger's trust file, the same bytes as the broker's."""
    memory_mib: int = 256
    """Memory of the guest."""
    pids: int = 64
    """Processes the guest may have."""
    status_socket: Path | None = None
    """Unix socket (0600) with /healthz and /metrics."""


def order(settings: LauncherSettings) -> GuestOrder:
    """The order for the guest, with HOST_DATA over the bytes it will read."""
    launch = schema.encode(
        LauncherLaunch(
            ticket=settings.ticket.read_bytes(),
            trust=settings.trust.read_bytes(),
            provider=settings.provider,
            hsm=settings.hsm,
        )
    )
    return GuestOrder(
        instance=settings.name,
        entry=ENTRY,
        host_data=tagged_hash("launcher-configuration", launch),
        launch=launch,
        package=b"",
        configuration=b"",
        memory_mib=settings.memory_mib,
        pids=settings.pids,
        relays={"broker": settings.broker},
        publish=True,
    )


async def run(settings: LauncherSettings, log: structlog.stdlib.BoundLogger) -> None:
    """Start the enclave and stay until it ends or this process is stopped. Raises why the enclave would not start."""
    silicon = SiliconClient(settings.silicon.removeprefix("unix:"))
    guests = Guests(settings.state / "guests", silicon, publish="127.0.0.1")
    await _clear(guests, settings.name)
    condition = Condition(why="the broker has not admitted the enclave yet")
    try:
        async with told(settings.status_socket, "launcher", condition, metrics.of_launcher):
            await guests.start(order(settings), publish_on=settings.listen)
            state = await _until_active(guests, settings.name)
            said = active_event(state) or {}
            condition.set(standing=True)
            log.info("launcher admitted", launcher=said.get("launcher"), address=state.address)
            announce_ready("launcher", address=state.address, launcher=str(said.get("launcher")))
            while state.state == "running":
                await asyncio.sleep(_LIFE_POLL_S)
                state = await guests.state(settings.name)
            raise _why(state)
    finally:
        await _clear(guests, settings.name)
        await guests.aclose()


async def _until_active(guests: Guests, name: str) -> GuestState:
    try:
        async with asyncio.timeout(_START_S):
            while True:
                state = await guests.state(name)
                if active_event(state) is not None:
                    return state
                if state.state != "running":
                    raise _why(state)
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise Unavailable("launcher.not_admitted_yet", "the broker did not admit the enclave in time") from None


async def _clear(guests: Guests, name: str) -> None:
    try:
        await guests.stop(name)
    except Refused:
        return  # there was none


def _why(state: GuestState) -> MoorlineError:
    return refused_event(state) or Unavailable(
        "launcher.guest_ended",
        "the launcher enclave ended",
        got=f"exit code {state.exit_code}",
        remedy="read its guest.log; start it again with a new ticket",
    )
