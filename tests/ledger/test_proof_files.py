"""Proof bundles as files: fetched by one, verified by another, offline, with a trust file and nothing else."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline import cli
from moorline.clock import Instant, SystemClock, rendered
from moorline.errors import Malformed
from moorline.ledger import key_names, proof, records, transactions, trust_file
from moorline.ledger.light_client import LedgerTrust
from moorline.ledger.records import RevocationKind

from .conftest import NAMES, NOW, consortium_at
from .test_admission import new_authority
from .test_light_client import bundle_of, note_of, now_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A ledger with provider alpha, one revocation, and its trust file; nobody changes it."""
    made = consortium_at(tmp_path_factory.mktemp("files") / "consortium")
    alpha = made.admitted("alpha", "alpha.test")
    made.as_provider(alpha, transactions.Revoke(kind=RevocationKind.DEVICE, id="phone-1"))
    return made


def verify(capsys, made, bundle, *arguments, trust=None, at=None):
    """`moor ledger verify` on a file: exit code, and what it said."""
    file = made.made.directory / "proof.cbor"
    file.write_bytes(bundle)
    at = str(now_of(made)) if at is None else at
    trust = made.made.directory / "trust.toml" if trust is None else trust
    code = cli.run(["ledger", "verify", str(file), "--trust", str(trust), "--at", at, *arguments])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


REVOKED, NOT_REVOKED = "revocation/device/alpha/phone-1", "revocation/device/alpha/phone-2"


@pytest.mark.parametrize(
    ("key", "arguments", "code", "says"),
    [
        ("provider/alpha", [], 0, "alpha.test"),
        ("provider/alpha", ["--expect", "present"], 0, "alpha.test"),
        ("provider/alpha", ["--expect", "absent"], 1, "[ledger.present]"),
        (REVOKED, ["--expect", "present"], 0, "phone-1"),
        (REVOKED, ["--expect", "absent"], 1, "[ledger.present]"),
        (NOT_REVOKED, ["--expect", "absent"], 0, "proven absent"),
        (NOT_REVOKED, ["--expect", "present"], 1, "[ledger.absent]"),
        (NOT_REVOKED, [], 0, "proven absent"),
    ],
)
def test_presence_and_absence_are_proven_as_expected_or_refused(shared, capsys, key, arguments, code, says):
    found, said = verify(capsys, shared, bundle_of(shared, [key]), *arguments)
    assert (found, says in said) == (code, True), said


def test_a_proof_of_another_key_does_not_answer(shared, capsys):
    """verifies that: a bundle that proves something else absent is not taken for the one that was asked for."""
    code, said = verify(capsys, shared, bundle_of(shared, ["revocation/device/alpha/phone-9"]), "--expect", "present")
    assert (code, "phone-9" in said) == (1, True)
    wrong = proof.parse_bundle(bundle_of(shared, [NOT_REVOKED]))
    renamed = replace(wrong, records=(replace(wrong.records[0], key=REVOKED),))
    from moorline.wire import schema

    code, said = verify(capsys, shared, schema.encode(renamed), "--expect", "absent")
    assert code in {1, 2}, said


def test_stale_proofs_are_refused_and_the_reader_may_be_stricter(shared, capsys):
    bundle = bundle_of(shared, ["provider/alpha"])
    later = now_of(shared) + 20
    assert verify(capsys, shared, bundle, at=rendered(later))[0] == 0
    code, said = verify(capsys, shared, bundle, "--max-age", "10", at=rendered(later))
    assert (code, "[ledger.proof_stale]" in said) == (1, True)
    code, said = verify(capsys, shared, bundle, at=str(later + 20))
    assert (code, "[ledger.proof_stale]" in said) == (1, True)
    assert verify(capsys, shared, bundle, "--max-age", "60", at=str(later + 20))[0] == 0
    code, said = verify(capsys, shared, bundle, at=str(now_of(shared) - 60))
    assert (code, "[ledger.proof_from_future]" in said) == (1, True)
    assert verify(capsys, shared, bundle, at="yesterday")[0] == 64
    assert verify(capsys, shared, bundle, at="2026-01-01T00:00:00")[0] == 64


def test_another_ledger_and_too_few_signatures_are_refused(shared, tmp_path, capsys):
    other = consortium_at(tmp_path / "other")
    code, said = verify(capsys, shared, bundle_of(other, ["provider/alpha"]))
    assert (code, "[ledger.other_ledger]" in said) == (1, True)
    few = bundle_of(shared, ["provider/alpha"], note=note_of(shared, shared.state, NAMES[:2]))
    code, said = verify(capsys, shared, few)
    assert (code, "[ledger.quorum_missing]" in said) == (1, True)


