"""Every process is killed at every step it makes durable, started again, and must go on: nothing doubled, nothing lost.

The names come from the source (`steps.names()`); `test_every_step_is_killed_here` fails for a name without a case. All
cases share one running system, so each leaves it as it found it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import secrets
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from moorline.attesters.tpm import Tpm
from moorline.cli.demo import hosting, operating
from moorline.cli.demo.world import HSM, ISSUING_CA, VERIFIER
from moorline.clock import SystemClock
from moorline.device import enrolment, no_pfs
from moorline.device.connection import Wanted
from moorline.device.store import DeviceStore
from moorline.errors import MoorlineError, Refused
from moorline.host_agent.attestation import FileLogs, HostAttestation
from moorline.host_agent.guests import Guests
from moorline.host_agent.silicon import SiliconClient
from moorline.hsm import revocation
from moorline.ledger import transactions as tx
from moorline.ledger.records import PackageRule
from moorline.nfv import Role
from moorline.simulators import firmware
from moorline.storage import steps
from moorline.wire import cbor, keys, launch, schema
from moorline.wire.guest import FunctionLaunch
from moorline.wire.http import HttpClient
from moorline.wire.orchestration import GuestOrder

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]

BROKER, BETA, ORCHESTRATOR, HOST = "broker-alpha", "broker-beta", "orchestrator", "host-h1"

# Which process dies at a step of a launch, and what becomes of the function: it serves, or fails with this code.
LAUNCH = {
    "orchestrator.launch.requested": (ORCHESTRATOR, None),
    "orchestrator.launch.intended": (ORCHESTRATOR, None),
    "orchestrator.launch.granted": (ORCHESTRATOR, None),
    "orchestrator.launch.started": (ORCHESTRATOR, None),
    "orchestrator.launch.active": (ORCHESTRATOR, None),
    "host.guest.prepared": (HOST, None),
    "host.guest.recorded": (HOST, None),
    "host.guest.started": (HOST, None),
    "broker.launch.consumed": (BROKER, None),
    "broker.launch.confirmed": (BROKER, None),
}
LEDGER = {
    "sequencer.block.proposed": "authority-1",
    "sequencer.block.committed": "authority-1",
    "cosigner.signature.intended": "authority-2",
    "cosigner.block.committed": "authority-2",
}
VERIFIER_STEPS = (
    "verifier.enrolment.opened",
    "verifier.enrolment.taken",
    "verifier.host.enrolled",
    "verifier.challenge.opened",
    "verifier.challenge.taken",
    "verifier.progress.kept",
    "verifier.verdict.stored",
)
CLEAN_UP = (
    "orchestrator.cleanup.halting",
    "orchestrator.cleanup.stopping",
    "orchestrator.cleanup.cleaned",
    "orchestrator.relaunch.requested",
)
RETIREMENT = ("broker.instance.retired", "broker.revocation.signed", "broker.revocation.committed")
CERTIFICATES = (
    "broker.certificate.revoked",
    "broker.certificate_revocation.signed",
    "broker.certificate_revocation.committed",
)
# Which end dies while alpha agrees with beta on a pair key.
PAIRS = {
    "broker.pair.intended": BROKER,
    "broker.pair.answered": BETA,
    "broker.pair.agreed": BROKER,
    "broker.pair.active": BETA,
    "broker.pair.anchored": BROKER,
}
OTHERS = {
    "broker.device_key.claimed",
    "broker.crl.numbered",
    "orchestrator.cursor.kept",
    "verifier.silence.told",
    "broker.loss.recorded",
    "broker.cursor.moved",
    "broker.cursor.forgotten",
    "broker.absence.recorded",
    "broker.renewal.recorded",
    "broker.session.held",
    "orchestrator.package.onboarded",
    "orchestrator.launch.failed",
    "orchestrator.launch.ended",
    "host.guest.removed",
    "broker.certificate.recorded",
    "broker.peer.recorded",
    "broker.code.made",
    "broker.device.enrolled",
    "broker.pool.refilled",
    "broker.pool.taken",
    "broker.ticket.used",
    "broker.lease.granted",
    "broker.epoch.opened",
    "broker.counter.advanced",
    "broker.database.discarded",
    "broker.launcher.revoked",
    "broker.clock.reset",
    "verifier.verdict.withdrawn",
}


COMETBFT = {"comet.block.finalized", "comet.block.committed", "comet.signature.intended"}
"""Killed in tests/cometbft/test_failures.py, where that engine runs."""
PROMOTION = {"authority.word.given", "sequencer.block.taken_over", "authority.term.certified"}
"""Killed in tests/ledger_failures."""
FILES = {"file.beside"}
"""Killed in tests/hsm/test_backup.py."""
PUSHED = {"verifier.event.accepted", "verifier.host.asked"}
"""Killed in tests/hosts/test_push.py and test_asking.py."""


async def test_every_step_is_killed_here():
    covered = {
        *PROMOTION,
        *PUSHED,
        *FILES,
        *COMETBFT,
        *LAUNCH,
        *LEDGER,
        *VERIFIER_STEPS,
        *CLEAN_UP,
        *RETIREMENT,
        *CERTIFICATES,
        *PAIRS,
        *OTHERS,
    }
    hsm = {name for name in steps.names() if name.startswith("hsm.")}  # killed in tests/hsm, which names each
    said = "".join(path.read_text("utf-8") for path in sorted((Path(__file__).parents[1] / "hsm").glob("test_*.py")))
    assert {name for name in hsm if f'"{name}"' not in said} == set()
    assert steps.names() == covered | hsm


# Launches ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", LAUNCH)
async def test_a_launch_survives(system, step):
    process, refused = LAUNCH[step]
    instance = f"crash-{step.replace('.', '-')}"
    alarms = len(system.alarms())
    await system.killed_at(process, step, lambda: system.request(instance))
    await system.request(instance)  # whoever asked and got no answer asks again
    row = await system.settled(instance)
    assert len(system.launches(instance)) == 1
    if refused is None:
        assert (row["state"], row["problem"]) == ("active", None)
        assert system.launches(instance)[0][0] == "confirmed"
        # A broker that died behind the confirmation signed one that nobody got; the function came back for another.
        assert len(certificates(system, instance)) == (2 if step == "broker.launch.confirmed" else 1)
        assert len(system.alarms()) == alarms
    else:
        assert (row["state"], row["problem"]["code"]) == ("failed", refused)
        assert len(certificates(system, instance)) == 1
        assert [code for code, *_ in system.alarms()[alarms:]] == [refused]
    await system.end(instance)
    assert await guest_state(instance, system) is None


async def test_the_same_keys_get_the_same_identity_and_other_keys_an_alarm(system):
    """The broker dies between consuming a token and answering; then the host starts a clone with the token it saw."""
    instance = "crash-clone"
    system.arm(BROKER, "broker.launch.consumed")
    await system.request(instance)
    await system.died(BROKER)
    _, public, kem, signing = system.launches(instance)[0]
    silicon = SiliconClient(hosting.silicon_socket(system.world, "h1"))
    order = order_seen_by_host(system, instance)
    await system.again(BROKER)
    await system.settled(instance)
    assert system.launches(instance) == [("confirmed", public, kem, signing)]

    guests = Guests(system.stage.path("attacker", "guests"), silicon, publish="127.0.0.1")
    try:
        assert await refusal_of(guests, order) == "launch.token_consumed"
    finally:
        await guests.stop(order.instance)
        await guests.aclose()
    code, first, second = system.alarms()[-1]
    assert code == "launch.token_consumed"
    assert first
    assert second
    assert first != second
    await system.end(instance)


async def test_other_keys_are_refused_before_the_first_ones_came_back(system):
    """As before, but the first guest is gone when the broker comes back: its launch is not the clone's for the taking."""
    instance = "crash-usurped"
    system.arm(BROKER, "broker.launch.consumed")
    await system.request(instance)
    await system.died(BROKER)
    before = system.launches(instance)
    silicon = SiliconClient(hosting.silicon_socket(system.world, "h1"))
    order = order_seen_by_host(system, instance)
    # The orchestrator is held still: it would notice the dead guest and revoke the instance before the clone is heard.
    orchestrator = system.stage.processes["orchestrator"].pid
    os.kill(orchestrator, signal.SIGSTOP)
    await silicon.kill(instance)
    await system.again(BROKER)
    guests = Guests(system.stage.path("attacker", "guests"), silicon, publish="127.0.0.1")
    try:
        assert await refusal_of(guests, order) == "launch.token_consumed"
    finally:
        os.kill(orchestrator, signal.SIGCONT)
        await guests.stop(order.instance)
        await guests.aclose()
    assert system.launches(instance) == before
    assert system.alarms()[-1][0] == "launch.token_consumed"
    row = await system.settled(instance)
    assert (row["state"], row["problem"]["code"]) == ("failed", "launch.guest_ended")
    await system.end(instance)


