"""What fails around an attestation authority, one story each: databases, clocks, networks, machines, and hosts that try."""

import asyncio
import contextlib
import dataclasses
import hashlib
import sys
import time
from pathlib import Path

import pytest

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant
from moorline.errors import Malformed, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence import tpm_structures as tpm
from moorline.evidence.tpm_quote import ClockInfo, Quote, serialize_quote
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.nfv import Role
from moorline.policy import host
from moorline.policy.sec009.assessment import Observation, Status, assess
from moorline.policy.sec009.catalogue import capabilities
from moorline.rats import Assurance, CapabilityLevel, EvidenceRoot
from moorline.services import host as agent_service
from moorline.simulators import firmware
from moorline.simulators.tpm import SimulatedTpm
from moorline.storage.verifier_store import VerifierStore
from moorline.wire import host as wire
from moorline.wire import keys, schema
from moorline.wire.http import HttpClient

sys.path.insert(0, str(Path(__file__).parent))
from served import Served
from test_asking import House
from test_policy import appraise, facts
from test_service import PKI
from test_stories import Machine as Booted

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
# The fleet of the benchmark: keys that sign TPM quotes.
from host_poll import NOW, SELECTION, Machine, enrol  # noqa: E402

sys.path.remove(BENCHMARKS)  # names there, such as ledger, are folders of tests too


@pytest.fixture
def house(tmp_path):
    return House(f"sqlite:///{tmp_path / 'v.db'}", tmp_path)


def told(house):
    return [(one.kind, one.code) for one in house.store.events(after=0, limit=500)[0]]


# The database ----------------------------------------------------------------------------------------------------------


async def test_a_stopped_postgresql_refuses_and_what_stood_stands_when_it_is_back(postgres, tmp_path):
    """verifies that: without its database a verifier says so and invents nothing; with it, everything is as before."""
    house = House(postgres.url(), tmp_path)
    verdict = await house.attests()
    evidence = house.machine.evidence(verdict.next)
    postgres.stop("immediate")
    try:
        for question in (
            house.authority.appraise("h1", evidence),
            house.authority.events(after=0, wait_s=0),
            house.suspected(),
            asyncio.to_thread(house.authority.standing, "h1"),
            asyncio.to_thread(house.authority.challenge, "h1"),
        ):
            with pytest.raises(Unavailable) as refused:
                await question
            assert refused.value.code == "storage.unavailable"
    finally:
        postgres.start()
    assert house.authority.standing("h1").ear == verdict.ear
    assert (await house.authority.appraise("h1", evidence)).status == "affirming"  # the challenge was not used up
    assert told(house) == [("verdict_gained", "")]


async def test_a_removed_sqlite_file_affirms_nobody(tmp_path):
    """verifies that: with the file gone no new process finds anybody enrolled or standing: absence is not acceptance."""
    file = tmp_path / "v.db"
    house = House(f"sqlite:///{file}", tmp_path)
    await house.attests()
    house.store.close()
    for part in tmp_path.glob("v.db*"):
        part.unlink()
    after = house.process(VerifierStore.open(file))
    for question in (after.standing, after.challenge):
        with pytest.raises(Refused) as refused:
            question("h1")
        assert refused.value.code in ("result.none", "host.not_enrolled")


async def test_a_locked_database_delays_nobody_for_good(tmp_path):
    """verifies that: while another holds the write lock evidence is refused, and the same evidence counts afterwards."""
    file = tmp_path / "v.db"
    house = House(f"sqlite:///{file}", tmp_path)
    evidence = house.machine.evidence(house.authority.challenge("h1"))
    other = VerifierStore.open(file)
    with house.store._engine.connect() as patient:
        patient.exec_driver_sql("PRAGMA busy_timeout=1")
    with other._engine.connect() as holding:
        holding.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable):
            await house.authority.appraise("h1", evidence)
        holding.rollback()
    assert (await house.authority.appraise("h1", evidence)).status == "affirming"


