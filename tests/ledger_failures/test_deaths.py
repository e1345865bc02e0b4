"""Authorities that die: one, two, each at every step of a commit and of a promotion. Four real processes."""

import asyncio
import random

import pytest

from moorline.storage import steps

from .cluster import FIRST, FOURTH, NAMES, SECOND, THIRD, Cluster, addresses, consortium

pytestmark = [pytest.mark.story, pytest.mark.timeout(300)]

COMMIT = {
    "sequencer.block.proposed": FIRST,
    "sequencer.block.committed": FIRST,
    "cosigner.signature.intended": SECOND,
    "cosigner.block.committed": THIRD,
}
PROMOTION = ("authority.word.given", "sequencer.block.taken_over", "authority.term.certified")


@pytest.fixture
def cluster(tmp_path):
    return Cluster(consortium(tmp_path, addresses()))


async def killed_at(cluster, step, name, by=SECOND):
    """A transaction is under way when `name` dies at `step`; it is acknowledged when it is back, and stands once."""
    process = cluster.processes[name]
    await process.dies_at(step)
    writing = asyncio.ensure_future(cluster.write(by))
    await process.killed()
    await process.start()
    _, data = await writing
    return data


async def test_one_dead_goes_on_two_dead_stop_and_lose_nothing_and_every_step_of_a_commit(cluster):
    """verifies that: three of four go on, two of four acknowledge nothing and keep everything, the third brings it back;
    killed behind any durable step, an authority comes back to the same state, and what was sent stands once."""
    async with cluster.running():
        await cluster.write()
        await cluster.processes[FOURTH].kill()
        height, _ = await cluster.write()
        await cluster.processes[THIRD].kill()
        waiting = asyncio.ensure_future(cluster.write())
        await asyncio.sleep(2)
        assert not waiting.done()
        assert (await cluster.head(FIRST)).height <= height + 1
        await cluster.processes[THIRD].start()
        await waiting
        await cluster.processes[FOURTH].start()
        sent = [await killed_at(cluster, step, name) for step, name in COMMIT.items()]
        await cluster.same()
        await cluster.one_history()
        assert await cluster.standing(sent) == [1] * len(sent)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_killed_a_hundred_times(cluster):
    """verifies that: whoever dies wherever in a commit, a hundred times over, all state roots are equal afterwards."""
    chosen = random.Random(5)
    async with cluster.running():
        sent = []
        for round_ in range(100):
            step = chosen.choice(sorted(COMMIT))
            name = FIRST if step.startswith("sequencer") else chosen.choice((SECOND, THIRD, FOURTH))
            by = NAMES[round_ % 4]  # one alone may have 64 proposals open, and these stay so
            sent.append(await killed_at(cluster, step, name, by))
        await cluster.same()
        await cluster.one_history()
        assert await cluster.standing(sent) == [1] * len(sent)


@pytest.mark.long
@pytest.mark.parametrize("step", PROMOTION)
async def test_a_promotion_killed_at_each_step_goes_on_and_the_old_sequencer_follows(cluster, step):
    """verifies that: a sequencer dies with a block one cosigner may have signed; its successor dies while it takes over;
    one history, with that block, is what all four have in the end, the old sequencer too."""
    async with cluster.running():
        _, before = await cluster.write()
        await cluster.same()
        await cluster.processes[THIRD].dies_at("cosigner.signature.intended")
        await cluster.processes[FOURTH].kill()
        writing = asyncio.ensure_future(cluster.write())
        await cluster.processes[THIRD].killed()
        await cluster.processes[FIRST].kill()
        await cluster.processes[THIRD].start()
        await cluster.processes[FOURTH].start()
        await cluster.processes[SECOND].dies_at(step)
        await cluster.promote(SECOND, [THIRD, FOURTH])
        if step == "authority.word.given":
            with pytest.raises(AssertionError):
                await cluster.promote(SECOND, [SECOND])
        else:
            await cluster.promote(SECOND, [SECOND])
        await cluster.processes[SECOND].killed()
        await cluster.processes[SECOND].start()
        _, data = await writing
        await cluster.write(through=THIRD)
        await cluster.processes[FIRST].start()
        await cluster.same()
        await cluster.one_history()
        assert await cluster.standing([before, data]) == [1, 1]
        assert {await cluster.sequencer(name) for name in NAMES} == {SECOND}


async def test_an_operator_promotes_and_the_old_sequencer_follows(cluster):
    """verifies that: `moor ledger promote` at three authorities makes a new sequencer; the old one cannot fork."""
    async with cluster.running():
        _, before = await cluster.write()
        await cluster.same()
        await cluster.processes[FIRST].kill()
        await cluster.promote(SECOND, [SECOND, THIRD, FOURTH])
        await cluster.write(through=THIRD)
        await cluster.processes[FIRST].start()
        await cluster.same()
        await cluster.processes[FOURTH].kill()  # the old sequencer's signature is needed now
        await cluster.write(through=FIRST)
        await cluster.one_history([FIRST, SECOND, THIRD])
        assert await cluster.standing_once(before) == 1
        assert await cluster.sequencer(FIRST) == SECOND


def test_every_step_of_the_ledger_is_killed_here():
    found = {one for one in steps.names() if one.split(".")[0] in {"sequencer", "cosigner", "authority"}}
    assert found == {*COMMIT, *PROMOTION}
