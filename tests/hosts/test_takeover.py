"""Two real processes of one verifier over a real PostgreSQL: one is killed, the database goes and comes back."""

import asyncio
import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from moorline.attesters.tpm import Tpm
from moorline.clock import SystemClock
from moorline.errors import MoorlineError
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.host_agent.verifier_processes import VerifierProcesses
from moorline.services import settings
from moorline.simulators import firmware
from moorline.wire.http import HttpClient

sys.path.insert(0, str(Path(__file__).parent))
from test_process import NAME, booted, issued, platform, published, verifier_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))
from consortium import Consortium, Process, free_addresses

pytestmark = [pytest.mark.story, pytest.mark.long]
PERIOD_S = 1.0
LEASE_S = 6


class Twice:
    """Two processes of verifier v1 of one provider over one database, and host h1 that knows both."""

    def __init__(self, made, alpha, directory, url, maker):
        self.made, self.directory = made, directory
        base = verifier_settings(made, alpha, directory, maker)
        self.settings = [
            dataclasses.replace(
                base, listen=free_addresses(1)[0], database_url=url, lease_s=LEASE_S, challenge_s=5, takeover_s=2.0
            )
            for _ in range(2)
        ]
        self.processes = []
        for number, one in enumerate(self.settings):
            config = directory / f"verifier-{number}.toml"
            settings.write(one, config)
            self.processes.append(Process(("verifier", "run", "--config", str(config)), directory / f"log-{number}"))

    def client(self, number, identity=None):
        return HttpClient(
            f"https://{self.settings[number].listen}",
            server_name=NAME,
            roots_pem=self.made.ceremony.roots_pem,
            identity=identity,
        )


async def followed(twice, number, reader, events):
    """Read events at one process into `events`, from where they end, until cancelled; errors are tried again."""
    while True:
        try:
            async with twice.client(number, reader) as client:
                after = events[-1]["cursor"] if events else 0
                page = await client.get_json("/v1/events", {"after": str(after), "wait_s": "2"})
                events.extend(page["events"])
        except MoorlineError:
            await asyncio.sleep(0.2)


async def stands(twice, number, reader):
    async with twice.client(number, reader) as client:
        try:
            await client.get_json("/v1/results/h1")
        except MoorlineError:
            return False
        return True


async def until(question, patience_s=40):
    async with asyncio.timeout(patience_s):
        while not await question():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.2)


async def test_work_is_taken_over_and_a_database_that_went_comes_back(maker, running, tmp_path, postgres):  # noqa: PLR0915 - one story
    """verifies that: the host goes on at the process that is left and loses nothing; readers lose and double no event; a
    host that falls silent under a killed process is told of by the other; a stopped database stops nobody for good."""
    now = SystemClock().now()
    made = await Consortium.found(tmp_path, max_age_s=30)
    twice, tasks = None, []
    try:
        alpha = await made.admit("alpha", verifier="v1", verifier_url="https://127.0.0.1:1")
        directory = tmp_path / "verifier"
        await issued(alpha, "spiffe://alpha.test/verifier/v1", directory)
        reader = await issued(alpha, "spiffe://alpha.test/orchestrator/o1", tmp_path / "orchestrator")
        signer = published(directory, now)
        twice = Twice(made, alpha, directory, postgres.url(), maker)
        await asyncio.gather(*(process.start() for process in twice.processes))
        with Tpm.open(running[0].tcti) as tpm:
            ek_digest, tag = booted(tpm, tmp_path / "h1", signer, now)
            await alpha.submitter.send(platform(ek_digest, tag))
            logs = FileLogs(tmp_path / "h1" / firmware.EVENT_LOG, tmp_path / "h1" / firmware.IMA_LIST)
            both = VerifierProcesses([twice.client(0), twice.client(1)])
            agent = HostAttestation(host="h1", verifier=both, tpm=tpm, logs=logs, tag=tag, period_s=PERIOD_S)
            attesting = asyncio.create_task(agent.run(lambda _: None))
            here, there = [], []
            tasks = [
                attesting,
                asyncio.create_task(followed(twice, 0, reader, here)),
                asyncio.create_task(followed(twice, 1, reader, there)),
            ]
            await until(lambda: stands(twice, 1, reader))

            await asyncio.sleep(LEASE_S + 1)  # both may blame a host by now, and watch half the fleet each
            await twice.processes[0].stop(9)
            for _ in range(2 * LEASE_S):  # a lease and more: it is renewed at the process that is left
                assert await stands(twice, 1, reader)
                await asyncio.sleep(1)
            assert [event["kind"] for event in there] == ["verdict_gained"]

            postgres.stop("immediate")
            await asyncio.sleep(2)
            postgres.start()
            await until(lambda: stands(twice, 1, reader))
            assert twice.processes[1].running.returncode is None

            await twice.processes[0].start()
            await asyncio.sleep(LEASE_S + 3)
            attesting.cancel()  # h1 falls silent while one of the two, whichever watches it, is killed
            await twice.processes[0].stop(9)

            async def told():
                return bool(there) and there[-1]["kind"] == "verdict_lost"

            await until(told)
            assert there[-1]["code"] == "result.expired"
            await twice.processes[0].start()

            async def same():
                return here == there

            await until(same)
            assert all(low["cursor"] < high["cursor"] for low, high in pairwise(there))
            assert [event["kind"] for event in there].count("verdict_lost") == [event["kind"] for event in there].count(
                "verdict_gained"
            )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if twice is not None:
            await asyncio.gather(*(process.stop() for process in twice.processes))
        await made.close()