async def test_a_refused_launch_stays_refused(system):
    """orchestrator.launch.failed: the HSM named is not on the ledger."""
    await system.killed_at(ORCHESTRATOR, "orchestrator.launch.failed", lambda: system.request("crash-refused", hsm="hsm-9"))
    row = await system.function("crash-refused")
    assert (row["state"], row["problem"]["code"]) == ("failed", "ledger.hsm_not_active")
    assert system.launches("crash-refused") == []


@pytest.mark.parametrize(("process", "step"), [(ORCHESTRATOR, "orchestrator.launch.ended"), (HOST, "host.guest.removed")])
async def test_an_end_survives(system, process, step):
    instance = f"crash-end-{process}"
    await system.request(instance)
    await system.settled(instance)
    await system.killed_at(process, step, lambda: system.end(instance))
    await system.end(instance)
    assert (await system.function(instance))["state"] == "ended"
    assert await guest_state(instance, system) is None


async def test_a_package_is_onboarded_once(system):
    answers = await system.killed_at(
        ORCHESTRATOR,
        "orchestrator.package.onboarded",
        lambda: system.persistently(lambda: operating.onboard(system.world, system.world.facts["csar"])),
    )
    assert answers[0]["digest"] == system.world.facts["package"]
    async with operating.orchestrator(system.world) as client:
        kept: Any = await client.get_json("/v1/packages")
    assert [one["digest"] for one in kept["packages"]] == [system.world.facts["package"]]


