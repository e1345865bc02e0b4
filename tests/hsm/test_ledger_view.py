"""The broker's view of the ledger: asked once for many, used again for a moment, never beyond it."""

from __future__ import annotations

import asyncio

import pytest

from moorline.errors import Unavailable
from moorline.services import ledger_view
from moorline.services.ledger_view import LedgerView


class Point:
    def __init__(self, height):
        self.height = height

    def body(self):
        return str(self.height)


class State:
    """Stands for what `verify_bundle` proves; light clients have suites of their own."""

    def __init__(self, bundle):
        self.height, self._records = bundle
        self.checkpoint = Point(self.height)


class Authorities:
    def __init__(self):
        self.asked, self.records, self.height, self.gone = [], {}, 1, False
        self.open, self.waiting = asyncio.Event(), asyncio.Event()
        self.open.set()

    async def prove(self, keys, *, height=0):
        self.asked.append(keys)
        self.waiting.set()
        await self.open.wait()
        if self.gone:
            raise Unavailable("ledger.unreachable", "nobody answers")
        return self.height, {key: self.records.get(key) for key in keys}


class Kept:
    def __init__(self):
        self.documents = {}

    def document(self, name):
        return self.documents.get(name)

    def set_document(self, name, value):
        self.documents[name] = value


class Fixed:
    def now(self):
        return 0


@pytest.fixture
def ledger(monkeypatch):
    """Authorities, a view that reuses for a second, and its clock."""
    monkeypatch.setattr(ledger_view, "verify_bundle", lambda bundle, *_, **__: State(bundle))
    monkeypatch.setattr(ledger_view, "together", lambda states: {k: v for one in states for k, v in one._records.items()})
    authorities, passed = Authorities(), [0.0]
    view = LedgerView(authorities, None, Kept(), Fixed(), reuse_s=1.0, elapsed=lambda: passed[0])
    return authorities, view, passed


@pytest.mark.asyncio
async def test_what_was_proven_is_used_for_a_moment_and_then_asked_again(ledger):
    """verifies that: within three quarters of reuse_s nobody is asked twice; after the whole of it a revocation counts."""
    authorities, view, passed = ledger
    for _ in range(3):
        assert (await view.state(("a", "b")))["a"] is None
    assert authorities.asked == [("a", "b")]
    authorities.records["a"] = b"revoked"
    passed[0] = 0.9
    assert (await view.state(("a",)))["a"] is None
    passed[0] = 1.0
    assert (await view.state(("a", "c")))["a"] == b"revoked"
    assert authorities.asked[1:] == [("a", "b", "c")]  # with b, which was asked for lately


@pytest.mark.asyncio
async def test_what_is_in_use_is_asked_again_before_it_is_too_old_and_nobody_waits(ledger):
    """verifies that: an older proof still serves, one question renews all in use; its failure is no one's."""
    authorities, view, passed = ledger
    await view.state(("a", "b"))
    await view.state(("c",))
    passed[0] = 0.8
    authorities.records["a"] = b"revoked"
    authorities.gone = True
    assert (await view.state(("a",)))["a"] is None
    await asyncio.sleep(0.01)
    assert authorities.asked[2:] == [("a", "b", "c")]  # it failed
    authorities.gone = False
    assert (await view.state(("a",)))["a"] is None
    await asyncio.sleep(0.01)
    assert (await view.state(("a",)))["a"] == b"revoked"
    assert len(authorities.asked) == 4
    passed[0] = 1.5
    assert (await view.state(("a",)))["a"] == b"revoked"
    await asyncio.sleep(0.01)
    passed[0] = 5.0
    authorities.gone = True
    with pytest.raises(Unavailable):
        await view.state(("a",))  # too old is too old


@pytest.mark.asyncio
async def test_who_asks_meanwhile_is_one_question(ledger):
    """verifies that: while one proof is on its way, all further keys gather into the next, which nobody missed."""
    authorities, view, _ = ledger
    authorities.open.clear()
    first = asyncio.ensure_future(view.state(("a",)))
    await authorities.waiting.wait()
    others = [asyncio.ensure_future(view.state(("a", f"k{number}"))) for number in range(10)]
    await asyncio.sleep(0)
    authorities.records["a"] = b"written meanwhile"
    authorities.open.set()
    await first
    assert {(await one)["a"] for one in others} == {b"written meanwhile"}
    assert len(authorities.asked) == 2


@pytest.mark.asyncio
async def test_a_ledger_that_is_gone_is_told_to_all_and_asked_again(ledger):
    """verifies that: a failed question fails for who waited for it, is not kept, and the next asks anew."""
    authorities, view, _ = ledger
    authorities.gone = True
    for outcome in await asyncio.gather(*(view.state((key,)) for key in "abc"), return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    authorities.gone = False
    assert await view.state(("a",)) == {"a": None}


@pytest.mark.asyncio
async def test_without_reuse_every_session_asks(ledger):
    authorities, view, _ = ledger
    view._reuse_s = 0.0
    for _ in range(3):
        await view.state(("a",))
    assert len(authorities.asked) == 3


@pytest.mark.asyncio
async def test_names_that_nobody_asks_about_again_are_forgotten(ledger):
    """verifies that: thousands of sessions, each with a name of its own, leave no proofs behind that are too old to use."""
    authorities, view, passed = ledger
    for number in range(3000):
        passed[0] += 0.1
        await view.state(("service", f"instance-{number}"))
    assert max(len(view._kept), len(view._joined)) <= 256
    authorities.records["service"] = b"revoked"
    passed[0] += 1.1
    assert (await view.state(("service", "instance-0")))["service"] == b"revoked"
