"""The launcher enclave, inside its measured guest: `python -m moorline.services.launcher` (orchestration.launcher).

1. It reads launch.cbor: its one-time ticket and what it must know before it can trust anybody. HOST_DATA covers these bytes.
2. It makes its session signing key, opens the attested session to the broker over `out-broker`, and judges the broker first.
3. It receives the launch key and a lease, kept in memory only, and says `active` in status.jsonl.
4. It answers intents on the socket `in` until it is stopped.

Nothing here may import what the guest image does not hold: standard library, this package, cryptography, cbor2, pyOpenSSL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.reports import ReportSource, report_source
from moorline.channel.driver import ClientSession, Collected, answered, open_session
from moorline.clock import SystemClock
from moorline.errors import EXIT_UNDECIDED, EXIT_YES, Malformed, MoorlineError, Refused, Unavailable
from moorline.ledger.light_client import LedgerTrust
from moorline.orchestration.broker import judge_broker
from moorline.orchestration.launcher import Launcher, SessionClock, problem_bytes
from moorline.secrecy import keep_secrets
from moorline.wire import keys, schema
from moorline.wire.frames import read_frame, write_frame
from moorline.wire.guest import BROKER_SOCKET, INBOUND_SOCKET, LAUNCH_FILE, SHARED_DIRECTORY, STATUS_FILE, LauncherLaunch
from moorline.wire.orchestration import LAUNCH_FRAME_CAP, LaunchReply
from moorline.wire.session import Activation, Challenge, EvidenceFormat, LauncherFields, LauncherSecrets, SessionRole

MAX_CONNECTIONS: Final = 32
FRAME_DEADLINE_S: Final = 30.0
MAX_CLOCK_DISAGREEMENT_S: Final = 300
ADMISSION_S: Final = 10.0


async def serve(shared: Path) -> None:
    """Attest, then answer intents until cancelled. Raises why it cannot."""
    launch = schema.decode(LauncherLaunch, (shared / LAUNCH_FILE).read_bytes())
    trust = LedgerTrust.parse(launch.trust)
    signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    reports = report_source(os.environ)  # once: the descriptor it takes over is closed with it
    async with await _Link.open(lambda: _session(shared, launch, trust, signer, reports)) as link:
        session = link.session
        launcher = Launcher(
            trust=trust,
            provider=launch.provider,
            signer=signer,
            session=link,
            secrets=schema.decode(LauncherSecrets, session.secrets),
            activation=session.activation,
            clock=SessionClock(time.monotonic),
        )
        link.readmitted = launcher.readmitted
        server = await asyncio.start_unix_server(_Door(launcher).enter, shared / INBOUND_SOCKET)
        said = {"event": "active", "launcher": launcher.id.hex(), "spiffe_id": session.activation.spiffe_id}
        tell(shared, said)
        async with server:
            await server.serve_forever()


class _Link:
    """The session with the broker, opened again under the same signing key when the broker went away and came back.

    The ticket is still this launcher's (PROTOCOLS.md 3): the broker lets who used it show it again while it lasts, and gives
    a fresh lease. When it has ended the refusal is passed on, and a new launcher with a new ticket is needed.
    """

    def __init__(self, connect: Callable[[], Awaitable[ClientSession]], session: ClientSession) -> None:
        self._connect = connect
        self._turn = asyncio.Lock()
        self.session = session
        self.readmitted: Callable[[LauncherSecrets, Activation], None] = lambda _secrets, _activation: None

    @classmethod
    async def open(cls, connect: Callable[[], Awaitable[ClientSession]]) -> Self:
        """A link whose first session is active. Raises what opening it raises."""
        return cls(connect, await _judged(connect))

    @property
    def closed(self) -> bool:
        """True while there is no session; the next call opens one."""
        return self.session.closed

    async def call(self, operation: str, body: bytes) -> bytes:
        """The broker's answer. A session that turns out to be gone is replaced once, and the question asked again."""
        async with self._turn:
            try:
                return await self.session.call(operation, body)
            except (Unavailable, Malformed):
                if not self.session.closed:
                    raise  # the broker's own answer
            self.session = await _judged(self._connect)
            self.readmitted(schema.decode(LauncherSecrets, self.session.secrets), self.session.activation)
            return await self.session.call(operation, body)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.session.aclose()