@pytest.mark.parametrize("moment", ["before the intent reached it", "after it answered"])
async def test_a_launcher_that_is_killed_is_replaced_with_a_new_ticket(system, moment):
    """It keeps nothing durable: what it promised is in grants, what it did not is asked of the next one."""
    instance = "crash-launcher-" + moment.split()[0]
    if moment.startswith("after"):
        system.arm(ORCHESTRATOR, "orchestrator.launch.granted")
        await system.request(instance)
        await system.died(ORCHESTRATOR)
        system.kill("launcher")
        await system.again(ORCHESTRATOR)
        row = await system.settled(instance)
        system.launcher("launcher")
        await system.again("launcher")
    else:
        system.kill("launcher")
        await system.request(instance)
        await system.settled(instance, states=("intended",))
        system.launcher("launcher")
        await system.again("launcher")
        row = await system.settled(instance)
    assert (row["state"], row["problem"]) == ("active", None)
    assert len(system.launches(instance)) == 1
    await system.end(instance)


# The ledger --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", LEDGER)
async def test_a_transaction_survives(system, step):
    authority, world = LEDGER[step], system.world
    checkpoint = await world.ledger.checkpoint()
    payload = tx.make(
        tx.RegisterReferenceValues(id=f"crash-{secrets.token_hex(4)}", kind="tpm", digest=os.urandom(32)),
        sender=tx.Sender(kind=tx.SenderKind.PROVIDER, name="alpha"),
        ledger_id=world.consortium.trust.ledger_id,
        nonce=os.urandom(32),
        valid_until=checkpoint.height + 100,
    )
    signed = tx.sign(payload, keys.KeySigner(world.alpha.key))
    await system.killed_at(authority, step, lambda: world.ledger.submit(signed))
    first = await system.persistently(lambda: world.ledger.submit(signed))
    second = await world.ledger.submit(signed)
    assert (first.height, first.index) == (second.height, second.index)
    await everybody_at(system, first.height)
    assert system.times_applied(tx.parse(signed).id) == [1, 1, 1, 1]
    system.require_one_chain()


# The attestation authority -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", VERIFIER_STEPS)
async def test_an_attestation_survives(system, step):
    async with attesting_host(system) as attestation:

        async def attest() -> None:
            await attestation.enrol()
            await attestation.attest()

        await system.killed_at("verifier", step, attest)
        await system.persistently(attest)
        verdict = await hosting.verdict(system.world, "h4")
    assert verdict.status.word == "affirming"


async def test_a_withdrawn_verdict_stays_withdrawn(system):
    """Evidence that fails after its quote held withdraws the standing result; the verifier dies right there."""
    async with attesting_host(system) as attestation:
        await attestation.enrol()
        await attestation.attest()
        async with attesting_host(system, event_log_of="h2") as lying:
            await system.killed_at("verifier", "verifier.verdict.withdrawn", lying.attest)
        async with verifier(system, system.world.facts["operator"]) as client:
            with pytest.raises(Refused, match="result.withdrawn"):
                await client.get_json("/v1/results/h4")
        await attestation.attest()
        assert (await hosting.verdict(system.world, "h4")).status.word == "affirming"


