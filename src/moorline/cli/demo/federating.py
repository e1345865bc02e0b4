"""Step 9: a device of beta enrols and uses alpha's function; and the same device in the hands of an attacker."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from moorline.channel import device as channel
from moorline.channel.tls import TlsIdentity
from moorline.cli.demo import founding
from moorline.cli.demo.world import AUTHORITIES, CONTRACT, HSM, SERVICE, World, since
from moorline.clock import SystemClock
from moorline.device.connection import Wanted, connected
from moorline.device.enrolment import roots_pem
from moorline.device.home import HttpsHome
from moorline.device.store import DeviceStore
from moorline.errors import MoorlineError, Refused, Unavailable, from_problem
from moorline.ledger import peers
from moorline.ledger import transactions as tx
from moorline.ledger.client import Endpoint
from moorline.nfv import Role
from moorline.verification.chains import VerifiedChain, verify_chain
from moorline.wire import cbor
from moorline.wire.access import PROFILE_TLS, AccessQuestion, Connection
from moorline.wire.certificates import parse_certificate, spiffe_id_of
from moorline.wire.device import Status

RECORD: Final = "observation-1"
_COMMAND_DEADLINE_S: Final = 30.0


async def use_function(world: World) -> str:
    """`moor device` in processes of its own: enrol over EST, store a record, read it back."""
    identity = await enrol(world, "device-1")
    content = f"pulse {60 + secrets.randbelow(40)}"
    await moor(*_connect(world, "put"), "--data", content)
    answer = await moor(*_connect(world, "get"))
    if answer["data"] != content:
        raise Refused("demo.record_differs", "the record came back changed", expected=content, got=answer["data"])
    return f"{identity['spiffe_id']} stored {RECORD} at alpha's function over mutual TLS 1.3 and read it back unchanged"


async def reconnect(world: World) -> None:
    """The same device at the function's new address: a new generation has new storage, so it stores first."""
    await moor(*_connect(world, "put"), "--data", "after the move")
    answer = await moor(*_connect(world, "get"))
    if answer["data"] != "after the move":
        raise Refused("demo.record_differs", "the record came back changed", got=answer["data"])


async def suspend_and_reinstate(world: World) -> str:
    """Beta is suspended while its device is connected: refused and cut off within the bound; reinstated, it connects."""
    max_age_s = world.consortium.trust.max_age_s
    store = DeviceStore(directory=device_directory(world, "device-1"))
    wanted = Wanted(provider="alpha", service=SERVICE, contract=CONTRACT)
    read = cbor.encode({"op": "get", "name": RECORD})
    async with connected(store, world.facts["function"]["address"], wanted, clock=SystemClock()) as connection:
        await connection.request(read)
        suspended = asyncio.get_running_loop().time()
        commit_ms = await _decide(world, tx.SuspendProvider(name="beta"))
        # A proof made just before the decision is good for max_age, and a live peer is judged again within max_age.
        bound_s = commit_ms / 1000 + 2 * max_age_s
        cut_s, cut = await _seconds_until_refused(connection.request(read) for _ in iter(int, 1))
    new_s, new = await _seconds_until_refused(moor(*_connect(world, "get")) for _ in iter(int, 1))
    refused_s = asyncio.get_running_loop().time() - suspended
    if cut_s > bound_s or refused_s > bound_s:
        raise Refused(
            "demo.revocation_late",
            "revocation took longer than its bound",
            expected=f"{bound_s:.1f} s",
            got=f"{cut_s:.1f} s",
        )
    await _decide(world, tx.ReinstateProvider(name="beta"))
    await _until_admitted(world, bound_s)
    return (
        f"revocation bound {bound_s:.1f} s (commit {commit_ms} ms + 2 x max_age {max_age_s} s); open connection cut after "
        f"{cut_s:.1f} s ({cut}), new connection refused after {new_s:.1f} s more ({new}); reinstated, it connects"
    )


async def _decide(world: World, action: tx.Action) -> int:
    """Two authorities decide; milliseconds from the proposal to the quorum's signature under the block that does it."""
    started = time.monotonic()
    first, second = (founding.authority_submitter(world, authority) for authority in AUTHORITIES[:2])
    _, proposal = await first.send_proposal(action)
    await second.approve(proposal)
    return since(started)


async def _seconds_until_refused(attempts: Iterator[Coroutine[Any, Any, object]]) -> tuple[float, str]:
    """How long attempts still succeeded, and the code of the first refusal."""
    started = asyncio.get_running_loop().time()
    for attempt in attempts:
        try:
            await attempt
        except MoorlineError as error:
            return asyncio.get_running_loop().time() - started, error.code
        await asyncio.sleep(0.1)
    raise AssertionError


