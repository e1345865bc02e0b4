"""Pushed events: in order, until they are taken, to who was meant; a real receiver over TLS that is slow, wrong and away."""

import asyncio
import contextlib
import os
import signal

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI, Request, Response
from test_service import PKI, by_chain_alone, client, configured, serving, silicon  # noqa: F401 - fixtures
from test_stream import NOW, OPERATOR, change

from moorline.clock import SystemClock
from moorline.errors import Misconfigured, NotAuthentic, Refused, Unavailable
from moorline.nfv import SpiffeId
from moorline.rats import EvidenceRoot
from moorline.services import http, verifier_push
from moorline.services.verifier_push import Pushing, ReceiverSettings
from moorline.storage import steps
from moorline.storage.verifier_rounds import EnrolledHost
from moorline.storage.verifier_store import VerifierStore
from moorline.wire import keys, security_event

VERIFIER = "spiffe://alpha.test/verifier/v1"
AUDIENCE = "siem.test"


class Siem:
    """A receiver that answers what it is told to, then takes everything; it verifies what it takes."""

    def __init__(self, key, answers=()):
        self.key, self.answers, self.taken, self.seen = key, list(answers), [], []
        self.enough = asyncio.Event()
        self.wanted = 0

    def app(self):
        app = FastAPI()

        @app.post("/events")
        async def take(request: Request) -> Response:
            assert request.headers["content-type"] == "application/secevent+jwt"
            event = security_event.parse_verified(
                await request.body(), self.key.public_key(), issuer=VERIFIER, audience=AUDIENCE
            )
            self.seen.append(event.cursor)
            status, headers = self.answers.pop(0) if self.answers else (202, {})
            if status == 202:
                self.taken.append(event)
                if len(self.taken) >= self.wanted:
                    self.enough.set()
            return Response(status_code=status, headers=headers)

        return app

    async def until(self, count):
        self.wanted = count
        self.enough.clear()
        if len(self.taken) < count:
            await asyncio.wait_for(self.enough.wait(), 20)


@contextlib.asynccontextmanager
async def listening(siem, *, listen="127.0.0.1:0", uri="spiffe://alpha.test/operator/siem"):
    bound = asyncio.get_running_loop().create_future()
    shown = PKI.identity(uri)
    identity = http.TlsIdentity(chain_pem=shown.certificate_chain_pem, key_pem=shown.private_key_pem)
    task = asyncio.create_task(
        http.serve(siem.app(), listen=listen, identity=identity, client_roots_pem=None, ready=bound.set_result)
    )
    yield await bound
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Authority:
    """The events of a store, as the attestation authority gives them."""

    def __init__(self, store):
        self.store = store

    async def events(self, *, after, wait_s):
        for _ in range(200):
            found, newest = self.store.events(after=after, limit=500)
            if found:
                return found, newest
            await asyncio.sleep(0.02)
        return (), newest

    def newest_event(self):
        return self.store.newest_event()


async def until(condition):
    """Wait for what a task of this very loop brings about."""
    while not condition():  # noqa: ASYNC110 - the condition is a row of a database
        await asyncio.sleep(0.01)


def told(store):
    return store.deliveries().all()[0].cursor


@pytest.fixture
def store(tmp_path):
    opened = VerifierStore.open(tmp_path / "verifier.db")
    opened.enrol(EnrolledHost(host="h1", ek_digest=b"e", ak_public=b"", root=EvidenceRoot.TEST, enrolled=NOW))
    return opened


@pytest.fixture
def key():
    return ec.generate_private_key(ec.SECP256R1())


def receiver(tmp_path, address, **changes):
    (tmp_path / "siem-roots.pem").write_bytes(PKI.roots_pem)
    port = address.rpartition(":")[2]
    server_name = "siem.operator.alpha.test"
    values = {"name": "siem", "url": f"https://{server_name}:{port}/events", "audience": AUDIENCE, **changes}
    (found,) = verifier_push.receivers((ReceiverSettings(roots=tmp_path / "siem-roots.pem", **values),))
    # The name is not in any DNS here: dial loopback, and check the certificate against the name all the same.
    return verifier_push.Receiver(
        name=found.name,
        base_url=f"https://127.0.0.1:{port}",
        path=found.path,
        server_name=found.server_name,
        audience=found.audience,
        roots_pem=found.roots_pem,
    )


def pushing(store, key, *, slept, deliveries=None):
    async def sign(messages):
        return tuple(keys.KeySigner(key).sign(message) for message in messages)

    async def sleep(seconds):
        slept.append(seconds)
        await asyncio.sleep(0)

    return Pushing(
        authority=Authority(store),
        verifier=VERIFIER,
        deliveries=deliveries or store.deliveries(),
        sign=sign,
        clock=SystemClock(),
        sleep=sleep,
        jitter=lambda: 1.0,
    )


