"""CometBFT: four authorities on this machine, against four nodes of CometBFT's own kvstore in the same run.

Both get the same load, the same way: transactions of one size, sent to all four nodes' RPC (broadcast_tx_sync) at once, counted
until the last stands in a block. Ours verify a signature a transaction and keep what it did; the kvstore does neither.
Target: at least half of its rate. And: how long one transaction takes, and a step of the light client (target: 1 ms).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from moorline.clock import Instant
from moorline.errors import Misconfigured
from moorline.ledger import ceremony, transactions
from moorline.ledger.client import LedgerClient
from moorline.ledger.engines.cometbft import header, network, verifier
from moorline.ledger.engines.cometbft.network import Ports
from moorline.ledger.engines.cometbft.process import find
from moorline.ledger.engines.cometbft.rpc import CometRpc
from moorline.ledger.engines.cometbft.verifier import LightBlock, Rules
from moorline.ledger.genesis import Parameters
from moorline.ledger.transactions import AnchorLog, Approve, Sender, SenderKind
from moorline.services import settings
from moorline.services.authority import Settings
from moorline.services.comet_settings import CometSettings
from moorline.wire import keys

TRANSACTIONS: Final = 1500
PROVIDERS: Final = 8
LATENCIES: Final = 40
AT_ONCE: Final = 32
STEPS: Final = 500
NAMES: Final = tuple(f"authority-{number}" for number in range(1, 5))


def free_addresses(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in held]


def founded(directory: Path) -> tuple[ceremony.Ceremony, list[str]]:
    listens, p2p, rpc = (free_addresses(4) for _ in range(3))
    made = ceremony.genesis_ceremony(
        directory,
        names=NAMES,
        consortium_domain="consortium.test",
        simulated_allowed=True,
        parameters=Parameters(max_age_s=60),
        addresses=dict(zip(NAMES, listens, strict=True)),
        now=Instant(int(time.time()) - 1),
    )
    network.make(made, {name: Ports(p2p=p2p[i], rpc=rpc[i]) for i, name in enumerate(NAMES)})
    for i, name in enumerate(NAMES):
        folder = directory / "authorities" / name
        comet = CometSettings(home=folder / "cometbft", rpc=rpc[i])
        settings.write(Settings(name=name, listen=listens[i], directory=folder, cometbft=comet), folder / "authority.toml")
    return made, rpc


def started(commands: list[list[str]], logs: Path) -> list[subprocess.Popen[bytes]]:
    logs.mkdir(parents=True, exist_ok=True)
    children = []
    for number, words in enumerate(commands):
        with (logs / str(number)).open("wb") as log:
            children.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    return children


@contextlib.asynccontextmanager
async def running(commands: list[list[str]], rpc: list[str], logs: Path) -> AsyncIterator[None]:
    """Processes that run until the end, once all four nodes answer and have a block."""
    children = started(commands, logs)
    try:
        await asyncio.gather(*(answering(one) for one in rpc))
        yield
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(30)


async def answering(address: str) -> None:
    async with CometRpc(f"http://{address}") as rpc:
        while True:
            with contextlib.suppress(Exception):
                if (await rpc.status()).height > 0:
                    return
            await asyncio.sleep(0.1)


def ours(made: ceremony.Ceremony) -> list[list[str]]:
    return [
        [
            sys.executable,
            "-m",
            "moorline.cli",
            "authority",
            "run",
            "--config",
            str(made.directory / "authorities" / name / "authority.toml"),
        ]
        for name in NAMES
    ]


def kvstore(made: ceremony.Ceremony, binary: Path) -> list[list[str]]:
    """The same homes with CometBFT's own application and key files."""
    commands = []
    for name in NAMES:
        home = network.home_of(made, name)
        config = home / "config" / "config.toml"
        lines = config.read_text("utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(("proxy_app", "priv_validator_"))]
        config.write_text('proxy_app = "kvstore"\n' + "\n".join(kept) + "\n", "utf-8")
        key = ceremony.load_authority(made.directory / "authorities" / name).checkpoint
        write_key(home, key)
        commands.append([str(binary), "start", "--home", str(home)])
    return commands


def write_key(home: Path, key: Ed25519PrivateKey) -> None:
    public = key.public_key().public_bytes_raw()
    said = {
        "address": header.address_of(public).hex().upper(),
        "pub_key": {"type": "tendermint/PubKeyEd25519", "value": base64.b64encode(public).decode()},
        "priv_key": {
            "type": "tendermint/PrivKeyEd25519",
            "value": base64.b64encode(key.private_bytes_raw() + public).decode(),
        },
    }
    (home / "config" / "priv_validator_key.json").write_text(json.dumps(said))
    (home / "data" / "priv_validator_state.json").write_text('{"height": "0", "round": 0, "step": 0}')


async def call(client: httpx.AsyncClient, address: str, method: str, **params: str) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    answer = (await client.post(f"http://{address}/", json=body)).json()
    if "error" in answer:
        raise RuntimeError(answer["error"])
    found: dict[str, Any] = answer["result"]
    return found


async def rate(rpc: list[str], batch: list[bytes]) -> float:
    """Transactions a second from the first sent to the last in a block."""
    waiting = asyncio.Queue[tuple[int, bytes]]()
    for number, data in enumerate(batch):
        waiting.put_nowait((number, data))
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        first = int((await call(client, rpc[0], "status"))["sync_info"]["latest_block_height"]) + 1
        began = time.perf_counter()

        async def send() -> None:
            while not waiting.empty():
                number, data = waiting.get_nowait()
                said = await call(client, rpc[number % 4], "broadcast_tx_sync", tx=base64.b64encode(data).decode())
                if said["code"]:
                    raise RuntimeError(said["log"])

        await asyncio.gather(*(send() for _ in range(AT_ONCE)))
        counted, height = 0, first
        while counted < len(batch):
            try:
                block = await call(client, rpc[0], "block", height=str(height))
            except RuntimeError:
                await asyncio.sleep(0.02)
                continue
            counted += len(block["block"]["data"]["txs"] or [])
            height += 1
        return len(batch) / (time.perf_counter() - began)


async def latencies(rpc: list[str], batch: list[bytes]) -> list[float]:
    """Seconds from sending to the block, one after the other (broadcast_tx_commit)."""
    found = []
    async with httpx.AsyncClient(timeout=60) as client:
        for data in batch:
            began = time.perf_counter()
            await call(client, rpc[0], "broadcast_tx_commit", tx=base64.b64encode(data).decode())
            found.append(time.perf_counter() - began)
    return found


class Load:
    """Signed transactions of admitted providers."""

    def __init__(self, made: ceremony.Ceremony) -> None:
        self.made = made
        self.keys = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in NAMES}
        self.providers = {f"p{number}": ec.generate_private_key(ec.SECP256R1()) for number in range(PROVIDERS)}
        self._made = 0

    def _signed(self, kind: SenderKind, name: str, body: Any, signer: Any) -> tuple[bytes, transactions.Payload]:
        payload = transactions.make(
            body,
            sender=Sender(kind=kind, name=name),
            ledger_id=self.made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=900,
        )
        return transactions.sign(payload, signer), payload

    async def admit(self, client: LedgerClient) -> None:
        async def one(name: str, key: ec.EllipticCurvePrivateKey) -> None:
            certificate = ceremony.issue_provider(
                self.keys[NAMES[0]].ca,
                key.public_key(),
                name=name,
                trust_domain=f"{name}.test",
                now=Instant(int(time.time())),
            )
            der = certificate.public_bytes(Encoding.DER)
            action = transactions.AdmitProvider(name=name, trust_domain=f"{name}.test", certificate=der)
            signer = self.keys[NAMES[0]].signer()
            data, payload = self._signed(SenderKind.AUTHORITY, NAMES[0], transactions.propose(action), signer)
            await client.submit(data)
            approval = Approve(proposal=transactions.proposal_id(payload))
            await client.submit(self._signed(SenderKind.AUTHORITY, NAMES[1], approval, self.keys[NAMES[1]].signer())[0])

        await asyncio.gather(*(one(name, key) for name, key in self.providers.items()))

    def batch(self, count: int) -> list[bytes]:
        found = []
        for _ in range(count):
            self._made += 1
            name = f"p{self._made % PROVIDERS}"
            body = AnchorLog(log=f"log-{self._made}", size=1, root=secrets.token_bytes(32))
            found.append(self._signed(SenderKind.PROVIDER, name, body, keys.KeySigner(self.providers[name]))[0])
        return found


