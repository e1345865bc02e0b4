"""Two broker processes of one provider: one PostgreSQL database, one token in a process of its own, one set of launches."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import load_der_private_key

from moorline.errors import MoorlineError, Unavailable
from moorline.services import settings
from moorline.wire import keys, launch, schema
from moorline.wire.http import HttpClient
from moorline.wire.launch import token_proof
from moorline.wire.session import FunctionFields, FunctionSecrets, LauncherSecrets, SessionRole, resume_message

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Process, free_addresses
from test_sessions import built, spki

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(postgres, tmp_path_factory):
    """A world whose alpha has two brokers, and the addresses of both."""
    directory = tmp_path_factory.mktemp("several")
    async with built(directory, owned=True, database_url=postgres.url()) as world:
        sessions, https = free_addresses(2)
        chosen = replace(
            world.alpha.settings,
            listen_sessions=sessions,
            listen_https=https,
            admin_socket=world.alpha.directory / "admin-2.sock",
        )
        settings.write(chosen, world.alpha.directory / "broker-2.toml")
        config = str(world.alpha.directory / "broker-2.toml")
        second = Process(("broker", "run", "--config", config), world.alpha.directory / "log-2")
        await second.start()
        yield world, (world.alpha.broker.said["sessions"], second.said["sessions"]), second
        await second.stop()


async def ended(session):
    return (await asyncio.wait_for(session.ended(), 20)).code


async def test_either_broker_says_why(pair):
    """verifies that: what one process decided, `moor hsm explain` learns from the other, and a refusal as well."""
    world, (first, second), _ = pair
    good, late = world.fields(), world.fields(package_digest=b"z" * 32)
    world.address = first
    async with await world.function(good):
        pass
    world.address = second
    assert await world.refused(world.function(late)) == "launch.package_not_registered"
    for admin in ("admin.sock", "admin-2.sock"):
        told = {}
        async with HttpClient(
            "http://broker", server_name="", roots_pem=b"", uds=str(world.alpha.directory / admin)
        ) as client:
            for fields in (good, late):
                async with asyncio.timeout(10):
                    while not told.get(fields.instance):
                        answer = await client.get_json(f"/v1/decisions/{fields.instance}")
                        told[fields.instance] = answer["decisions"]
                        await asyncio.sleep(0.1)
        assert told[good.instance][0]["allowed"] is True
        assert told[late.instance][0]["decided_by"] == "launch.package_not_registered"


async def test_a_token_counts_once_for_both(pair):
    """verifies that: what one broker consumed the other refuses, and the alarm, at either, names both sessions."""
    world, (first, second), _ = pair
    fields = world.fields()
    world.address = first
    async with await world.function(fields):
        world.address = second
        assert await world.refused(world.function(fields)) == "launch.token_consumed"
    async with world.alpha.admin() as admin:
        alarm = (await admin.get_json("/v1/alarms"))["alarms"][0]
    assert alarm["code"] == "launch.token_consumed"
    assert alarm["first"] != alarm["second"]


async def test_two_brokers_race_for_one_launch(pair):
    """verifies that: shown to both brokers at the same moment, a token gives one identity; twenty times over."""
    world, addresses, _ = pair
    for _ in range(20):
        fields = world.fields()

        async def one(address, fields=fields):
            held = launch.token(world.secrets.launch_key, fields)
            world.address = address  # read when the connection is made, before anybody else runs
            return await world.open(
                SessionRole.FUNCTION,
                schema.encode(FunctionFields(launch_fields=launch.encode_fields(fields))),
                guest={"measurement": fields.measurement, "host_data": launch.commitment(fields)},
                proof=lambda digest: token_proof(held, digest),
            )

        outcomes = await asyncio.gather(*(one(address) for address in addresses), return_exceptions=True)
        lost = [one for one in outcomes if isinstance(one, MoorlineError)]
        assert [error.code for error in lost] == ["launch.token_consumed"]
        for won in outcomes:
            if not isinstance(won, MoorlineError):
                await won.aclose()


async def test_a_session_is_resumed_at_another_broker(pair):
    """verifies that: a function whose broker died goes on at the other one, with the same key and a fresh certificate."""
    world, (first, second), _ = pair
    fields = world.fields()
    world.address = first
    session = await world.function(fields)
    held = schema.decode(FunctionSecrets, session.secrets)
    await session.aclose()
    signer = keys.KeySigner(load_der_private_key(held.private_key, None))
    world.address = second
    again = await world.open(
        SessionRole.RESUME,
        schema.encode(FunctionFields(launch_fields=launch.encode_fields(fields))),
        guest={"measurement": fields.measurement, "host_data": launch.commitment(fields)},
        proof=lambda digest: signer.sign(resume_message(digest)),
        signing=keys.public_bytes(signer.public_key()),
    )
    assert again.activation.spiffe_id == session.activation.spiffe_id
    assert again.activation.certificate != session.activation.certificate
    await again.call("renew", b"")
    await again.aclose()


async def test_a_second_session_at_another_broker_closes_the_first(pair):
    """verifies that: of one instance the newest session counts, wherever it was opened; the older one is told why."""
    world, (first, second), _ = pair
    fields = world.fields()
    world.address = first
    older = await world.function(fields)
    held = schema.decode(FunctionSecrets, older.secrets)
    signer = keys.KeySigner(load_der_private_key(held.private_key, None))
    world.address = second
    newer = await world.open(
        SessionRole.RESUME,
        schema.encode(FunctionFields(launch_fields=launch.encode_fields(fields))),
        guest={"measurement": fields.measurement, "host_data": launch.commitment(fields)},
        proof=lambda digest: signer.sign(resume_message(digest)),
        signing=keys.public_bytes(signer.public_key()),
    )
    assert await ended(older) == "session.superseded"
    await asyncio.sleep(1.0)  # two looks of the process that holds the newer one
    await newer.call("renew", b"")
    await newer.aclose()


async def test_what_one_broker_ends_ends_at_the_other(pair):
    """verifies that: a later generation launched at one broker closes the session that the other one holds."""
    world, (first, second), _ = pair
    fields = world.fields()
    world.address = first
    older = await world.function(fields)
    world.address = second
    later = replace(world.fields(), instance=fields.instance, generation=2)
    async with await world.function(later):
        assert await ended(older) == "renewal.generation_behind"


async def test_launchers_lease_at_either(pair):
    """verifies that: no broker takes the other's advance of the counter for a restoration, also one that starts anew."""
    world, addresses, second = pair
    leased = []
    for address in (*addresses, *addresses):
        world.address = address
        async with await world.launcher(world.ticket(), signing=spki()) as session:
            leased.append(schema.decode(LauncherSecrets, session.secrets))
    assert len({one.epoch for one in leased}) == 1
    await second.stop(signal.SIGKILL)
    await second.start()
    async with world.alpha.admin() as admin:
        codes = [alarm["code"] for alarm in (await admin.get_json("/v1/alarms"))["alarms"]]
    assert "broker.database_restored" not in codes


async def test_without_the_ledger_old_sessions_go_on_and_new_ones_are_told_when(pair):
    """verifies that: authorities gone, a session still answers; a new one is Unavailable with a retry time."""
    world, (first, _), _ = pair
    world.address = first
    async with await world.function(world.fields()) as session:
        for authority in world.consortium.authorities:
            await authority.stop(signal.SIGKILL)
        assert await session.call("time", b"")
        with pytest.raises(Unavailable) as caught:
            await session.call("renew", b"")
        assert caught.value.retry_after_s > 0
        assert await session.call("time", b"")  # the refusal of one call does not end the session
        with pytest.raises(Unavailable) as caught:
            await world.function(world.fields())
        assert caught.value.retry_after_s > 0
        await asyncio.gather(*(authority.start() for authority in world.consortium.authorities))
        await session.call("renew", b"")
    async with await world.function(world.fields()):
        pass
