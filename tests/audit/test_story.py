"""The logs of a real broker and a service beside it: signed, anchored, exported by `moor log`, and tampered with."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import sqlite3
import sys
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.audit import checkpoint as checkpoints
from moorline.audit import export
from moorline.audit.log import encode_entry, entry_digest, parse_entry
from moorline.clock import Instant, SystemClock
from moorline.errors import MoorlineError, NotAuthentic, Refused
from moorline.ledger import audit_export
from moorline.ledger.light_client import LedgerTrust
from moorline.nfv import Role, SpiffeId
from moorline.rats import EvidenceRoot
from moorline.services import http, service_audit
from moorline.services.service_audit import ServiceLog
from moorline.storage.verifier_store import EnrolledHost, VerifierStore
from moorline.wire import keys
from moorline.wire.certificates import dns_name
from moorline.wire.http import ClientIdentity, HttpClient

sys.path.insert(0, str(Path(__file__).parents[1] / "hsm"))
from consortium import Consortium

pytestmark = [pytest.mark.story, pytest.mark.asyncio(loop_scope="module")]
BROKER, VERIFIER = "broker/hsm-1", "verifier/v1"


async def identity_of(provider, role: str, name: str) -> ClientIdentity:
    key = ec.generate_private_key(ec.SECP256R1())
    public = base64.b64encode(keys.public_bytes(key.public_key())).decode()
    async with provider.admin() as admin:
        given = await admin.post_json("/v1/svid", {"public_key": public, "spiffe_id": f"spiffe://alpha.test/{role}/{name}"})
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ClientIdentity(certificate_chain_pem=given["chain"].encode(), private_key_pem=pem)


@dataclasses.dataclass
class World:
    """A ledger, alpha's broker, and a verifier's log served beside it."""

    consortium: Consortium
    directory: Path
    alpha: object
    operator: ClientIdentity
    verifier: ClientIdentity
    store: VerifierStore
    log: ServiceLog
    address: str
    hosts: int = 0

    @property
    def trust(self) -> LedgerTrust:
        return self.consortium.ceremony.trust

    @property
    def source(self) -> str:
        name = dns_name(SpiffeId(trust_domain="alpha.test", role=Role.VERIFIER, segments=("v1",)))
        return f"https://{self.address}|{name}"

    def write(self, count: int) -> None:
        """So many entries more in the verifier's log."""
        for _ in range(count):
            self.hosts += 1
            name = f"h{self.hosts}"
            self.store.enrol(
                EnrolledHost(
                    host=name,
                    ek_digest=name.encode(),
                    ak_public=b"ak",
                    root=EvidenceRoot.TEST,
                    enrolled=Instant(1_790_000_000),
                )
            )

    async def exported(self, name: str) -> tuple[int, dict, Path]:
        """`moor log export`: exit code, what it says, and the file."""
        file = self.directory / f"{name}.log"
        words = ["log", "export", "--from", str(self.directory / "alpha"), "--from", self.source, "-o", str(file)]
        code, told = await self.moor(*words, "--as", str(self.directory / "operator.toml"), "--json")
        return code, told, file

    async def moor(self, *words: str) -> tuple[int, dict]:
        """A `moor` command in a process of its own, with --json."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "import sys; from moorline.cli import main; main()", *words),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await process.communicate()
        return process.returncode, json.loads(said)

    async def verified(self, file: Path, *more: str) -> tuple[int, dict]:
        trust = self.directory / "ledger" / "trust.cbor"
        return await self.moor("log", "verify", str(file), "--trust", str(trust), "--json", *more)

    async def alarms(self) -> set[str]:
        async with self.alpha.admin() as admin:
            return {alarm["code"] for alarm in (await admin.get_json("/v1/alarms"))["alarms"]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    consortium = await Consortium.found(directory)
    serving = None
    try:
        alpha = await consortium.admit("alpha")
        operator = await identity_of(alpha, "operator", "ops")
        verifier = await identity_of(alpha, "verifier", "v1")
        (directory / "chain.pem").write_bytes(operator.certificate_chain_pem)
        (directory / "key.pem").write_bytes(operator.private_key_pem)
        (directory / "operator.toml").write_text(
            'roots = "ledger/roots.pem"\ncertificate_chain = "chain.pem"\nprivate_key = "key.pem"\n'
        )
        store = VerifierStore.open(directory / "verifier.db")

        async def broker() -> HttpClient:
            return alpha.https(verifier)

        log = ServiceLog(name=VERIFIER, read=store.audit_rows, broker=broker)
        app = http.application("verifier")
        service_audit.add_routes(app, log, trust_domain="alpha.test")
        bound = asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(
            http.serve(
                app,
                listen="127.0.0.1:0",
                identity=http.TlsIdentity(chain_pem=verifier.certificate_chain_pem, key_pem=verifier.private_key_pem),
                client_roots_pem=alpha.roots_pem,
                ready=bound.set_result,
            )
        )
        made = World(consortium, directory, alpha, operator, verifier, store, log, await bound)
        made.write(6)
        async with alpha.admin() as admin:
            for number in range(3):
                await admin.post_json("/v1/enrolment-codes", {"device": f"d-{number}"})
        yield made
    finally:
        if serving is not None:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        await consortium.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(world) -> Path:
    code, told, file = await world.exported("whole")
    assert (code, told["refused"]) == (0, {})
    return file


def verify(world, data: bytes, **more) -> audit_export.VerifiedExport:
    return audit_export.verify(data, world.trust, now=SystemClock().now(), **more)


def refusal(world, data: bytes, **more) -> MoorlineError:
    with pytest.raises(MoorlineError) as caught:
        verify(world, data, **more)
    return caught.value


async def test_an_export_verifies_and_says_what_it_establishes(world, whole):
    """verifies that: the file holds what the broker did before it, the verifier's entries, and an anchor for both."""
    code, told = await world.verified(whole, "--max-age", "60")
    assert code == 0
    assert [(one["log"], one["entries"]) for one in told["logs"]][1] == (VERIFIER, 6)
    assert told["anchor"]["size"] == told["logs"][0]["entries"]
    assert any("as true as the service that wrote it" in line for line in told["not_established"])
    found = verify(world, whole.read_bytes())
    events = {entry.event for one in found.logs for entry in one.read()}
    assert {"svid-issued", "log-checkpointed", "host-enrolled"} <= events
    code, shown = await world.moor("log", "show", str(whole), "--log", VERIFIER, "--json")
    assert code == 0
    assert [entry["subject"] for entry in shown["entries"]] == [f"h{n}" for n in range(1, 7)]


