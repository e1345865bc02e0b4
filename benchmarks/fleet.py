"""A fleet under continuous attestation: N hosts, each once a period, by one verifier process over TLS, HTTP and SQLite.

    ./dev bench fleet                                          1,000 hosts, 30 s
    .venv/bin/python benchmarks/fleet.py --hosts 10000 --minutes 10 --tpms 300
    .venv/bin/python benchmarks/fleet.py --growth                                    100, 1,000 and 10,000; four minutes
    .venv/bin/python benchmarks/fleet.py --hosts 10000 --seconds 120 --processes 2   over PostgreSQL

The verifier is the service's own application in a process of its own, with its database on disk and a P-256 key for results.
The hosts are here (hosts/simulated.py): each has its own attestation key, which signs real TPM quotes over a real boot log and
IMA list, and its own TLS connection; they share this process, so what making quotes costs is on the same machine and is printed
apart. `--tpms` of them have a swtpm process each. Some drift while it runs, and one reader waits for the events. Nobody
enrols over the wire (their keys are put into the database), and the ledger's platform records are at hand.

A deadline is met when the verdict is there before the host's next turn. The cold start is all hosts at once, with whole logs;
a host that does not get in comes again. Keylime's core takes the same evidence at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import Request
from host_poll import NOW, POLLS, Core, Machine, authority_with, cpu_seconds, enrol, firmware_values, peer_of
from hosts.figures import Growth, Seen, Slices, below, row, share, spread, table, usage
from hosts.simulated import REFUSED, Chip, Host, Software
from peers.keylime import VERSION

from moorline.clock import Instant, SystemClock, Validity
from moorline.nfv import SpiffeId
from moorline.services import (
    http,
    http_connection,
    process,
    verifier,
    verifier_anchors,
    verifier_routes,
    verifier_watch,
)
from moorline.services.process import collect_seldom, serve_all
from moorline.storage.verifier_store import VerifierStore
from moorline.verification.anchors import production_anchors
from moorline.wire import certificates, keys
from moorline.wire.http import ClientIdentity, HttpClient

NAME = "v1.verifier.alpha.test"
VERIFIER = "spiffe://alpha.test/verifier/v1"
READER = "spiffe://alpha.test/orchestrator/o1"
PEM = serialization.Encoding.PEM
OPEN_AT_ONCE = 256
"""Hosts that this process lets call at one time; more make it slow itself, which the verifier takes for silence."""
DRIFTS = 60
EVENT_WAIT_S = 20
SLICE_MIN_S = 5.0


# The verifier's process ------------------------------------------------------------------------------------------------


async def serve(directory: Path, url: str | None) -> None:
    key = ec.generate_private_key(ec.SECP256R1())

    async def sign(messages: tuple[bytes, ...]) -> tuple[bytes, ...]:
        signer = keys.KeySigner(key)
        return tuple(signer.sign(message) for message in messages)

    store = VerifierStore.open(url or directory / "verifier.db")
    served = authority_with(store, firmware_values(SystemClock().now()), sign=sign, clock=SystemClock())
    anchors = verifier_anchors.Anchors(tpm=(), snp=production_anchors(), simulated_allowed=True)
    app = verifier_routes.application(served, anchors, trust_domain="alpha.test", clock=SystemClock(), guard=by_chain_alone)
    shown = http.TlsIdentity(chain_pem=(directory / "chain.pem").read_bytes(), key_pem=(directory / "key.pem").read_bytes())
    collect_seldom()  # as the service does
    serving = http.serve(
        app,
        listen="127.0.0.1:0",
        identity=shown,
        client_roots_pem=(directory / "roots.pem").read_bytes(),
        ready=lambda address: print(json.dumps({"address": address}), flush=True),
        connections=http_connection.Connections(room=65536, idle_s=verifier.HOST_IDLE_S),
    )
    await serve_all(serving, verifier_watch.follow(served))  # readers hear of what another process wrote


async def by_chain_alone(_: Request) -> None:
    """There is no ledger here: the one reader's certificate is worth what its chain is. Hosts show none."""