# The broker's other acts -------------------------------------------------------------------------------------------------


async def test_a_certificate_is_issued_after_all(system):
    spki = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    asked = {"public_key": base64.b64encode(spki).decode(), "spiffe_id": "spiffe://alpha.test/operator/crash"}
    (answer,) = await system.killed_at(BROKER, "broker.certificate.recorded", lambda: system.admin("/v1/svid", asked))
    assert "BEGIN CERTIFICATE" in answer["certificate"]
    # One was recorded and never handed out, one was handed out; both are known, so that both could be revoked.
    assert len(system.rows("SELECT serial FROM certificates WHERE spiffe_id = ?", asked["spiffe_id"])) == 2


@pytest.mark.parametrize("step", CERTIFICATES)
async def test_a_revoked_certificate_stays_revoked(system, step):
    """Whenever the broker dies, the revocation is decided once and reaches the ledger once."""
    serial = await device_certificate(system, f"revoked-{step.rpartition('.')[2]}")
    revoke = {"serial": serial, "reason": "key_compromise"}
    await system.killed_at(BROKER, step, lambda: system.admin("/v1/certificates/revoke", revoke))
    await system.admin("/v1/certificates/revoke", revoke)
    query = "SELECT reason FROM revoked_certificates WHERE serial = ? AND height IS NOT NULL"
    async with asyncio.timeout(30):
        while system.rows(query, serial) != [("key_compromise",)]:  # noqa: ASYNC110 - of a database
            await asyncio.sleep(0.05)


async def test_a_list_never_has_the_number_of_another(system):
    """A number is spent before the list is signed: who dies in between has lost it and does not give it twice."""
    ca = ISSUING_CA

    async def number() -> int:
        async with HttpClient(
            f"https://{system.world.alpha.https}",
            server_name=system.world.alpha.name_of(Role.HSM, HSM),
            roots_pem=system.world.roots_pem,
        ) as client:
            found = revocation.crl_number(revocation.parse_crl(await client.get_bytes(f"/crl/{ca}.crl")))
        assert found is not None
        return found

    before = await system.persistently(number)
    revoked = {"serial": await device_certificate(system, "another"), "reason": "superseded"}
    await system.admin("/v1/certificates/revoke", revoked)  # so that there is a new list to make
    spent = await system.killed_at(BROKER, "broker.crl.numbered", lambda: system.persistently(number))
    ((kept,),) = system.rows("SELECT value FROM facts WHERE name = 'crl-number'")
    assert before < spent[0] == kept


async def test_peers_meet_again(system):
    await system.admin("/v1/peers/connect", {"provider": "beta", "hsm": HSM})
    await system.killed_at(
        BROKER, "broker.peer.recorded", lambda: system.admin("/v1/peers/connect", {"provider": "beta", "hsm": HSM})
    )
    assert len(system.rows("SELECT provider FROM peers")) == 1


@pytest.mark.parametrize("step", PAIRS)
async def test_a_pair_key_is_agreed_after_all(system, step):
    """Whichever end dies, the epoch is finished by whoever began it, and both ends hold the same transcript."""
    provider = {BROKER: "alpha", BETA: "beta"}[PAIRS[step]]
    await system.killed_at(
        PAIRS[step],
        step,
        lambda: system.admin("/v1/peers/connect", {"provider": "beta", "hsm": HSM, "rotate": True}),
    )
    assert system.rows("SELECT COUNT(*) FROM pairs", provider=provider) != [(0,)]
    query = "SELECT epoch, transcript FROM pairs WHERE state = 'active' AND height IS NOT NULL ORDER BY epoch DESC LIMIT 1"
    pending = "SELECT COUNT(*) FROM pairs WHERE state IN ('offered', 'agreed')"
    async with asyncio.timeout(40):
        while True:
            mine, theirs = system.rows(query), system.rows(query, provider="beta")
            if mine and mine == theirs and system.rows(pending) == [(0,)]:
                break
            await asyncio.sleep(0.1)


