"""A whole broker at work, with secrets that its clients know: they are looked for everywhere but where they belong.

Launcher, function and device come to real processes over TLS; all of them log what they can (asyncio's debug mode, every
logger at DEBUG), and cores are allowed by whoever started them. What a client was given is searched in each usual form.
"""

import asyncio
import base64
import contextlib
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.errors import MoorlineError
from moorline.wire import launch, schema
from moorline.wire.session import (
    EntropyCall,
    EntropyReply,
    FunctionSecrets,
    KeyKind,
    RekeyCall,
    RekeyReply,
    StorageKeyReply,
)

sys.path.insert(0, str(Path(__file__).parent))
from canaries import command_lines, dumps_core, environment, family, forms
from test_sessions import built

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]

LOUD = "import logging\nlogging.basicConfig(level=logging.DEBUG, format='%(name)s %(message)s')\n"

SHOWN = (
    *("/v1/launches", "/v1/instances", "/v1/pool", "/v1/keys", "/v1/token", "/v1/alarms", "/v1/peers", "/v1/audit"),
    *("/v1/audit/export", "/v1/pairs", "/v1/enrolments", "/v1/revocation", "/v1/hsm/keys", "/v1/hsm/requests", "/metrics"),
)


@dataclass
class Planted:
    """The world, what was given out in secret, and what everybody was told openly."""

    world: object
    directory: Path
    secrets: dict[str, bytes] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    seen: bytes = b""
    instance: bytes = b""

    async def refused(self, opening):
        with pytest.raises(MoorlineError) as caught:
            await opening
        self.said.append(json.dumps(caught.value.as_problem()) + repr(caught.value))

    async def launched(self):
        """A function's session from launch to rekeying, and what goes wrong on the way."""
        world, fields = self.world, self.world.fields()
        token = launch.token(world.secrets.launch_key, fields)
        self.instance = fields.instance.encode()
        self.secrets |= {"launch key": world.secrets.launch_key, "launch token": token}
        await self.refused(world.function(world.fields(), token=token))
        async with await world.function(fields, token=token) as session:
            given = schema.decode(FunctionSecrets, session.secrets)
            again = schema.decode(StorageKeyReply, await session.call("storage.key", b""))
            assert again.storage_key == given.storage_key
            self.secrets |= {"storage key": given.storage_key, "pool key": scalar(given.private_key)}
            for kind in (KeyKind.P256, KeyKind.ED25519):
                got = schema.decode(RekeyReply, await session.call("rekey", schema.encode(RekeyCall(kind=kind))))
                self.secrets[f"{kind} key"] = scalar(got.private_key)
            drawn = schema.decode(EntropyReply, await session.call("entropy", schema.encode(EntropyCall(size=64))))
            self.secrets["entropy"] = drawn.random
            await self.refused(session.call("rekey", given.storage_key))
            await self.refused(session.call("entropy", given.private_key))
            await self.refused(session.call("log", given.storage_key))
        await self.refused(world.function(fields, token=token))

    async def enrolled(self):
        """A device that enrols by code, in a process of its own; an installer who guesses and then knows a password."""
        alpha = self.world.alpha
        async with alpha.admin() as admin:
            code = (await admin.post_json("/v1/enrolment-codes", {"device": "d-1"}))["code"]
            account = {"name": "crew", "prefix": "meter-", "devices": 2, "ttl_s": 600, "approval": False}
            password = (await admin.post_json("/v1/enrolment-accounts", account))["password"]
        self.secrets |= {"enrolment code": code.encode(), "password": password.encode()}
        await self.moor_device(code)
        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        nonsense = base64.b64encode(
            public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
        )
        async with alpha.https() as client:
            for user, secret in (("d-1", code), ("crew", password), ("crew", password[:-1] + "x"), (code, password)):
                basic = base64.b64encode(f"{user}:{secret}".encode()).decode()
                headers = {"authorization": f"Basic {basic}", "content-type": "application/pkcs10"}
                self.secrets.setdefault(f"basic {user}", basic.encode())
                for path in ("simpleenroll", "serverkeygen", f"no-such-route?{code}"):
                    with contextlib.suppress(MoorlineError):
                        await client.send("POST", f"/.well-known/est/{path}", headers=headers, content=nonsense)

    async def moor_device(self, code):
        (url, _, authority) = self.world.alpha.settings.ledger_urls[0].partition("|")
        words = ("--ledger", f"{url}={authority}", "--trust", str(self.world.alpha.settings.ledger_trust), "--name", "d-1")
        home = ("--url", f"https://{self.world.alpha.broker.said['https']}", "--server-name", self.world.alpha.server_name)
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "moorline.cli",
                "device",
                "enrol",
                "--dir",
                str(self.directory / "device"),
                *words,
                *home,
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "MOOR_ENROLMENT_CODE": code},
        )
        looking = asyncio.ensure_future(self.look(until=process))
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        await looking
        assert process.returncode == 0, said
        self.said.append(said.decode())

    async def look(self, *, until):
        """At every command line of this machine, for as long as a process runs."""
        while until.returncode is None:
            self.seen += command_lines()
            await asyncio.sleep(0.02)

    def environment(self):
        """Of the broker and its key maker."""
        return environment(family(self.world.alpha.broker.running.pid))

    async def shown(self):
        """What an operator is shown, and the secure log as it is exported."""
        async with self.world.alpha.admin() as admin:
            for path in SHOWN:
                self.said.append((await admin.get_bytes(path)).decode("latin-1"))
        return "".join(self.said).encode()


