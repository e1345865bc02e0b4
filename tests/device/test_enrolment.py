"""EST enrolment over real HTTPS: an honest server, and servers that answer with anything else."""

import asyncio
import base64
import contextlib
import json
import stat

import pytest
import typer.testing
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from fastapi import Request
from fastapi.responses import Response
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import SystemClock
from moorline.device.enrolment import certificates_of, enrol, renew
from moorline.device.store import DeviceStore
from moorline.errors import Malformed, MoorlineError, NotAuthentic
from moorline.ledger.client import Endpoint
from moorline.services import http
from moorline.services.http import TlsIdentity

NAME = "hsm-1.hsm.beta.test"
EST = "/.well-known/est"


def pem(certificates):
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def cms(certificates):
    return base64.encodebytes(pkcs7.serialize_certificates(list(certificates), serialization.Encoding.DER))


class Server:
    """Beta's EST server. `answer` decides what comes back for an accepted CSR."""

    def __init__(self, beta, *, tls=None):
        self.beta = beta
        self.tls = tls or beta
        self.codes = {"d-1": "one-time"}
        self.bound = {}
        self.answer = self.honest
        self.above = (beta.ca, beta.provider, beta.authority, beta.root)

    def honest(self, public, device):
        return self.certified(public, device), *(issuer.certificate for issuer in self.above)

    def certified(self, public, device):
        class Public:
            def public_key(self):
                return public

        return self.beta.leaf(f"device/{device}", key=Public())

    def application(self):
        app = http.application("est")

        @app.get(f"{EST}/cacerts")
        async def cacerts():
            return Response(cms(issuer.certificate for issuer in self.above), media_type="application/pkcs7-mime")

        @app.post(f"{EST}/simpleenroll")
        async def simpleenroll(request: Request):
            user, _, code = base64.b64decode(request.headers["authorization"].split()[1]).decode().partition(":")
            csr = x509.load_der_x509_csr(base64.b64decode(await request.body()))
            key = csr.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            if self.codes.get(user) != code or self.bound.setdefault(user, key) != key:
                raise NotAuthentic("est.code", "the code does not hold")
            return Response(cms(self.answer(csr.public_key(), user)), media_type="application/pkcs7-mime")

        @app.post(f"{EST}/simplereenroll")
        async def simplereenroll(request: Request):
            caller = http.peer(request)
            csr = x509.load_der_x509_csr(base64.b64decode(await request.body()))
            return Response(cms(self.answer(csr.public_key(), caller.segments[0])), media_type="application/pkcs7-mime")

        return app

    @contextlib.asynccontextmanager
    async def running(self):
        shown = self.tls.identity("hsm/hsm-1", issuer=self.tls.hsm)
        key = shown.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        identity = TlsIdentity(chain_pem=pem(x509.load_der_x509_certificate(one) for one in shown.chain), key_pem=key)
        ready = asyncio.get_running_loop().create_future()
        roots = pem([self.beta.root.certificate])
        serving = http.serve(
            self.application(),
            listen="127.0.0.1:0",
            identity=identity,
            client_roots_pem=roots,
            ready=ready.set_result,
        )
        task = asyncio.create_task(serving)
        try:
            address = await asyncio.wait_for(ready, 10)
            yield address if address.startswith("https:") else f"https://{address}"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def server(world):
    return Server(world.beta)


@pytest.fixture
def store(world):
    store = DeviceStore(directory=world.directory / "new-device")
    store.provision(world.ledger.trust, (Endpoint(url="https://127.0.0.1:1", server_name="a"),))
    return store


async def refusal(awaitable):
    with pytest.raises(MoorlineError) as caught:
        await awaitable
    return caught.value.code


def arguments(url, **changes):
    return {"url": url, "server_name": NAME, "device": "d-1", "code": "one-time", "now": SystemClock().now(), **changes}


