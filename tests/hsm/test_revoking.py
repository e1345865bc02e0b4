"""Revocations on the ledger: all that falls with a host is told it together, and what fails holds nothing else up."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from moorline.errors import Unavailable
from moorline.services import broker_revoking


class Intended:
    """What is to be revoked, as the broker's store gives it: until it was."""

    def __init__(self, names):
        self.left = [SimpleNamespace(id=name, serial=name) for name in names]

    def pending(self):
        return tuple(self.left)


async def test_what_falls_with_a_host_is_revoked_many_at_a_time(monkeypatch):
    """verifies that: a hundred revocations are under way beside each other, and one that fails is tried again by itself."""
    instances, certificates = Intended(f"i-{number}" for number in range(100)), Intended(["c-1", "c-2"])
    broker = SimpleNamespace(instances=instances, revocations=certificates, revoking=asyncio.Event())
    under_way, most, tried, all_made = 0, 0, [], asyncio.Event()

    async def make(intended, one):
        nonlocal under_way, most
        tried.append(one.id)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        if one.id == "i-7" and tried.count("i-7") == 1:
            raise Unavailable("peer.unreachable", "no authority answers")
        intended.left.remove(one)
        if not instances.left and not certificates.left:
            all_made.set()

    monkeypatch.setattr(broker_revoking, "revoke", lambda _, one: make(instances, one))
    monkeypatch.setattr(broker_revoking, "revoke_certificate", lambda _, one: make(certificates, one))
    revoking = asyncio.create_task(broker_revoking.keep_revoking(broker))
    await all_made.wait()
    revoking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await revoking
    assert most == broker_revoking._AT_ONCE
    assert sorted(tried) == sorted([*(f"i-{number}" for number in range(100)), "i-7", "c-1", "c-2"])