# Clocks ----------------------------------------------------------------------------------------------------------------


async def test_a_clock_that_goes_back_makes_no_old_challenge_good_again(house):
    """verifies that: a quote made before the verifier's clock went back is as old as it is; a fresh one counts."""
    stale = house.machine.evidence(house.authority.challenge("h1"))
    house.clock.at -= 600
    with pytest.raises(NotAuthentic) as refused:
        await house.authority.appraise("h1", stale)
    assert refused.value.code == "tpm.nonce_mismatch"
    assert (await house.attests()).status == "affirming"


async def test_a_clock_that_goes_back_lengthens_no_silence_and_blames_nobody_who_attests(house):
    """verifies that: after ten minutes back, whoever attests keeps standing, and whoever is silent is lost a lease later and
    not ten minutes later."""
    enrol(house.store, "h2", house.machine)
    house.authority._patience_until = Instant(0)
    for name in ("h1", "h2"):
        await house.authority.appraise(name, house.machine.evidence(house.authority.challenge(name)))
    await house.authority.sweep()
    house.clock.at -= 600
    await house.authority.sweep()
    assert told(house) == [("verdict_gained", "")] * 2  # nobody had time to attest yet
    for _ in range(7):
        house.clock.at += 10
        await house.attests()
        await house.authority.sweep()
    (lost,) = house.store.events(after=2, limit=9)[0]
    assert (lost.host, lost.kind, lost.code) == ("h2", "verdict_lost", "result.expired")


# Machines --------------------------------------------------------------------------------------------------------------


