"""Drift over real interfaces: HTTPS with client certificates to a verifier, a broker and two host agents; a real launcher
enclave's code, a real store, real relays. Only the silicon runs nothing, and a guest's words are written for it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Request

from moorline.cli import vnf
from moorline.clock import Instant, SystemClock, Validity
from moorline.errors import Conflict, Malformed, Unavailable
from moorline.host_agent.guests import Guests
from moorline.nfv import Role, SpiffeId
from moorline.orchestration.clean_up import Retirement
from moorline.orchestration.compliance import Compliance, Reactions
from moorline.orchestration.launch import Identity, Launches, as_json
from moorline.policy import ear
from moorline.services import host as host_service
from moorline.services import http
from moorline.services import orchestrator as service
from moorline.services.orchestrator_peers import Brokers, HostAgents, NamedHost, Peer
from moorline.storage.orchestrator_store import LaunchState
from moorline.wire import certificates as profile
from moorline.wire import keys
from moorline.wire.certificates import dns_name
from moorline.wire.http import ClientIdentity

from .conftest import NOW, until
from .test_guests import Silicon
from .test_launch import mano  # noqa: F401 - a fixture
from .test_placement import result

PRESENT = SystemClock().now()
LIFE = Validity(not_before=Instant(PRESENT - 60), not_after=Instant(PRESENT + 3000))
DOMAIN = "alpha.test"


class Pki:
    """One root, and identities under it that TLS believes today."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = profile.root_certificate(self.key, name="root", validity=LIFE, serial=1)
        self.roots_pem = self.root.public_bytes(serialization.Encoding.PEM)

    def identity(self, path):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = profile.leaf_certificate(
            key.public_key(),
            spiffe_id=SpiffeId.parse(f"spiffe://{DOMAIN}/{path}"),
            issuer=profile.Issuer(certificate=self.root, key=self.key),
            validity=LIFE,
            serial=2,
        )
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return http.TlsIdentity(chain_pem=certificate.public_bytes(serialization.Encoding.PEM), key_pem=pem)

    def client(self, path):
        identity = self.identity(path)
        return ClientIdentity(certificate_chain_pem=identity.chain_pem, private_key_pem=identity.key_pem)


class Verifier:
    """GET /v1/results and /v1/events as PROTOCOLS.md 8 and the verifier's page have them, over results it is given."""

    def __init__(self, signer):
        self.signer, self.results, self.history, self.changed = signer, {}, [], asyncio.Event()
        self.app = http.application("verifier")

        @self.app.get("/v1/results/{host}")
        async def one(request: Request, host: str) -> dict[str, str]:
            http.require(request, Role.ORCHESTRATOR, trust_domain=DOMAIN)
            return {"host": host, "ear": ear.encode(self.results[host], self.signer, audience=DOMAIN)}

        @self.app.get("/v1/events")
        async def events(request: Request, after: int = 0, wait_s: int = 0) -> dict[str, object]:
            http.require(request, Role.ORCHESTRATOR, trust_domain=DOMAIN)
            if after > len(self.history):
                raise Conflict("events.cursor_unknown", "another history")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while len(self.history) <= after:
                        self.changed.clear()
                        await self.changed.wait()
            return {"events": self.history[after:], "next": len(self.history), "newest": len(self.history)}

    def lose(self, host, code):
        self.results[host] = result(host, status=result(host).status.CONTRAINDICATED, expires=Instant(NOW + 10_000))
        told = {"host": host, "at": NOW + 1, "kind": "verdict_lost", "code": code, "result_expires": NOW}
        self.history.append({"cursor": len(self.history) + 1, **told})
        self.changed.set()


class Broker:
    """POST /v1/instances/{instance}/retire: the same answer each time; `log` is when it was first asked."""

    def __init__(self, order):
        self.retired, self.away, self.order = {}, 0, order
        self.app = http.application("broker")

        @self.app.post("/v1/instances/{instance}/retire")
        async def retire(request: Request, instance: str, body: dict[str, object]) -> dict[str, object]:
            http.require(request, Role.ORCHESTRATOR, Role.OPERATOR, trust_domain=DOMAIN)
            if self.away:
                self.away -= 1
                raise Unavailable("token.busy", "the token does not answer", retry_after_s=0.1)
            key = (instance, body["generation"])
            if key not in self.retired:
                self.order.append(("keys", *key))
            self.retired.setdefault(key, len(self.retired) + 70)
            return {
                "instance": instance,
                "generation": key[1],
                "destroyed": ["storage-key", "function-key"],
                "not_proven": ["enclave-memory"],
                "revoked_at_height": self.retired[key],
            }