async def test_a_device_key_that_was_claimed_and_not_given_is_lost_and_another_is_made(system):
    """verifies that: with keys of the two HSMs a device talks to a function, real processes throughout, also after a crash.

    alpha's broker dies when it has claimed a key for the function and not given it away: the next attempt makes another.
    """
    world, instance = system.world, "crash-nopfs"
    facts = world.facts
    rule = PackageRule(package_digest=facts["package_digest"], measurement=facts["measurement"])
    profiles = ("tls", "no-pfs")
    await world.alpha.submitter.send(
        tx.UpdateService(
            name=operating.SERVICE, use_case=operating.USE_CASE, packages=(rule,), profiles=profiles, callers=("beta",)
        )
    )
    offer = tx.OfferAccess(
        contract="nopfs", service=operating.SERVICE, grantee="beta", conditions=operating.CONDITIONS, profiles=profiles
    )
    await world.alpha.submitter.send(offer)
    await world.beta.submitter.send(tx.AcceptAccess(contract="nopfs"))
    await system.admin("/v1/peers/connect", {"provider": "beta", "hsm": HSM})
    await system.request(instance, contracts=["nopfs"])
    row = await system.active(instance)
    async with world.beta.admin() as admin:
        code = await admin.post_json("/v1/enrolment-codes", {"device": "nopfs-1", "ttl_s": 300})
    home = {"url": f"https://{world.beta.https}", "server_name": world.beta.name_of(Role.HSM, HSM)}
    store = provisioned(system, "nopfs-1")
    await enrolment.enrol(store, **home, device="nopfs-1", code=code["code"], now=SystemClock().now())
    wanted = Wanted(provider="alpha", service=operating.SERVICE, contract="nopfs")

    async def put() -> bytes:
        async with await no_pfs.connect(store, row["address"], wanted, clock=SystemClock()) as connection:
            return await connection.request(cbor.encode({"op": "put", "name": "r", "data": b"x"}))

    await system.killed_at(BROKER, "broker.device_key.claimed", put)
    assert len(system.rows("SELECT key_id FROM device_keys WHERE instance = ?", instance)) >= 1
    await system.persistently(put)
    ids = system.rows("SELECT key_id FROM device_keys WHERE instance = ?", instance)
    assert len(ids) == len(set(ids)) >= 2
    await system.end(instance)


@pytest.mark.parametrize("step", ["broker.code.made", "broker.device.enrolled"])
async def test_an_enrolment_survives(system, step):
    """The device's key is on its disk before it asks, so its second request is the same one. Another key is an alarm."""
    world, device = system.world, f"device-{step.rpartition('.')[2]}"
    code: dict[str, Any] = {}

    async def enrol(directory: str = device) -> None:
        if not code:
            async with world.beta.admin() as admin:
                code.update(await admin.post_json("/v1/enrolment-codes", {"device": device, "ttl_s": 300}))
        store = provisioned(system, directory)
        await enrolment.enrol(
            store,
            url=f"https://{world.beta.https}",
            server_name=world.beta.name_of(Role.HSM, HSM),
            device=device,
            code=code["code"],
            now=SystemClock().now(),
        )

    await system.killed_at(BETA, step, enrol)
    await system.persistently(enrol)
    assert system.rows("SELECT COUNT(*) FROM devices WHERE device = ?", device, provider="beta") == [(1,)]
    with pytest.raises(Refused, match="est.code_used"):
        await enrol(f"{device}-thief")
    assert system.alarms("beta")[-1][0] == "est.code_used"


async def test_a_refilled_pool_holds_no_key_twice(system):
    with changed(system) as database:
        database.execute("DELETE FROM pool")
    system.arm(BROKER, "broker.pool.refilled")
    system.stage.again(BROKER)
    await system.died(BROKER)
    await system.again(BROKER)
    publics = [public for (public,) in system.rows("SELECT public FROM pool")]
    assert len(publics) == len(set(publics)) == 32
    used = {public for (public,) in system.rows("SELECT public FROM launches")}
    assert not used & set(publics)


@pytest.mark.parametrize("step", ["broker.ticket.used", "broker.lease.granted"])
async def test_an_admission_survives(system, step):
    """The launcher asks again under its key: the ticket is still its own, and what was leased before is void or its own."""
    name = f"launcher-{step.rpartition('.')[2]}"
    command = system.launcher(name)
    system.arm(BROKER, step)
    started = system.stage.spawn(name, *command)
    await system.died(BROKER)
    await system.again(BROKER)
    await started.wait_ready()
    launcher = bytes.fromhex(started.ready["launcher"])
    assert system.rows("SELECT COUNT(*) FROM launchers WHERE launcher = ?", launcher) == [(1,)]
    leases = sorted(system.rows("SELECT first, count FROM leases WHERE launcher = ?", launcher))
    assert all(first + count <= then for (first, count), (then, _) in itertools.pairwise(leases))
    assert not [one for one in system.alarms() if one[0] == "launcher.ticket_used"]
    started.stop()


