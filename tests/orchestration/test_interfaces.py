"""The HTTP interfaces of orchestrator and host agent: who may, what comes back, and what a stranger gets."""

import asyncio
import logging
import ssl
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import EXIT_REFUSED, Misconfigured, Unavailable
from moorline.host_agent.guests import Guests
from moorline.orchestration import package as packages
from moorline.services import host as host_service
from moorline.services import http, key_files
from moorline.services import orchestrator as service
from moorline.services import settings as settings_module
from moorline.services.launcher_parent import LauncherSettings, order
from moorline.storage.orchestrator_store import LaunchState
from moorline.wire import keys, schema
from moorline.wire.guest import LauncherLaunch
from moorline.wire.http import HttpClient, load_identity

from .conftest import guard_of, until
from .test_compliance_story import Pki
from .test_guests import Silicon
from .test_guests import order as guest_order
from .test_launch import mano  # noqa: F401 - a fixture

OPERATOR = "operator/op-1"


class As:
    """An ASGI application seen by a client whose certificate TLS has verified."""

    def __init__(self, app, certificate):
        self.app, self.certificate = app, certificate

    async def __call__(self, scope, receive, send):
        scope["moorline.peer"] = self.certificate
        await self.app(scope, receive, send)


def client(app, provider, path):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    certificate = None if path is None else provider.svid(path, key)[0]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=As(app, certificate)), base_url="https://there")


class Log:
    """Takes what structlog takes."""

    def __getattr__(self, name):
        return lambda event, **facts: logging.getLogger("test").debug("%s %s", event, facts)


class Results:
    """Stands where the verifier's results are listed."""

    async def standing_results(self):
        return [{"host": "h1", "status": "affirming"}]


@pytest.fixture
def api(mano, publisher):  # noqa: F811 - the fixture
    configured = type("Settings", (), {"hsm": "hsm-1", "trust_domain": "alpha.test"})()
    orchestrator = service.Orchestrator(
        configured,
        store=mano.store,
        launches=mano.launches,
        hosts=Results(),
        signers=(publisher.der,),
        trust=mano.provider.trust,
        clock=mano.clock,
        log=Log(),
    )
    return service.application(configured, orchestrator, guard_of(mano.provider))


ROUTES = [
    ("POST", "/v1/packages"),
    ("GET", "/v1/packages"),
    ("POST", "/v1/functions"),
    ("GET", "/v1/functions"),
    ("GET", "/v1/functions/records-1"),
    ("DELETE", "/v1/functions/records-1"),
    ("GET", "/v1/hosts"),
    ("POST", "/v1/placement/explain"),
]


def test_every_route_of_the_orchestrator_is_in_the_table(api):
    found = {(method, route.path) for route in api.routes for method in route.methods - {"HEAD"}}
    named = {(method, path.replace("records-1", "{instance}")) for method, path in ROUTES}
    assert {pair for pair in found if pair[1].startswith("/v1")} == named


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(("who", "code"), [(None, "http.no_client_certificate"), ("host/h1", "http.not_authorised")])
async def test_strangers_are_refused_on_every_route(api, provider, method, path, who, code):
    body = {"service": "records", "package": "00" * 32, "tenant": "t"} if path == "/v1/functions" else {}
    async with client(api, provider, who) as caller:
        answer = await caller.request(method, path, json=body)
    assert answer.json()["code"] == code


async def test_onboarding(api, provider, publisher, mano):  # noqa: F811
    async with client(api, provider, OPERATOR) as caller:
        csar = publisher.build(version="2.0.0")
        answer = await caller.post("/v1/packages", content=csar)
        assert answer.status_code == 201
        assert answer.json()["digest"] == packages.package_digest(csar).hex()
        listed = (await caller.get("/v1/packages")).json()["packages"]
        assert {row["version"] for row in listed} == {"1.0.0", "2.0.0"}
        for body, code in ((csar[:-1], "package.malformed"), (b"junk", "package.malformed")):
            answer = await caller.post("/v1/packages", content=body)
            assert (answer.status_code, answer.json()["code"]) == (400, code)


