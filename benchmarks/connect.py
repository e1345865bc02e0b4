"""A device connects to a function: whole connections of both profiles, with everything that either end and both HSMs do for it.

One process and one run: the agent of a launched function (simulated silicon), its broker's code over a SoftHSM token and SQLite, the
device's home HSM behind real HTTPS. The TLS profile needs a statement of the home HSM and a decision of the function's; the profile
without forward secrecy needs a key from each. The ledger answers from memory in both. In turns, so that a busy machine is busy for both.

The peer in the same run is a TLS 1.3 handshake with client authentication in memory: what a connection costs that asks nobody anything.
"""

import asyncio
import contextlib
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from moorline.clock import Instant
from moorline.hsm.ceremony import initialise
from moorline.hsm.token import open_token
from moorline.simulators.manufacturer import create_manufacturer, open_chip
from moorline.simulators.silicon import Silicon
from moorline.verification.anchors import parse_anchor_file

TESTS = Path(__file__).parents[1] / "tests" / "device"
TURNS = 8
AT_ONCE = 5


def loaded(name: str, path: Path):
    """A module of the tests, whose world this measures."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def handshake(key, certificate):
    """TLS 1.3 in memory, both ends with a certificate."""
    contexts = []
    for _ in range(2):
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.use_certificate(certificate)
        context.use_privatekey(key)
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
        contexts.append(context)

    def once() -> None:
        client, server = (SSL.Connection(context) for context in contexts)
        client.set_connect_state()
        server.set_accept_state()
        for _ in range(4):
            for end, other in ((client, server), (server, client)):
                with contextlib.suppress(SSL.WantReadError):
                    end.do_handshake()
                with contextlib.suppress(SSL.WantReadError):
                    other.bio_write(end.bio_read(65536))

    return once


async def turn(connect) -> tuple[float, float]:
    """Seconds of CPU and of time a connection took, of a few one after the other; each is closed again."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(AT_ONCE):
        async with await connect():
            pass
    return (time.process_time() - cpu) / AT_ONCE, (time.perf_counter() - wall) / AT_ONCE


async def measured(world, stage) -> dict[str, tuple[float, float]]:
    """The middle of the turns of each profile."""
    found: dict[str, list[tuple[float, float]]] = {"tls": [], "no-pfs": []}
    async with stage.home() as home:
        store = stage.device(home)
        ways = {"tls": lambda: world.connect(store), "no-pfs": lambda: stage.connect(store)}
        for connect in ways.values():
            await turn(connect)  # what is made once is made
        for _ in range(TURNS):
            for name, connect in ways.items():
                found[name].append(await turn(connect))
    return {name: tuple(sorted(part)[len(part) // 2] for part in zip(*turns, strict=True)) for name, turns in found.items()}


async def whole(folder: Path, token) -> dict[str, tuple[float, float]]:
    """Both profiles against one running function."""
    world_of = loaded("device_world", TESTS / "conftest.py")
    tests = loaded("no_pfs_stage", TESTS / "test_no_pfs.py")
    now = Instant(int(time.time()) - 3600)
    maker = create_manufacturer(folder / "maker", now=now)
    silicon = Silicon(open_chip(maker.make_chip("m0", now=now)))
    (folder / "w").mkdir()
    world = world_of.World(
        directory=folder / "w", silicon=silicon, anchors=parse_anchor_file(maker.anchors_path.read_bytes())
    )
    world.hand_over()
    await world.start()
    stage = tests.Stage(world, token, folder)
    stage.alpha.meet(stage.beta)
    try:
        return await measured(world, stage)
    finally:
        await world.stop()
        for one in (stage.alpha, stage.beta):
            one.store.close()


def main() -> None:
    if shutil.which("softhsm2-util") is None:
        print("SoftHSM is not installed")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_token(initialise(folder / "token", label="bench").location) as token:
            found = asyncio.run(whole(folder, token))
    from cryptography import x509

    from moorline.clock import Validity
    from moorline.wire.certificates import root_certificate

    key = ec.generate_private_key(ec.SECP256R1())
    life = Validity(not_before=Instant(0), not_after=Instant(2_000_000_000))
    certificate: x509.Certificate = root_certificate(key, name="bench", validity=life, serial=1)
    bare = handshake(key, certificate)
    cpu = time.process_time()
    for _ in range(200):
        bare()
    limit = (time.process_time() - cpu) / 200
    print(f"bare TLS 1.3 handshake, both ends authenticated      {limit * 1e3:8.2f} ms of CPU")
    for name, (spent, passed) in found.items():
        says = f"{name} connection, device, function and both HSMs"
        print(f"{says:52} {spent * 1e3:8.2f} ms of CPU, {passed * 1e3:8.2f} ms   {limit / spent:5.2f} of the bare handshake")
    tls, plain = found["tls"], found["no-pfs"]
    print(
        f"no-pfs against tls                                   {plain[0] / tls[0]:8.2f} of its CPU, {plain[1] / tls[1]:.2f} of its time"
    )


if __name__ == "__main__":
    main()
