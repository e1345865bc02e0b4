"""Doors that take a client certificate ask the ledger whether it still counts: orchestrator, host agent, verifier.

The same questions at each of the three, over proofs that authorities really cosign. Certificates chain to the root as well
as ever throughout: only the ledger changes.
"""

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.clock import Instant
from moorline.errors import Unavailable
from moorline.host_agent.guests import Guests
from moorline.ledger import records
from moorline.ledger.records import RevocationKind, Status
from moorline.nfv import SpiffeId
from moorline.services import callers, verifier_events, verifier_routes
from moorline.services import host as host_service
from moorline.wire import certificates

from .conftest import NOW, Provider, der, guard_of, until
from .test_guests import Silicon
from .test_interfaces import OPERATOR, api, client  # noqa: F401 - a fixture
from .test_launch import mano  # noqa: F401 - a fixture

ORCHESTRATOR = "orchestrator/o1"
DOORS = ("orchestrator", "host", "verifier")


class Authority:
    """As much of the attestation authority as its list of hosts needs, and a stream in which nothing happens."""

    def __init__(self):
        self.released = asyncio.Event()

    def overview(self):
        return []

    async def events(self, *, after, wait_s):
        await asyncio.sleep(wait_s)
        return (), after

    def release_readers(self):
        self.released.set()


@dataclass
class Door:
    """An application, somebody who may use a route of it, and that route."""

    app: object
    provider: Provider
    who: str
    path: str

    async def ask(self, **certified):
        """The code of the answer: None for a good one."""
        shown = SimpleNamespace(svid=partial(self.provider.svid, **certified))
        async with client(self.app, shown, self.who) as caller:
            answer = await caller.get(self.path)
        return None if answer.status_code == 200 else answer.json()["code"]


@pytest.fixture(params=DOORS)
async def door(request, api, provider, tmp_path):  # noqa: F811
    guests = Guests(tmp_path / "guests", Silicon(), publish="127.0.0.1")
    if request.param == "orchestrator":
        yield Door(api, provider, OPERATOR, "/v1/functions")
    elif request.param == "host":
        configured = SimpleNamespace(trust_domain="alpha.test", orchestrator="o1")
        yield Door(host_service.application(configured, guests, guard_of(provider)), provider, ORCHESTRATOR, "/v1/guests")
    else:
        clock = SimpleNamespace(now=lambda: NOW)
        app = verifier_routes.application(
            Authority(), None, trust_domain="alpha.test", clock=clock, guard=guard_of(provider)
        )
        yield Door(app, provider, ORCHESTRATOR, "/v1/hosts")
    await guests.aclose()


def put_ca(provider, status, certificate=None):
    provider.ledger.put(
        records.issuing_ca_key("alpha", "ca-1"),
        records.IssuingCaRecord(
            provider="alpha",
            id="ca-1",
            status=status,
            certificate=der(provider.issuing.certificate) if certificate is None else certificate,
        ),
    )


def revoke(provider, kind, name):
    provider.ledger.put(
        records.revocation_key(kind, "alpha", name),
        records.RevocationRecord(kind=kind, registrant="alpha", id=name, time_ms=NOW * 1000),
    )


async def test_a_stolen_issuing_ca_opens_no_door_once_it_is_revoked(door, provider):
    """verifies that: what a thief signs passes until RevokeIssuingCa, and is refused afterwards; another CA's goes on."""
    assert await door.ask() is None
    put_ca(provider, Status.REVOKED)
    assert await door.ask() == "http.issuing_ca"
    other = provider._issuer(provider._under(certificates.issuing_ca_certificate, provider.ca, 44, name="ca-2"))
    record = records.IssuingCaRecord(provider="alpha", id="ca-2", status=Status.ACTIVE, certificate=der(other.certificate))
    provider.ledger.put(records.issuing_ca_key("alpha", "ca-2"), record)
    assert await door.ask(issuer=other) is None


async def test_a_revoked_certificate_opens_no_door(door, provider):
    revoke(provider, RevocationKind.CERTIFICATE, f"{77:x}")
    assert await door.ask() == "ledger.revoked"


async def test_another_ca_of_the_same_name_opens_no_door(door, provider):
    """verifies that: the key that signed is the record's; a name alone stands for nothing."""
    other = provider._issuer(provider._under(certificates.issuing_ca_certificate, provider.ca, 45, name="ca-1"))
    put_ca(provider, Status.ACTIVE, der(other.certificate))
    assert await door.ask() == "http.issuing_ca"


async def test_a_revoked_orchestrator_opens_no_door(door, provider):
    """verifies that: RevokeOrchestrator alone ends what its certificate opens, another one too; operators go on."""
    assert await door.ask() is None
    provider.orchestrator(Status.REVOKED)
    code = "ledger.orchestrator_not_active" if door.who == ORCHESTRATOR else None
    assert await door.ask() == code
    assert await door.ask(serial=78) == code


