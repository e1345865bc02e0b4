"""Two providers' brokers whose keys are due every few seconds: killed, away for long, put back from backups, never asked."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import pytest_asyncio

from moorline.hsm.calendar import Rotation
from moorline.hsm.token import open_token

sys.path.insert(0, str(Path(__file__).parent))
from consortium import Consortium

pytestmark = [pytest.mark.story, pytest.mark.long, pytest.mark.asyncio(loop_scope="module")]
POLICY = Rotation(wrapping_s=4, verifier_s=6, announce_s=2, hsm_kem_s=2, pair_s=4, every_s=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calendar")
    consortium = await Consortium.found(directory)
    try:
        more = {"rotation": POLICY, "pool_services": ("records",), "pool_low": 4, "pool_high": 4}
        yield await consortium.admit("alpha", **more), await consortium.admit("beta", rotation=POLICY)
    finally:
        await consortium.close()


async def until(what, said):
    """`what()` comes to be as `said` wants it; the last answer."""
    end = time.monotonic() + 60
    while not said(found := await what()):
        assert time.monotonic() < end, found
        await asyncio.sleep(0.3)
    return found


async def states(provider) -> dict[str, dict]:
    async with provider.admin() as admin:
        return {row["label"]: row for row in (await admin.get_json("/v1/hsm/keys"))["keys"]}


async def newest(provider) -> int:
    async with provider.admin() as admin:
        rows = (await admin.get_json("/v1/pairs"))["pairs"]
    return max((row["epoch"] for row in rows if row["state"] == "active"), default=0)


async def test_keys_rotate_while_nobody_does_anything(both):
    """verifies that: wrapping and verifier keys follow one another, a KEM key waits for its provider, metrics say it."""
    alpha, _ = both
    found = await until(lambda: states(alpha), lambda rows: {"wrapping@3", "verifier@3"} <= set(rows))
    assert [found[name]["state"] for name in ("wrapping", "verifier")] == ["retiring", "retiring"]
    assert (found["hsm-kem@2"]["state"], found["hsm-kem@2"]["waits_for"]) == ("pre-active", "provider")
    assert "hsm-kem@3" not in found
    assert all(row["due"] is None for row in found.values() if row["role"] == "issuing-ca")
    async with alpha.admin() as admin:
        answer = await admin.send("GET", "/metrics", headers={})
    text = str(getattr(answer, "body", answer))
    assert 'moorline_broker_key_due_seconds{role="wrapping"}' in text
    assert 'moorline_broker_keys{role="verifier",state="retiring"}' in text


async def test_sealing_again_survives_the_kill(both, monkeypatch):
    """verifies that: kill -9 behind a row that was sealed again; the next start goes on by itself and loses nothing."""
    alpha, _ = both
    trigger = alpha.directory / "kill"
    monkeypatch.setenv("MOOR_KILL_AT", str(trigger))
    await alpha.broker.stop()
    await alpha.broker.start()
    async with alpha.admin() as admin:
        before = (await admin.get_json("/v1/pool"))["pools"]
    for _ in range(2):
        trigger.write_text("hsm.rewrap.row")
        assert await asyncio.wait_for(alpha.broker.running.wait(), 60) == -signal.SIGKILL
        await alpha.broker.start()
    active = max(int(label.partition("@")[2] or 1) for label in await states(alpha) if label.startswith("wrapping"))
    await until(lambda: states(alpha), lambda rows: f"wrapping@{active + 1}" in rows)
    async with alpha.admin() as admin:
        assert (await admin.get_json("/v1/pool"))["pools"] == before
        assert (await admin.post_json("/v1/hsm/keys/rewrap", {}))["unreadable"] == 0


async def test_pair_keys_follow_one_another_through_an_outage_and_a_restore(both):
    """verifies that: epochs rise by themselves; a peer away for many of them, then one put back to its first, go on."""
    alpha, beta = both
    async with alpha.admin() as admin:
        await admin.post_json("/v1/peers/connect", {"provider": "beta", "hsm": "hsm-1"})
    await until(lambda: newest(alpha), lambda epoch: epoch >= 2)
    await beta.broker.stop()
    backup = beta.directory / "broker.db.bak"
    shutil.copy(beta.settings.database, backup)
    at_backup = await newest(alpha)
    await asyncio.sleep(3 * (POLICY.pair_s or 0))  # epochs that are missed
    assert await newest(alpha) <= at_backup + 1
    await beta.broker.start()
    reached = await until(lambda: newest(beta), lambda epoch: epoch > at_backup + 1)
    await until(lambda: newest(alpha), lambda epoch: epoch >= reached)

    await beta.broker.stop(signal.SIGKILL)
    for each in beta.directory.glob("broker.db*"):
        if each != backup:
            each.unlink()
    shutil.copy(backup, beta.settings.database)
    with open_token(beta.hsm.location) as token:  # a restored token has no pair keys
        for fact in token.inspect():
            if fact.label.startswith("pair/"):
                token.destroy_secret(fact.label)
    await beta.broker.start()
    again = await until(lambda: newest(beta), lambda epoch: epoch > reached)
    await until(lambda: newest(alpha), lambda epoch: epoch >= again)
