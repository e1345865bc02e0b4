"""The process that owns a token, for the broker processes of one machine: `moor hsm serve`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from moorline.clock import SystemClock
from moorline.errors import Misconfigured
from moorline.hsm.approvals import verify_grant
from moorline.hsm.backup import FILE_CAP
from moorline.hsm.custody import Locked
from moorline.hsm.token import LocalToken, Token, TokenLocation, open_token
from moorline.hsm.token.calls import Call
from moorline.hsm.token.capabilities import probe
from moorline.hsm.token.owner import Door, Owner
from moorline.wire import schema


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOwnerSettings:
    """`token.toml`; paths are relative to it."""

    token_module: str
    """The PKCS#11 module (shared library)."""
    socket: Path
    """Unix socket for this provider's broker processes (token_owner in broker.toml). Its directory should be 0700."""
    token_label: str | None = None
    """Label of the token. A token is named by label, serial number or slot; all that are given must hold."""
    token_serial: str | None = None
    """Serial number of the token."""
    token_slot: int | None = None
    """Number of the token's slot."""
    token_pin_file: Path | None = None
    """File with the token's PIN, mode 0600. Or one of the two keys below."""
    token_pin_environment: str | None = None
    """Name of the variable that holds the PIN; it is taken out of the environment when it is read."""
    token_pin_prompt: bool = False
    """Ask for the PIN at the terminal at the start."""
    softhsm_conf: Path | None = None
    """SoftHSM's configuration file; left out for another token."""
    custody: Path | None = None
    """custody.cbor of the token: whose approval destroys keys through the socket. Without it none is destroyed there."""
    provider: str = ""
    """The provider's name on the ledger; with custody."""
    hsm: str = ""
    """This HSM's id on the ledger; with custody."""
    uids: tuple[int, ...] = ()
    """Users (numbers) whose processes may use the token; the owner's own user if left out."""
    lanes: int = 4
    """Sessions, and with them operations in the module at once."""

    def location(self) -> TokenLocation:
        """Where the token is."""
        conf = self.softhsm_conf
        return TokenLocation(
            module=self.token_module,
            label=self.token_label,
            serial=self.token_serial,
            slot=self.token_slot,
            pin_file=self.token_pin_file,
            pin_environment=self.token_pin_environment,
            pin_prompt=self.token_pin_prompt,
            environment={} if conf is None else {"SOFTHSM2_CONF": str(conf.resolve())},
        )


async def run(settings: TokenOwnerSettings, *, ready: Callable[[str], None]) -> None:
    """Own the token and serve its door until cancelled. `ready` gets the socket. Raises Misconfigured or Unavailable."""
    granted = _grants(settings)
    token = await asyncio.to_thread(open_token, settings.location(), lanes=settings.lanes)
    owner = Owner(places=settings.lanes)
    try:
        await asyncio.to_thread(say_what_is_lacking, token)
        uids = frozenset(settings.uids) or frozenset({os.geteuid()})
        door = Door(name="broker", path=settings.socket, token=token, uids=uids)
        owner.open(door if granted is None else replace(door, granted=granted))
        ready(str(settings.socket))
        await asyncio.Event().wait()
    finally:
        owner.close()
        token.close()


def _grants(settings: TokenOwnerSettings) -> Callable[[Call], None] | None:
    if settings.custody is None:
        return None
    if not (settings.provider and settings.hsm):
        raise Misconfigured("owner.settings", "custody, provider and hsm belong together")
    circle = schema.decode(Locked, settings.custody.read_bytes(), max_bytes=FILE_CAP).circle
    clock = SystemClock()

    def granted(call: Call) -> None:
        verify_grant(call.data, circle, provider=settings.provider, hsm=settings.hsm, target=call.label, now=clock.now())

    return granted


def say_what_is_lacking(token: Token) -> None:
    """Log what a token opened here lacks, and what follows from it; a token of another process was logged there."""
    if not isinstance(token, LocalToken):
        return
    found = probe(token)
    log = structlog.get_logger()
    log.info("token", manufacturer=found.manufacturer, model=found.model, serial=found.serial, lacks=len(found.lacking))
    for each in found.lacking:
        log.warning("token lacks", what=each.name, needs=each.needs, consequence=each.consequence)