async def test_a_verification_in_another_place_or_time_is_refused(world, whole):
    data = whole.read_bytes()
    other = dataclasses.replace(world.trust, ledger_id=bytes(32))
    with pytest.raises(Refused) as caught:
        audit_export.verify(data, other, now=SystemClock().now())
    assert caught.value.code == "ledger.other_ledger"
    later = Instant(SystemClock().now() + 3600)
    audit_export.verify(data, world.trust, now=later)
    with pytest.raises(Refused) as caught:
        audit_export.verify(data, world.trust, now=later, max_age_s=60)
    assert caught.value.code == "ledger.proof_stale"
    code, told = await world.verified(whole, "--at", "2000-01-01T00:00:00Z")
    assert (code, told["error"]["code"]) == (1, "ledger.proof_from_future")


async def test_every_changed_entry_is_named(world, whole):
    """verifies that: for every entry of every log, a byte of it changed is laid to that entry of that log."""
    data = whole.read_bytes()
    for one in export.parse(data).logs:
        for number, entry in enumerate(one.entries):
            changed = bytearray(data)
            at = data.index(entry) + len(entry) // 3
            changed[at] ^= 1
            error = refusal(world, bytes(changed))
            if (number, one.log) != (len(one.entries) - 1, one.log):
                assert (error.code, error.says) == ("audit.entry_changed", f"entry {number} of {one.log} was changed")
            else:
                assert error.code in ("audit.entry_changed", "audit.log_rewritten")
                assert one.log in error.says


async def test_any_changed_byte_of_the_file_is_found(world, whole):
    """verifies that: no single changed byte, anywhere, passes; a missing or doubled byte, or a missing end, neither."""
    file = whole.read_bytes()
    tried = []

    @given(at=st.integers(0, len(file) - 1), other=st.integers(1, 255))
    @settings(max_examples=150, deadline=None)
    def one(at, other):
        refusal(world, file[:at] + bytes([file[at] ^ other]) + file[at + 1 :])
        refusal(world, file[:at] + file[at + 1 :])
        refusal(world, file[:at])
        tried.append(at)

    one()
    refusal(world, file + file[-1:])
    assert len(tried) >= 100


