"""Who waits in the event loop hears at once of what a thread did."""

import asyncio

from moorline.services.waking import Wake


async def test_a_thread_wakes_who_waits():
    """verifies that: asyncio's own check for calls from other threads finds nothing, and the waiter goes on."""
    asyncio.get_running_loop().set_debug(True)
    wake = Wake()
    for _ in range(20):
        waiting = asyncio.ensure_future(wake.wait())
        await asyncio.sleep(0)
        await asyncio.to_thread(wake.set)
        async with asyncio.timeout(5):
            assert await waiting
        wake.clear()


async def test_set_before_anybody_waits_and_within_the_loop():
    wake = Wake()
    await asyncio.to_thread(wake.set)
    assert await wake.wait()
    wake.clear()
    waiting = asyncio.ensure_future(wake.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    wake.set()
    assert await waiting