async def _judged(connect: Callable[[], Awaitable[ClientSession]]) -> ClientSession:
    session = await answered(connect, within_s=ADMISSION_S)
    try:
        _judge_clock(session.activation.now)
    except BaseException:
        await session.aclose()
        raise
    return session


def tell(shared: Path, event: Mapping[str, object]) -> None:
    """Append one line to status.jsonl, where the host agent reads it."""
    with (shared / STATUS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


async def _session(
    shared: Path, launch: LauncherLaunch, trust: LedgerTrust, signer: keys.Signer, reports: ReportSource
) -> ClientSession:
    clock = SystemClock()

    async def judge(challenge: Challenge, certificates: tuple[bytes, ...]) -> None:
        judge_broker(challenge, certificates, trust=trust, provider=launch.provider, hsm=launch.hsm, now=clock.now())

    async def prove(_: Challenge, __: bytes) -> None:
        return None

    async def collect(binding: bytes, _: Challenge) -> Collected:
        report = await asyncio.to_thread(reports.report, binding)
        return Collected(format=EvidenceFormat.SNP, evidence=report.outblob, endorsements=report.auxblob)

    return await open_session(
        f"unix:{shared / BROKER_SOCKET}",
        role=SessionRole.LAUNCHER,
        formats=(EvidenceFormat.SNP,),
        fields=schema.encode(LauncherFields(ticket=launch.ticket)),
        signing_public=keys.public_bytes(signer.public_key()),
        verify_broker=judge,
        prove=prove,
        collect=collect,
    )


def _judge_clock(told: int) -> None:
    """The broker was judged by the host's clock: one turned back would have let an old proof of it pass."""
    off = abs(told - SystemClock().now())
    if off > MAX_CLOCK_DISAGREEMENT_S:
        raise Refused(
            "launcher.clock_disagrees", "the host's clock is not the broker's", expected=MAX_CLOCK_DISAGREEMENT_S, got=off
        )


class _Door:
    """Connections on the socket `in`: one frame asks, one answers; anything odd is told why and shown out.

    A newcomer beyond the bound takes the place of the one that has asked nothing for longest.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._free = MAX_CONNECTIONS
        self._silent: dict[asyncio.StreamWriter, None] = {}

    async def enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._free <= 0:
            if not self._silent:
                writer.close()
                return
            longest = next(iter(self._silent))
            del self._silent[longest]
            longest.transport.abort()
        self._free -= 1
        try:
            while True:
                self._silent[writer] = None
                frame = await read_frame(reader, cap=LAUNCH_FRAME_CAP, deadline_s=FRAME_DEADLINE_S)
                self._silent.pop(writer, None)
                await write_frame(writer, await self._launcher.answer(frame), deadline_s=FRAME_DEADLINE_S)
        except MoorlineError as error:
            if not reader.at_eof():
                reply = LaunchReply(grant=None, problem=problem_bytes(error))
                await _last_word(writer, schema.encode(reply))
        finally:
            self._silent.pop(writer, None)
            self._free += 1
            writer.close()


async def _last_word(writer: asyncio.StreamWriter, body: bytes) -> None:
    try:
        await write_frame(writer, body, deadline_s=1.0)
    except MoorlineError:
        return


def main() -> int:
    """Run until SIGTERM; the exit code. What kept it from running is also the last line of status.jsonl."""
    shared = Path(SHARED_DIRECTORY)

    async def supervised() -> None:
        task = asyncio.ensure_future(serve(shared))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            tell(shared, {"event": "stopped"})

    try:
        asyncio.run(supervised())
    except MoorlineError as error:
        tell(shared, {"event": "refused", "problem": error.as_problem()})
        return error.exit_code
    except Exception as error:  # the process's top loop: the host sees that it ended, the guest's log says why
        crashed = Unavailable("launcher.crashed", "the launcher enclave crashed", got=type(error).__name__)
        tell(shared, {"event": "refused", "problem": crashed.as_problem()})
        sys.excepthook(type(error), error, error.__traceback__)
        return EXIT_UNDECIDED
    return EXIT_YES


if __name__ == "__main__":
    keep_secrets()
    sys.exit(main())