def rewritten(data: bytes, name: str, change) -> bytes:
    """The file with one log replaced by `change` of it, and its digest repaired."""
    found = export.parse(data)
    logs = [change(one) if one.log == name else one for one in found.logs]
    header = found.header
    return export.write(
        ledger_id=header.ledger_id,
        provider=header.provider,
        hsm=header.hsm,
        bundle=found.bundle,
        logs=[one for one in logs if one is not None],
    )


@pytest.mark.parametrize("name", [BROKER, VERIFIER])
async def test_removed_moved_added_and_cut_entries_are_named(world, whole, name):
    """verifies that: what a holder of the file can do without the HSM's key is refused with the name of the entry."""
    data = whole.read_bytes()
    error = refusal(world, export.without(data, log=name, entry=2))
    assert (error.code, error.says) == ("audit.entry_removed", f"entry 2 of {name} is missing")

    def entries(change):
        return rewritten(data, name, lambda one: dataclasses.replace(one, entries=tuple(change(list(one.entries)))))

    def one_more(kept):
        last = parse_entry(kept[-1])
        return [
            *kept,
            encode_entry(
                number=last.number + 1, previous=entry_digest(kept[-1]), time=last.time, event="x", subject="", details={}
            ),
        ]

    cases = {
        "audit.truncated": lambda kept: kept[:-1],
        "audit.entry_reordered": lambda kept: [kept[1], kept[0], *kept[2:]],
        "audit.entry_added": lambda kept: [*kept[:2], kept[1], *kept[2:]],
        "audit.entry_appended": one_more,
    }
    for code, change in cases.items():
        error = refusal(world, entries(change))
        assert (error.code, name in error.says) == (code, True)
    assert refusal(world, rewritten(data, name, lambda _: None)).code == "audit.log_missing"
    assert (
        refusal(world, rewritten(data, name, lambda one: dataclasses.replace(one, checkpoints=()))).code
        == "audit.checkpoint_missing"
    )


async def test_a_log_left_out_is_accepted_only_on_purpose(world, whole):
    file = rewritten(whole.read_bytes(), VERIFIER, lambda _: None)
    assert refusal(world, file).got == VERIFIER
    assert verify(world, file, partial=True).missing == (VERIFIER,)


async def test_checkpoints_of_another_key_or_log_are_refused(world, whole):
    """verifies that: only the HSM key the ledger proves signs, and only for the log it says."""
    data = whole.read_bytes()
    found = export.parse(data)
    signer = keys.KeySigner(ec.generate_private_key(ec.SECP256R1()))
    real = [one.checkpoints[-1] for one in found.logs]
    key = world.alpha.hsm.keys.identity
    facts = {"ledger_id": world.trust.ledger_id, "provider": "alpha", "hsm": "hsm-1"}
    said = checkpoints.verify(real[1], key, **facts, log=VERIFIER)
    for forged in (checkpoints.sign(said, signer), real[0], b"\xd2\x84", real[1][:-1]):
        broken = rewritten(data, VERIFIER, lambda one, bad=forged: dataclasses.replace(one, checkpoints=(bad,)))
        assert refusal(world, broken).code == "audit.checkpoint_not_authentic"
    doubled = rewritten(data, VERIFIER, lambda one: dataclasses.replace(one, checkpoints=one.checkpoints * 2))
    assert refusal(world, doubled).code == "audit.checkpoint_not_authentic"


async def test_an_older_state_of_a_log_does_not_pass_for_the_newest(world, whole):
    """verifies that: whoever cuts a service's log back to an earlier, genuine checkpoint is found by the anchored log."""
    old = export.parse(whole.read_bytes()).logs[1]
    world.write(2)
    code, _, file = await world.exported("newer")
    assert code == 0
    newer = file.read_bytes()
    verify(world, newer)
    assert refusal(world, rewritten(newer, VERIFIER, lambda _: old)).code == "audit.anchor_mismatch"
    mixed = export.parse(newer)
    older = export.parse(whole.read_bytes())
    header = mixed.header
    forked = export.write(ledger_id=header.ledger_id, provider="alpha", hsm="hsm-1", bundle=mixed.bundle, logs=older.logs)
    assert refusal(world, forked).code == "audit.anchor_mismatch"


