"""Four authorities as processes that can be killed, cut off, given odd clocks, full disks and lies."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from moorline.clock import Instant
from moorline.errors import MoorlineError
from moorline.ledger import blocks, checkpoint, transactions
from moorline.ledger.client import LedgerClient, Submitter
from moorline.ledger.engines.node import Committed
from moorline.ledger.transactions import Sender, SenderKind
from moorline.wire import cbor, schema

sys.path.insert(0, str(Path(__file__).parents[1]))
from ledger.conftest import NAMES, consortium_at
from ledger.processes import free_addresses

HERE = Path(__file__).parent
MOOR = [sys.executable, "-c", "import sys; from moorline.cli import main; main()"]
FIRST, SECOND, THIRD, FOURTH = NAMES


class Process:
    """`moor authority run`, or the odd one in its place; it dies at the step that the file `kill` names."""

    def __init__(self, name, directory, prefix=()):
        self.name, self.directory, self.prefix = name, directory, list(prefix)
        self.kill_at = directory / "kill"
        self.process = None

    async def start(self, *, odd=None, ready=True):
        program = MOOR if odd is None else [sys.executable, str(HERE / "odd_authority.py"), odd]
        with (self.directory / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.prefix,
                *program,
                *("authority", "run", "--config", str(self.directory / "authority.toml")),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "MOOR_KILL_AT": str(self.kill_at)},
            )
        if ready:
            line = await asyncio.wait_for(self.process.stdout.readline(), 60)
            assert line, self.log()
            assert json.loads(line)["ready"], self.log()
        return self

    def log(self):
        return (self.directory / "log").read_text()

    def running(self):
        return self.process is not None and self.process.returncode is None

    async def kill(self):
        if self.running():
            self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def ended(self):
        """Its exit code, when it has ended by itself."""
        return await asyncio.wait_for(self.process.wait(), 60)

    async def dies_at(self, step):
        """Have it killed at the next time it reaches a step; returns when it is dead."""
        self.kill_at.write_text(step)

    async def killed(self):
        assert await self.ended() == -signal.SIGKILL


class Cluster:
    """The four of one consortium, and a client."""

    def __init__(self, real, prefixes=None):
        self.real = real
        root = real.made.directory / "authorities"
        self.processes = {name: Process(name, root / name, (prefixes or {}).get(name, ())) for name in NAMES}
        self.client = LedgerClient(real.made.endpoints, roots_pem=real.made.roots_pem)
        self.each = {
            one.server_name.partition(".")[0]: LedgerClient([one], roots_pem=real.made.roots_pem)
            for one in real.made.endpoints
        }

    @contextlib.asynccontextmanager
    async def running(self, odd=None):
        try:
            await asyncio.gather(*(one.start(odd=(odd or {}).get(name)) for name, one in self.processes.items()))
            # Who was late for the first block signs none up to the one after it (ADR 0010): a story in which all others
            # have to sign begins when everybody does.
            await self.same([name for name in NAMES if name not in (odd or {})], least=3)
            yield self
        finally:
            for process in self.processes.values():
                if process.process is not None:
                    await process.kill()
            for client in (self.client, *self.each.values()):
                await client.aclose()

    def submitter(self, name, through=None):
        return Submitter(
            self.each[through] if through else self.client,
            sender=Sender(kind=SenderKind.AUTHORITY, name=name),
            signer=self.real.authorities[name].signer(),
            ledger_id=self.real.made.trust.ledger_id,
        )

    async def write(self, by=SECOND, through=None):
        """One transaction, acknowledged; sent again as it is as long as nobody can say. Its height and its id."""
        body = transactions.propose(transactions.SetParameter(name="max_age_s", value=6))
        payload = await self.submitter(by, through)._payload(body)
        data = transactions.sign(payload, self.real.authorities[by].signer())
        while True:
            try:
                receipt = await (self.each[through] if through else self.client).submit(data)
            except MoorlineError as error:
                if type(error).__name__ != "Unavailable":
                    raise
                await asyncio.sleep(0.2)
            else:
                blocks.verify_receipt(receipt, data, self.real.made.trust)
                return receipt.height, data

    async def head(self, name):
        return checkpoint.parse_note(await self.each[name].note()).checkpoint

    async def same(self, names=NAMES, *, least=0):
        """Once all of these have the same head, of this height at least: that head.

        Empty blocks go on being made, so it is asked again and again.
        """
        while True:
            with contextlib.suppress(MoorlineError):
                heads = [await self.head(name) for name in names]
                if len({(one.height, one.root, one.state_root) for one in heads}) == 1 and heads[0].height >= least:
                    return heads[0]
            await asyncio.sleep(0.1)

    async def one_history(self, names=NAMES):
        """Every height that two of them have is the same block with the same state."""
        seen = {}
        top = min([(await self.head(name)).height for name in names])
        for name in names:
            for height in range(1, top + 1):
                data = await self.each[name]._first(lambda http, height=height: http.get_bytes(f"/v1/blocks/{height}"))
                block = schema.decode(Committed, data, max_bytes=1 << 24).block
                assert seen.setdefault(height, block) == block, f"{name} has another block {height}"
        return top

    async def standing(self, sent):
        """In how many blocks of the first authority's chain each of these transactions stands."""
        found = dict.fromkeys(sent, 0)
        for height in range(1, (await self.head(FIRST)).height + 1):
            got = await self.each[FIRST]._first(lambda http, height=height: http.get_bytes(f"/v1/blocks/{height}"))
            for data in blocks.parse(schema.decode(Committed, got, max_bytes=1 << 24).block).transactions:
                if data in found:
                    found[data] += 1
        return [found[data] for data in sent]

    async def standing_once(self, data):
        """In how many blocks one stands."""
        return (await self.standing([data]))[0]

    async def sequencer(self, name):
        status = cbor.decode(await self.each[name]._first(lambda http: http.get_bytes("/v1/ledger")), max_bytes=1 << 22)
        return status["sequencer"]

    async def promote(self, name, by):
        for one in by:
            code, said = await moor(
                "ledger", "promote", name, "--by", self.processes[one].directory, prefix=self.processes[one].prefix
            )
            assert code == 0, said


async def moor(*arguments, prefix=()):
    """One command of `moor`: its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *prefix, *MOOR, *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def consortium(directory, addresses, max_age_s=6):
    return consortium_at(directory / "consortium", addresses=addresses, max_age_s=max_age_s, now=Instant(int(time.time())))


def addresses():
    return free_addresses(NAMES)