async def test_a_function_from_request_to_end(api, provider, mano):  # noqa: F811
    asked = {"service": "records", "package": mano.package.hex(), "tenant": "tenant-1", "id": "records-1"}
    async with client(api, provider, OPERATOR) as caller:
        answer = await caller.post("/v1/functions", json=asked)
        assert (answer.status_code, answer.json()["id"]) == (202, "records-1")
        await until(lambda: mano.store.function("records-1").state is LaunchState.ACTIVE)
        shown = (await caller.get("/v1/functions/records-1")).json()
        assert (shown["state"], shown["host"], shown["placement"]["chosen"]) == ("active", "h1", "h1")
        assert [event["state"] for event in shown["events"]][-1] == "active"
        again = await caller.post("/v1/functions", json=asked)
        assert again.json()["id"] == "records-1"
        assert len((await caller.get("/v1/functions")).json()["functions"]) == 1
        ended = await caller.delete("/v1/functions/records-1")
        assert ended.json()["state"] == "ended"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"package": "zz"}, 400, "package.digest_malformed"),
        ({"package": "00" * 32}, 403, "package.not_onboarded"),
        ({"service": "other"}, 403, "launch.other_service"),
        ({"id": "../x"}, 400, "name.malformed"),
        ({"id": "x" * 60}, 400, "name.malformed"),
        ({"id": "records-g2"}, 400, "launch.instance_name"),
        ({"contracts": ["A B"]}, 400, "name.malformed"),
        ({"surprise": 1}, 400, "http.request_malformed"),
        ({"tenant": 7}, 400, "http.request_malformed"),
    ],
)
async def test_requests_that_are_not_taken(api, provider, mano, changes, status, code):  # noqa: F811
    asked = {"service": "records", "package": mano.package.hex(), "tenant": "tenant-1"}
    async with client(api, provider, OPERATOR) as caller:
        answer = await caller.post("/v1/functions", json=asked | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert mano.store.functions() == ()


async def test_explaining_a_placement(api, provider, mano):  # noqa: F811
    async with client(api, provider, OPERATOR) as caller:
        answer = (await caller.post("/v1/placement/explain", json={"package": mano.package.hex()})).json()
        assert answer["chosen"] == "h1"
        assert {need["capability"] for need in answer["profile"]} >= {"boot.measured", "location.geo"}
        elsewhere = {"use_case": "4.7", "jurisdiction": "CH"}
        assert (await caller.post("/v1/placement/explain", json=elsewhere)).json()["chosen"] is None
        nothing = await caller.post("/v1/placement/explain", json={})
        assert nothing.json()["code"] == "http.request_malformed"
        assert (await caller.get("/v1/hosts")).json()["hosts"][0]["host"] == "h1"


# The host agent -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def agent(tmp_path, provider):
    configured = type("Settings", (), {"trust_domain": "alpha.test", "orchestrator": "o1"})()
    guests = Guests(tmp_path / "guests", Silicon(), publish="127.0.0.1")
    yield host_service.application(configured, guests, guard_of(provider))
    await guests.aclose()


async def test_only_its_own_orchestrator_may_use_a_host(agent, provider):
    provider.orchestrator(name="o2")
    for who, code in (
        (None, "http.no_client_certificate"),
        ("orchestrator/o2", "http.not_authorised"),
        (OPERATOR, "http.not_authorised"),
    ):
        async with client(agent, provider, who) as caller:
            for method, path in (
                ("POST", "/v1/guests"),
                ("GET", "/v1/guests"),
                ("GET", "/v1/guests/g"),
                ("DELETE", "/v1/guests/g"),
            ):
                assert (await caller.request(method, path)).json()["code"] == code


async def test_a_guest_through_the_interface(agent, provider):
    body = schema.encode(guest_order())
    async with client(agent, provider, "orchestrator/o1") as caller:
        started = (await caller.post("/v1/guests", content=body)).json()
        assert started["state"] == "running"
        assert (await caller.post("/v1/guests", content=body)).json()["address"] == started["address"]
        assert [guest["instance"] for guest in (await caller.get("/v1/guests")).json()["guests"]] == ["records-1"]
        assert (await caller.get("/v1/guests/records-1?wait_s=1")).json()["state"] == "running"
        for junk in ("-1", "21", "soon"):
            assert (await caller.get(f"/v1/guests/records-1?wait_s={junk}")).status_code == 400
        assert (await caller.delete("/v1/guests/records-1")).json()["state"] == "ended"
        gone = await caller.get("/v1/guests/records-1")
        assert (gone.status_code, gone.json()["code"]) == (403, "host.no_such_guest")
        for junk in (b"", b"\xa0", b"\xff" * 100):
            assert (await caller.post("/v1/guests", content=junk)).status_code == 400


async def test_an_agent_waits_for_an_identity_and_renews_it_without_hanging_up(tmp_path, monkeypatch):
    """verifies that: no identity is no reason to end, and a request under way outlives a renewal."""
    monkeypatch.setattr(host_service, "RETRY_S", 0.01)
    monkeypatch.setattr(host_service, "RENEW_RETRY_S", 0.01)
    pki = Pki()
    (tmp_path / "roots.pem").write_bytes(pki.roots_pem)
    given = [pki.identity("host/h1"), pki.identity("host/h1")]
    renewals, arrived, answer = asyncio.Event(), asyncio.Event(), asyncio.Event()
    asked = []

    async def obtain():
        asked.append(1)
        if len(asked) in (1, 3):
            raise Unavailable("peer.unreachable", "the broker is away")
        if len(asked) == 2:
            return host_service.Standing(identity=given[0], renew_after_s=0.01)
        renewals.set()
        return host_service.Standing(identity=given[1], renew_after_s=1000.0)

    app = http.application("agent")

    @app.get("/slow")
    async def slow() -> str:
        arrived.set()
        await answer.wait()
        return "answered"

    configured = type("Settings", (), {"id": "h1", "listen": "127.0.0.1:0", "roots": tmp_path / "roots.pem"})()
    server = host_service._Server(configured, app, Log())
    bound = asyncio.get_running_loop().create_future()
    server._bound = bound.set_result
    serving = asyncio.ensure_future(server.serve(obtain))
    address = await bound

    def agent():
        return HttpClient(f"https://{address}", server_name="h1.host.alpha.test", roots_pem=pki.roots_pem)

    async def renewed():
        return await shown(address) == given[1].chain_pem.decode()

    async with agent() as first:
        waiting = asyncio.ensure_future(first.get_json("/slow"))
        await arrived.wait()
        await renewals.wait()
        await until(renewed)
        answer.set()
        assert await waiting == "answered"
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert len(asked) == 4


async def shown(address):
    host, _, port = address.rpartition(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


async def test_an_orchestrator_keeps_its_certificate_while_its_files_are_no_pair(tmp_path, monkeypatch):
    """verifies that: what it shows is shown on to who connects, however often it looks, and the next good pair instead."""
    monkeypatch.setattr(service, "IDENTITY_REREAD_S", 0.01)
    pki, bound, tried = Pki(), asyncio.get_running_loop().create_future(), []
    monkeypatch.setattr(service, "announce_ready", lambda _, *, address: bound.set_result(address))
    monkeypatch.setattr(service, "load_identity", lambda used, *pair: tried.append(pair) or load_identity(used, *pair))
    first, second = pki.identity("orchestrator/o1"), pki.identity("orchestrator/o1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(first.chain_pem)
    key.write_bytes(first.key_pem)
    configured = SimpleNamespace(listen="127.0.0.1:0", certificate_chain=chain, private_key=key)
    log = structlog.stdlib.get_logger("orchestrator")
    serving = asyncio.ensure_future(service._serve(configured, http.application("orchestrator"), pki.roots_pem, log))
    address = await bound
    key.write_bytes(second.key_pem)
    await until(lambda: tried.count((first.chain_pem, second.key_pem)) >= 2)
    assert await shown(address) == first.chain_pem.decode()
    chain.write_bytes(second.chain_pem)

    async def renewed():
        return await shown(address) == second.chain_pem.decode()

    await until(renewed)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_an_agent_takes_no_files_that_are_no_pair(tmp_path):
    pki, chain, key = Pki(), tmp_path / "chain.pem", tmp_path / "key.pem"
    given, other = pki.identity("host/h1"), pki.identity("host/h1")
    obtain = host_service._from_files(chain, key)
    chain.write_bytes(given.chain_pem)
    for bad in (other.key_pem, given.key_pem[:100], b""):
        key.write_bytes(bad)
        with pytest.raises(Misconfigured) as refusal:
            await obtain()
        assert refusal.value.code == "host.no_identity"
    key.write_bytes(given.key_pem)
    assert (await obtain()).identity == given


# Settings and small parts -------------------------------------------------------------------------------------------------


def test_settings_load_from_toml(tmp_path):
    (tmp_path / "host.toml").write_text(
        'provider = "alpha"\ntrust_domain = "alpha.test"\nid = "h1"\nlisten = "127.0.0.1:0"\nstate = "state"\n'
        'silicon = "unix:/x"\norchestrator = "o1"\nroots = "roots.pem"\n'
        'trust = "trust.cbor"\nledger_urls = ["https://127.0.0.1:1|authority-1.authority.consortium.test"]\n'
        '[attestation]\ntcti = "swtpm:path=x"\nverifier_url = "https://127.0.0.1:1"\nverifier_name = "v"\n'
        'event_log = "log"\nima = "ima"\n'
    )
    loaded = settings_module.load(host_service.HostSettings, tmp_path / "host.toml")
    assert loaded.attestation.event_log == tmp_path / "log"
    assert loaded.certificate_chain is None


def test_host_data_of_a_launcher_covers_what_it_reads(tmp_path):
    for name in ("ticket", "trust"):
        (tmp_path / name).write_bytes(name.encode())
    settings = LauncherSettings(
        provider="alpha",
        hsm="hsm-1",
        name="launcher-1",
        listen="127.0.0.1:0",
        state=tmp_path,
        silicon="unix:/x",
        broker="127.0.0.1:1",
        ticket=tmp_path / "ticket",
        trust=tmp_path / "trust",
    )
    made = order(settings)
    assert schema.decode(LauncherLaunch, made.launch).ticket == b"ticket"
    (tmp_path / "ticket").write_bytes(b"other")
    assert order(settings).host_data != made.host_data


def test_moor_package_from_publisher_to_verdict(tmp_path, capsys, monkeypatch):
    from moorline import cli

    def moor(*arguments):
        monkeypatch.setattr("sys.argv", ["moor", *arguments])
        return cli.run(list(arguments))

    monkeypatch.chdir(tmp_path)
    Path("function.py").write_text("class Function: ...\n")
    common = ["--certificate", "publisher.pem", "--key", "publisher.key"]
    assert moor("package", "publisher", "--name", "me", *common) == 0
    described = ["--service", "records", "--provider", "alpha"]
    assert moor("package", "build", "function.py", "-o", "p.csar", *described, *common) == 0
    assert moor("package", "verify", "p.csar", "--signers", "publisher.pem") == 0
    assert "EU" in capsys.readouterr().out
    assert Path("publisher.key").stat().st_mode & 0o777 == 0o600
    other = ["--certificate", "other.pem", "--key", "other.key"]
    assert moor("package", "publisher", "--name", "other", *other) == 0
    assert moor("package", "verify", "p.csar", "--signers", "other.pem", "--json") == EXIT_REFUSED
    assert "package.signer_untrusted" in capsys.readouterr().out


def test_keys_and_certificates_from_files(tmp_path, publisher, provider):
    from cryptography.hazmat.primitives.serialization import Encoding

    (tmp_path / "spki.der").write_bytes(keys.public_bytes(provider.intent_signer.public_key()))
    assert key_files.load_public(tmp_path / "spki.der") == provider.intent_signer.public_key()
    (tmp_path / "signers.pem").write_bytes(publisher.certificate.public_bytes(Encoding.PEM) * 2)
    assert service.load_certificates(tmp_path / "signers.pem") == (publisher.der, publisher.der)
    for loader in (service.load_signer, key_files.load_public, service.load_certificates):
        with pytest.raises(service.Misconfigured):
            loader(tmp_path / "nothing")