async def test_an_opened_epoch_is_the_only_open_one(system):
    before = system.rows("SELECT MAX(epoch) FROM epochs")[0][0]
    await system.killed_at(BROKER, "broker.epoch.opened", lambda: system.admin("/v1/epochs", {}))
    epochs = system.rows("SELECT epoch FROM epochs WHERE wrapped IS NOT NULL")
    assert len(epochs) == 1
    assert epochs[0][0] > before
    await launches_with_a_new_launcher(system, "crash-epoch")


async def test_a_revoked_launcher_stays_revoked(system):
    """Between the revocation and the next epoch: no epoch is open then, and the next launcher opens one."""
    started = system.stage.spawn("launcher-revoked", *system.launcher("launcher-revoked"))
    await started.wait_ready()
    launcher = started.ready["launcher"]
    await system.killed_at(
        BROKER, "broker.launcher.revoked", lambda: system.admin("/v1/launchers/revoke", {"launcher": launcher})
    )
    started.stop()
    assert system.rows("SELECT revoked IS NULL FROM launchers WHERE launcher = ?", bytes.fromhex(launcher)) == [(0,)]
    await launches_with_a_new_launcher(system, "crash-revoked")


async def test_an_accepted_clock_leaves_nothing_leased(system):
    """Between the acceptance and the next epoch: what was leased by the later time is void, and a new launcher goes on."""
    await system.killed_at(BROKER, "broker.clock.reset", lambda: system.admin("/v1/clock", {}))
    assert system.rows("SELECT count(*) FROM leases WHERE NOT void") == [(0,)]
    await launches_with_a_new_launcher(system, "crash-clock")


async def test_a_counter_that_ran_ahead_halts_launching_until_an_operator_looks(system):
    """The token counted and the database did not: as after a restored database, launches are refused, with an alarm."""
    system.arm(BROKER, "broker.counter.advanced")
    with contextlib.suppress(MoorlineError):
        async with system.world.alpha.admin() as admin:
            await admin.post_json("/v1/epochs", {})
    await system.died(BROKER)
    await system.again(BROKER)
    assert system.alarms()[-1][0] == "broker.database_restored"
    instance = "crash-halted"
    await system.request(instance)
    row = await system.settled(instance)
    assert (row["state"], row["problem"]["code"]) == ("failed", "launch.epoch_closed")
    await system.end(instance)
    await system.admin("/v1/epochs", {})
    await launches_with_a_new_launcher(system, "crash-unhalted")


async def test_a_restored_database_is_noticed_once(system):
    with changed(system) as database:
        database.execute("UPDATE facts SET value = value - 1 WHERE name = 'counter'")
    before = len(system.alarms())
    system.arm(BROKER, "broker.database.discarded")
    system.stage.again(BROKER)
    await system.died(BROKER)
    await system.again(BROKER)
    assert [code for code, *_ in system.alarms()[before:]] == ["broker.database_restored"]
    await system.admin("/v1/epochs", {})
    await launches_with_a_new_launcher(system, "crash-restored")


# Drift -------------------------------------------------------------------------------------------------------------------


async def test_a_silence_is_told_once(system):
    """h3 stops attesting: the verifier dies when it has told of it, broker and orchestrator when they have acted on that.

    Then h3 attests again, and the broker dies when it has read that.
    """
    before = await lost(system, "h3")
    system.arm(ORCHESTRATOR, "orchestrator.cursor.kept")
    system.arm(BROKER, "broker.loss.recorded")
    system.arm("verifier", "verifier.silence.told")
    system.kill("host-h3")
    await system.died("verifier")
    await system.again("verifier")
    await system.died(ORCHESTRATOR)
    await system.died(BROKER)
    await system.again(BROKER)
    await system.again(ORCHESTRATOR)
    assert await lost(system, "h3") == before + 1
    system.arm(BROKER, "broker.cursor.moved")
    await system.again("host-h3")
    await system.died(BROKER)
    await system.again(BROKER)
    assert system.rows("SELECT COUNT(*) FROM host_losses WHERE host = 'h3'") == [(1,)]


@pytest.mark.parametrize("step", RETIREMENT)
async def test_a_retirement_survives(system, step):
    """An operator ends a function: its keys go, its identity is revoked on the ledger, once, whenever the broker dies."""
    instance = f"crash-{step.rpartition('.')[2]}"
    await system.request(instance)
    await system.active(instance)
    await system.killed_at(BROKER, step, lambda: system.end(instance))
    await system.end(instance)
    row = await system.function(instance)
    assert row["state"] == "ended"
    assert "storage-key" in row["clean_ups"][0]["destroyed"]
    assert system.rows("SELECT state FROM generations WHERE instance = ?", instance) == [("retired",)]
    ((height,),) = system.rows("SELECT height FROM revocations WHERE instance = ?", instance)
    assert row["clean_ups"][0]["revoked_at_height"] == height
    assert system.rows("SELECT COUNT(*) FROM storage_keys WHERE instance = ?", instance) == [(0,)]


