"""A function whose broker stands behind a proxy that ends TLS: the agent's own code, a real broker, a real proxy process."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moorline.channel.driver import new_kem
from moorline.errors import MoorlineError
from moorline.ledger import transactions as tx
from moorline.ledger.records import PackageRule
from moorline.simulators.silicon import GuestContext, guest_policy
from moorline.storage import steps
from moorline.wire import keys
from moorline.wire import launch as launches
from moorline.wire.guest import FunctionConfiguration
from moorline.wire.launch import ChannelProfile
from moorline.workload_agent.broker import attest
from moorline.workload_agent.launch import Launch

sys.path.insert(0, str(Path(__file__).parent))
from test_sessions import FUNCTION_CODE, PACKAGE, USE_CASE, world  # noqa: F401 - a fixture

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]


def certificate(folder):
    """A certificate that no consortium knows: the proxy's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "proxy.test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "proxy.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "proxy.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "proxy.pem"), str(folder / "proxy.key")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(world, tmp_path_factory):  # noqa: F811
    """The address of a proxy before alpha's broker, whose service `beyond` permits sessions through it."""
    await world.alpha.submitter.send(
        tx.RegisterService(
            name="beyond",
            use_case=USE_CASE,
            packages=(PackageRule(package_digest=PACKAGE, measurement=FUNCTION_CODE),),
            profiles=("hpke-only",),
            callers=(),
        )
    )
    files = certificate(tmp_path_factory.mktemp("proxy"))
    program = str(Path(__file__).parent / "terminating_proxy.py")
    running = await asyncio.create_subprocess_exec(
        sys.executable, program, world.alpha.broker.said["sessions"], *files, stdout=subprocess.PIPE
    )
    yield (await running.stdout.readline()).decode().strip()
    running.kill()
    await running.wait()


class Chip:
    """The report source of a guest with this commitment."""

    def __init__(self, world, fields):  # noqa: F811
        self.silicon = world.silicon
        self.context = GuestContext(
            measurement=fields.measurement,
            host_data=launches.commitment(fields),
            policy=guest_policy(debug=False),
            report_id=os.urandom(32),
        )

    def report(self, report_data):
        return self.silicon.report(self.context, report_data)


def launched(world, **changes):  # noqa: F811
    """What a function finds in its guest, and its chip."""
    fields = world.fields(**{"service": "beyond", "profile": ChannelProfile.HPKE_ONLY, **changes})
    held = Launch(
        encoded_fields=launches.encode_fields(fields),
        fields=fields,
        token=launches.token(world.secrets.launch_key, fields),
        configuration=_configuration(world, fields.service),
        trust=world.consortium.ceremony.trust,
        package=b"",
    )
    return held, Chip(world, fields)


def _configuration(world, service):  # noqa: F811
    return FunctionConfiguration(
        trust=world.trust_bytes, provider="alpha", hsm="hsm-1", service=service, contracts=(), max_age_s=30, settings={}
    )


async def code_of(opening):
    with pytest.raises(MoorlineError) as caught:
        await asyncio.wait_for(opening, 30)
    return caught.value


async def test_a_function_behind_a_proxy_lives_there(world, proxy):  # noqa: F811
    """verifies that: it gets identity, time, proofs and renewals, and resumes, through a proxy it knows nothing about."""
    held, chip = launched(world)
    link = await attest(proxy, held, chip)
    first = link.chain.leaf
    await link.synchronise()
    await link.renew()
    assert link.chain.leaf != first
    await link.resume(proxy, chip)
    await link.synchronise()
    await link.aclose()
    async with world.alpha.admin() as admin:
        (row,) = [
            one for one in (await admin.get_json("/v1/launches"))["launches"] if one["instance"] == held.fields.instance
        ]
        assert (row["state"], row["channel"]) == ("confirmed", "hpke-only")
        entries = (await admin.get_json("/v1/audit"))["entries"]
        (consumed,) = [
            one["body"] for one in entries if one["kind"] == "launch-consumed" and one["body"]["instance"] == row["instance"]
        ]
        assert consumed["channel"] == "hpke-only"


async def test_the_last_word_of_the_broker_comes_through_as_a_record(world, proxy):  # noqa: F811
    """verifies that: a revocation push reaches the function behind a proxy under its own code."""
    held, chip = launched(world)
    link = await attest(proxy, held, chip)
    ended = asyncio.ensure_future(link.ended())
    again = await attest_again(world, proxy, link, held, chip)
    assert (await asyncio.wait_for(ended, 30)).code == "session.superseded"
    await again.aclose()


async def test_a_kem_key_serves_one_session_behind_a_proxy(world, proxy, monkeypatch):  # noqa: F811
    """verifies that: without TLS of the broker the key of the launch opens no second session; a fresh one does."""
    kem = new_kem()
    monkeypatch.setattr("moorline.workload_agent.broker.new_kem", lambda: kem)
    held, chip = launched(world)
    link = await attest(proxy, held, chip)
    refusal = await code_of(attest_again(world, proxy, link, held, chip, kem=kem))
    assert refusal.code == "session.unsigned_problem"
    assert refusal.got.startswith("session.kem_reused")
    await (await attest_again(world, proxy, link, held, chip)).aclose()


