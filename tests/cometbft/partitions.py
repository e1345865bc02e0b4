"""Links between nodes that can be cut: every node dials every other through a proxy of its own."""

import asyncio
import contextlib


class Link:
    """From one node to another."""

    def __init__(self, target):
        self._host, self._port = target.rsplit(":", 1)
        self._open = True
        self._tasks = set()
        self.address = None
        self._server = None

    async def listen(self):
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def cut(self):
        self._open = False
        for task in self._tasks:
            task.cancel()

    def heal(self):
        self._open = True

    async def close(self):
        self.cut()
        self._server.close()

    async def _carry(self, reader, writer):
        if not self._open:
            writer.close()
            return
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            theirs, ours = await asyncio.open_connection(self._host, self._port)
            try:
                await asyncio.gather(_pump(reader, ours), _pump(theirs, writer))
            finally:
                ours.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


async def _pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


class Links:
    """All links of a network, by who dials whom."""

    def __init__(self):
        self._links = {}

    async def between(self, addresses):
        for one in addresses:
            for other, address in addresses.items():
                if one != other:
                    self._links[one, other] = await Link(address).listen()
        return self

    def peers_of(self, one, ids):
        return tuple(f"{ids[other]}@{link.address}" for (dialler, other), link in self._links.items() if dialler == one)

    def split(self, *sides):
        for (one, other), link in self._links.items():
            if not any(one in side and other in side for side in sides):
                link.cut()

    def heal(self):
        for link in self._links.values():
            link.heal()

    async def close(self):
        for link in self._links.values():
            await link.close()
