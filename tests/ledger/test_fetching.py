"""Proofs fetched over HTTPS from authorities of which some are behind: honestly, for a moment, or for good."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import pytest
from fastapi import Query
from fastapi.responses import Response

from moorline.clock import SystemClock
from moorline.errors import Refused
from moorline.ledger import fetching
from moorline.ledger.ceremony import authority_id, tls_identity
from moorline.ledger.client import Endpoint, LedgerClient
from moorline.services import http
from moorline.services.ledger_view import LedgerView
from moorline.wire.certificates import dns_name
from moorline.wire.http import CBOR_TYPE

from .conftest import DOMAIN, NAMES, consortium_at
from .test_light_client import bundle_of, now_of

KEY = "provider/alpha"


class Authority:
    """The door of one authority, with its real key and certificate; it says of the ledger what it is given to say."""

    def __init__(self, consortium, name, bundle):
        self.consortium, self.name, self.bundle, self.asked = consortium, name, bundle, 0
        self.later = []

    def answer(self):
        self.asked += 1
        if self.later and self.asked > 1:
            self.bundle = self.later.pop(0)
        return self.bundle

    @asynccontextmanager
    async def serving(self):
        app = http.application("authority")

        @app.get("/v1/proof")
        async def prove(key: list[str] = Query()):  # noqa: B008 - how FastAPI is told
            return Response(self.answer(), media_type=CBOR_TYPE)

        chain_pem, key_pem = tls_identity(self.consortium.authorities[self.name], DOMAIN, now=SystemClock().now())
        bound = asyncio.get_running_loop().create_future()
        identity = http.TlsIdentity(chain_pem=chain_pem, key_pem=key_pem)
        task = asyncio.ensure_future(
            http.serve(app, listen="127.0.0.1:0", identity=identity, client_roots_pem=None, ready=bound.set_result)
        )
        try:
            yield Endpoint(url=f"https://{await bound}", server_name=dns_name(authority_id(DOMAIN, self.name)))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class World:
    """Two authorities of four behind doors, two heads that a quorum signed, and who has seen the newer one."""

    def __init__(self, directory):
        self.consortium = consortium_at(directory, now=SystemClock().now())
        self.older = bundle_of(self.consortium, [KEY])
        self.consortium.block()
        self.newer, self.height = bundle_of(self.consortium, [KEY]), self.consortium.state.height
        self.first, self.second = (Authority(self.consortium, name, self.older) for name in NAMES[:2])
        self.kept = {}

    @asynccontextmanager
    async def view(self):
        async with AsyncExitStack() as stack:
            endpoints = [await stack.enter_async_context(one.serving()) for one in (self.first, self.second)]
            client = LedgerClient(endpoints, roots_pem=self.consortium.made.roots_pem)
            clock = SimpleNamespace(now=lambda: now_of(self.consortium))
            kept = SimpleNamespace(document=self.kept.get, set_document=self.kept.__setitem__)
            async with client:
                yield LedgerView(client, self.consortium.made.trust, kept, clock)

    async def seen(self, view):
        self.first.bundle = self.newer
        assert (await view.proven((KEY,)))[1].height == self.height
        self.first.bundle, self.first.asked = self.older, 0


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "consortium")


async def test_an_authority_that_is_behind_is_passed_over(world):
    """verifies that: who has seen a newer head asks the next authority for it, although the first one keeps its old one."""
    async with world.view() as view:
        await world.seen(view)
        world.second.bundle = world.newer
        assert (await view.proven((KEY,)))[1].height == world.height
        assert (world.first.asked, world.second.asked) == (2, 1)


async def test_a_proof_that_was_overtaken_is_fetched_again(world):
    """verifies that: where nobody has the block yet, the question is asked until somebody has."""
    async with world.view() as view:
        await world.seen(view)
        world.first.later = [world.older, world.older, world.newer]
        assert (await view.proven((KEY,)))[1].height == world.height
        assert world.first.asked == 4


async def test_authorities_that_keep_showing_an_old_head_are_refused(world, monkeypatch):
    """verifies that: a head goes on being refused that is fresh, signed by a quorum and older, however often it is shown."""
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.3)
    async with world.view() as view:
        await world.seen(view)
        with pytest.raises(Refused, match="ledger.rollback"):
            await view.proven((KEY,))
        assert min(world.first.asked, world.second.asked) > 1
    async with world.view() as after_a_restart:
        with pytest.raises(Refused, match="ledger.rollback"):
            await after_a_restart.proven((KEY,))


async def test_another_refusal_is_not_waited_out():
    """verifies that: only being behind is asked again about."""
    attempts = []

    async def stale(_height):
        attempts.append(1)
        raise Refused("ledger.proof_stale", "the proof is too old")

    with pytest.raises(Refused, match="proof_stale"):
        await fetching.not_overtaken(stale)
    assert attempts == [1]


async def test_what_a_peer_says_of_heights_is_no_more_than_a_hint():
    """verifies that: a peer that names no number, or a silly one, does not break the asking."""
    said, given = ["12", "٣", "9" * 400, None, "-4", "many"], []

    async def attempt(height):
        given.append(height)
        if len(given) > len(said):
            return "answered"
        raise Refused("ledger.rollback", "behind", expected=said[len(given) - 1])

    assert await fetching.not_overtaken(attempt) == "answered"
    assert given == [0, 12, 3, int("9" * 400), 0, 0, 0]
