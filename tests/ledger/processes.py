"""Authorities as the processes they are: started, killed, started again. Real TLS on loopback."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path


def free_addresses(names):
    """One loopback address a name; all are held at once, so that none is given twice."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name in names:
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", 0))
            found[name] = f"127.0.0.1:{sock.getsockname()[1]}"
        return found


class Authority:
    """A running `moor authority run`."""

    def __init__(self, name: str, directory: Path):
        self.name, self.directory = name, directory
        self.process = None

    async def start(self):
        log = (self.directory / "log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; from moorline.cli import main; main()",
            "authority",
            "run",
            "--config",
            str(self.directory / "authority.toml"),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        log.close()
        return self

    async def ready(self):
        line = await asyncio.wait_for(self.process.stdout.readline(), 30)
        assert line, (self.directory / "log").read_text()
        assert json.loads(line)["ready"] is True
        return self

    async def kill(self):
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self):
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 10)
        return self.process.returncode


@contextlib.asynccontextmanager
async def running(made, names):
    """The authorities of a ceremony, all started, all stopped at the end."""
    authorities = {name: Authority(name, made.directory / "authorities" / name) for name in names}
    try:
        for authority in authorities.values():
            await authority.start()
        for authority in authorities.values():
            await authority.ready()
        yield authorities
    finally:
        for authority in authorities.values():
            with contextlib.suppress(ProcessLookupError):
                await authority.stop()