async def test_a_device_enrols_again_after_a_lost_answer_and_renews(server, store, world):
    async with server.running() as url:
        chain = await enrol(store, **arguments(url))
        assert str(chain.spiffe_id) == "spiffe://beta.test/device/d-1"
        again = await enrol(store, **arguments(url))  # the same code with the same key: a retry
        assert again.leaf.public_key() == chain.leaf.public_key()
        renewed = await renew(store, url=url, server_name=NAME, now=SystemClock().now())
        assert renewed.spiffe_id == chain.spiffe_id
    assert len(store.identity().chain) == 4
    for path in store.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


async def test_a_wrong_or_taken_code_is_refused(server, store, world):
    async with server.running() as url:
        assert await refusal(enrol(store, **arguments(url, code="guess"))) == "est.code"
        await enrol(store, **arguments(url))
        thief = DeviceStore(directory=world.directory / "thief")
        thief.provision(world.ledger.trust, ())
        assert await refusal(enrol(thief, **arguments(url))) == "est.code"


async def test_a_server_under_another_root_is_refused(store, world):
    from_nowhere = type(world.beta)(trust_domain="beta.test")
    async with Server(world.beta, tls=from_nowhere).running() as url:
        assert await refusal(enrol(store, **arguments(url))) == "peer.tls_not_trusted"
    assert not (store.directory / "chain.pem").exists()


async def test_a_server_of_another_name_is_refused(server, store):
    async with server.running() as url:
        assert await refusal(enrol(store, **arguments(url, server_name="hsm-2.hsm.beta.test"))) == "peer.tls_not_trusted"
    assert not (store.directory / "chain.pem").exists()


async def test_what_comes_back_must_be_for_this_device(server, store, world):
    stranger = type(world.beta)(trust_domain="beta.test")
    other_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    twins = {
        "est.other_identity": lambda public, device: (server.certified(other_key, device),),
        "chain.untrusted": lambda public, device: (Server(stranger).certified(public, device),),
    }
    async with server.running() as url:
        for code, answer in twins.items():
            server.answer = answer
            assert await refusal(enrol(store, **arguments(url))) in {code, "chain.signature"}
        server.answer = lambda public, device: (server.certified(public, "d-2"),)
        assert await refusal(enrol(store, **arguments(url))) == "est.other_identity"
        assert not (store.directory / "chain.pem").exists()
        server.answer = server.honest
        await enrol(store, **arguments(url))


async def test_cas_that_lead_nowhere_are_refused(server, store, world):
    server.above = (*server.above, type(world.beta)().provider)
    async with server.running() as url:
        assert (await refusal(enrol(store, **arguments(url)))).startswith("chain.")


async def test_a_device_that_is_not_enrolled_says_what_to_do(store):
    with pytest.raises(MoorlineError) as caught:
        store.identity()
    assert caught.value.code == "device.not_enrolled"
    assert caught.value.remedy == "moor device enrol"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_certificates_or_malformed(body):
    with pytest.raises(Malformed):
        certificates_of(body)


@pytest.mark.parametrize("body", [b"\xff", b"[]x", b'[{"url": "x"}]', b"{}x"])
def test_a_spoilt_ledger_file_is_malformed(store, body):
    (store.directory / "ledger.json").write_bytes(body)
    with pytest.raises(Malformed):
        store.endpoints()


async def test_the_command_line_enrols(server, world, tmp_path):
    from moorline.cli.device import app

    trust, code = tmp_path / "trust.cbor", tmp_path / "code"
    trust.write_bytes(world.ledger.trust.encode())
    code.write_text("one-time\n")
    async with server.running() as url:
        words = ["enrol", "--dir", str(tmp_path / "d"), "--url", url, "--server-name", NAME, "--trust", str(trust)]
        words += ["--name", "d-1", "--code-file", str(code), "--ledger", "https://127.0.0.1:1=a", "--json"]
        result = await asyncio.to_thread(typer.testing.CliRunner().invoke, app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["spiffe_id"] == "spiffe://beta.test/device/d-1"