def test_what_cannot_be_read_or_trusted_decides_nothing(shared, capsys, tmp_path):
    assert verify(capsys, shared, b"")[0] == 2
    assert verify(capsys, shared, b"garbage")[0] == 2
    bundle = bundle_of(shared, ["provider/alpha"])
    assert verify(capsys, shared, bundle[:-1])[0] == 2
    assert verify(capsys, shared, bundle, trust=tmp_path / "none.toml")[0] == 2
    (tmp_path / "empty.toml").write_text("")
    code, said = verify(capsys, shared, bundle, trust=tmp_path / "empty.toml")
    assert (code, "[ledger.trust_malformed]" in said) == (2, True)
    assert cli.run(["ledger", "verify", str(shared.made.directory / "proof.cbor")]) == 2
    assert "ledger.no_trust" in capsys.readouterr().err


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_flipped_bit_verifies_as_expected(shared, capsys, data):
    """verifies that: of a revoked device no changed proof shows "not revoked", of a standing one none shows "revoked"."""
    key, lie = data.draw(st.sampled_from([(REVOKED, "absent"), ("provider/alpha", "absent"), (NOT_REVOKED, "present")]))
    bundle = bytearray(bundle_of(shared, [key]))
    bit = data.draw(st.integers(0, len(bundle) * 8 - 1))
    bundle[bit // 8] ^= 1 << bit % 8
    code, said = verify(capsys, shared, bytes(bundle), "--expect", lie)
    if code == 0:  # the flipped bit made it the true proof of another key that is absent: then that key is what it says
        assert key not in said
    assert code in {0, 1, 2}


def test_json_says_the_same(shared, capsys):
    code, said = verify(capsys, shared, bundle_of(shared, ["provider/alpha", NOT_REVOKED]), "--json")
    found = json.loads(said)
    assert (code, found["proven"]) == (0, {"provider/alpha": "present", NOT_REVOKED: "absent"})
    assert found["ledger"] == shared.made.genesis.ledger_id.hex()
    code, said = verify(capsys, shared, bundle_of(shared, [REVOKED]), "--json", "--expect", "absent")
    assert (code, json.loads(said)["error"]["code"]) == (1, "ledger.present")


def test_a_change_of_the_authorities_is_carried_and_without_the_old_quorum_refused(tmp_path, capsys):
    """verifies that: a trust file made before an authority joined verifies what the new set signs, through the change."""
    made = consortium_at(tmp_path / "consortium")
    action = new_authority(made, "authority-5", made.made.directory)
    made.decide(action, NAMES[:3])
    changed = made.state
    made.block()
    note = note_of(made, made.state, [*NAMES[:3], action.name])
    change = proof.SetChange(note=note_of(made, changed), authorities=changed.authority_set())
    assert verify(capsys, made, bundle_of(made, ["provider/x"], note=note, changes=[change]), "--expect", "absent")[0] == 0
    forged = replace(change, note=note_of(made, changed, NAMES[:2]))
    code, said = verify(capsys, made, bundle_of(made, ["provider/x"], note=note, changes=[forged]))
    assert (code, "[ledger.quorum_missing]" in said) == (1, True)
    code, said = verify(capsys, made, bundle_of(made, ["provider/x"], note=note))
    assert (code, "[ledger.signature_unknown]" in said) == (1, True)
    # Who was provisioned afterwards needs no change, and is sent none.
    new = trust_file.render(replace(made.made.trust, authorities=changed.authority_set(), quorum=4))
    (tmp_path / "new.toml").write_text(new)
    assert proof.changes_since(proof.authority_set_digest(changed.authority_set()), [change]) == ()
    assert proof.changes_since(proof.authority_set_digest(made.made.trust.authorities), [change]) == (change,)
    assert verify(capsys, made, bundle_of(made, ["provider/x"], note=note), trust=tmp_path / "new.toml")[0] == 0


# Trust files -----------------------------------------------------------------------------------------------------------


def test_an_expired_trust_file_is_said_to_be_and_how_to_get_another(shared, capsys):
    at = str(now_of(shared) + 181 * 86_400)
    code, said = verify(capsys, shared, bundle_of(shared, ["provider/alpha"]), at=at)
    assert (code, "ledger.trust_expired" in said, "moor ledger trust --renew" in said) == (1, True, True), said


@pytest.mark.parametrize(("days", "says"), [(149, None), (151, "ends in 28 days"), (179, "ends in 0 days")])
def test_whoever_uses_a_trust_file_that_ends_soon_is_told_on_standard_error(shared, capsys, days, says):
    """verifies that: the answer is the same, with the command that renews the file beside it from 30 days before the end."""
    known = shared.made.trust.known_s
    file, at = shared.made.directory / "proof.cbor", known + days * 86_400 + 60
    file.write_bytes(bundle_of(shared, ["provider/alpha"]))
    age = str(at - now_of(shared) + 60)
    trust = shared.made.directory / "trust.toml"
    assert cli.run(["ledger", "verify", str(file), "--trust", str(trust), "--at", str(at), "--max-age", age, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["proven"] == {"provider/alpha": "present"}
    assert (says or "") in shown.err
    assert ("moor ledger trust --renew" in shown.err) is (says is not None)


EXAMPLES = Path(__file__).parents[2] / "docs" / "spec" / "examples"
ENDS_SOON = pytest.mark.parametrize(("days", "says"), [(149, None), (151, "ends in 28 days")])


def known_for(directory, trust, *, days, at):
    """A trust file of 180 days that at that time has been known for so many, and a minute."""
    aged = replace(LedgerTrust.parse(bytes.fromhex(trust)), known_s=at - days * 86_400 - 60, trusting_period_s=180 * 86_400)
    (directory / "trust.cbor").write_bytes(aged.encode())
    return str(directory / "trust.cbor")


@ENDS_SOON
def test_who_verifies_evidence_by_a_trust_file_that_ends_soon_is_told(tmp_path, capsys, days, says):
    """verifies that: `moor ledger evidence verify`, which judges at no time but now, gives the same answer beside it."""
    example = json.loads((EXAMPLES / "ledger-embedded.json").read_text("utf-8"))
    (tmp_path / "evidence").write_bytes(bytes.fromhex(example["evidence"]))
    trust = known_for(tmp_path, example["trust"], days=days, at=SystemClock().now())
    assert cli.run(["ledger", "evidence", "verify", str(tmp_path / "evidence"), "--trust", trust, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["offenders"] == ["authority-2"]
    assert (says or "") in shown.err
    assert ("moor ledger trust --renew" in shown.err) is (says is not None)


@ENDS_SOON
def test_who_verifies_a_log_by_a_trust_file_that_ends_soon_is_told(tmp_path, capsys, days, says):
    """verifies that: `moor log verify` counts the days from when the log is judged, and gives the same answer beside it."""
    example = json.loads((EXAMPLES / "audit-log.json").read_text("utf-8"))
    (tmp_path / "log").write_bytes(bytes.fromhex(example["file"]))
    trust, at = known_for(tmp_path, example["trust"], days=days, at=example["at"]), str(example["at"])
    assert cli.run(["log", "verify", str(tmp_path / "log"), "--trust", trust, "--at", at, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ok"] is True
    assert (says or "") in shown.err
    assert ("moor ledger trust --renew" in shown.err) is (says is not None)


def test_who_writes_a_trust_file_of_an_old_ledger_is_told(tmp_path, capsys):
    """verifies that: a genesis gives 180 days from its own time; the file says when it ends, the reminder that it has."""
    made = consortium_at(tmp_path / "old", now=Instant(NOW - 400 * 86_400))
    genesis, new = str(made.made.directory / "genesis.cbor"), tmp_path / "new.toml"
    assert cli.run(["ledger", "trust", "--genesis", genesis, "--output", str(new)]) == 0
    shown = capsys.readouterr()
    ends = rendered(Instant(NOW - 220 * 86_400))
    assert f"ended at {ends}" in shown.err
    assert ends in shown.out


def test_a_trust_file_is_written_as_services_take_it(shared, tmp_path, capsys):
    """verifies that: *.cbor is the binary one, with roots; from TOML, which has none, none is made."""
    genesis = str(shared.made.directory / "genesis.cbor")
    assert cli.run(["ledger", "trust", "--genesis", genesis, "--output", str(tmp_path / "new.cbor")]) == 0
    assert LedgerTrust.parse((tmp_path / "new.cbor").read_bytes()) == shared.made.trust
    capsys.readouterr()


def read_nothing(name):
    raise AssertionError(name)


def test_a_trust_file_says_what_the_genesis_says(shared):
    trust = shared.made.trust
    written = trust_file.parse(trust_file.render(trust).encode(), read_nothing)
    assert written == replace(trust, roots=())
    assert trust_file.parse(trust.encode(), read_nothing) == trust
    named = "\n".join(line for line in trust_file.render(trust).splitlines()[:7]) + '\ngenesis = "genesis.cbor"\n'
    directory = shared.made.directory
    assert trust_file.parse(named.encode(), lambda name: (directory / name).read_bytes()) == trust


@pytest.mark.parametrize("missing", range(1, 7))
def test_a_trust_file_without_one_of_its_fields_is_refused(shared, missing):
    lines = trust_file.render(shared.made.trust).splitlines()
    text = "\n".join(lines[:missing] + lines[missing + 1 :])
    with pytest.raises(Malformed, match="ledger.trust_malformed"):
        trust_file.parse(text.encode(), read_nothing)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("quorum = 3", "quorum = 2"),
        ("quorum = 3", "quorum = 5"),
        ("quorum = 3", "quorum = true"),
        ("max_age_s = 30", "max_age_s = 0"),
        ("simulated_allowed = true", 'simulated_allowed = "yes"'),
        ("trusting_period_s = 15552000", "trusting_period_s = 0"),
        ("trusting_period_s = 15552000", 'trusting_period_s = "for ever"'),
        ("Z\ntrusting", "\ntrusting"),
        ("known = 2", "known = 1"),
        ("[authorities]", "[authority]"),
        ('ledger = "', 'ledger = "ab'),
        ("quorum = 3", "quorum = 3\nextra = 1"),
    ],
)
def test_a_trust_file_that_says_something_odd_is_refused(shared, old, new):
    text = trust_file.render(shared.made.trust)
    assert old in text
    with pytest.raises(Malformed, match="ledger.trust_malformed"):
        trust_file.parse(text.replace(old, new).encode(), read_nothing)


def test_one_key_does_not_count_for_two_authorities(shared):
    lines = trust_file.render(shared.made.trust).splitlines()
    lines[-1] = "authority-4 = " + lines[-2].partition(" = ")[2]
    with pytest.raises(Malformed, match="one key"):
        trust_file.parse("\n".join(lines).encode(), read_nothing)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_trust_file_or_malformed(data):
    with pytest.raises(Malformed):
        trust_file.parse(data, read_nothing)


def test_the_genesis_in_a_trust_file_has_to_be_of_its_ledger(shared):
    text = "\n".join(trust_file.render(shared.made.trust).splitlines()[:7]) + '\ngenesis = "g"\n'
    wrong = text.replace(shared.made.genesis.ledger_id.hex(), "ab" * 32)
    with pytest.raises(Malformed, match="another ledger"):
        trust_file.parse(wrong.encode(), lambda _name: shared.made.genesis.encode())
    assert isinstance(shared.made.trust, LedgerTrust)


# Keys ------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_record_has_a_key_that_people_can_write():
    """verifies that: each function of ledger.records that makes a key makes one that `key_names` takes."""
    for name, make in inspect.getmembers(records, inspect.isfunction):
        if name.endswith("_key") and not name.endswith("index_key") and name != "revocation_key":
            key = make(*("a-1" for _ in inspect.signature(make).parameters))
            assert key_names.parse(key) == key


def test_revocations_say_whose_they_are():
    assert key_names.parse("revocation/measurement/ab12") == "revocation/measurement/consortium/ab12"
    assert key_names.parse("revocation/chip/alpha/ab12") == "revocation/chip/alpha/ab12"
    assert key_names.parse("revocation/device/alpha/d1") == "revocation/device/alpha/d1"


@pytest.mark.parametrize(
    "text",
    ["", "provider", "provider/", "provider/a/b", "Provider/alpha", "hsm/alpha", "revocation/device/d1", "revocation/x/a/b",
     "revocation/device/alpha/d 1", "revocation", "contract/..", "provider/ALPHA", "hsm//x"],
)  # fmt: skip
def test_what_names_no_record_is_never_proven_absent(text, capsys):
    with pytest.raises(Malformed, match="ledger.key_malformed"):
        key_names.parse(text)
    assert cli.run(["ledger", "prove", text, "-o", "x", "--genesis", "nowhere"]) == 2
    assert "ledger.key_malformed" in capsys.readouterr().err
