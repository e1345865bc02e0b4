"""Attacks on what parties believe of the ledger: too few signatures, old proofs, going back, identities that were revoked.

Victims are alpha's function, which judges the proof a device shows of itself, and `moor device`, which judges what an
authority gives it and what a function shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Final

from fastapi import Query
from fastapi.responses import Response

from moorline.cli.demo import federating
from moorline.cli.demo.attack_tools import Outcome, refused_with, time_passes
from moorline.cli.demo.attacks_launches import genuine_guest, genuine_launch
from moorline.cli.demo.world import AUTHORITIES, CONSORTIUM, World, now
from moorline.clock import Instant, SystemClock
from moorline.device.store import LEDGER_FILE, DeviceStore
from moorline.ledger import checkpoint, peers, proof
from moorline.ledger import transactions as tx
from moorline.ledger.ceremony import authority_id, load_authority, tls_identity
from moorline.ledger.records import RevocationKind
from moorline.services import http
from moorline.services.http import TlsIdentity
from moorline.verification.chains import verify_chain
from moorline.wire import schema
from moorline.wire.certificates import dns_name
from moorline.wire.http import CBOR_TYPE

DEVICE: Final = "device-0"
"""The device that an attacker of these scenes holds; beta enrolled it, and the contract lets it in."""
TURNED: Final = AUTHORITIES[-1]
"""An authority that serves what its attacker likes; alone it can sign nothing that counts."""

# At the function ---------------------------------------------------------------------------------------------------------


async def ledger_head_without_quorum(world: World) -> Outcome:
    """A device proves its standing by a head that two of four authorities signed. Control: the same head, all signatures."""
    whole = await _own_proof(world)
    parsed = proof.parse_bundle(whole)
    note = checkpoint.parse_note(parsed.note)
    two = dataclasses.replace(note, signatures=tuple(line for line in note.signatures if line.name in AUTHORITIES[:2]))
    cut = schema.encode(dataclasses.replace(parsed, note=two.encode()))
    code = await refused_with(_show(world, cut))
    control = await refused_with(_show(world, whole))
    signed = {line.name for line in note.signatures}
    return Outcome(code=code, control=control is None, says=f"signed by {len(signed)} the same head and proof are taken")


async def ledger_proof_fresh(world: World) -> Outcome:
    """The control of `ledger_proof_stale`: a device shows a proof while it is fresh, and keeps it."""
    shown = await _own_proof(world)
    control = await refused_with(_show(world, shown))
    world.facts["shown"] = (shown, control)
    return Outcome(code=None, control=control is None, says="waiting for max_age to pass", unfinished=True)


async def ledger_proof_stale(world: World) -> Outcome:
    """The device shows the very same proof again after max_age, which really passes."""
    shown, control = world.facts["shown"]
    made = checkpoint.parse_note(proof.parse_bundle(shown).note).checkpoint.time
    max_age_s = world.consortium.trust.max_age_s
    # The function goes by the broker's time, told in whole seconds: it may be one behind.
    await time_passes(Instant(made + max_age_s + 1))
    code = await refused_with(_show(world, shown))
    return Outcome(code=code, control=control is None, says=f"the very same bytes were taken within {max_age_s} s")


async def _own_proof(world: World) -> bytes:
    return await world.ledger.prove(_own_keys(world))


def _own_keys(world: World) -> tuple[str, ...]:
    chain = DeviceStore(directory=federating.device_directory(world, DEVICE)).identity().chain
    return peers.device_keys(verify_chain(chain[0], chain[1:], world.consortium.trust.roots, SystemClock().now()))


async def _show(world: World, bundle: bytes) -> None:
    async def shown() -> bytes:
        return bundle

    identity = DeviceStore(directory=federating.device_directory(world, DEVICE)).identity()
    await federating.visit(world, identity, shown)


# At the device -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _TurnedAuthority:
    """Passes on what the ledger says, but first keeps the head before; `lying`, it serves that one again."""

    world: World
    old: bytes = b""
    lying: bool = False

    async def prove(self, wanted: tuple[str, ...]) -> bytes:
        if self.lying:
            return self.old
        self.old = await self.world.ledger.prove(wanted)
        height = checkpoint.parse_note(proof.parse_bundle(self.old).note).checkpoint.height
        await self.world.alpha.submitter.send(tx.RegisterReferenceValues(id=f"spare-{height}", kind="tpm", digest=bytes(32)))
        return await self.world.ledger.prove(wanted)


async def ledger_rollback(world: World) -> Outcome:
    """An authority gives a device an older head than before, signed by all and fresh enough. Control: the newest one.

    A device that took it would not see what was decided since, such as a revocation.
    """
    directory = world.stage.path("attacker") / "device"
    await asyncio.to_thread(shutil.copytree, federating.device_directory(world, DEVICE), directory)
    turned = _TurnedAuthority(world)
    async with _serving(world, turned) as address:
        endpoint = {"url": f"https://{address}", "server_name": dns_name(authority_id(CONSORTIUM, TURNED))}
        (directory / LEDGER_FILE).write_text(json.dumps([endpoint]), "utf-8")
        control = await refused_with(_connect(directory, world.facts["function"]["address"]))
        turned.lying = True
        code = await refused_with(_connect(directory, world.facts["function"]["address"]))
    return Outcome(
        code=code, control=control is None, says="from the same authority the newest head was taken, and kept as the highest"
    )


async def _connect(directory: Path, address: str) -> object:
    return await federating.moor(*federating.connect_command(directory, address, "put"), "--data", "as any device does")


@asynccontextmanager
async def _serving(world: World, turned: _TurnedAuthority) -> AsyncIterator[str]:
    """The turned authority's interface, under its own certificate; the address."""
    app = http.application("turned authority")

    @app.get("/v1/proof")
    async def prove(key: Annotated[list[str], Query()]) -> Response:
        return Response(await turned.prove(tuple(key)), media_type=CBOR_TYPE)

    keys = load_authority(world.consortium.directory / "authorities" / TURNED)
    chain_pem, key_pem = tls_identity(keys, CONSORTIUM, now=now())
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.ensure_future(
        http.serve(
            app,
            listen="127.0.0.1:0",
            identity=TlsIdentity(chain_pem=chain_pem, key_pem=key_pem),
            client_roots_pem=None,
            ready=bound.set_result,
        )
    )
    try:
        yield await bound
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def instance_revoked(world: World) -> Outcome:
    """A function whose instance was revoked goes on serving. Control: the same device at the same function before.

    The function's own proof may be a fraction of max_age old, so the device is refused within max_age and not at once.
    """
    guest = await genuine_guest(world)
    instance = (await genuine_launch(world)).fields.instance
    directory = federating.device_directory(world, DEVICE)
    control = await refused_with(_connect(directory, guest.state.address))
    await world.alpha.submitter.send(tx.Revoke(kind=RevocationKind.INSTANCE, id=instance))
    loop = asyncio.get_running_loop()
    revoked = loop.time()
    bound_s = world.consortium.trust.max_age_s
    code = None
    while code is None and loop.time() - revoked <= bound_s:
        code = await refused_with(_connect(directory, guest.state.address))
    took_s = loop.time() - revoked
    await guest.end()
    return Outcome(
        code=code, control=control is None, says=f"served the device before; refused {took_s:.1f} s after it was revoked"
    )
