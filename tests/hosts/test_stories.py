"""Hosts with real TPMs (swtpm) against an attestation authority: enrolment, appraisal, and each attack with its control."""

import asyncio
import dataclasses
import hashlib

import pytest

from moorline.attesters.tpm import Tpm
from moorline.clock import Instant
from moorline.errors import Conflict, Misconfigured, MoorlineError, NotAuthentic, Refused, Unavailable
from moorline.evidence.tpm_structures import parse_public
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.policy import ear, reference_values
from moorline.rats import Assurance, Outcome, Tier
from moorline.simulators import firmware
from moorline.simulators.tpm import SimulatedTpm
from moorline.verification.tpm_identity import endorsement_digest
from moorline.wire import host as wire
from moorline.wire import schema

pytestmark = pytest.mark.story


class Direct:
    """The verifier's HTTP interface without HTTP: the same messages, in and out as bytes."""

    def __init__(self, authority):
        self.authority = authority
        self.sent = []

    async def post_cbor(self, path, body):
        _, _, _, host, verb = path.split("/", 4)
        if verb == "enrol":
            answer = await self.authority.begin_enrolment(host, schema.decode(wire.EnrolRequest, body))
        elif verb == "enrol/finish":
            answer = await self.authority.finish_enrolment(host, schema.decode(wire.EnrolProof, body))
        elif verb == "challenge":
            answer = self.authority.challenge(host)
        else:
            self.sent.append(body)
            answer = await self.authority.appraise(host, wire.decode_evidence(body))
        return schema.encode(answer)


class Machine:
    """One host: its TPM, what it booted, its logs, its agent."""

    def __init__(self, world, simulated, name, profile=firmware.GOOD, *, registered=True, location="EU/DE"):
        self.world, self.simulated, self.name = world, simulated, name
        self.logs = world.directory / name
        self.tpm = Tpm.open(simulated.tcti)
        firmware.boot(self.tpm, self.logs, profile)
        self.ek_digest = endorsement_digest(parse_public(self.tpm.endorsement().public).key())
        self.tag = world.tag(name, self.ek_digest, location=location)
        self.tpm.write_location(reference_values.tag_digest(self.tag))
        if registered:
            world.register(name, self.ek_digest, location=location, tag=self.tag)

    def agent(self, authority):
        self.wire = Direct(authority)
        return HostAttestation(
            host=self.name,
            verifier=self.wire,
            tpm=self.tpm,
            logs=FileLogs(self.logs / firmware.EVENT_LOG, self.logs / firmware.IMA_LIST),
            tag=self.tag,
            period_s=1,
        )


def result_of(world, verdict):
    return ear.parse_verified(verdict.ear, world.ear_key.public_key(), now=Instant(world.clock.at), audience="alpha.test")


async def test_a_good_host_is_affirmed_and_a_standing_poll_sends_little(world, running):
    """verifies that: enrolment, a full appraisal, an incremental one, restart of the verifier, and the end of the lease"""
    machine = Machine(world, running[0], "h1")
    agent = machine.agent(world.authority())
    enrolled = await agent.enrol()
    assert enrolled.ek_digest == machine.ek_digest
    result = result_of(world, await agent.attest())
    assert result.status is Tier.AFFIRMING, result.first_refusal()
    levels = {one.capability: (one.level, one.value) for one in result.capabilities}
    for capability in ("boot.measured", "boot.kernel.identity", "ima.measurement", "integrity.runtime"):
        assert levels[capability][0] is Assurance.MEASURED
    assert levels["location.geo"] == (Assurance.ASSERTED, "EU/DE")
    assert levels["location.jurisdiction"] == (Assurance.DECLARED, "EU/DE")
    assert levels["kernel.lockdown"] == (Assurance.ASSERTED, "integrity")
    assert result.bound["ek"] == machine.ek_digest.hex()

    agent = machine.agent(world.authority())
    firmware.execute(machine.tpm, machine.logs, *firmware.GOOD.files[0])
    assert (await agent.attest()).status == "affirming"
    sent = wire.decode_evidence(machine.wire.sent[-1])
    assert sent.event_log is None
    assert (sent.ima_from, sent.ima.count(b"\n")) == (5, 1)

    authority = world.authority()
    assert authority.standing("h1").status == "affirming"
    world.clock.at += world.lease_s
    with pytest.raises(Refused) as refused:
        authority.standing("h1")
    assert refused.value.code == "result.expired"