@contextlib.asynccontextmanager
async def telling(parts, to):
    task = asyncio.create_task(verifier_push.keep_telling(parts, to))
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_come_in_order_and_only_202_counts(store, key, tmp_path):
    """verifies that: an error, a redirect and a 200 all mean "again", with pauses that grow; nothing is skipped."""
    elsewhere = {"location": "https://elsewhere.test/"}
    siem = Siem(key, [(202, {}), (503, {"retry-after": "30"}), (302, elsewhere), (200, {}), (400, {}), (202, {})])
    slept = []
    async with listening(siem) as address:
        store.deliveries().begin("siem", at=NOW)
        change(store, 4)
        async with telling(pushing(store, key, slept=slept), receiver(tmp_path, address)):
            await siem.until(4)
    assert [one.cursor for one in siem.taken] == [1, 2, 3, 4]
    assert siem.seen == [1, 2, 2, 2, 2, 2, 3, 4]
    assert slept == [30.0, 2.0, 4.0, 8.0]
    assert (siem.taken[1].kind, siem.taken[1].code, siem.taken[1].host) == ("verdict_lost", "ima.unknown_file", "h1")


async def test_a_receiver_that_was_away_gets_what_it_missed(store, key, tmp_path):
    """verifies that: the verifier and the receiver may both die; each event is taken once all the same."""
    siem, slept = Siem(key), []
    async with listening(siem) as address:
        store.deliveries().begin("siem", at=NOW)
        change(store, 2)
        async with telling(pushing(store, key, slept=slept), receiver(tmp_path, address)):
            await until(lambda: told(store) == 2)
    change(store, 3)
    async with telling(pushing(store, key, slept=slept), receiver(tmp_path, address)):
        await until(lambda: len(slept) >= 3)  # nobody listens there now
    (held,) = store.deliveries().all()
    assert (held.cursor, held.code) == (2, "peer.unreachable")
    assert held.failures >= 3
    async with listening(siem, listen=address):
        again = VerifierStore.open(tmp_path / "verifier.db")
        async with telling(pushing(again, key, slept=[]), receiver(tmp_path, address)):
            await until(lambda: told(store) == 5)
    assert [one.cursor for one in siem.taken] == [1, 2, 3, 4, 5]
    assert store.deliveries().all()[0].failures == 0


async def test_a_crash_after_the_answer_repeats_one_event_under_its_name(store, key, tmp_path):
    """verifies that: dying between 202 and the durable cursor gives the same `jti` once more, and nothing else."""

    class Dies:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def accepted(self, name, cursor, *, at):
            if cursor == 2:
                raise KeyboardInterrupt
            self.inner.accepted(name, cursor, at=at)

    siem = Siem(key)
    async with listening(siem) as address:
        store.deliveries().begin("siem", at=NOW)
        change(store, 3)
        dying = pushing(store, key, slept=[], deliveries=Dies(store.deliveries()))
        with contextlib.suppress(KeyboardInterrupt):
            await verifier_push.keep_telling(dying, receiver(tmp_path, address))
        assert store.deliveries().all()[0].cursor == 1
        async with telling(pushing(store, key, slept=[]), receiver(tmp_path, address)):
            await siem.until(4)
    names = [one.jti for one in siem.taken]
    assert [one.cursor for one in siem.taken] == [1, 2, 2, 3]
    assert names[1] == names[2]


async def test_a_verifier_killed_behind_the_cursor_goes_on_with_the_next_event(store, key, tmp_path):
    """verifies that: SIGKILL right after an acceptance was noted repeats nothing and skips nothing."""
    siem = Siem(key)
    store.deliveries().begin("siem", at=NOW)
    change(store, 2)
    if (pid := os.fork()) == 0:
        os.environ[steps.VARIABLE] = "verifier.event.accepted"
        VerifierStore.open(tmp_path / "verifier.db").deliveries().accepted("siem", 1, at=NOW)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL  # noqa: ASYNC222 - it kills itself at once
    async with listening(siem) as address, telling(pushing(store, key, slept=[]), receiver(tmp_path, address)):
        await until(lambda: told(store) == 2)
    assert [one.cursor for one in siem.taken] == [2]


async def test_a_new_receiver_hears_what_happens_from_now_on(store, key, tmp_path):
    change(store, 3)
    siem = Siem(key)
    async with listening(siem) as address, telling(pushing(store, key, slept=[]), receiver(tmp_path, address)):
        await until(store.deliveries().all)
        change(store, 1)
        await siem.until(1)
    assert [one.cursor for one in siem.taken] == [4]


