"""The ledger's embedded engine: transactions a second, latency, proofs, growth, start-up; each against what it needs at least.

    ./dev bench ledger                              all of it, states of 10^3 and 2*10^4 keys
    python benchmarks/ledger.py --size 1000000 --folder F    a million revocations and 10,000 providers: makes them in F, real
                                                    transactions all of them, or measures what it finds there

Targets (issue of the ledger): 5,000 tx/s in batches of 100 with fsync; a proof of one key in 4 KiB, verified in 1 ms.
Databases are SQLite files with synchronous=FULL below the temporary directory. "Others elsewhere" charges the sequencer with
everything it does, and the cosigners with their signatures only, as if they ran on machines of their own. "In batches of 100":
so many senders at a time wait for their receipts and send the next then; "three batches in flight": 300 do, so that one
hundred can come in while the block of another waits for the disk. A worker process verifies signatures on another core, as in
a service. "All four here" executes every block four times in this one process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import pickle
import resource
import secrets
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from moorline.clock import Instant
from moorline.ledger import blocks, ceremony, checkpoint, light_client, transactions
from moorline.ledger.checkpoint import Note
from moorline.ledger.engines import taking_over
from moorline.ledger.engines.cosigner import Cosigner
from moorline.ledger.engines.embedded import Sequencer
from moorline.ledger.engines.node import Committed, Node
from moorline.ledger.engines.verifiers import Verifiers
from moorline.ledger.genesis import Parameters
from moorline.ledger.records import RevocationKind
from moorline.ledger.state import execute
from moorline.ledger.transactions import Sender, SenderKind
from moorline.services.authority import collect_rarely
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore
from moorline.wire import keys, schema

NAMES = ("authority-1", "authority-2", "authority-3", "authority-4")
BATCH = 100
MEASURED = 6_000
SINGLE = 180
IN_FLIGHT = 3
PROVIDERS = int(os.environ.get("MOOR_BENCH_PROVIDERS", "10000"))


@dataclass
class World:
    """A consortium with provider alpha, and nodes over databases in a folder."""

    made: ceremony.Ceremony
    authorities: dict
    provider: ec.EllipticCurvePrivateKey
    folder: Path

    def node(self, name: str, file: str | None = None) -> Node:
        store = LedgerStore(open_database(f"sqlite:///{self.folder / (file or name)}.db", "ledger"))
        return Node(
            name=name,
            genesis=self.made.genesis,
            key=self.authorities[name].checkpoint,
            store=store,
            now_ms=lambda: time.time_ns() // 1_000_000,
        )

    def signed(self, kind: SenderKind, name: str, body, signer, height: int) -> bytes:
        payload = transactions.make(
            body,
            sender=Sender(kind=kind, name=name),
            ledger_id=self.made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=height + 190,
        )
        return transactions.sign(payload, signer)

    def revocations(self, count: int, height: int, start: int = 0) -> list[bytes]:
        private = self.provider.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return signed_revocations(self.made.genesis.ledger_id, private, count, height, start)


class Elsewhere:
    """A cosigner on another machine: this one pays for its signature and for nothing else."""

    def __init__(self, world: World, name: str) -> None:
        self.key, self.name = world.authorities[name].checkpoint, name
        self.head: checkpoint.Checkpoint | None = None

    async def cosign(self, _: bytes) -> str:
        assert self.head is not None
        return checkpoint.cosign(self.head, name=self.name, key=self.key, now=self.head.time).line()

    async def announce(self, committed: bytes) -> None:
        """It commits on its own time."""


class Telling(Sequencer):
    """Tells cosigners elsewhere what to sign, since they execute nothing."""

    async def _collect(self, candidate):
        for peer in self._peers.values():
            peer.head = candidate.head.checkpoint()
        return await super()._collect(candidate)


class Here:
    """An authority in this process."""

    def __init__(self, node: Node, engine) -> None:
        self.node, self.engine = node, engine

    async def cosign(self, proposal: bytes) -> str:
        return await self.engine.cosign(proposal)

    async def announce(self, committed: bytes) -> None:
        await self.engine.announce(committed)

    async def block(self, height: int) -> bytes:
        return self.node.committed(height)

    async def note(self) -> bytes:
        return self.node.signed_note()

    async def manifest(self) -> bytes:
        return self.node.manifest()

    async def chunk(self, first: int) -> bytes:
        return self.node.chunk(first)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def made_world(folder: Path) -> World:
    now = Instant(int(time.time()) - 60)
    made = ceremony.genesis_ceremony(
        folder / "consortium",
        names=NAMES,
        consortium_domain="consortium.test",
        simulated_allowed=True,
        parameters=Parameters(max_age_s=3600),
        addresses=dict.fromkeys(NAMES, "127.0.0.1:1"),
        now=now,
    )
    loaded = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in NAMES}
    return World(made, loaded, ec.generate_private_key(ec.SECP256R1()), folder)


class Chain:
    """Blocks put straight into a node's database, signed by a quorum: how large states are made."""

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node

    def block(self, batch: list[bytes]) -> None:
        head = self.node.head
        time_ms = max(head.state.time_ms + 1, time.time_ns() // 1_000_000 - 1000)
        block, after, outcomes = blocks.make(head, batch, time_ms=time_ms)
        assert len(block.transactions) == len(batch), [one for one in outcomes if hasattr(one, "code")][:1]
        found = after.checkpoint()
        lines = [
            checkpoint.cosign(found, name=name, key=self.world.authorities[name].checkpoint, now=found.time)
            for name in NAMES[:3]
        ]
        note = Note(checkpoint=found, signatures=(self.node.sign_as_maker(found), *lines)).encode()
        self.node.commit(Committed(block=blocks.encode(block), note=note, edge=after.edge), after, outcomes)

    def admit(self) -> None:
        """Provider alpha."""
        self.block(self.admission("alpha", self.world.provider))

    def providers(self, count: int) -> None:
        """So many more providers, each with a key, a name-constrained CA certificate and two approvals."""
        for first in range(0, count, 400):
            names = [f"provider-{number}" for number in range(first, min(first + 400, count))]
            self.block([data for name in names for data in self.admission(name, ec.generate_private_key(ec.SECP256R1()))])

    def admission(self, name: str, key) -> list[bytes]:
        world, height = self.world, self.node.head.state.height
        now = Instant(int(time.time()) - 50)
        domain = f"{name}.test"
        made = ceremony.issue_provider(
            world.authorities[NAMES[0]].ca, key.public_key(), name=name, trust_domain=domain, now=now
        )
        action = transactions.AdmitProvider(name=name, trust_domain=domain, certificate=made.public_bytes(Encoding.DER))
        payload = transactions.make(
            transactions.propose(action),
            sender=Sender(kind=SenderKind.AUTHORITY, name=NAMES[0]),
            ledger_id=world.made.genesis.ledger_id,
            nonce=secrets.token_bytes(32),
            valid_until=height + 190,
        )
        approve = transactions.Approve(proposal=transactions.proposal_id(payload))
        return [
            transactions.sign(payload, world.authorities[NAMES[0]].signer()),
            world.signed(SenderKind.AUTHORITY, NAMES[1], approve, world.authorities[NAMES[1]].signer(), height),
        ]

    def grow(self, count: int, start: int, label: str, *, apart: bool = False) -> float:
        """So many more records, by real transactions in full blocks; seconds it took without signing them."""
        spent, done = 0.0, 0
        for batch in self.signed_apart(count, start) if apart else self.signed_here(count, start):
            spent += timed(lambda batch=batch: self.block(batch))
            done += len(batch)
            if sys.stderr.isatty():
                print(f"\r   {label}: {done:,} of {count:,}", end="", file=sys.stderr)
        return spent

    def signed_here(self, count: int, start: int) -> Iterator[list[bytes]]:
        for at in range(0, count, 1000):
            yield self.world.revocations(min(1000, count - at), self.node.head.state.height, start + at)

    def signed_apart(self, count: int, start: int) -> Iterator[list[bytes]]:
        """The same, signed by another process four blocks ahead; for who runs this file as a program."""
        world, first = self.world, self.node.head.state.height
        private = world.provider.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        wanted = iter(
            (world.made.genesis.ledger_id, private, min(1000, count - at), first + at // 1000, start + at)
            for at in range(0, count, 1000)
        )
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as signing:
            asked = deque(signing.submit(signed_revocations, *one) for one in itertools.islice(wanted, 4))
            while asked:
                batch = asked.popleft().result()
                asked.extend(signing.submit(signed_revocations, *one) for one in itertools.islice(wanted, 1))
                yield batch


def signed_revocations(ledger_id: bytes, private: bytes, count: int, height: int, start: int) -> list[bytes]:
    """So many revocations by provider alpha, signed; in a process of its own while blocks are made of others."""
    signer = keys.KeySigner(load_der_private_key(private, None))
    return [
        transactions.sign(
            transactions.make(
                transactions.Revoke(kind=RevocationKind.DEVICE, id=f"d{start + number:x}"),
                sender=Sender(kind=SenderKind.PROVIDER, name="alpha"),
                ledger_id=ledger_id,
                nonce=secrets.token_bytes(32),
                valid_until=height + 190,
            ),
            signer,
        )
        for number in range(count)
    ]


def bare_verifications(world: World) -> float:
    """P-256 verifications a second, with nothing around them."""
    public, message = world.provider.public_key(), bytes(300)
    signature = world.provider.sign(message, ec.ECDSA(hashes.SHA256()))
    algorithm = ec.ECDSA(hashes.SHA256())
    return 2000 / timed(lambda: [public.verify(signature, message, algorithm) for _ in range(2000)])


class Senders:
    """So many, who each send their next transaction when they have the receipt of the last: a callback each, no task."""

    def __init__(self, sequencer: Sequencer, sent: list[bytes], at_once: int) -> None:
        self._sequencer, self._left, self._under_way = sequencer, iter(sent), 0
        self._at_once, self._ended = at_once, asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []

    async def all_answered(self) -> None:
        self._next()
        await self._ended

    def _next(self) -> None:
        """A batch, when all of the one before is answered."""
        batch = list(itertools.islice(self._left, self._at_once))
        self._under_way = len(batch)
        for data in batch:
            self._sequencer.accept(data).add_done_callback(partial(self._answered, time.perf_counter()))
        if not batch:
            self._ended.set_result(None)

    def _answered(self, began: float, receipt: asyncio.Future[bytes]) -> None:
        self.latencies.append(time.perf_counter() - began)
        if receipt.exception() is not None and not self._ended.done():
            self._ended.set_exception(receipt.exception())
        self._under_way -= 1
        if not self._under_way and not self._ended.done():
            self._next()


async def through(
    made: Callable[[Verifiers | None], Sequencer], sent: list[bytes], *, groups: int, at_once: int
) -> list[float]:
    """So many groups submit so many at once, each again when all have their receipts; the latency of each transaction."""
    verifiers = Verifiers() if groups * at_once > 1 else None
    if verifiers is not None:
        await verifiers.started()
    sequencer = made(verifiers)
    collect_rarely()  # as a service does
    task = asyncio.ensure_future(sequencer.run())
    share = len(sent) // groups
    senders = [Senders(sequencer, sent[at : at + share], at_once) for at in range(0, len(sent), share)]
    await asyncio.gather(*(one.all_answered() for one in senders))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if verifiers is not None:
        await verifiers.close()
    return [latency for one in senders for latency in one.latencies]


def rate(world: World, node: Node, made, *, groups: int, start: int) -> tuple[float, float, float]:
    """Transactions a second, the engine's CPU a transaction in microseconds, and transactions a block."""
    sent = world.revocations(MEASURED, node.head.state.height, start)
    height, cpu = node.head.state.height, time.process_time()
    spent = timed(lambda: asyncio.run(through(made, sent, groups=groups, at_once=BATCH)))
    return MEASURED / spent, (time.process_time() - cpu) / MEASURED * 1e6, MEASURED / (node.head.state.height - height)


def sequencing(world: World, node: Node) -> None:
    bare, start = bare_verifications(world), len(node.head.state.tree)
    peers = {name: Elsewhere(world, name) for name in NAMES[1:]}
    state, batch = node.head.state, world.revocations(1000, node.head.state.height, (1 << 42) + start)
    apply_s = timed(lambda: execute(state, batch, time_ms=state.time_ms + 1)) / 1000
    print(f"   bare P-256 verification                      {bare:10,.0f} /s")
    print(
        f"   a block of 1,000 executed, {len(state.tree):9,} keys     {1 / apply_s:10,.0f} /s   {1 / apply_s / bare:5.2f} of bare"
    )

    def made(verifiers: Verifiers | None) -> Sequencer:
        return Telling(node, peers, verifiers=verifiers)

    for groups in (1, IN_FLIGHT):
        found, cpu, a_block = rate(world, node, made, groups=groups, start=(groups << 40) + start)
        print(
            f"   sequenced, {groups} batch of {BATCH} in flight           {found:10,.0f} tx/s {found / bare:5.2f} of bare"
            f"   {cpu:4.0f} us of CPU a transaction, {a_block:.0f} a block"
        )
    single = world.revocations(SINGLE, node.head.state.height, (1 << 41) + start)
    lone = sorted(asyncio.run(through(made, single, groups=1, at_once=1)))
    print(
        f"   one transaction at a time                    p50 {statistics.median(lone) * 1e3:6.2f} ms   p99 {lone[int(len(lone) * 0.99)] * 1e3:6.2f} ms"
        f"   (a bare commit of 1 KiB, twice: {2 * bare_commit(world.folder) * 1e3:.2f} ms)"
    )


def bare_commit(folder: Path) -> float:
    """Seconds that SQLite takes to make one row durable: the median of some."""
    engine = open_database(f"sqlite:///{folder / 'bare.db'}", "ledger")
    store = LedgerStore(engine)
    took = [timed(lambda number=number: store.propose(number + 1, bytes(1024), seal=b"")) for number in range(100)]
    store.close()
    return statistics.median(took)


def all_four(folder: Path) -> None:
    world = made_world(folder)
    first = world.node(NAMES[0])
    Chain(world, first).admit()
    nodes = {name: world.node(name) for name in NAMES[1:]}
    here: dict[str, Here] = {NAMES[0]: Here(first, None)}
    for node in nodes.values():
        node.adopt(schema.decode(Committed, first.committed(1), max_bytes=1 << 24))

    def made(verifiers: Verifiers | None) -> Sequencer:
        for name, node in nodes.items():
            here[name] = Here(node, Cosigner(node, here[NAMES[0]], verifiers=verifiers))
        return Sequencer(first, {name: here[name] for name in NAMES[1:]}, verifiers=verifiers)

    for groups in (1, IN_FLIGHT):
        found, _, a_block = rate(world, first, made, groups=groups, start=groups << 40)
        print(
            f"   all four authorities in one process, {groups} batch of {BATCH} in flight {found:6,.0f} tx/s, {a_block:.0f} a block"
        )
    for node in (first, *nodes.values()):
        node.store.close()


def bare_proof(node: Node) -> float:
    """Seconds of the quorum's Ed25519 signatures and the path's hashes, with nothing around them."""
    key = ed25519.Ed25519PrivateKey.generate()
    public, signature = key.public_key(), key.sign(bytes(200))
    depth = len(node.head.state.tree).bit_length()

    def one() -> None:
        for _ in range(3):
            public.verify(signature, bytes(200))
        for _ in range(depth):
            hashlib.sha256(bytes(90)).digest()

    return min(timed(lambda: [one() for _ in range(100)]) for _ in range(5)) / 100


def proving(world: World, node: Node, label: str) -> None:
    trust, now = world.made.trust, node.head.checkpoint().time
    present, absent = "revocation/device/alpha/d7", "revocation/device/alpha/not-there"
    print(f"   bare: three Ed25519 signatures and the hashes of a path             {bare_proof(node) * 1e3:6.3f} ms")
    for key in ("provider/alpha", present, absent):
        bundle = node.prove([key])
        made = timed(lambda key=key: [node.prove([key]) for _ in range(200)]) / 200
        verified = min(
            timed(lambda bundle=bundle: [light_client.verify_bundle(bundle, trust, now=now) for _ in range(50)]) / 50
            for _ in range(5)
        )
        print(f"   {label:>9} keys: {key.partition('/')[0]:<10} {'absent' if key == absent else 'present':<8}"
              f"{len(bundle):6,} bytes   made {made * 1e3:6.3f} ms   verified {verified * 1e3:6.3f} ms")  # fmt: skip
    cold = [f"revocation/device/alpha/d{secrets.randbelow(1000):x}" for _ in range(100)]
    looked = timed(lambda: [node.head.state.get(key) for key in cold]) / 100
    print(f"   {label:>9} keys: a record looked up {looked * 1e6:8.1f} us (mixed warm and cold)")


def catching_up(world: World, node: Node, file: str) -> None:
    """Start-up of the node, a snapshot taken from it, and the same again."""
    node.store.close()
    before = memory_mib()
    began = time.perf_counter()
    again = world.node(NAMES[0])
    opened = time.perf_counter() - began
    print(
        f"   opened, {len(again.head.state.tree):,} keys, height {again.head.state.height:,}: {opened:6.2f} s, {memory_mib() - before:+,} MiB"
    )
    empty = world.node(NAMES[3], file)
    took = timed(lambda: asyncio.run(taking_over.take_over(empty, [Here(again, None)])))
    assert empty.head.digest == again.head.digest
    print(
        f"   snapshot taken over and verified: {took:6.1f} s, {len(empty.head.state.tree) / took:,.0f} records/s, {memory_mib()} MiB in all"
    )
    empty.store.close()
    again.store.close()


def report(size: int) -> None:
    """Small states and all four authorities, then one of this size."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        world = made_world(folder)
        node = world.node(NAMES[0])
        chain = Chain(world, node)
        chain.admit()
        done = 0
        for keys_ in (1_000, size):
            spent = chain.grow(keys_ - done, done, f"{keys_:,} keys")
            rate_ = (keys_ - done) / spent
            print(
                f"\n-- {keys_:,} revocations ({rate_:,.0f} tx/s while growing, blocks of 1,000, fsync; {memory_mib()} MiB)"
            )
            done = keys_
            proving(world, node, f"{keys_:,}")
            sequencing(world, node)
        catching_up(world, node, "empty")
        print("\n-- all four here")
        all_four(folder / "four")


def at_scale(folder: Path, size: int) -> None:
    """Make a state of this size and 10,000 providers in `folder`; or, if it is there, measure it."""
    kept = folder / "world.pickle"
    if not kept.exists():
        world = made_world(folder)
        node = world.node(NAMES[0])
        chain = Chain(world, node)
        chain.admit()
        spent = timed(lambda: chain.providers(PROVIDERS))
        print(f"   {PROVIDERS:,} providers admitted, their certificates made: {spent:.0f} s", flush=True)
        spent, cpu = chain.grow(size, 0, f"{size:,} keys"), time.process_time()
        print(
            f"   {size:,} revocations: {size / spent:,.0f} tx/s, blocks of 1,000, fsync; {cpu / size * 1e6:.0f} us of CPU each"
        )
        private = world.provider.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        kept.write_bytes(pickle.dumps((world.made, private)))
        node.store.close()
        return
    made, private = pickle.loads(kept.read_bytes())
    loaded = {name: ceremony.load_authority(made.directory / "authorities" / name) for name in NAMES}
    world = World(made, loaded, load_der_private_key(private, None), folder)
    began, before = time.perf_counter(), memory_mib()
    node = world.node(NAMES[0])
    spent, count = time.perf_counter() - began, len(node.head.state.tree)
    print(f"\n-- {count:,} keys, height {node.head.state.height:,}: opened in {spent:.2f} s, {memory_mib() - before:+,} MiB")
    proving(world, node, f"{count:,}")
    sequencing(world, node)
    (folder / "empty.db").unlink(missing_ok=True)
    catching_up(world, node, "empty")


def main() -> None:
    report(20_000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000, help="the largest state, in revocations")
    parser.add_argument("--folder", type=Path, help="make or measure a large state there")
    found = parser.parse_args()
    if found.folder is None:
        report(found.size)
    else:
        found.folder.mkdir(exist_ok=True)
        at_scale(found.folder, found.size)