async def test_a_changed_kernel_is_contraindicated(world, running):
    machine = Machine(world, running[0], "h2", firmware.CHANGED_KERNEL)
    agent = machine.agent(world.authority())
    await agent.enrol()
    verdict = await agent.attest()
    assert (verdict.status, verdict.code) == ("contraindicated", "host.kernel_not_in_reference_values")
    bad = [finding.code for finding in result_of(world, verdict).findings if finding.outcome is Outcome.NOT_MET]
    assert bad == ["host.kernel_not_in_reference_values"]
    world.profile = firmware.CHANGED_KERNEL
    assert (await machine.agent(world.authority()).attest()).status == "affirming"


async def test_a_file_nobody_listed_turns_the_verdict_until_the_next_boot(world, running):
    machine = Machine(world, running[0], "h1")
    agent = machine.agent(world.authority())
    await agent.enrol()
    assert (await agent.attest()).status == "affirming"
    firmware.execute(machine.tpm, machine.logs, "/tmp/.x/miner", b"miner")
    verdict = await agent.attest()
    assert (verdict.status, verdict.code) == ("contraindicated", "host.file_not_in_reference_values")
    assert (await agent.attest()).code == "host.file_not_in_reference_values"
    running[0].stop()
    running[0].start()
    firmware.boot(machine.tpm, machine.logs, firmware.GOOD)
    assert (await agent.attest()).status == "affirming"
    world.files = (("/tmp/.x/miner", b"miner"),)
    firmware.execute(machine.tpm, machine.logs, "/tmp/.x/miner", b"miner")
    assert (await machine.agent(world.authority()).attest()).status == "affirming"


async def test_a_replayed_quote_answers_no_challenge(world, running):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    await agent.attest()
    recorded = wire.decode_evidence(machine.wire.sent[-1])
    authority.challenge("h1")
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", recorded)
    assert refused.value.code == "tpm.nonce_mismatch"
    assert authority.standing("h1").status == "affirming", "a stranger cannot end a standing result"
    assert (await agent.attest()).status == "affirming"


async def test_an_expired_challenge_is_no_challenge(world, running):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    challenge = authority.challenge("h1")
    evidence = agent._answer(challenge, None)
    world.clock.at += 31
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", evidence)
    assert refused.value.code == "tpm.nonce_mismatch"


async def test_another_hosts_key_and_another_hosts_challenge_are_refused(world, running):
    one, two = Machine(world, running[0], "h1"), Machine(world, running[1], "h2")
    authority = world.authority()
    agents = [one.agent(authority), two.agent(authority)]
    for agent in agents:
        await agent.enrol()
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", agents[1]._answer(authority.challenge("h1"), 0))
    assert refused.value.code == "tpm.signature_invalid"
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", agents[0]._answer(authority.challenge("h2"), 0))
    assert refused.value.code == "tpm.nonce_mismatch"


async def test_a_name_keeps_its_tpm_and_a_tpm_its_name(world, running):
    one, two = Machine(world, running[0], "h1"), Machine(world, running[1], "h2")
    await one.agent(world.authority()).enrol()
    await one.agent(world.authority()).enrol()
    world.register("h1", two.ek_digest)
    two.name = "h1"
    with pytest.raises(Conflict) as refused:
        await two.agent(world.authority()).enrol()
    assert refused.value.code == "enrol.other_tpm"
    world.register("h3", one.ek_digest)
    one.name = "h3"
    with pytest.raises(Conflict) as refused:
        await one.agent(world.authority()).enrol()
    assert refused.value.code == "enrol.other_host"