async def test_a_false_receiver_is_told_nothing(store, key, tmp_path):
    """verifies that: a server with another name, or under another root, gets no event."""
    siem, slept = Siem(key), []
    store.deliveries().begin("siem", at=NOW)
    change(store, 1)
    mallory = "spiffe://alpha.test/operator/mallory"
    async with (
        listening(siem, uri=mallory) as address,
        telling(pushing(store, key, slept=slept), receiver(tmp_path, address)),
    ):
        await until(lambda: len(slept) >= 2)
    assert siem.seen == []
    assert store.deliveries().all()[0].code == "peer.tls_not_trusted"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"url": "http://siem.test/events"}, "push.receiver_url"),
        ({"url": "https://ann:secret@siem.test/"}, "push.receiver_url"),
        ({"url": "https:///events"}, "push.receiver_url"),
        ({"url": "https://siem.test/events?token=1"}, "push.receiver_url"),
        ({"roots": "no-such.pem"}, "push.receiver_roots"),
        ({"roots": "garbage.pem"}, "push.receiver_roots"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, changes, code):
    (tmp_path / "siem-roots.pem").write_bytes(PKI.roots_pem)
    (tmp_path / "garbage.pem").write_bytes(b"not a certificate")
    values = {"name": "siem", "url": "https://siem.test/events", "audience": AUDIENCE, "roots": "siem-roots.pem", **changes}
    one = ReceiverSettings(**{**values, "roots": tmp_path / values["roots"]})
    with pytest.raises(Misconfigured) as refused:
        verifier_push.receivers((one,))
    assert refused.value.code == code


def test_two_receivers_of_one_name_are_refused(tmp_path):
    (tmp_path / "roots.pem").write_bytes(PKI.roots_pem)
    one = ReceiverSettings(name="siem", url="https://siem.test/", audience="a", roots=tmp_path / "roots.pem")
    with pytest.raises(Misconfigured) as refused:
        verifier_push.receivers((one, one))
    assert refused.value.code == "push.receiver_twice"


def test_pauses_double_to_a_bound():
    error = Unavailable("peer.unreachable", "away", retry_after_s=0.0)
    assert [verifier_push.pause_s(n, error, 1.0) for n in (1, 2, 3, 9, 10, 500)] == [1.0, 2.0, 4.0, 256.0, 300.0, 300.0]
    assert verifier_push.pause_s(4, error, 0.0) == 4.0
    asked = Unavailable("push.not_accepted", "later", retry_after_s=10_000.0)
    assert verifier_push.pause_s(1, asked, 0.0) == 300.0


async def test_operators_see_how_far_receivers_were_told(configured, world):  # noqa: F811
    """verifies that: lag and the reason are shown to operators of the own trust domain, and in the metrics."""
    from test_service import composed, trust

    from moorline.services import verifier_anchors, verifier_routes

    anchors = verifier_anchors.read_anchors(configured, trust())
    authority = composed(configured, world, anchors)
    store = VerifierStore.open(configured.database)
    store.enrol(EnrolledHost(host="h1", ek_digest=b"e", ak_public=b"", root=EvidenceRoot.TEST, enrolled=NOW))
    app = verifier_routes.application(
        authority, anchors, trust_domain="alpha.test", clock=SystemClock(), guard=by_chain_alone
    )
    verifier_push.add_routes(app, store.deliveries(), authority, trust_domain="alpha.test")
    store.deliveries().begin("siem", at=NOW)
    change(store, 3)
    store.deliveries().accepted("siem", 1, at=NOW)
    store.deliveries().failed("siem", 2, "push.not_accepted", at=NOW)
    bound = asyncio.get_running_loop().create_future()
    shown = http.TlsIdentity(chain_pem=configured.identity_chain.read_bytes(), key_pem=configured.identity_key.read_bytes())
    task = asyncio.create_task(
        http.serve(app, listen="127.0.0.1:0", identity=shown, client_roots_pem=PKI.roots_pem, ready=bound.set_result)
    )
    address = await bound
    async with client(address, OPERATOR) as session:
        answer = await session.get_json("/v1/receivers")
        metrics = await session.get_bytes("/metrics")
    async with client(address, "spiffe://alpha.test/orchestrator/o1") as session:
        with pytest.raises(Refused):
            await session.get_json("/v1/receivers")
    async with client(address) as session:
        with pytest.raises(NotAuthentic):
            await session.get_json("/v1/receivers")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    row = {"receiver": "siem", "cursor": 1, "behind": 2, "failures": 2, "code": "push.not_accepted", "at": NOW}
    assert answer == {"newest": 3, "receivers": [row]}
    assert b'moorline_verifier_receiver_behind{receiver="siem"} 2.0' in metrics


def test_the_receivers_identity_in_these_tests_is_what_its_url_names():
    assert SpiffeId.parse("spiffe://alpha.test/operator/siem").role == "operator"
