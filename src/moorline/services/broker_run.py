"""A broker process from its start to its end: doors, watchers and what runs in the background."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from moorline.errors import MoorlineError
from moorline.services import (
    broker_admin,
    broker_anchor,
    broker_calendar,
    broker_cmp,
    broker_drift,
    broker_est,
    broker_explain,
    broker_following,
    broker_launcher_watch,
    broker_pairs,
    broker_pools,
    broker_revocation,
    broker_revoking,
    broker_sessions,
    broker_tenant_logs,
)
from moorline.services.broker import Broker, compose
from moorline.services.broker_clock import keep_marking
from moorline.services.broker_keys import adopt_keys
from moorline.services.broker_settings import BrokerSettings
from moorline.services.broker_tenants import OpenTenants, open_tenants
from moorline.services.process import serve_all
from moorline.services.token_owner import say_what_is_lacking

_LEDGER_FIRST_S: Final = 5.0
_OTHER_DESCRIPTORS: Final = 512
_SWITCH_S: Final = 0.001
"""How long a thread that computes may keep the others waiting; Python's own 5 ms are felt by everybody who asks."""
_THREADS: Final = 32  # what waits for token or database; on few cores Python's own default is fewer


async def run(settings: BrokerSettings, *, ready: Callable[[dict[str, str]], None]) -> None:
    """Serve until cancelled. `ready` is called once, with the addresses that are really bound."""
    _room_for(settings.max_sessions)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="broker"))
    sys.setswitchinterval(_SWITCH_S)
    broker = compose(settings)
    anchoring: asyncio.Future[None] | None = None
    tenants: OpenTenants | None = None
    try:
        tenants = await _put_in_order(broker)
        anchoring = asyncio.ensure_future(broker_anchor.keep_anchored(broker))
        lists = broker_revocation.Lists(broker)
        with contextlib.suppress(TimeoutError, MoorlineError):
            # Whoever waits for the ready line wants to launch and to enrol. Without a ledger the broker tells them to wait.
            async with asyncio.timeout(_LEDGER_FIRST_S):
                await broker.judged.wait()
                await lists.look_at_cas()
        server = await broker_sessions.serve(broker)
        doors = _Doors(settings, server.address, ready)
        async with server:
            await serve_all(server.serve_forever(), anchoring, *_served(broker, lists, tenants, doors))
    finally:
        if anchoring is not None:
            anchoring.cancel()
        if tenants is not None:
            await asyncio.to_thread(tenants.close)
        await broker.ledger.aclose()
        broker.close()


async def _put_in_order(broker: Broker) -> OpenTenants | None:
    """What a start does before anybody is served."""
    await asyncio.to_thread(say_what_is_lacking, broker.token.inner)
    await asyncio.to_thread(adopt_keys, broker)
    tenants = await asyncio.to_thread(open_tenants, broker)
    broker.launch_keys.reconcile(broker.clock.now())
    broker.instances.erase()  # a process that died between deleting a key and erasing it did not get this far
    await asyncio.to_thread(broker_pools.prefill, broker)
    return tenants


def _served(
    broker: Broker, lists: broker_revocation.Lists, tenants: OpenTenants | None, doors: _Doors
) -> list[Awaitable[None]]:
    """Everything that runs beside the session port."""
    cmp = broker_cmp.Cmp(broker)
    return [
        broker_est.serve(broker, lists, cmp, doors.named("https")),
        broker_est.serve_bootstrap(broker, doors.named("bootstrap")),
        broker_revocation.serve(lists, lambda app: broker_cmp.add_routes(app, cmp), doors.named("revocation")),
        broker_admin.serve(broker, lists, tenants, doors.named("admin")),
        lists.keep_watching(),
        cmp.keep_sweeping(),
        broker_pairs.keep_pairing(broker),
        broker_following.keep_following(broker),
        broker_calendar.keep_calendar(broker),
        broker_tenant_logs.keep_holding(broker),
        broker_drift.keep_watching(broker),
        broker_drift.keep_ending(broker),
        broker_launcher_watch.keep_watching(broker),
        broker_revoking.keep_revoking(broker),
        broker_pools.keep_pools(broker),
        keep_marking(broker.clock),
        broker_explain.keep_writing(broker),
    ]


class _Doors:
    """Which addresses are bound; says so once all of them are."""

    def __init__(self, settings: BrokerSettings, sessions: str, ready: Callable[[dict[str, str]], None]) -> None:
        optional = {"revocation": settings.listen_revocation, "bootstrap": settings.listen_bootstrap}
        self._waiting = {"https", "admin", *(name for name, listen in optional.items() if listen is not None)}
        self._bound = {"sessions": sessions}
        self._ready = ready

    def named(self, name: str) -> Callable[[str], None]:
        """What is told the address of this door."""
        return partial(self._opened, name)

    def _opened(self, name: str, address: str) -> None:
        self._bound[name] = address
        self._waiting.discard(name)
        if not self._waiting and "address" not in self._bound:
            self._bound["address"] = self._bound["https"]
            _keep_what_stays()
            self._ready(dict(self._bound))


def _keep_what_stays() -> None:
    """What was loaded until now lives as long as the process: the garbage collector need not look at it again and again.

    Each full look at it stopped every session for as long as it took, tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


def _room_for(sessions: int) -> None:
    """As many descriptors as the sessions need, or as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sessions + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