@pytest.mark.story
async def test_a_tpm_that_was_reset_without_a_reboot_loses_the_verdict(world, running):
    """verifies that: a TPM that forgot its PCRs under a running system does not stand by the logs of the old boot."""
    machine = Booted(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    assert (await agent.attest()).status == "affirming"
    running[0].stop()
    running[0].start()  # the logs of the system are still there, and go on
    with pytest.raises(MoorlineError) as refused:
        await agent.attest()
    with pytest.raises(Refused) as gone:
        authority.standing("h1")
    assert (gone.value.code, gone.value.got) == ("result.withdrawn", refused.value.code)
    firmware.boot(machine.tpm, machine.logs, firmware.GOOD)
    assert (await agent.attest()).status == "affirming"


@pytest.mark.story
async def test_a_tpm_without_the_bank_that_is_asked_for_cannot_attest(world, maker, tmp_path):
    """verifies that: a host whose SHA-256 bank was switched off has nothing to quote, and its lease runs out."""
    simulated = SimulatedTpm.manufacture(tmp_path / "t", maker)
    with simulated:
        world.clock.at = int(time.time()) + 2  # its certificate begins now
        machine = Booted(world, simulated, "h1")
        authority = world.authority()
        agent = machine.agent(authority)
        await agent.enrol()
        assert (await agent.attest()).status == "affirming"
        from tpm2_pytss import ESAPI, ESYS_TR
        from tpm2_pytss.constants import TPM2_ALG
        from tpm2_pytss.types import TPML_PCR_SELECTION, TPMS_PCR_SELECTION

        none = TPMS_PCR_SELECTION(hash=TPM2_ALG.SHA256, sizeofSelect=3, pcrSelect=bytes(3))
        with ESAPI(simulated.tcti) as esys:
            esys.pcr_allocate(TPML_PCR_SELECTION([TPMS_PCR_SELECTION.parse("sha1:all"), none]), auth_handle=ESYS_TR.PLATFORM)
        simulated.stop()
        simulated.start()
        with pytest.raises(MoorlineError):
            await agent.attest()
        world.clock.at += world.lease_s
        with pytest.raises(Refused) as refused:
            authority.standing("h1")
        assert refused.value.code == "result.expired"


class Rebooting(Machine):
    """A host that can boot again: its TPM counts that, and its logs begin anew."""

    boots = 1

    def quote(self, nonce):
        self.clock += 1
        digest = tpm.digest(tpm.ALG_SHA256, b"".join(self.pcrs[index] for index in SELECTION))
        chosen = (tpm.select(tpm.ALG_SHA256, SELECTION),)
        message = serialize_quote(
            Quote(b"\x00\x0b" + bytes(32), nonce, ClockInfo(self.clock, self.boots, 0, safe=True), 7, chosen, digest)
        )
        raw = keys.KeySigner(self.key).sign(message)
        return message, tpm.serialize_signature(tpm.Signature(tpm.ALG_ECDSA, tpm.ALG_SHA256, raw[:32], raw[32:]))

    def all_of_it(self, challenge):
        """Evidence from the beginning, as after a boot."""
        return dataclasses.replace(
            self.evidence(dataclasses.replace(challenge, ima_from=0, event_log_digest=None)), event_log=self.log
        )


async def test_a_storm_of_reboots_loses_no_host_and_keeps_one_log(tmp_path):
    """verifies that: eighty hosts that boot at once, and again, all stand; logs that are alike are one."""
    house = House(f"sqlite:///{tmp_path / 'v.db'}", tmp_path)
    machine = Rebooting()
    names = [f"s{number}" for number in range(80)]
    for name in names:
        enrol(house.store, name, machine)
    for _ in range(2):
        machine.boots += 1
        asked = [(name, machine.all_of_it(house.authority.challenge(name))) for name in names]
        verdicts = await asyncio.gather(*(house.authority.appraise(*one) for one in asked))
        assert {verdict.status for verdict in verdicts} == {"affirming"}
    logs = {house.store.progress(name).boot_log for name in names}
    assert logs == {hashlib.sha256(machine.log).digest()}
    assert told(house) == [("verdict_gained", "")] * 80  # a good boot is no event


async def test_a_flapping_host_is_told_of_each_time_and_disturbs_nobody(house):
    """verifies that: a host that is good and bad by turns makes two events a turn and none more; its neighbour makes one."""
    enrol(house.store, "calm", house.machine)
    await house.authority.appraise("calm", house.machine.evidence(house.authority.challenge("calm")))
    good = Rebooting(key=house.machine.key)
    bad = Rebooting(extra=("/usr/local/bin/miner", b"not allowed"), key=house.machine.key)
    for turn in range(10):
        machine = (good, bad)[turn % 2]
        good.boots = bad.boots = turn + 2
        verdict = await house.authority.appraise("h1", machine.all_of_it(house.authority.challenge("h1")))
        assert verdict.status == ("affirming", "contraindicated")[turn % 2]
    events = [one for one in house.store.events(after=0, limit=99)[0] if one.host == "h1"]
    assert [one.kind for one in events] == ["verdict_gained", "verdict_lost"] * 5
    assert house.authority.standing("calm").status == "affirming"


async def test_a_slow_host_holds_up_nobody_and_gains_no_time(house):
    """verifies that: evidence that comes when its challenge is over is refused; hosts that answer meanwhile are served."""
    enrol(house.store, "quick", house.machine)
    late = house.machine.evidence(house.authority.challenge("h1"))
    for _ in range(4):
        house.clock.at += 10
        verdict = await house.authority.appraise("quick", house.machine.evidence(house.authority.challenge("quick")))
        assert verdict.status == "affirming"
    with pytest.raises(NotAuthentic):
        await house.authority.appraise("h1", late)
    assert "h1" not in house.store.results()


# Networks --------------------------------------------------------------------------------------------------------------


class Cable:
    """A way to the verifier that can be cut: what is under way then never arrives."""

    def __init__(self, address):
        self.address, self.whole, self.open = address, True, set()

    async def carry(self, reader, writer):
        if not self.whole:
            await asyncio.sleep(3600)
        far_reader, far_writer = await asyncio.open_connection(*self.address.split(":"))
        self.open |= {writer, far_writer}

        async def one_way(source, sink):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if self.whole:
                        sink.write(data)

        await asyncio.gather(one_way(reader, far_writer), one_way(far_reader, writer))

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        host_, port = self.server.sockets[0].getsockname()
        self.here = f"{host_}:{port}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self.open:
            writer.close()


@pytest.mark.story
async def test_a_host_cut_off_loses_its_verdict_and_gains_it_when_the_network_heals(world, running):
    """verifies that: a network that swallows everything is silence, and silence ends a lease; nothing need be restarted."""
    world.lease_s = 2
    served = Served(world)
    served.authority._patience_until = Instant(0)
    machine = Booted(world, running[0], "h1")
    async with served.serving(), Cable(served.address) as cable:
        client = HttpClient(
            f"https://{cable.here}",
            server_name=served.name,
            server_role=Role.VERIFIER,
            roots_pem=PKI.roots_pem,
            timeout_s=0.5,
        )
        logs = FileLogs(machine.logs / firmware.EVENT_LOG, machine.logs / firmware.IMA_LIST)
        async with client:
            agent = HostAttestation(host="h1", verifier=client, tpm=machine.tpm, logs=logs, tag=machine.tag, period_s=0.3)
            attesting = asyncio.create_task(agent.run(lambda _: None))
            try:
                await heard(served, "verdict_gained", after=0)
                cable.whole = False
                lost = await heard(served, "verdict_lost", after=1)
                assert lost.code == "result.expired"
                cable.whole = True
                await heard(served, "verdict_gained", after=lost.cursor)
            finally:
                attesting.cancel()


async def heard(served, kind, *, after):
    """The event of this kind behind a cursor, once there is one."""
    async with asyncio.timeout(30):
        while True:
            await served.authority.sweep()
            for event in (await served.authority.events(after=after, wait_s=0.2))[0]:
                if event.kind == kind:
                    return event


# Hosts that try --------------------------------------------------------------------------------------------------------


async def test_giant_logs_are_bounded_and_others_are_served(house):
    """verifies that: what is too large is refused by its size; a list as large as is allowed, all of files nobody knows, is
    judged in the same round as a neighbour's, and kept as a number and a few names."""
    enrol(house.store, "calm", house.machine)
    fresh = house.machine.evidence(house.authority.challenge("h1"))
    for grown in ({"event_log": bytes((1 << 20) + 1)}, {"ima": bytes(wire.MAX_IMA_DELTA + 1)}):
        with pytest.raises(Malformed):
            wire.decode_evidence(schema.encode(dataclasses.replace(fresh, **grown)))
    with pytest.raises(Malformed):
        wire.decode_evidence(bytes(wire.MAX_EVIDENCE + 1))
    line = b"10 " + b"ab" * 20 + b" ima-ng sha256:" + b"cd" * 32 + b" /x/%06d\n"
    giant = dataclasses.replace(fresh, ima=b"".join(line % number for number in range(14_000)))
    assert len(giant.ima) > 1 << 20
    calm = house.machine.evidence(house.authority.challenge("calm"))
    answers = await asyncio.gather(
        house.authority.appraise("h1", giant), house.authority.appraise("calm", calm), return_exceptions=True
    )
    assert answers[0].code == "ima.template_mismatch" or isinstance(answers[0], MoorlineError)
    assert answers[1].status == "affirming"

    many = [(f"/tmp/.x/{number}", b"%d" % number) for number in range(500)]
    unknown = Machine(key=house.machine.key)
    from host_poll import _entry

    from moorline.evidence import ima as lists
    from moorline.verification import ima

    entries = [_entry("boot_aggregate", ima.boot_aggregate(unknown.pcrs))]
    entries += [_entry(path, hashlib.sha256(content).digest()) for path, content in many]
    unknown.ima = b"".join(lists.serialize_line(one) + b"\n" for one in entries)
    unknown.pcrs[10] = ima.replay(entries, tpm.ALG_SHA256)
    unknown.clock = house.machine.clock + 1
    verdict = await house.authority.appraise("h1", unknown.evidence(house.authority.challenge("h1")))
    assert verdict.code == "host.file_not_in_reference_values"
    standing = schema.decode(host.FileStanding, house.store.progress("h1").standing)
    assert (standing.unlisted, len(standing.first_unlisted)) == (500, host.UNLISTED_KEPT)


@pytest.mark.story
async def test_an_evidence_factory_makes_nothing_that_counts(world, running):
    """verifies that: other code on the host, with the TPM in its hands, gets quotes; but the agent's doors give it none, a
    quote over words of its own answers no challenge, one for a session is no evidence, and a true answer to a challenge says
    what the host is, drift included."""
    machine = Booted(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    assert (await agent.attest()).status == "affirming"
    factory = Tpm(running[0].tcti)  # the same device, another process's worth of it

    settings = dataclasses.make_dataclass("S", ["trust_domain", "orchestrator"])("alpha.test", "o1")
    paths = {route.path for route in agent_service.application(settings, None, None).routes}
    assert paths == {"/healthz", "/metrics", "/v1/guests", "/v1/guests/{instance}"}

    def evidence(nonce):
        quoted = factory.quote(nonce, 0x0B, tuple(range(11)))
        challenge = dataclasses.replace(authority.challenge("h1"), nonce=nonce)
        return dataclasses.replace(
            agent._answer(challenge, 0),
            quoted=quoted.attest,
            signature=quoted.signature,
            pcrs=tuple(wire.PcrValue(index=index, digest=digest) for index, digest in sorted(quoted.pcrs.items())),
        )

    for nonce in (b"words of its own".ljust(32, b"."), wire.session_qualifying_data(b"b" * 64)):
        with pytest.raises(NotAuthentic) as refused:
            await authority.appraise("h1", evidence(nonce))
        assert refused.value.code == "tpm.nonce_mismatch"
    assert authority.standing("h1").status == "affirming"  # strangers' noise withdraws nothing

    firmware.execute(machine.tpm, machine.logs, "/usr/local/bin/factory", b"factory")
    verdict = await authority.appraise("h1", evidence(authority.challenge("h1").nonce))
    assert verdict.code == "host.file_not_in_reference_values"


def test_an_agent_that_lies_about_every_capability_stays_asserted():
    """verifies that: a host that says of everything there is that it has it, and how well, is worth its word: nothing above
    `asserted`, and no use case may be hosted on it; what was verified about it lifts what it is about, and no lie beside."""
    lies = [
        Observation(capability=name, status=Status.MET, seen=Assurance.HW_ATTESTED, root=EvidenceRoot.SOFTWARE, value="best")
        for name in capabilities()
    ]
    told_so = assess(lies, host="h1", at=NOW, privileged=True)
    assert {one.assurance for one in told_so.capabilities} <= {Assurance.NONE, Assurance.DECLARED, Assurance.ASSERTED}
    assert not any(one.may_host for one in told_so.use_cases)
    shown = CapabilityLevel(capability="boot.measured", level=Assurance.MEASURED)
    proven = assess(lies, host="h1", at=NOW, privileged=True, attested=(shown,))
    above = {one.id for one in proven.capabilities if one.assurance > Assurance.ASSERTED}
    assert above == {"boot.measured"}


def test_a_root_of_software_lifts_nothing_a_host_shows():
    honest = {one.capability: one.level for one in appraise(facts(root=EvidenceRoot.HARDWARE)).capabilities}
    assert max(honest.values()) > Assurance.ASSERTED
    for root in (EvidenceRoot.VIRTUAL, EvidenceRoot.SOFTWARE):
        lying = appraise(facts(root=root)).capabilities
        assert lying
        assert max(one.level for one in lying) <= Assurance.ASSERTED
    asserted = {name for name, level in honest.items() if level is Assurance.ASSERTED}
    assert {"location.geo", "kernel.lockdown"} <= asserted  # also hardware vouches for no place and no lockdown at run time