async def _until_admitted(world: World, bound_s: float) -> None:
    deadline = asyncio.get_running_loop().time() + bound_s
    while True:
        try:
            await moor(*_connect(world, "get"))
        except MoorlineError:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def enrol(world: World, name: str) -> dict[str, Any]:
    """A one-time code from beta's operator, and `moor device enrol` with it."""
    async with world.beta.admin() as admin:
        made: Any = await admin.post_json("/v1/enrolment-codes", {"device": name, "ttl_s": 300})
    authorities = [url.replace("|", "=") for url in world.ledger_urls()]
    return await moor(
        *("device", "enrol", "--dir", str(device_directory(world, name)), "--name", name),
        *("--url", f"https://{world.beta.https}", "--server-name", world.beta.name_of(Role.HSM, HSM)),
        *("--trust", str(world.trust_file)),
        *(word for authority in authorities for word in ("--ledger", authority)),
        environment={"MOOR_ENROLMENT_CODE": made["code"]},
    )


async def store_and_read(world: World, name: str) -> None:
    """A device's identity and standing in the hands of somebody who judges nobody, used as they are. Raises as `visit`."""
    store = DeviceStore(directory=device_directory(world, name))
    identity = store.identity()
    own = verify_chain(identity.chain[0], identity.chain[1:], store.trust().roots, SystemClock().now())

    async def bundle() -> bytes:
        return await world.ledger.prove(peers.device_keys(own))

    await visit(world, identity, bundle)


async def visit(
    world: World, identity: TlsIdentity, bundle: Callable[[], Awaitable[bytes]], *, at_home: TlsIdentity | None = None
) -> None:
    """Store a record at alpha's function and read it, by somebody who judges nobody: whatever refuses is the function.

    `bundle` is what is shown as the ledger's proof of the device's standing. What beta's HSM says is passed on as it is, and
    nothing if it says nothing; it is asked as `at_home`, where that is another identity of the same name. Raises the
    function's refusal.
    """
    trust = world.consortium.trust
    own = parse_certificate(identity.chain[0])
    home = HttpsHome(
        endpoint=Endpoint(url=f"https://{world.beta.https}", server_name=world.beta.name_of(Role.HSM, HSM)),
        roots_pem=roots_pem(trust),
        identity=lambda: at_home or identity,
    )

    async def ask_home(peer: VerifiedChain, secured: channel.Secured) -> bytes:
        asked = Connection(
            device=str(spiffe_id_of(own)),
            device_provider="beta",
            function=str(peer.spiffe_id),
            function_provider="alpha",
            service=SERVICE,
            contract=CONTRACT,
            profile=PROFILE_TLS,
            post_quantum=secured.post_quantum,
            binding=secured.binding,
        )
        try:
            return await home.ask(AccessQuestion(connection=asked))
        except MoorlineError:  # such as for a name that is not beta's
            return b""

    async def judge(_chain: VerifiedChain, _status: Status, _secured: channel.Secured) -> None:
        return None

    connection = await channel.connect(
        world.facts["function"]["address"],
        identity=identity,
        roots=trust.roots,
        clock=SystemClock(),
        bundle=bundle,
        ask_home=ask_home,
        judge=judge,
        max_age_s=trust.max_age_s,
    )
    async with connection:
        await connection.request(cbor.encode({"op": "put", "name": RECORD, "data": b"from an attacker, or not"}))
        await connection.request(cbor.encode({"op": "get", "name": RECORD}))


async def moor(*arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run one `moor` command with --json in a process of its own; its answer, or the error it reported."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moorline.cli", *arguments, "--json"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        async with asyncio.timeout(_COMMAND_DEADLINE_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable("demo.command_slow", f"moor {arguments[0]} {arguments[1]} did not end") from None
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        said = err.decode("utf-8", "replace").strip()[-300:]
        raise Unavailable("demo.command_failed", f"moor {arguments[0]} {arguments[1]} failed", got=said) from None
    if "error" in answer:
        raise from_problem(answer["error"])
    return answer


def _connect(world: World, verb: str) -> tuple[str, ...]:
    return connect_command(device_directory(world, "device-1"), world.facts["function"]["address"], verb)


def connect_command(directory: Path, address: str, verb: str) -> tuple[str, ...]:
    """`moor device connect` with the records function at an address."""
    return (
        *("device", "connect", verb, "--dir", str(directory)),
        *("--address", address, "--provider", "alpha", "--service", SERVICE),
        *("--contract", CONTRACT, "--name", RECORD),
    )


def device_directory(world: World, name: str) -> Path:
    """Where a device of beta keeps what it has."""
    return world.stage.path("beta", "devices") / name