async def test_an_orchestrator_that_nobody_registered_opens_no_door(door, provider):
    """verifies that: a certificate alone makes no orchestrator."""
    del provider.ledger.records[records.orchestrator_key("alpha", "o1")]
    provider.ledger.height += 1
    assert await door.ask() == ("ledger.orchestrator_not_active" if door.who == ORCHESTRATOR else None)


async def test_nobody_of_a_suspended_provider_comes_in(door, provider):
    record = records.parse(records.ProviderRecord, provider.ledger.records[records.provider_key("alpha")])
    provider.ledger.put(records.provider_key("alpha"), replace(record, status=Status.SUSPENDED))
    assert await door.ask() == "ledger.provider_not_active"


async def test_without_a_ledger_the_last_proof_counts_until_it_is_too_old(door, provider, monkeypatch):
    """verifies that: a caller known to stand goes on for max_age, a new one is told to wait; nobody is let in unproven."""
    assert await door.ask() is None

    async def gone(_, *, height=0):
        raise Unavailable("ledger.unreachable", "nobody answers")

    monkeypatch.setattr(provider.ledger, "prove", gone)
    provider.ledger.now = Instant(NOW + provider.trust.max_age_s)
    assert await door.ask() is None
    assert await door.ask(serial=78) == "http.standing_unknown"
    provider.ledger.now = Instant(NOW + provider.trust.max_age_s + 1)
    assert await door.ask() == "http.standing_unknown"


async def test_a_ledger_that_stands_still_is_no_ledger(door, provider):
    """verifies that: proofs that are fetched and too old count as none, and say when to ask again."""
    stale = provider.ledger.bundle

    def old(wanted):
        return stale(wanted, time=NOW)

    provider.ledger.bundle = old
    provider.ledger.now = Instant(NOW + provider.trust.max_age_s + 1)
    async with client(door.app, provider, door.who) as caller:
        answer = await caller.get(door.path)
    assert (answer.status_code, answer.json()["code"]) == (503, "http.standing_unknown")
    assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture
async def reading(provider, monkeypatch):
    """The verifier's door, and the answer to somebody of good standing who has a stream of events open at it."""
    monkeypatch.setattr(verifier_events, "KEEP_ALIVE_S", 0.02)
    clock = SimpleNamespace(now=lambda: NOW)
    app = verifier_routes.application(Authority(), None, trust_domain="alpha.test", clock=clock, guard=guard_of(provider))
    door = Door(app, provider, ORCHESTRATOR, verifier_events.STREAM_PATH)
    stream = asyncio.ensure_future(door.ask())
    await until(lambda: len(provider.ledger.asked) >= 4)
    assert not stream.done()  # the reader stands, and was asked about again and again
    yield door, stream
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_an_open_stream_ends_when_its_reader_is_revoked(reading, provider):
    """verifies that: the stream ends like an answer, and the reader that comes back is told why."""
    door, stream = reading
    revoke(provider, RevocationKind.CERTIFICATE, f"{77:x}")
    assert await asyncio.wait_for(stream, 10) is None
    assert await door.ask() == "ledger.revoked"


async def test_an_open_stream_ends_when_its_orchestrator_is_revoked(reading, provider):
    door, stream = reading
    provider.orchestrator(Status.REVOKED)
    assert await asyncio.wait_for(stream, 10) is None
    assert await door.ask() == "ledger.orchestrator_not_active"


async def test_an_open_stream_goes_on_without_a_ledger_while_the_last_proof_counts(reading, provider, monkeypatch):
    """verifies that: who was seen to stand keeps the stream for max_age, and then it ends; nobody reads on unproven."""
    door, stream = reading
    asked = []

    async def gone(keys, *, height=0):
        asked.append(keys)
        raise Unavailable("ledger.unreachable", "nobody answers")

    monkeypatch.setattr(provider.ledger, "prove", gone)
    await until(lambda: len(asked) >= 3)
    assert not stream.done()
    provider.ledger.now = Instant(NOW + provider.trust.max_age_s + 1)
    assert await asyncio.wait_for(stream, 10) is None
    assert await door.ask() == "http.standing_unknown"


