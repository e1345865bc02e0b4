"""`moor device connect` against a function, with proofs over HTTPS from a ledger node."""

import asyncio
import contextlib
import json
import sys

import pytest
import typer.testing
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fastapi import Request
from fastapi.responses import Response

from moorline.cli.device import app
from moorline.errors import MoorlineError
from moorline.ledger.client import Endpoint
from moorline.services import broker_access, http
from moorline.services.http import TlsIdentity

home_door, recorded = sys.modules["device_world"].home_door, sys.modules["device_world"].recorded

NAME = "authority-1.authority.alpha.test"


@contextlib.asynccontextmanager
async def ledger_node(world):
    """An authority's proof endpoint over the world's ledger."""
    node = http.application("authority")

    @node.get("/v1/proof")
    async def proof(request: Request):
        return Response(world.ledger.bundle(tuple(request.query_params.getlist("key"))), media_type="application/cbor")

    shown = world.alpha.identity("authority/authority-1", issuer=world.alpha.authority)
    pem = serialization.Encoding.PEM
    chain = b"".join(x509.load_der_x509_certificate(der).public_bytes(pem) for der in shown.chain[:2])
    key = shown.key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    ready = asyncio.get_running_loop().create_future()
    serving = http.serve(
        node,
        listen="127.0.0.1:0",
        identity=TlsIdentity(chain_pem=chain, key_pem=key),
        client_roots_pem=None,
        ready=ready.set_result,
    )
    task = asyncio.create_task(serving)
    try:
        address = await asyncio.wait_for(ready, 10)
        yield address if address.startswith("https:") else f"https://{address}"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def moor_device(*words):
    return await asyncio.to_thread(typer.testing.CliRunner().invoke, app, list(words))


async def test_put_get_and_list_a_record(running, tmp_path):
    beta = running.homes["beta.test"]
    async with ledger_node(running) as url, home_door(running.beta, lambda app: broker_access.add_routes(app, beta)) as home:
        store = running.device()
        store.keep_home(home)
        recorded(beta.kept, store.chain()[0], beta.clock.now())
        store.provision(running.ledger.trust, (Endpoint(url=url, server_name=NAME),))
        where = ["--dir", str(store.directory), "--address", running.inbound, "--provider", "alpha"]
        where += ["--service", "records", "--contract", "c1", "--json"]
        put = await moor_device("connect", "put", *where, "--name", "r1", "--data", "personal data")
        assert json.loads(put.output) == {"ok": True, "name": "r1", "bytes": 13}
        got = await moor_device("connect", "get", *where, "--name", "r1")
        assert json.loads(got.output)["data"] == "personal data"
        listed = await moor_device("connect", "list", *where)
        assert json.loads(listed.output)["names"] == ["r1"]
        missing = await moor_device("connect", "get", *where, "--name", "r2")
        assert isinstance(missing.exception, MoorlineError)
        assert missing.exception.code == "records.unknown"
        assert (store.directory / "highest.cbor").exists()
    assert len(beta.decisions()) == len(running.broker.hsm.decisions()) == 2 * 4  # four connections, two decisions each


@pytest.mark.parametrize("words", [["put"], ["put", "--data", "x", "--file", "y"], ["get"]])
async def test_wrong_use_is_told(words, tmp_path):
    where = ["--dir", str(tmp_path), "--address", "127.0.0.1:1", "--provider", "a", "--service", "s", "--contract", "c"]
    verb, *rest = words
    name = ["--name", "r"] if verb == "put" else []
    result = await moor_device("connect", verb, *where, *name, *rest)
    assert result.exit_code == 2


async def test_a_device_that_is_not_enrolled_is_told_what_to_do(tmp_path):
    where = ["--dir", str(tmp_path), "--address", "127.0.0.1:1", "--provider", "a", "--service", "s", "--contract", "c"]
    result = await moor_device("connect", "list", *where)
    assert isinstance(result.exception, MoorlineError)
    assert result.exception.code == "device.not_provisioned"
