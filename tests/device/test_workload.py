"""The workload agent: what it refuses before it does anything, and on whose word it becomes active."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import MoorlineError
from moorline.wire import cbor, guest
from moorline.workload_agent import agent, broker
from moorline.workload_agent.__main__ import main


async def refusal(world):
    """Run the function with the broker there; the code it ends with."""
    server = await world.broker.serve(f"unix:{world.guest / guest.BROKER_SOCKET}")
    try:
        with pytest.raises(MoorlineError) as caught:
            async with asyncio.timeout(20):
                await agent.run(world.guest, lambda: world.reports)
        return caught.value.code
    finally:
        await server.aclose()


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


async def test_a_changed_configuration_or_package_is_refused_before_anything_else(world):
    for file, code in (
        (guest.CONFIGURATION_FILE, "workload.configuration_mismatch"),
        (guest.PACKAGE_FILE, "workload.package_mismatch"),
    ):
        world.hand_over()
        spoil(world.guest / file)
        assert await refusal(world) == code
    assert world.broker.asked == []
    world.hand_over()  # the control
    await world.start()
    await world.stop()


@pytest.mark.parametrize("file", [guest.LAUNCH_FILE, guest.CONFIGURATION_FILE, guest.PACKAGE_FILE])
async def test_what_is_not_handed_over_is_refused(world, file):
    world.hand_over()
    (world.guest / file).unlink()
    assert await refusal(world) == "workload.launch_unreadable"


async def test_garbage_for_a_launch_is_refused(world):
    world.hand_over()
    (world.guest / guest.LAUNCH_FILE).write_bytes(b"\xff" * 40)
    assert await refusal(world) == "workload.launch_unreadable"


@pytest.mark.parametrize("change", [{"provider": "gamma"}, {"hsm": "hsm-2"}, {"service": "others"}])
async def test_a_configuration_for_another_function_is_refused_even_with_the_right_digest(world, change):
    world.hand_over(configuration=world.configuration(**change))
    assert await refusal(world) == "workload.configuration_mismatch"


async def test_a_function_without_its_token_is_refused_by_the_broker(world):
    world.hand_over(token=b"t" * 32)
    assert await refusal(world) == "hsm.token"


async def test_a_function_launched_for_something_else_is_refused_by_the_broker(world):
    """The host starts the guest for one launch and hands it the fields of another: HOST_DATA tells."""
    world.hand_over(instance="i-2")
    reports = world.reports
    world.hand_over()
    world.reports = reports
    assert await refusal(world) == "hsm.commitment"


async def test_a_broker_with_another_hsm_certificate_is_refused(world):
    world.broker.identity = world.beta.identity("hsm/hsm-1", issuer=world.beta.hsm)
    world.hand_over()
    assert await refusal(world) == "ledger.peer_mismatch"


async def test_a_broker_of_another_name_is_refused(world):
    configuration = world.configuration(hsm="hsm-2")
    world.hand_over(configuration=configuration, hsm="hsm-2")
    assert await refusal(world) == "workload.broker_not_trusted"


@pytest.mark.parametrize(
    ("key", "code"), [("hsm/alpha/hsm-1", "ledger.hsm_not_active"), ("provider/alpha", "ledger.provider_not_active")]
)
async def test_a_broker_that_the_ledger_does_not_carry_is_refused(world, key, code):
    world.hand_over()
    world.ledger.values.pop(key)
    assert await refusal(world) == code


async def test_a_certificate_for_another_key_is_refused(world):
    world.broker.certified = ec.generate_private_key(ec.SECP256R1())
    world.hand_over()
    assert await refusal(world) == "workload.identity_mismatch"


async def test_a_certificate_for_another_instance_is_refused(world):
    world.hand_over(instance="i-2")
    assert await refusal(world) == "workload.identity_mismatch"


async def test_a_clock_far_from_the_brokers_is_refused(world):
    world.broker.time_off = -400
    world.hand_over()
    assert await refusal(world) == "workload.clock_disagrees"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("this is not python", "workload.function_unloadable"),
        ("class Other: pass", "workload.function_unloadable"),
        ("class Function:\n    def __init__(self, context): raise OSError", "workload.function_unloadable"),
        ("class Function:\n    def __init__(self, context): pass", "workload.function_unloadable"),
    ],
)
async def test_an_application_that_does_not_start_is_refused(world, source, code):
    world.package = world.csar(source)
    world.hand_over()
    assert await refusal(world) == code


async def test_a_package_without_an_application_is_refused(world):
    world.package = b"PK not a zip"
    world.hand_over()
    assert await refusal(world) == "workload.package_unreadable"


async def test_an_application_that_fails_does_not_take_the_service_down(world):
    world.package = world.csar(
        "class Function:\n    def __init__(self, context): self.context = context\n"
        "    async def handle(self, request, caller):\n"
        "        if request == b'fail': raise KeyError('secret')\n        return caller.encode()\n"
    )
    world.hand_over()
    await world.start()
    try:
        async with await world.connect(world.device()) as connection:
            with pytest.raises(MoorlineError) as caught:
                await connection.request(b"fail")
            assert caught.value.code == "workload.function_failed"
            assert "secret" not in str(caught.value)
            assert await connection.request(b"x") == b"spiffe://beta.test/device/d-1"
    finally:
        await world.stop()


async def test_a_contract_that_comes_later_counts_when_it_is_there(world):
    world.ledger.values.pop("contract/c1")
    world.ledger.contract("c2", grantee="gamma")
    world.hand_over(configuration=world.configuration(contracts=("c2", "c1")))
    await world.start()
    try:
        world.ledger.contract("c1")
        async with await world.connect(world.device()) as connection:
            assert await connection.request(cbor.encode({"op": "list"}))
    finally:
        await world.stop()


async def test_storage_survives_a_relaunch_and_what_the_host_changed_does_not(world):
    world.hand_over()
    await world.start()
    async with await world.connect(world.device()) as connection:
        await connection.request(cbor.encode({"op": "put", "name": "r1", "data": b"data"}))
    await world.stop()
    (world.guest / guest.STATUS_FILE).unlink()
    await world.start()
    async with await world.connect(world.device()) as connection:
        assert b"data" in await connection.request(cbor.encode({"op": "get", "name": "r1"}))
    await world.stop()
    spoil(world.guest / agent.STORAGE_DIRECTORY / "index")
    assert await refusal(world) == "workload.storage_not_authentic"


def test_a_refusal_is_written_for_the_host_to_read_and_ends_with_one(world):
    world.hand_over()
    spoil(world.guest / guest.PACKAGE_FILE)
    assert main(world.guest) == 1
    event = json.loads((world.guest / guest.STATUS_FILE).read_text())
    assert event["event"] == "refused"
    assert event["problem"]["code"] == "workload.package_mismatch"


def test_a_guest_without_a_broker_says_so(world):
    world.hand_over()
    environment = {**os.environ, "MOOR_SILICON_FD": ""}
    script = (
        "import sys; from pathlib import Path; from moorline.workload_agent.__main__ import main\n"
        "sys.exit(main(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(world.guest)], env=environment, check=False, timeout=60)
    assert done.returncode == 1
    event = json.loads((world.guest / guest.STATUS_FILE).read_text())
    assert event["event"] == "refused"


def test_the_agent_needs_only_what_the_guest_has():
    """Nothing that is not in the measured runtime is imported (httpx, structlog, sqlalchemy ...)."""
    script = (
        "import sys\n"
        "class Only:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        root = name.partition('.')[0]\n"
        "        if root in {'httpx', 'structlog', 'sqlalchemy', 'fastapi', 'typer', 'pydantic', 'uvicorn', 'pkcs11'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Only())\n"
        "import moorline.workload_agent.__main__\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


async def test_a_function_whose_broker_stays_away_ends_and_says_why(world, monkeypatch):
    monkeypatch.setattr(broker, "TIME_TRUSTED_S", 2)
    world.hand_over()
    await world.start()
    await world.server.aclose()
    with pytest.raises(MoorlineError) as caught:
        async with asyncio.timeout(20):
            await world.task
    assert caught.value.code == "workload.no_time"