async def attest_again(world, proxy, link, held, chip, *, kem=None):  # noqa: F811
    """The same instance opens a newer session: the broker ends the older one and says why."""
    from moorline.channel.driver import open_session
    from moorline.wire import keys, schema
    from moorline.wire.session import EvidenceFormat, FunctionFields, SessionRole, resume_message
    from moorline.workload_agent.broker import _collector, judge_broker

    signer = keys.KeySigner(link._key)

    async def verify_broker(challenge, certificates):
        return judge_broker(challenge, certificates, held, held.trust, world.now)

    async def prove(_challenge, digest):
        return signer.sign(resume_message(digest))

    return await open_session(
        proxy,
        role=SessionRole.RESUME,
        formats=(EvidenceFormat.SNP,),
        fields=schema.encode(FunctionFields(launch_fields=held.encoded_fields)),
        signing_public=keys.public_bytes(signer.public_key()),
        verify_broker=verify_broker,
        prove=prove,
        collect=_collector(chip),
        profile=ChannelProfile.HPKE_ONLY,
        kem=kem,
    )


async def test_a_launch_that_does_not_permit_it_gets_nothing_behind_a_proxy(world, proxy):  # noqa: F811
    """verifies that: launched for TLS of the broker, neither the honest way nor a downgrade of the session works."""
    held, chip = launched(world, service="records", profile=ChannelProfile.TLS)
    assert (await code_of(attest(proxy, held, chip))).code.startswith("chain.")
    # The host turns the session into an HPKE-only one; the fields the token is over still say TLS.
    lowered = replace(held, fields=replace(held.fields, profile=ChannelProfile.HPKE_ONLY))
    refusal = await code_of(attest(proxy, lowered, chip))
    assert refusal.code == "session.unsigned_problem"
    assert refusal.got.startswith("launch.profile_mismatch")


async def test_a_service_that_does_not_permit_it_is_refused(world, proxy):  # noqa: F811
    """verifies that: launch fields for HPKE-only count only where the service's record on the ledger has the profile."""
    held, chip = launched(world, service="records")
    refusal = await code_of(attest(proxy, held, chip))
    assert refusal.got.startswith("launch.profile_not_permitted")


async def test_the_profile_needs_no_proxy(world):  # noqa: F811
    """verifies that: the same launch works straight to the broker."""
    held, chip = launched(world)
    link = await attest(world.alpha.broker.said["sessions"], held, chip)
    await link.synchronise()
    await link.aclose()


class Mortal:
    """Alpha's broker, which dies by SIGKILL at the step it is told, and is started again."""

    def __init__(self, broker, order):
        self.broker, self.order = broker, order

    async def dies_at(self, step):
        self.order.write_text(step)
        return asyncio.create_task(self._buried(step))

    async def _buried(self, step):
        assert await asyncio.wait_for(self.broker.running.wait(), 60) == -signal.SIGKILL, step
        assert not self.order.exists()
        await self.broker.start()


@pytest_asyncio.fixture(loop_scope="module")
async def mortal(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv(steps.VARIABLE, str(tmp_path / "die"))
    await world.alpha.broker.stop()
    await world.alpha.broker.start()
    yield Mortal(world.alpha.broker, tmp_path / "die")
    monkeypatch.delenv(steps.VARIABLE)
    await world.alpha.broker.stop()
    await world.alpha.broker.start()


async def launches_of(world, instance):  # noqa: F811
    async with world.alpha.admin() as admin:
        found = (await admin.get_json("/v1/launches"))["launches"]
        alarms = (await admin.get_json("/v1/alarms"))["alarms"]
    return [row for row in found if row["instance"] == instance], len(alarms)


@pytest.mark.long
async def test_a_broker_behind_a_proxy_dies_at_every_step(world, proxy, mortal):  # noqa: F811
    """verifies that: kill -9 at every step of the HPKE-only path leaves one identity, no alarm, no second key."""
    _, alarms = await launches_of(world, "")
    for step in ("broker.launch.consumed", "broker.launch.confirmed"):
        held, chip = launched(world)
        buried = await mortal.dies_at(step)
        link = await attest(proxy, held, chip)
        await buried
        rows, after = await launches_of(world, held.fields.instance)
        assert [row["state"] for row in rows] == ["confirmed"], step
        assert after == alarms, step
        await link.synchronise()
    key = keys.public_bytes(link.identity.key.public_key())
    buried = await mortal.dies_at("broker.renewal.recorded")
    with pytest.raises(MoorlineError):
        await link.renew()
    await buried
    for step in ("broker.session.held", "broker.renewal.recorded"):
        buried = await mortal.dies_at(step)
        with pytest.raises(MoorlineError):
            await link.resume(proxy, chip)
        await buried
    await link.resume(proxy, chip)
    await link.renew()
    assert keys.public_bytes(link.identity.key.public_key()) == key
    rows, after = await launches_of(world, held.fields.instance)
    assert len(rows) == 1
    assert after == alarms
    await link.aclose()