async def test_enrolment_needs_the_platform_record_and_the_anchor(world, running):
    machine = Machine(world, running[0], "h1", registered=False)
    agent = machine.agent(world.authority())
    with pytest.raises(Refused) as refused:
        await agent.enrol()
    assert refused.value.code == "ledger.platform_not_active"
    world.register("h1", bytes(32))
    with pytest.raises(Refused) as refused:
        await agent.enrol()
    assert refused.value.code == "host.platform_mismatch"
    world.register("h1", machine.ek_digest)
    world.platforms["h1"] = dataclasses.replace(world.platforms["h1"], simulated=False)
    with pytest.raises(Refused) as refused:
        await agent.enrol()
    assert refused.value.code == "host.simulation_undeclared"
    world.register("h1", machine.ek_digest)
    anchors, world.anchors = world.anchors, ()
    with pytest.raises(NotAuthentic) as refused:
        await machine.agent(world.authority()).enrol()
    assert refused.value.code == "ek.anchor_unknown"
    world.anchors = anchors
    assert (await machine.agent(world.authority()).enrol()).host == "h1"


async def test_a_credential_opens_only_in_the_tpm_it_was_made_for(world, running):
    """verifies that: an attestation key of another TPM cannot be enrolled under this endorsement key"""
    one, two = Machine(world, running[0], "h1"), Machine(world, running[1], "h2")
    authority = world.authority()
    endorsement = one.tpm.endorsement()
    request = wire.EnrolRequest(
        ek_public=endorsement.public, ek_certificates=endorsement.certificates, ak_public=two.tpm.attestation_key()
    )
    challenge = await authority.begin_enrolment("h1", request)
    for tpm in (one.tpm, two.tpm):
        with pytest.raises(MoorlineError) as refused:
            tpm.activate(challenge.credential_blob, challenge.secret)
        assert refused.value.code == "tpm.activation_failed"
    with pytest.raises(NotAuthentic) as refused:
        await authority.finish_enrolment("h1", wire.EnrolProof(enrolment=challenge.enrolment, activated=bytes(32)))
    assert refused.value.code == "enrol.activation"
    with pytest.raises(NotAuthentic) as refused:
        await authority.finish_enrolment("h1", wire.EnrolProof(enrolment=challenge.enrolment, activated=bytes(32)))
    assert refused.value.code == "enrol.unknown", "one try each"


@pytest.mark.parametrize(
    ("bank", "selection"), [(0x0B, tuple(range(10))), (0x0B, (0, 1, 2, 3, 5, 6, 7, 8, 9, 10)), (0x0B, tuple(range(12)))]
)
async def test_fewer_or_more_pcrs_than_asked_for_are_refused(world, running, bank, selection):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    asked = dataclasses.replace(authority.challenge("h1"), bank=bank, selection=selection)
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", agent._answer(asked, 0))
    assert refused.value.code == "tpm.selection_mismatch"


async def test_logs_that_do_not_replay_withdraw_the_result(world, running):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    assert (await agent.attest()).status == "affirming"
    evidence = agent._answer(authority.challenge("h1"), 0)
    assert evidence.event_log is not None
    kernel = hashlib.sha256(firmware.GOOD.kernel).digest()
    changed = evidence.event_log.replace(kernel, hashlib.sha256(b"other").digest())
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", dataclasses.replace(evidence, event_log=changed))
    assert refused.value.code == "eventlog.replay_mismatch"
    with pytest.raises(Refused) as refused:
        authority.standing("h1")
    assert (refused.value.code, refused.value.got) == ("result.withdrawn", "eventlog.replay_mismatch")
    evidence = agent._answer(authority.challenge("h1"), 0)
    with pytest.raises(NotAuthentic) as refused:
        await authority.appraise("h1", dataclasses.replace(evidence, ima=evidence.ima.split(b"\n", 1)[1]))
    assert refused.value.code == "ima.replay_mismatch"
    assert (await agent.attest()).status == "affirming"