def certify(directory: Path) -> None:
    now = SystemClock().now()
    life = Validity(not_before=Instant(now - 60), not_after=Instant(now + 3500))
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = certificates.root_certificate(root_key, name="root", validity=life, serial=1)
    (directory / "roots.pem").write_bytes(root.public_bytes(PEM))
    for name, chain, private in ((VERIFIER, "chain.pem", "key.pem"), (READER, "reader.pem", "reader-key.pem")):
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = certificates.leaf_certificate(
            key.public_key(),
            spiffe_id=SpiffeId.parse(name),
            issuer=certificates.Issuer(certificate=root, key=root_key),
            validity=life,
            serial=2,
        )
        (directory / chain).write_bytes(leaf.public_bytes(PEM))
        pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (directory / private).write_bytes(pem)


# The fleet -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """What was asked for."""

    hosts: int
    seconds: float
    period: float
    tpms: int
    processes: int
    postgres: bool


@dataclass(frozen=True)
class Process:
    """A verifier's process."""

    pid: int
    address: str


async def begin(host: Host, seen: Seen, room: asyncio.Semaphore) -> None:
    """Attest for the first time; whoever does not get in comes again, as agents do."""
    while True:
        async with room:
            try:
                assert await host.poll() is None
            except OSError as error:
                seen.fail(error)
            else:
                return
        await asyncio.sleep(random.uniform(0.5, 2.0))


async def live(host: Host, seen: Seen, first: float, period: float, until: float, drift: float | None) -> None:
    due, failed_before = first, False
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent = time.monotonic()
        if drift is not None and drift <= sent and host.name not in seen.drifted:
            host.machine.drift()
            seen.drifted[host.name], seen.sent[host.name] = drift, sent
        try:
            code = await host.poll()
        except OSError as error:
            seen.fail(error)
            seen.missed += not failed_before
            failed_before = True
        else:
            failed_before = False
            now = time.monotonic()
            assert code is None or (code == REFUSED and host.name in seen.drifted), code
            if code is not None:
                seen.told.setdefault(host.name, now)
            seen.took.append(now - sent)
            seen.missed += now > due + period
        due += period


async def follow(address: str, directory: Path, seen: Seen) -> None:
    """One who is told of verdicts, as an orchestrator is."""
    identity = ClientIdentity(
        certificate_chain_pem=(directory / "reader.pem").read_bytes(),
        private_key_pem=(directory / "reader-key.pem").read_bytes(),
    )
    roots, after = (directory / "roots.pem").read_bytes(), 0
    async with HttpClient(
        f"https://{address}", server_name=NAME, roots_pem=roots, identity=identity, timeout_s=EVENT_WAIT_S + 10.0
    ) as client:
        after = (await client.get_json("/v1/events?after=0"))["newest"]
        while True:
            answer = await client.get_json(f"/v1/events?after={after}&wait_s={EVENT_WAIT_S}")
            after = answer["next"]
            for event in answer["events"]:
                seen.heard.setdefault(event["host"], time.monotonic())


async def run(asked: Fleet, directory: Path) -> Growth:
    from broker import cluster  # over there is all that a broker is, which most runs need not load

    certify(directory)
    template = Machine()
    with contextlib.ExitStack() as stack:
        machines: list[Software | Chip] = []
        for number in range(min(asked.tpms, asked.hosts)):
            machines.append(Chip(directory / f"t{number}"))
            stack.callback(machines[-1].stop)
        machines += [Software.like(template) for _ in range(asked.hosts - len(machines))]
        url = stack.enter_context(cluster(directory / "pg")).url() if asked.postgres else ""
        store = VerifierStore.open(url or directory / "verifier.db")
        for number, machine in enumerate(machines):
            enrol(store, f"h{number}", machine)
        store.close()
        processes = [_served(stack, directory, url) for _ in range(asked.processes)]
        return await drive(asked, processes, machines, directory)


