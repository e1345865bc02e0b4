"""The end of one generation of a function as a saga: keys first, then the guest, then the record, then what comes after.

    halting  -> stopping   the broker destroys the sealed-storage key, then revokes the identity; the same answer each time
    stopping -> cleaned    the host agent ends the guest and forgets its directory; a host that does not answer gates nothing
    cleaned  -> requested  the next generation, placed anew; or failed, or ended, as the halt says

Keys go first, because a host that lost its verdict cannot be made to stop anything: what it keeps is of no use without the
key. So a broker that is away does hold the saga up, and is asked until it answers. A broker that refuses destroys nothing:
that is recorded as not proven, the guest is stopped all the same, and no further generation is launched beside one that may
still have its identity.

What is recorded as destroyed is the broker's word about its own token. That a guest has stopped is the word of a host agent,
which an administrator of the host can make say anything: from a host without a verdict it counts as not proven.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

from moorline.clock import Clock
from moorline.errors import Conflict, Malformed, MoorlineError, Refused, Unavailable
from moorline.storage.orchestrator_store import (
    ON_A_HOST,
    Afterwards,
    CleanUp,
    FunctionRow,
    Halt,
    LaunchState,
    OrchestratorStore,
)

HOST_LOST: Final = "host-lost"
GUEST_ENDED: Final = "guest-ended"
LAUNCH_FAILED: Final = "launch-failed"
OPERATOR: Final = "operator"
STOP_DEADLINE_S: Final = 10.0
_KEYS_ARE_GONE: Final = "retire.revocation_pending"
_REASON_CHARS: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Retirement:
    """What a broker is asked: end this generation of this instance for good, at the broker of `hsm` found at `url`."""

    hsm: str
    url: str
    instance: str
    generation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retired:
    """What the broker says that it destroyed, could not prove, and at which height the ledger has the revocation."""

    destroyed: tuple[str, ...]
    not_proven: tuple[str, ...]
    revoked_at_height: int | None


class Broker(Protocol):
    """The broker that gave a function its keys."""

    async def retire(self, asked: Retirement, /) -> Retired:
        """Destroy the generation's keys, then revoke it. The same again gives the same answer."""
        ...


class GuestHosts(Protocol):
    """Where guests run."""

    async def stop(self, host: str, instance: str, /) -> None:
        """End a guest; fine if it is not there."""
        ...