async def test_a_location_tag_of_another_place_or_host_does_not_count(world, running):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    assert (await agent.attest()).status == "affirming"
    right = machine.tag
    machine.tag = agent._tag = world.tag("h1", machine.ek_digest, location="US/VA")
    with pytest.raises(NotAuthentic) as refused:
        await agent.attest()
    assert refused.value.code == "host.location_tag_mismatch"
    machine.tpm.write_location(reference_values.tag_digest(machine.tag))
    assert (await agent.attest()).code == "host.location_not_registered"
    agent._tag = world.tag("h9", machine.ek_digest)
    machine.tpm.write_location(reference_values.tag_digest(agent._tag))
    assert (await agent.attest()).code == "host.location_other_host"
    agent._tag = None
    assert (await agent.attest()).code == "host.location_missing"
    agent._tag = right
    machine.tpm.write_location(reference_values.tag_digest(right))
    assert (await agent.attest()).status == "affirming"


async def test_point_place_and_law_of_a_tag_are_kept_apart(world, running):
    """verifies that: a real TPM certifies the tag, and each of the three is a capability of its own, none above asserted"""
    machine = Machine(world, running[0], "h1")
    agent = machine.agent(world.authority())
    await agent.enrol()
    agent._tag = world.tag("h1", machine.ek_digest, geographical="50.1109,8.6821~1km", logical="fra1/hall2/row7")
    machine.tpm.write_location(reference_values.tag_digest(agent._tag))
    assert (await agent.attest()).code == "host.location_not_registered"
    world.register("h1", machine.ek_digest, tag=agent._tag)
    result = result_of(world, await agent.attest())
    levels = {one.capability: (one.level, one.value) for one in result.capabilities}
    assert levels["location.geo"] == (Assurance.ASSERTED, "50.1109,8.6821~1km")
    assert levels["location.logical"] == (Assurance.ASSERTED, "fra1/hall2/row7")
    assert levels["location.jurisdiction"] == (Assurance.DECLARED, "EU/DE")


async def test_the_same_evidence_twice_at_once_counts_once(world, running):
    machine = Machine(world, running[0], "h1")
    authority = world.authority()
    agent = machine.agent(authority)
    await agent.enrol()
    evidence = agent._answer(authority.challenge("h1"), 0)
    answers = await asyncio.gather(*(authority.appraise("h1", evidence) for _ in range(4)), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["HostVerdict", *["NotAuthentic"] * 3]


async def test_a_quote_for_a_session_answers_that_session_alone(world, running):
    from moorline.rats import EvidenceRoot
    from moorline.verification.tpm_quote import attestation_key, verify_quote

    machine = Machine(world, running[0], "h1")
    evidence = wire.decode_evidence(await machine.agent(world.authority()).evidence_for_session(b"b" * 64))
    arguments = {
        "key": attestation_key(machine.tpm.attestation_key(), EvidenceRoot.TEST),
        "bank": 0x0B,
        "selection": tuple(range(11)),
    }
    verify_quote(
        evidence.quoted,
        evidence.signature,
        wire.pcr_map(evidence),
        qualifying=wire.session_qualifying_data(b"b" * 64),
        **arguments,
    )
    with pytest.raises(NotAuthentic) as refused:
        verify_quote(
            evidence.quoted,
            evidence.signature,
            wire.pcr_map(evidence),
            qualifying=wire.session_qualifying_data(b"c" * 64),
            **arguments,
        )
    assert refused.value.code == "tpm.nonce_mismatch"


def test_a_socket_path_that_cannot_be_is_said_before_anything_starts(tmp_path):
    with pytest.raises(Misconfigured) as refused:
        SimulatedTpm(tmp_path / ("d" * 120)).start()
    assert refused.value.code == "simulator.path_too_long"


def test_a_tpm_that_does_not_answer_is_unavailable(tmp_path):
    with pytest.raises(Unavailable) as refused:
        Tpm.open(f"swtpm:path={tmp_path / 'nobody'}")
    assert refused.value.code == "tpm.unreachable"