async def test_a_function_comes_back_to_its_broker(system):
    """The broker dies, comes back, and dies again when it has recorded the certificate for a function that came back."""
    instance = "crash-back"
    await system.request(instance)
    await system.active(instance)
    issued = len(certificates(system, instance))
    system.kill(BROKER)
    for step in ("broker.session.held", "broker.renewal.recorded"):
        system.arm(BROKER, step)
        system.stage.again(BROKER)
        await system.died(BROKER)
    await system.again(BROKER)
    for _ in range(600):
        assert (await system.active(instance))["generation"] == 1
        if "reconnected" in said_by(system, instance):
            break
        await asyncio.sleep(0.05)
    assert len(certificates(system, instance)) >= issued + 2  # one recorded and never handed out
    assert len(system.launches(instance)) == 1
    await system.end(instance)


async def test_a_forgotten_cursor_is_made_up_for_by_looking(system):
    """The verifier does not know the broker's cursor, as after its database was restored: the broker looks at the hosts.

    It dies when it has forgotten, and when it has acted on what it saw; the function is on a host without a verdict.
    """
    instance = "crash-absent"
    await system.request(instance)
    await system.active(instance)
    with changed(system) as database:
        database.execute("UPDATE facts SET value = 1000000 WHERE name = 'verifier-cursor'")
        database.execute("UPDATE generations SET host = 'h2' WHERE instance = ?", (instance,))
    for step in ("broker.cursor.forgotten", "broker.absence.recorded"):
        system.arm(BROKER, step)
        system.stage.again(BROKER)
        await system.died(BROKER)
    await system.again(BROKER)
    assert system.rows("SELECT state FROM generations WHERE instance = ? AND generation = 1", instance) != [("live",)]
    async with asyncio.timeout(30):
        query = "SELECT COUNT(*) FROM revocations WHERE instance = ? AND generation = 1 AND height IS NOT NULL"
        while system.rows(query, instance) != [(1,)]:  # noqa: ASYNC110 - of a database
            await asyncio.sleep(0.05)
    await system.end(instance)


async def test_a_clean_up_survives_a_kill_at_every_step(system):
    """h1 runs what is not allowed; the orchestrator dies at each step of halting the function and launching it on h4."""
    world, instance = system.world, "crash-drift"
    if "host-h4" not in system.stage.processes:
        hosting.start_agent(world, hosting.host(world, "h4"))
    assert (await hosting.verdict(world, "h4")).status.word == "affirming"
    await system.request(instance)
    assert (await system.active(instance))["host"] == "h1"
    system.arm(ORCHESTRATOR, CLEAN_UP[0])
    await asyncio.to_thread(drift, hosting.host(world, "h1"))
    await system.died(ORCHESTRATOR)
    for step in CLEAN_UP[1:]:
        system.arm(ORCHESTRATOR, step)
        system.stage.again(ORCHESTRATOR)
        await system.died(ORCHESTRATOR)
    await system.again(ORCHESTRATOR)
    row = await system.settled(instance)
    assert (row["state"], row["generation"], row["host"]) == ("active", 2, "h4"), row
    assert len(row["clean_ups"]) == 1
    assert len(system.launches(instance)) == 2
    assert await guest_state(instance, system) is None
    await system.end(instance)


def drift(one: hosting.Host) -> None:
    with Tpm.open(one.tpm.tcti) as tpm:
        firmware.execute(tpm, one.directory / "logs", "/usr/bin/xmrig", b"SIMULATED miner")


async def device_certificate(system: Any, name: str) -> str:
    """The serial number of a certificate that alpha's broker gave to a device."""
    spki = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    asked = {"public_key": base64.b64encode(spki).decode(), "spiffe_id": f"spiffe://alpha.test/device/{name}"}
    answer = await system.admin("/v1/svid", asked)
    return f"{x509.load_pem_x509_certificate(answer['certificate'].encode()).serial_number:x}"


# Helpers of these stories ------------------------------------------------------------------------------------------------


def certificates(system: Any, instance: str) -> list[tuple[Any, ...]]:
    return system.rows("SELECT serial FROM certificates WHERE spiffe_id LIKE ?", f"%/{instance}")