class CleanUps:
    """The steps, each on a row as it was read. `locate` finds the HTTPS address of an HSM's broker on the ledger."""

    def __init__(
        self,
        *,
        store: OrchestratorStore,
        broker: Broker,
        hosts: GuestHosts,
        clock: Clock,
        locate: Callable[[str], Awaitable[str]],
        stop_deadline_s: float = STOP_DEADLINE_S,
    ) -> None:
        self._store, self._broker, self._hosts, self._clock, self._locate = store, broker, hosts, clock, locate
        self._stop_deadline_s = stop_deadline_s
        self.steps = {
            LaunchState.HALTING: self._retire,
            LaunchState.STOPPING: self._stop,
            LaunchState.CLEANED: self._follow,
        }

    async def begin(self, row: FunctionRow, halt: Halt, *, says: str) -> FunctionRow | None:
        """Record that this generation ends; None if it is not there any more to be ended. Nothing else happens yet."""
        while row.state in ON_A_HOST:
            halting = dataclasses.replace(row, state=LaunchState.HALTING, halt=halt, token=None, reply_key=None)
            try:
                return await self._save(halting, says)
            except Conflict:
                moved = await asyncio.to_thread(self._store.function, row.instance)
                if moved.generation != row.generation:
                    return None
                row = moved
        return None

    async def _retire(self, row: FunctionRow) -> None:
        assert row.halt is not None
        assert row.host is not None
        halt = row.halt
        done = CleanUp(generation=row.generation, host=row.host, cause=halt.cause, code=halt.code)
        try:
            retired = await self._retired(row, f"{halt.cause}: {halt.code}"[:_REASON_CHARS])
        except Unavailable as error:
            if error.code == _KEYS_ARE_GONE:  # only the ledger is behind: the guest need not run on until it has caught up
                with contextlib.suppress(MoorlineError, TimeoutError):
                    await self._stopped(row.host, row.instance)
            raise
        except (Refused, Conflict, Malformed) as error:
            done = dataclasses.replace(done, not_proven=(f"keys and identity: the broker refused, {error.code}",))
            if halt.afterwards is Afterwards.RELAUNCH:
                halt = dataclasses.replace(halt, afterwards=Afterwards.FAIL, problem=_not_destroyed(error).as_problem())
            says = f"the broker destroyed nothing: {error}"
        else:
            done = dataclasses.replace(
                done,
                destroyed=retired.destroyed,
                not_proven=retired.not_proven,
                revoked_at_height=retired.revoked_at_height,
            )
            says = f"keys destroyed: {', '.join(retired.destroyed) or 'there were none'}"
            if retired.revoked_at_height is not None:
                says += f"; identity revoked at height {retired.revoked_at_height}"
        stopping = dataclasses.replace(row, state=LaunchState.STOPPING, halt=halt, clean_ups=(*row.clean_ups, done))
        await self._save(stopping, says)

    async def _retired(self, row: FunctionRow, reason: str) -> Retired:
        """The broker's answer, at its recorded address or, if nobody answers there, at the one the ledger has now."""
        url = row.broker_url or await self._locate(row.hsm)
        asked = Retirement(hsm=row.hsm, url=url, instance=row.instance, generation=row.generation, reason=reason)
        try:
            return await self._broker.retire(asked)
        except Unavailable:
            moved = await self._locate(row.hsm)
            if moved == url:
                raise
            return await self._broker.retire(dataclasses.replace(asked, url=moved))

    async def _stop(self, row: FunctionRow) -> None:
        assert row.halt is not None
        assert row.host is not None
        done = row.clean_ups[-1]
        try:
            await self._stopped(row.host, row.instance)
        except (MoorlineError, TimeoutError) as error:
            code = error.code if isinstance(error, MoorlineError) else "peer.unreachable"
            unproven: tuple[str, ...] = (f"guest stopped: {row.host} did not confirm it, {code}",)
            done = dataclasses.replace(done, not_proven=(*done.not_proven, *unproven))
            says = f"{row.host} did not confirm that the guest stopped ({code})"
        else:
            unproven = (f"guest stopped: only {row.host} says so, and it has no verdict",)
            if row.halt.cause == HOST_LOST:
                done = dataclasses.replace(done, not_proven=(*done.not_proven, *unproven))
            done = dataclasses.replace(done, stopped=True)
            says = f"{row.host} says that the guest stopped"
        cleaned = dataclasses.replace(row, state=LaunchState.CLEANED, clean_ups=(*row.clean_ups[:-1], done))
        await self._save(cleaned, says)

    async def _stopped(self, host: str, instance: str) -> None:
        async with asyncio.timeout(self._stop_deadline_s):
            await self._hosts.stop(host, instance)

    async def _follow(self, row: FunctionRow) -> None:
        assert row.halt is not None
        if row.halt.afterwards is Afterwards.RELAUNCH:
            await self._save(_next_generation(row, self._clock), f"generation {row.generation + 1} is to be placed")
        elif row.halt.afterwards is Afterwards.FAIL:
            failed = dataclasses.replace(row, state=LaunchState.FAILED, problem=row.halt.problem)
            await self._save(failed, f"{row.halt.problem['says']} [{row.halt.problem['code']}]")
        else:
            await self._save(dataclasses.replace(row, state=LaunchState.ENDED), "ended by an operator")

    async def _save(self, row: FunctionRow, says: str) -> FunctionRow:
        return await asyncio.to_thread(self._store.save, row, at=self._clock.now(), says=says)


def _next_generation(row: FunctionRow, clock: Clock) -> FunctionRow:
    """The function as if it had just been requested, one generation later; what ended stays in history and clean-ups."""
    return FunctionRow(
        instance=row.instance,
        revision=row.revision,
        service=row.service,
        tenant=row.tenant,
        hsm=row.hsm,
        package=row.package,
        contracts=row.contracts,
        settings=row.settings,
        generation=row.generation + 1,
        requested=clock.now(),
        clean_ups=row.clean_ups,
    )


def _not_destroyed(error: MoorlineError) -> Refused:
    return Refused(
        "compliance.keys_not_destroyed",
        "the broker refused to end this generation, so no other is launched beside it",
        got=f"{error.code}: {error.says}",
        remedy="look at the broker, then create the function under another name",
    )