class TalkingSilicon(Silicon):
    """Writes what the function inside would write once it had its identity."""

    def __init__(self, host, order):
        super().__init__()
        self.host, self.order = host, order

    async def launch(self, request):
        status = await super().launch(request)
        with open(f"{request.shared}/status.jsonl", "w", encoding="utf-8") as file:  # noqa: ASYNC230, PTH123 - a guest's own
            file.write(json.dumps({"event": "active", "spiffe_id": f"spiffe://{DOMAIN}/svc/records/on-{self.host}"}) + "\n")
        return status

    async def stop(self, name):
        self.order.append(("guest", name, self.host))
        return await super().stop(name)


async def by_chain_alone(_: Request):
    """The doors of hosts are judged in test_interfaces; here a certificate is worth what its chain is."""


class Log:
    """Takes what structlog takes."""

    def __getattr__(self, name):
        return lambda event, **facts: logging.getLogger("test").debug("%s %s", event, facts)


@dataclass
class System:
    """Everything that listens, and an orchestrator process over it that can be killed and started again."""

    mano: object
    pki: Pki
    verifier: Verifier
    broker: Broker
    silicons: dict
    order: list
    addresses: dict = field(default_factory=dict)
    servers: dict = field(default_factory=dict)
    tasks: list = field(default_factory=list)

    async def serve(self, path, app):
        bound = asyncio.get_running_loop().create_future()
        self.servers[path] = asyncio.ensure_future(
            http.serve(
                app,
                listen=self.addresses.get(path, "127.0.0.1:0"),
                identity=self.pki.identity(path),
                client_roots_pem=self.pki.roots_pem,
                ready=bound.set_result,
            )
        )
        self.addresses[path] = await bound

    async def unplug(self, path):
        self.servers[path].cancel()
        await asyncio.gather(self.servers.pop(path), return_exceptions=True)

    def peer(self, path):
        spiffe = SpiffeId.parse(f"spiffe://{DOMAIN}/{path}")
        return {"url": f"https://{self.addresses[path]}", "server_name": dns_name(spiffe)}

    async def orchestrate(self):
        """A new orchestrator process over the same database."""
        over = self.mano.process()  # a new store over the same file
        identity = self.pki.client("orchestrator/o1")
        agents = HostAgents(
            hosts=tuple(NamedHost(id=host, **self.peer(f"host/{host}")) for host in ("h1", "h2")),
            verifier=Peer(**self.peer("verifier/v1")),
            verifier_keys=lambda: (self.verifier.signer.public_key(),),
            roots_pem=self.pki.roots_pem,
            identity=lambda: identity,
            provider="alpha",
            trust_domain=DOMAIN,
            clock=over.clock,
        )
        self.brokers = Brokers(roots_pem=self.pki.roots_pem, identity=lambda: identity, trust_domain=DOMAIN)
        me = Identity(
            provider="alpha",
            trust_domain=DOMAIN,
            id="o1",
            signer=over.provider.intent_signer,
            trust=over.provider.trust,
            max_age_s=30,
            launch_life_s=300,
        )
        launches = Launches(
            me=me,
            store=over.store,
            ledger=over.provider.ledger,
            hosts=agents,
            launcher=over.enclave,
            broker=Located(self.brokers, f"https://{self.addresses['hsm/hsm-1']}"),
            clock=over.clock,
        )
        orchestrator = service.Orchestrator(
            type("Settings", (), {"hsm": "hsm-1", "trust_domain": DOMAIN})(),
            store=over.store,
            launches=launches,
            hosts=agents,
            signers=(),
            trust=over.provider.trust,
            clock=over.clock,
            log=Log(),
        )
        compliance = Compliance(
            store=over.store,
            clean_ups=launches.clean_ups,
            verdicts=agents,
            guests=agents,
            clock=over.clock,
            reactions=Reactions(supervise_s=0.2),
            interrupt=orchestrator.interrupt,
            on_error=lambda _: None,
        )
        await orchestrator.resume_all()
        self.orchestrator, self.compliance = orchestrator, compliance
        self.tasks = [asyncio.ensure_future(compliance.follow()), asyncio.ensure_future(compliance.supervise())]

    async def kill(self):
        """End the orchestrator without letting it finish anything."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.orchestrator.aclose()
        self.mano.store.close()

    async def active_on(self, host, generation):
        store = self.mano.store

        def there():
            row = store.function("records-1")
            return row if (row.state, row.host, row.generation) == (LaunchState.ACTIVE, host, generation) else None

        return await until(there, within_s=20)


class Located:
    """The broker at its real address: the ledger of these tests has another."""

    def __init__(self, brokers, url):
        self.brokers, self.url = brokers, url

    async def retire(self, asked):
        return await self.brokers.retire(
            Retirement(
                hsm=asked.hsm, url=self.url, instance=asked.instance, generation=asked.generation, reason=asked.reason
            )
        )


@pytest.fixture
async def system(mano, tmp_path):  # noqa: F811 - the fixture
    signer, order = keys.KeySigner(ec.generate_private_key(ec.SECP256R1())), []
    made = System(
        mano=mano,
        pki=Pki(),
        verifier=Verifier(signer),
        broker=Broker(order),
        silicons={host: TalkingSilicon(host, order) for host in ("h1", "h2")},
        order=order,
    )
    await made.serve("verifier/v1", made.verifier.app)
    await made.serve("hsm/hsm-1", made.broker.app)
    configured = type("Settings", (), {"trust_domain": DOMAIN, "orchestrator": "o1"})()
    agents = {}
    for host, silicon in made.silicons.items():
        made.verifier.results[host] = result(host, expires=Instant(NOW + 10_000))
        agents[host] = Guests(tmp_path / host, silicon, publish="127.0.0.1")
        await made.serve(f"host/{host}", host_service.application(configured, agents[host], by_chain_alone))
    made.agents = agents
    mano.store.close()
    await made.orchestrate()
    made.mano.request()
    made.orchestrator.resume("records-1")
    await made.active_on("h1", 1)
    made.mano.clock.at += 1
    yield made
    await made.kill()
    for path in list(made.servers):
        await made.unplug(path)
    for guests in agents.values():
        await guests.aclose()
    mano.process()  # the fixture closes it


async def test_a_lost_verdict_moves_the_function_to_another_host(system):
    """verifies that: an event of the verifier ends generation 1 keys first, and generation 2 serves elsewhere."""
    system.verifier.lose("h1", "ima.file_unknown")
    row = await system.active_on("h2", 2)
    assert system.order == [("keys", "records-1", 1), ("guest", "records-1", "h1")]
    assert row.spiffe_id.endswith("on-h2")
    (done,) = row.clean_ups
    assert (done.destroyed, done.revoked_at_height, done.stopped) == (("storage-key", "function-key"), 70, True)
    assert [state.state for state in await system.agents["h1"].states()] == []
    states = [(event.generation, event.state) for event in system.mano.store.events("records-1")]
    assert states[5:9] == [(1, "halting"), (1, "stopping"), (1, "cleaned"), (2, "requested")]
    assert all(event.at_ms for event in system.mano.store.events("records-1"))


async def test_what_an_operator_is_shown(system, capsys):
    """verifies that: `moor vnf show` tells the story with times, what was destroyed and what was not proven."""
    system.verifier.lose("h1", "ima.file_unknown")
    row = await system.active_on("h2", 2)
    events = [dataclasses.asdict(event) for event in system.mano.store.events("records-1")]
    vnf._show_function({**as_json(row), "events": events}, as_json=False)
    told = capsys.readouterr().out
    lines = [line.split() for line in told.splitlines() if line.startswith("  20")]
    assert [(line[1], line[2]) for line in lines][4:8] == [
        ("1", "active"),
        ("1", "halting"),
        ("1", "stopping"),
        ("1", "cleaned"),
    ]
    assert all(line[0].endswith("Z") for line in lines)
    assert "clean-up of generation 1 on h1: host-lost, ima.file_unknown" in told
    assert "destroyed: storage-key, function-key" in told
    assert "not proven: guest stopped: only h1 says so, and it has no verdict" in told


async def test_a_verifier_without_events_is_looked_at(system):
    """verifies that: the poll alone notices a verdict that turned."""
    history = system.verifier.history
    system.verifier.lose("h1", "ima.file_unknown")
    system.verifier.history = []
    del history[:]
    row = await system.active_on("h2", 2)
    assert row.clean_ups[0].cause == "host-lost"


async def test_an_orchestrator_that_dies_while_a_broker_is_slow(system):
    """verifies that: what one process began, another finishes, and nothing is doubled."""
    system.broker.away = 1000
    system.verifier.lose("h1", "ima.file_unknown")
    await until(lambda: system.orchestrator.launches.waiting.get("records-1"))
    assert system.silicons["h1"].guests["records-1"].state == "running"  # keys first
    await system.kill()
    system.broker.away = 0
    await system.orchestrate()
    await system.active_on("h2", 2)
    assert system.broker.retired == {("records-1", 1): 70}
    assert len(system.silicons["h2"].launched) == 1


async def test_a_host_that_is_gone_gates_nothing(system):
    """verifies that: the function is back elsewhere, and the guest is ended once its host is reachable again."""
    await system.unplug("host/h1")
    system.verifier.lose("h1", "result.expired")
    row = await system.active_on("h2", 2)
    assert row.clean_ups[0].stopped is False
    assert system.silicons["h1"].guests["records-1"].state == "running"
    configured = type("Settings", (), {"trust_domain": DOMAIN, "orchestrator": "o1"})()
    await system.serve("host/h1", host_service.application(configured, system.agents["h1"], by_chain_alone))
    await until(lambda: system.mano.store.left_guests() == ())
    assert system.silicons["h1"].guests["records-1"].state == "ended"
    assert system.silicons["h2"].guests["records-1"].state == "running"


async def test_a_guest_that_dies_comes_back(system):
    """verifies that: supervision notices a guest that ended by itself."""
    silicon = system.silicons["h1"]
    silicon.guests["records-1"] = silicon._status("records-1", "ended", 1)
    row = await system.active_on("h1", 2)
    assert row.clean_ups[0].code == "launch.guest_ended"
    assert len(silicon.launched) == 2


async def test_an_operator_ends_a_function(system):
    """verifies that: ending destroys keys first too, and answers when it is done."""
    row = await system.orchestrator.end("records-1")
    assert row.state is LaunchState.ENDED
    assert system.order == [("keys", "records-1", 1), ("guest", "records-1", "h1")]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {"instance": "records-1", "generation": 1, "destroyed": [], "not_proven": []},
        {"instance": "records-2", "generation": 1, "destroyed": [], "not_proven": [], "revoked_at_height": 1},
        {"instance": "records-1", "generation": 2, "destroyed": [], "not_proven": [], "revoked_at_height": 1},
        {"instance": "records-1", "generation": 1, "destroyed": "keys", "not_proven": [], "revoked_at_height": 1},
        {"instance": "records-1", "generation": 1, "destroyed": [1], "not_proven": [], "revoked_at_height": 1},
        {"instance": "records-1", "generation": 1, "destroyed": [], "not_proven": [], "revoked_at_height": "1"},
    ],
)
async def test_what_is_no_answer_of_a_broker(system, answer):
    app = http.application("broker")

    @app.post("/v1/instances/{instance}/retire")
    async def retire(instance: str) -> object:
        return answer

    await system.serve("hsm/hsm-2", app)
    asked = Retirement(
        hsm="hsm-2", url=f"https://{system.addresses['hsm/hsm-2']}", instance="records-1", generation=1, reason="test"
    )
    with pytest.raises(Malformed) as caught:
        await system.brokers.retire(asked)
    assert caught.value.code == "peer.answer_malformed"