def pairs(count: int, size: int) -> list[bytes]:
    """key=value for the kvstore, as long as ours."""
    return [f"{secrets.token_hex(16)}=".encode() + secrets.token_hex(size).encode()[: size - 33] for _ in range(count)]


async def light_blocks(rpc: list[str]) -> tuple[LightBlock, LightBlock, LightBlock]:
    async with CometRpc(f"http://{rpc[0]}") as client:
        last = (await client.status()).height - 1
        first, second, newest = [await light_block(client, height) for height in (1, 2, last)]
        return first, second, newest


async def light_block(client: CometRpc, height: int) -> LightBlock:
    return LightBlock(
        signed=await client.signed_header(height),
        validators=await client.validators(height),
        next_validators=await client.validators(height + 1),
    )


def step(trusted: LightBlock, new: LightBlock) -> float:
    rules = Rules(trusting_period_s=86_400, now_ns=time.time_ns())
    began = time.perf_counter()
    for _ in range(STEPS):
        verifier.verify(trusted, new, rules)
    return (time.perf_counter() - began) / STEPS


async def measured(directory: Path) -> None:
    binary = find()
    count = int(sys.argv[sys.argv.index("--size") + 1]) if "--size" in sys.argv else TRANSACTIONS
    made, rpc = founded(directory / "ours")
    load = Load(made)
    async with (
        running(ours(made), rpc, directory / "logs"),
        LedgerClient(made.endpoints, roots_pem=made.roots_pem) as client,
    ):
        while True:
            with contextlib.suppress(Exception):
                await client.checkpoint()
                break
            await asyncio.sleep(0.2)
        await load.admit(client)
        batch = load.batch(count)
        our_rate = await rate(rpc, batch)
        our_latency = await latencies(rpc, load.batch(LATENCIES))
        receipts = []
        for data in load.batch(LATENCIES):
            began = time.perf_counter()
            await client.submit(data)
            receipts.append(time.perf_counter() - began)
        first, second, last = await light_blocks(rpc)
    peer, peer_rpc = founded(directory / "kvstore")
    async with running(kvstore(peer, binary), peer_rpc, directory / "peer-logs"):
        size = len(batch[0])
        peer_rate = await rate(peer_rpc, pairs(count, size))
        peer_latency = await latencies(peer_rpc, pairs(LATENCIES, size))
    print(f"{count} transactions of about {size} bytes, four nodes on this machine")
    print(f"  ours                 {our_rate:8.0f} tx/s   {our_rate / peer_rate:5.2f} of the kvstore's")
    print(f"  kvstore              {peer_rate:8.0f} tx/s")
    print(f"  in a block, ours     p50 {quantile(our_latency, 50):6.1f} ms   p99 {quantile(our_latency, 99):6.1f} ms")
    print(f"  in a block, kvstore  p50 {quantile(peer_latency, 50):6.1f} ms   p99 {quantile(peer_latency, 99):6.1f} ms")
    print(
        f"  receipt over HTTPS   p50 {quantile(receipts, 50):6.1f} ms   p99 {quantile(receipts, 99):6.1f} ms  (state proven)"
    )
    print(f"  light-client step    adjacent {step(first, second) * 1e3:.3f} ms   skipping {step(first, last) * 1e3:.3f} ms")


def quantile(seconds: list[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100)[percent - 1] * 1000


def main() -> None:
    try:
        find()
    except Misconfigured as error:
        print(f"left out: {error}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that its nodes end with it
    directory = Path(tempfile.mkdtemp(prefix="moor-bench-"))
    try:
        asyncio.run(measured(directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