def scalar(pkcs8):
    """The secret number of a key: what every encoding of it holds."""
    key = serialization.load_der_private_key(pkcs8, None)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.private_numbers().private_value.to_bytes(32, "big")
    return key.private_bytes_raw()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def planted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("canaries")
    loud = directory / "loud"
    loud.mkdir()
    (loud / "sitecustomize.py").write_text(LOUD)
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", str(loud))
        changed.setenv("PYTHONASYNCIODEBUG", "1")
        changed.chdir(directory)  # where a core would be written
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        try:
            async with built(directory) as world:
                made = Planted(world, directory)
                pin = world.alpha.hsm.location.pin_file.read_text().strip()
                made.secrets["PIN"] = pin.encode()
                await made.launched()
                await made.enrolled()
                yield made
        finally:
            resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def files_of(planted):
    """Everything the broker's side wrote: databases with their logs, secure logs, settings, what was printed; no token."""
    alpha = planted.world.alpha
    for folder in (alpha.directory, planted.directory / "ledger"):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_relative_to(alpha.directory / "token"):
                yield path


async def test_nothing_given_in_secret_is_kept_printed_or_shown(planted):
    """verifies that: keys, tokens, codes, passwords, PIN are in no log, answer, database, environment or command line."""
    shown = await planted.shown()
    places = {str(path): path.read_bytes() for path in files_of(planted)}
    places |= {"shown": shown, "ps": planted.seen + command_lines(), "environment": planted.environment()}
    assert len(planted.secrets) >= 12
    found = [
        f"{name} ({form}) in {place}"
        for name, secret in planted.secrets.items()
        for form, looked_for in forms(secret).items()
        for place, content in places.items()
        if looked_for in content
    ]
    assert found == []


async def test_what_is_not_secret_is_found_in_the_same_places(planted):
    """The control: whoever looks does see what is there, in databases with their logs, in printed lines, in processes."""
    shown, alpha = await planted.shown(), planted.world.alpha
    held = {str(path): path.read_bytes() for path in files_of(planted)}
    assert any(planted.instance in content for name, content in held.items() if ".db" in name)
    assert any(name.endswith("-wal") and content for name, content in held.items())
    assert b"asyncio" in (alpha.directory / "log").read_bytes()
    assert planted.instance in shown
    assert b"PYTHONASYNCIODEBUG" in planted.environment()
    assert str(alpha.directory / "broker.toml").encode() in command_lines()
    assert b"device\x00enrol" in planted.seen
    for around in (b"", b"a", b"ab", b"abc"):
        canary = forms(b"\xff-a-canary-\x00")
        text = base64.b64encode(around + b"\xff-a-canary-\x00" + around).decode()
        assert any(form.decode() in text for name, form in canary.items() if name.startswith("base64 "))


async def test_a_broker_that_aborts_leaves_no_core(planted):
    """verifies that: broker and key maker gave up the cores that whoever started them allowed."""
    broker = planted.world.alpha.broker
    assert len(family(broker.running.pid)) > 1
    assert [pid for pid in family(broker.running.pid) if dumps_core(pid)] == []
    broker.running.send_signal(signal.SIGABRT)
    await asyncio.wait_for(broker.running.wait(), 20)
    await broker.start()
    assert [path for path in planted.directory.iterdir() if path.name.startswith("core")] == []
