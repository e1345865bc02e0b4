"""Four authorities of the CometBFT engine as the processes they are. Skipped by name where there is no cometbft."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from moorline.clock import Instant
from moorline.errors import Misconfigured, MoorlineError
from moorline.ledger import ceremony
from moorline.ledger.client import LedgerClient
from moorline.ledger.engines.cometbft import network
from moorline.ledger.engines.cometbft.network import Ports
from moorline.ledger.engines.cometbft.process import find
from moorline.ledger.engines.cometbft.rpc import CometRpc
from moorline.ledger.genesis import Parameters
from moorline.services import settings
from moorline.services.authority import Settings
from moorline.services.comet_settings import CometSettings

NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
DOMAIN = "consortium.test"
READY_S = 60.0


def cometbft():
    """The program, or the test is skipped."""
    try:
        return find()
    except Misconfigured as error:
        pytest.skip(f"the CometBFT engine needs cometbft: {error.code}")


def free_addresses(count):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in held]


class Authority:
    """A running `moor authority run`, with the CometBFT below it."""

    def __init__(self, name, directory, rpc):
        self.name, self.directory, self.rpc = name, directory, rpc
        self.process = None
        self.kill_at = directory / "kill"
        """What stands in it is the step at which the application dies next (moorline.storage.steps)."""

    @property
    def config(self):
        return self.directory / "authority.toml"

    @property
    def home(self):
        return self.directory / "cometbft"

    async def start(self):
        with (self.directory / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "import sys; from moorline.cli import main; main()",
                "authority",
                "run",
                "--config",
                str(self.config),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "MOOR_KILL_AT": str(self.kill_at.absolute())},
            )
        return self

    async def ready(self):
        line = await asyncio.wait_for(self.process.stdout.readline(), READY_S)
        assert line, self.log()
        assert json.loads(line)["ready"] is True
        return self

    def log(self):
        node = self.home / "cometbft.log"
        return (self.directory / "log").read_text() + (node.read_text()[-2000:] if node.exists() else "")

    def node_pid(self):
        """The process id of its CometBFT."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if b"start" in words and str(self.home.absolute()).encode() in words:
                    return int(path.parent.name)
        return None

    async def kill(self):
        """Both processes, as a power cut would."""
        node = self.node_pid()
        self.process.send_signal(signal.SIGKILL)
        if node is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(node, signal.SIGKILL)
        await self.process.wait()
        while self.node_pid() is not None:  # noqa: ASYNC110 - another program's end
            await asyncio.sleep(0.02)

    async def stop(self):
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 20)
        return self.process.returncode if self.process is not None else None

    def alive(self):
        return self.process is not None and self.process.returncode is None

    async def status(self):
        async with CometRpc(f"http://{self.rpc}") as rpc:
            return await rpc.status()


class Network:
    """The authorities of one ceremony."""

    def __init__(self, made, authorities, ids, ports):
        self.made, self.authorities, self.ids, self.ports = made, authorities, ids, ports
        self.keys = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in authorities}

    def __getitem__(self, number):
        return self.authorities[f"authority-{number}"]

    def client(self, *numbers, timeout_s=20.0):
        """A client of these authorities, in this order; of all without."""
        by_name = {one.url: one for one in self.made.endpoints}
        addresses = {one.name: f"https://{one.address}" for one in self.made.genesis.authorities}
        wanted = [f"authority-{number}" for number in numbers] or list(self.authorities)
        endpoints = [by_name[addresses[name]] for name in wanted]
        return LedgerClient(endpoints, roots_pem=self.made.roots_pem, timeout_s=timeout_s)

    async def start(self, *numbers):
        chosen = [self[number] for number in numbers] or list(self.authorities.values())
        for one in chosen:
            await one.start()
        for one in chosen:
            await one.ready()

    async def stop(self):
        await asyncio.gather(*(one.stop() for one in self.authorities.values()), return_exceptions=True)
        for one in self.authorities.values():
            if one.alive() or one.node_pid() is not None:
                await one.kill()

    async def heads(self, *numbers):
        """Height and state root of each authority, as it says itself."""
        from moorline.wire import cbor

        found = {}
        for number in numbers or range(1, len(self.authorities) + 1):
            async with self.client(number) as client:
                status = cbor.decode(await client._first(lambda one: one.get_bytes("/v1/ledger")))
                found[number] = (status["height"], status["state_root"])
        return found


def made_network(directory, *, count=4, max_age_s=30, snapshot_every=1000):
    """A ceremony and homes; nothing runs yet."""
    cometbft()
    names = NAMES[:count]
    addresses = free_addresses(3 * count)
    listens, p2p, rpc = addresses[:count], addresses[count : 2 * count], addresses[2 * count :]
    made = ceremony.genesis_ceremony(
        directory,
        names=names,
        consortium_domain=DOMAIN,
        simulated_allowed=True,
        parameters=Parameters(max_age_s=max_age_s),
        addresses=dict(zip(names, listens, strict=True)),
        now=Instant(int(time.time()) - 1),
    )
    ports = {name: Ports(p2p=p2p[i], rpc=rpc[i]) for i, name in enumerate(names)}
    ids = network.make(made, ports)
    authorities = {}
    for i, name in enumerate(names):
        folder = directory / "authorities" / name
        authorities[name] = Authority(name, folder, rpc[i])
        configured = Settings(
            name=name,
            listen=listens[i],
            directory=folder,
            cometbft=CometSettings(home=folder / "cometbft", rpc=rpc[i], snapshot_every=snapshot_every),
        )
        settings.write(configured, folder / "authority.toml")
    return Network(made, authorities, ids, ports)


@contextlib.asynccontextmanager
async def running(directory, **options):
    """A network that runs, all of it gone at the end."""
    found = made_network(directory, **options)
    try:
        await found.start()
        yield found
    finally:
        await found.stop()


async def eventually(what, *, within_s=30.0, every_s=0.1):
    """What `what()` gives once it gives something true; a MoorlineError counts as not yet."""
    deadline = time.monotonic() + within_s
    last = None
    while True:
        try:
            last = await what()
        except MoorlineError as error:
            last = error
        else:
            if last:
                return last
        assert time.monotonic() < deadline, f"not within {within_s} s: {last}"
        await asyncio.sleep(every_s)