async def test_one_silent_authority_shuts_nobody_out(provider, monkeypatch):
    """verifies that: who has no young proof waits for the next authority's answer, who has one goes on with it."""
    monkeypatch.setattr(callers, "_PATIENCE_S", 0.01)
    silent, asked = asyncio.Event(), []

    async def prove(wanted, *, height=0):
        asked.append(wanted)
        await silent.wait()
        return provider.ledger.bundle(wanted)

    guard = guard_of(provider, prover=SimpleNamespace(prove=prove))
    leaf = certificates.parse_certificate(provider.svid(OPERATOR, ec.generate_private_key(ec.SECP256R1()).public_key())[0])
    waiting = asyncio.ensure_future(guard.require_standing(leaf))
    while not asked:  # noqa: ASYNC110 - until it is under way
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    silent.set()
    await waiting
    silent.clear()
    await guard.require_standing(leaf)
    assert len(asked) == 2


async def test_authorities_that_say_nothing_are_not_waited_for_for_ever(provider, monkeypatch):
    monkeypatch.setattr(callers, "_PATIENCE_MAX_S", 0.01)
    silent = SimpleNamespace(prove=lambda _, **__: asyncio.Event().wait())
    guard = guard_of(provider, prover=silent)
    leaf = certificates.parse_certificate(provider.svid(OPERATOR, ec.generate_private_key(ec.SECP256R1()).public_key())[0])
    with pytest.raises(Unavailable) as caught:
        await guard.require_standing(leaf)
    assert caught.value.code == "http.standing_unknown"
    assert caught.value.retry_after_s >= 1


class Elsewhere:
    """Certificates of other roles and of another provider, before one guard."""

    def __init__(self, provider):
        self.provider, self.guard = provider, guard_of(provider)

    async def judged(self, uri, issuer, serial=90):
        leaf = certificates.leaf_certificate(
            ec.generate_private_key(ec.SECP256R1()).public_key(),
            spiffe_id=SpiffeId.parse(uri),
            issuer=issuer,
            validity=self.provider.validity_of_leaves(),
            serial=serial,
        )
        try:
            await self.guard.require_standing(certificates.parse_certificate(der(leaf)))
        except Exception as error:
            return error.code
        return None


@pytest.fixture
def elsewhere(provider):
    return Elsewhere(provider)


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        ("device/d1", RevocationKind.DEVICE, "d1"),
        ("host/h1", RevocationKind.HOST, "h1"),
        ("svc/records/i1", RevocationKind.INSTANCE, "i1"),
    ],
)
async def test_who_is_revoked_by_name_comes_in_with_no_certificate(elsewhere, provider, path, kind, name):
    uri = f"spiffe://alpha.test/{path}"
    assert await elsewhere.judged(uri, provider.issuing) is None
    revoke(provider, kind, name)
    assert await elsewhere.judged(uri, provider.issuing, serial=91) == "ledger.revoked"


async def test_odd_names_are_malformed_and_not_let_in(elsewhere, provider):
    assert await elsewhere.judged("spiffe://alpha.test/svc/records", provider.issuing) == "certificate.spiffe_id"
    assert await elsewhere.judged("spiffe://alpha.test/device/d1/x", provider.issuing) == "certificate.spiffe_id"
    assert await elsewhere.judged("spiffe://alpha.test/device/d1", provider.root) == "http.issuing_ca"


async def test_a_broker_stands_under_the_hsm_that_the_ledger_has(elsewhere, provider):
    """verifies that: a broker's TLS key counts under the registered HSM certificate, not under an issuing CA."""
    uri, key = "spiffe://alpha.test/hsm/hsm-1", records.hsm_key("alpha", "hsm-1")
    assert await elsewhere.judged(uri, provider.hsm) is None
    assert await elsewhere.judged(uri, provider.issuing) == "ledger.hsm_not_active"
    record = records.parse(records.HsmRecord, provider.ledger.records[key])
    provider.ledger.put(key, replace(record, status=Status.REVOKED))
    assert await elsewhere.judged(uri, provider.hsm) == "ledger.hsm_not_active"


async def test_callers_of_another_domain_stand_by_their_own_provider(elsewhere, provider):
    """verifies that: the ledger says whose a trust domain is; one that nobody holds comes in nowhere."""
    beta = Provider(name="beta", trust_domain="beta.test")
    assert await elsewhere.judged("spiffe://beta.test/orchestrator/o1", beta.issuing) == "ledger.no_such_domain"
    for key, value in beta.ledger.records.items():
        provider.ledger.records[key] = value
    provider.ledger.put(records.trust_domain_index_key("beta.test"), records.IndexRecord(holders=("beta",)))
    assert await elsewhere.judged("spiffe://beta.test/orchestrator/o1", beta.issuing) is None
    assert await elsewhere.judged("spiffe://beta.test/orchestrator/o1", provider.issuing) == "http.issuing_ca"
    provider.ledger.put(records.trust_domain_index_key("gamma.test"), records.IndexRecord(holders=("beta",)))
    assert await elsewhere.judged("spiffe://gamma.test/orchestrator/o1", beta.issuing) == "http.issuing_ca"