def _served(stack: contextlib.ExitStack, directory: Path, url: str) -> Process:
    started = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(directory), *(["--database", url] if url else [])],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    stack.callback(started.wait, 20)
    stack.callback(started.terminate)
    assert started.stdout is not None
    return Process(started.pid, json.loads(started.stdout.readline())["address"])


async def drive(asked: Fleet, processes: list[Process], machines: list[Software | Chip], directory: Path) -> Growth:
    context = ssl.create_default_context(cafile=str(directory / "roots.pem"))
    hosts = [
        Host(f"h{number}", machine, processes[number % len(processes)].address, context, NAME)
        for number, machine in enumerate(machines)
    ]
    count, first, room = len(hosts), Seen(), asyncio.Semaphore(OPEN_AT_ONCE)
    pids = [one.pid for one in processes]
    chips, chip_pids = min(asked.tpms, count), below(os.getpid(), "swtpm")
    idle_cpu, idle_memory = usage(pids)
    started = time.monotonic()
    await asyncio.gather(*(begin(host, first, room) for host in hosts))
    settled = time.monotonic() - started
    cold_cpu, _ = usage(pids)
    row(
        f"cold start of {count} hosts at once, {chips} with a swtpm",
        f"{settled:.1f} s",
        f"0 lost, {first.failed} came again, {(cold_cpu - idle_cpu) / count * 1000:.2f} ms CPU a host {first.why or ''}",
    )
    gc.collect()
    gc.freeze()  # the hosts stay; looking at them again and again is none of their work
    seen = Seen()
    following = asyncio.create_task(follow(processes[-1].address, directory, seen))
    own, before, begun = time.process_time(), usage(pids)[0], time.monotonic()
    chips_before = usage(chip_pids)[0]
    drifting = set(random.sample(range(chips, count), min(DRIFTS, (count - chips) // 4)))
    drifts = {index: begun + asked.seconds * random.uniform(0.1, 0.7) for index in drifting}
    slicing = asyncio.create_task(sliced(Slices(seen, pids, directory), asked.seconds, begun))
    turns = [
        live(host, seen, begun + index * asked.period / count, asked.period, begun + asked.seconds, drifts.get(index))
        for index, host in enumerate(hosts)
    ]
    await asyncio.gather(*turns)
    after, memory = usage(pids)
    elapsed = time.monotonic() - begun
    used = (after - before, time.process_time() - own, usage(chip_pids)[0] - chips_before)
    slicing.cancel()
    await asyncio.sleep(1.5)
    if following.done():
        following.result()  # raises what ended it: nobody would have been told of anything after that
    following.cancel()
    grown = Growth(
        hosts=count,
        settled_s=settled,
        verdicts=len(seen.took),
        late=seen.missed,
        each_ms=used[0] / max(1, len(seen.took)) * 1000,
        cores=used[0] / elapsed,
        p50_ms=share(sorted(seen.took), 0.5) * 1000,
        p99_ms=share(sorted(seen.took), 0.99) * 1000,
        kib=(memory - idle_memory) / count / 1024,
    )
    report(seen, grown, asked.period, elapsed)
    shown = f"{chips} swtpm processes {used[2] / elapsed:.2f} cores; " if chips else ""
    row(
        "the hosts' own CPU, in this process", f"{used[1] / elapsed:.2f} cores", f"{shown}on the same {os.cpu_count()} cores"
    )
    return grown


async def sliced(slices: Slices, seconds: float, begun: float) -> None:
    """Ten lines over a run that is long enough: what grows, and when it was late, shows there."""
    each = seconds / 10
    if each < SLICE_MIN_S:
        return
    slices.begin()
    for number in range(10):
        await asyncio.sleep(max(0.0, begun + (number + 1) * each - time.monotonic()))
        slices.line(number * each, time.monotonic() - begun)


def report(seen: Seen, grown: Growth, period: float, elapsed: float) -> None:
    row(
        f"{grown.hosts} hosts, one period {period:.0f} s, for",
        f"{elapsed:.0f} s",
        f"{grown.verdicts} verdicts, {grown.late} deadlines missed, {seen.failed} failed {seen.why or ''}",
    )
    row(
        "verifier CPU a verdict, with TLS, HTTP and database",
        f"{grown.each_ms:.2f} ms",
        f"{grown.each_ms / 1000 / bare():.1f} x bare P-256 verification; {grown.cores:.2f} cores",
    )
    spread("from evidence sent to verdict read", seen.took)
    spread(
        "from drift to verdict, the wait for the turn included", [at - seen.drifted[one] for one, at in seen.told.items()]
    )
    spread("from evidence of drift sent to verdict", [at - seen.sent[one] for one, at in seen.told.items()])
    heard = {one: at for one, at in seen.heard.items() if one in seen.drifted}
    spread("from drift to event", [at - seen.drifted[one] for one, at in heard.items()])
    spread("from evidence of drift sent to event", [at - seen.sent[one] for one, at in heard.items()])
    lost = len(seen.drifted) - len(heard)
    row("drifts seen", f"{len(seen.told)} of {len(seen.drifted)}", f"{lost} without an event")
    row("verifier memory a host", f"{grown.kib:.0f} KiB", "with its TLS connection")


def peer() -> None:
    """Keylime's verifier core on the evidence of one of these hosts, beside ours, one process each."""
    machine = Machine()
    core = Core(machine, firmware_values(NOW))
    message, signature = machine.quote(bytes(range(32)))
    ours = cpu_seconds(lambda: core.poll(message, signature, bytes(range(32)))) / POLLS
    row("our core on the same evidence", f"{ours * 1000:.2f} ms", "quote, logs as held, policy, result")
    found = peer_of(machine)
    if found is not None:
        theirs = statistics.median(found[1]() for _ in range(3)) / POLLS
        found[0].close()
        row(f"{VERSION}, quote check and empty list", f"{theirs * 1000:.2f} ms", f"{theirs / ours:.1f} x our core")


def bare() -> float:
    key = ec.generate_private_key(ec.SECP256R1())
    scheme, public = ec.ECDSA(hashes.SHA256()), key.public_key()
    signature = key.sign(b"message", scheme)
    started = time.process_time()
    for _ in range(2000):
        public.verify(signature, b"message", scheme)
    return (time.process_time() - started) / 2000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--period", type=float, default=10.0)
    parser.add_argument("--tpms", type=int, default=0, help="how many of the hosts have a swtpm process")
    parser.add_argument(
        "--growth", action="store_true", help="a hundred, a thousand and ten thousand hosts, one after the other"
    )
    parser.add_argument("--processes", type=int, default=1, help="of one verifier, over PostgreSQL where there are several")
    parser.add_argument("--postgres", action="store_true", help="PostgreSQL in place of SQLite")
    parser.add_argument("--database", help=argparse.SUPPRESS)
    asked = parser.parse_args([] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends it ends what it started
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    if asked.serve is not None:
        return process.run("verifier", lambda _: serve(asked.serve, asked.database))
    seconds = asked.seconds if asked.minutes is None else asked.minutes * 60
    grown = []
    with contextlib.suppress(KeyboardInterrupt):
        for count in (100, 1000, 10000) if asked.growth else (asked.hosts,):
            fleet = Fleet(count, seconds, asked.period, asked.tpms, asked.processes, asked.postgres or asked.processes > 1)
            with tempfile.TemporaryDirectory(dir="/tmp") as name:
                grown.append(asyncio.run(run(fleet, Path(name))))
        peer()
        table(grown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