async def test_a_broker_signs_for_nobody_else_and_never_backwards(world):
    """verifies that: over the real interface, another's log, a shorter log and another log are refused, with alarms."""
    await world.log.checkpoint()
    async with world.alpha.https(world.verifier) as client:
        known = await client.get_json("/v1/audit/checkpoint")
        size, root = known["size"], known["root"]
        shown = {"log": VERIFIER, "size": size, "root": root, "head": "00" * 32, "proof": []}
        cases = [
            ("audit.other_log", {**shown, "log": "orchestrator/o1"}),
            ("audit.log_truncated", {**shown, "size": size - 1}),
            ("audit.log_rewritten", {**shown, "root": "11" * 32}),
            ("audit.log_rewritten", {**shown, "size": size + 1}),
            ("audit.log_rewritten", {**shown, "size": size + 1, "proof": ["22" * 32]}),
            ("http.request_malformed", {**shown, "size": 0}),
            ("http.request_malformed", {**shown, "more": 1}),
        ]
        for code, body in cases:
            with pytest.raises(MoorlineError) as caught:
                await client.post_json("/v1/audit/checkpoint", body)
            assert caught.value.code == code
    async with world.alpha.https(world.operator) as client:
        with pytest.raises(MoorlineError) as caught:
            await client.post_json("/v1/audit/checkpoint", shown)
        assert caught.value.code == "http.not_authorised"
    assert {"audit.log_truncated", "audit.log_rewritten"} <= await world.alarms()
    async with world.alpha.https(world.verifier) as client:
        assert (await client.get_json("/v1/audit/checkpoint"))["size"] == size


async def test_a_service_gives_its_log_to_operators_only(world):
    url, _, name = world.source.partition("|")
    for who, code in ((world.verifier, "http.not_authorised"), (None, "http.no_client_certificate")):
        async with HttpClient(url, server_name=name, roots_pem=world.alpha.roots_pem, identity=who) as client:
            with pytest.raises(MoorlineError) as caught:
                await client.get_bytes("/v1/audit/export")
            assert caught.value.code == code


async def test_an_entry_removed_from_a_services_database_is_found_twice(world):
    """verifies that: the broker refuses the changed log with an alarm, and the file, written all the same, tells which."""
    with sqlite3.connect(world.directory / "verifier.db") as database:
        (kept,) = database.execute("select data from audit where number = 3").fetchone()
        database.execute("delete from audit where number = 3")
    with pytest.raises(NotAuthentic) as caught:
        await world.log.checkpoint()
    assert caught.value.code == "audit.log_truncated"
    code, told, file = await world.exported("tampered")
    assert (code, told["refused"][VERIFIER]["code"]) == (1, "audit.log_truncated")
    code, told = await world.verified(file)
    assert (code, told["error"]["code"]) == (1, "audit.entry_removed")
    assert told["error"]["says"] == f"entry 3 of {VERIFIER} is missing"
    with sqlite3.connect(world.directory / "verifier.db") as database:  # control: nothing else was changed
        database.execute("insert into audit values (3, ?)", (kept,))
    code, _, file = await world.exported("repaired")
    assert code == 0
    assert (await world.verified(file))[0] == 0


async def test_an_entry_changed_in_the_brokers_database_is_not_anchored(world):
    """verifies that: the broker reads its own log from the database before it signs, names the entry and raises an alarm."""
    database_file = world.alpha.settings.database
    with sqlite3.connect(database_file) as database:
        (kept,) = database.execute("select data from audit where number = 1").fetchone()
        database.execute("update audit set data = ? where number = 1", (kept[:-1] + bytes([kept[-1] ^ 1]),))
    async with world.alpha.admin() as admin:
        with pytest.raises(NotAuthentic) as caught:
            await admin.post_json("/v1/audit/anchor", {})
    assert (caught.value.code, caught.value.says) == ("audit.entry_changed", f"entry 1 of {BROKER} was changed")
    assert "audit.entry_changed" in await world.alarms()
    with sqlite3.connect(database_file) as database:
        database.execute("update audit set data = ? where number = 1", (kept,))
    async with world.alpha.admin() as admin:
        assert (await admin.post_json("/v1/audit/anchor", {}))["log"] == BROKER