async def guest_state(instance: str, system: Any) -> str | None:
    """What h1's silicon says about a guest; None if it does not run."""
    try:
        status = await SiliconClient(hosting.silicon_socket(system.world, "h1")).status(instance)
    except Refused:
        return None
    return status.state if status.state == "running" else None


def said_by(system: Any, instance: str) -> str:
    """What a guest on h1 said about itself."""
    shared = system.stage.directory / "hosts" / "h1" / "agent" / "state" / "guests" / instance / "shared"
    return (shared / "status.jsonl").read_text("utf-8")


async def lost(system: Any, host: str) -> int:
    """How often the verifier told that a host fell silent."""

    async def ask() -> Any:
        async with verifier(system, system.world.facts["operator"]) as client:
            return await client.get_json("/v1/events", {"after": "0"})

    events = (await system.persistently(ask))["events"]
    return sum((one["host"], one["kind"], one["code"]) == (host, "verdict_lost", "result.expired") for one in events)


def order_seen_by_host(system: Any, instance: str) -> GuestOrder:
    """What the host's administrator can read about a guest, as an order for a clone of it."""
    shared = system.stage.directory / "hosts" / "h1" / "agent" / "state" / "guests" / instance / "shared"
    seen = (shared / "launch.cbor").read_bytes()
    fields = launch.parse_fields(schema.decode(FunctionLaunch, seen).launch_fields)
    return GuestOrder(
        instance=f"{instance}-clone",
        entry=operating.FUNCTION_ENTRY,
        host_data=launch.commitment(fields),
        launch=seen,
        package=(shared / "package.csar").read_bytes(),
        configuration=(shared / "config.cbor").read_bytes(),
        memory_mib=256,
        pids=64,
        relays={"broker": system.world.alpha.sessions},
        publish=False,
    )


async def refusal_of(guests: Guests, order: GuestOrder) -> str:
    """The code with which a guest gave up."""
    await guests.start(order)
    async with asyncio.timeout(30):
        while True:
            for event in (await guests.state(order.instance)).events:
                assert event["event"] == "refused", event
                return event["problem"]["code"]
            await asyncio.sleep(0.05)


async def everybody_at(system: Any, height: int) -> None:
    """Return when all four authorities have committed `height`."""
    async with asyncio.timeout(30):
        while min(system.heights()) < height:  # noqa: ASYNC110 - of four databases
            await asyncio.sleep(0.05)


def verifier(system: Any, identity: Any = None) -> HttpClient:
    world = system.world
    return HttpClient(
        f"https://{world.facts['verifier_address']}",
        server_name=world.alpha.name_of(Role.VERIFIER, VERIFIER),
        roots_pem=world.roots_pem,
        identity=identity,
    )


@contextlib.asynccontextmanager
async def attesting_host(system: Any, *, event_log_of: str = "h4"):
    """h4 as its agent attests it; with the boot log of another machine, if that is asked for."""
    one, other = (hosting.host(system.world, name) for name in ("h4", event_log_of))
    async with verifier(system) as client:
        tpm = await asyncio.to_thread(Tpm.open, one.tpm.tcti)
        try:
            yield HostAttestation(
                host="h4",
                verifier=client,
                tpm=tpm,
                logs=FileLogs(
                    events=other.directory / "logs" / firmware.EVENT_LOG, ima=one.directory / "logs" / firmware.IMA_LIST
                ),
                tag=one.tag,
                period_s=hosting.PERIOD_S,
            )
        finally:
            await asyncio.to_thread(tpm.close)


def provisioned(system: Any, directory: str) -> DeviceStore:
    path = system.stage.path("crash-devices") / directory
    store = DeviceStore(directory=path)
    if not path.exists():
        store.provision(system.world.consortium.trust, system.world.consortium.endpoints)
    return store


@contextlib.contextmanager
def changed(system: Any):
    """The broker's database while the broker is down; it is left down."""
    system.kill(BROKER)
    path = system.world.alpha.directory / "broker" / "broker.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        yield connection
        connection.commit()


async def launches_with_a_new_launcher(system: Any, instance: str) -> None:
    """The epoch moved on without grace, so alpha's launcher is replaced; then everything works as before."""
    system.stage.processes["launcher"].stop()
    system.stage.processes["launcher"].reap(time.monotonic() + 10)
    system.launcher("launcher")
    await system.again("launcher")
    await system.request(instance)
    row = await system.settled(instance)
    assert (row["state"], row["problem"]) == ("active", None)
    await system.end(instance)
