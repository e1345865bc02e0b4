"""Backup to a quorum, restore to an empty token: rightly, with wrong, too few, doubled and forged shares, and killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.clock import Instant
from moorline.errors import Conflict, Malformed, Misconfigured, MoorlineError, NotAuthentic, Refused
from moorline.hsm import backup, ceremony, custody
from moorline.hsm.custody import Circle, Share
from moorline.hsm.keys import HSM_IDENTITY, ISSUING_CA, KEM, VERIFIER, WRAPPING, TokenEcKey
from moorline.hsm.launch_keys import COUNTER
from moorline.hsm.token import initialise_softhsm, open_token
from moorline.nfv import Role, SpiffeId
from moorline.wire import cose, keys, schema

sys.path.insert(0, str(Path(__file__).parent))
from looking import issuing_ca

from conftest import DOMAIN, make_provider

NOW = Instant(1_800_000_000)
NAMES = ("ada", "bo", "cy")
OWN = {name: (ec.generate_private_key(ec.SECP256R1()), x25519.X25519PrivateKey.generate()) for name in NAMES}
CIRCLE = Circle(
    quorum=2,
    custodians=tuple(custody.public_of(name, OWN[name][0].public_key(), OWN[name][1].public_key()) for name in NAMES),
)


def shares(locked, *names: str) -> list[Share]:
    return [custody.take_share(locked, name, OWN[name][1]) for name in names]


# -- the construction alone ------------------------------------------------------------------------------------------------


def test_every_quorum_opens_and_nothing_less_does():
    """verifies that: of all subsets of five custodians exactly those with three or more open the secret."""
    names = ("a", "b", "c", "d", "e")
    own = {name: x25519.X25519PrivateKey.generate() for name in names}
    signing = {name: ec.generate_private_key(ec.SECP256R1()).public_key() for name in names}
    circle = Circle(
        quorum=3, custodians=tuple(custody.public_of(name, signing[name], own[name].public_key()) for name in names)
    )
    locked = custody.lock(b"the secret", circle, purpose="test", random=os.urandom)
    assert len(locked.locks) == 10
    assert schema.decode(custody.Locked, schema.encode(locked)) == locked
    taken = {name: custody.take_share(locked, name, own[name]) for name in names}
    for size in range(6):
        for chosen in itertools.combinations(names, size):
            brought = [taken[name] for name in chosen]
            if size >= 3:
                assert custody.unlock(locked, brought) == b"the secret"
                assert custody.unlock(locked, brought[::-1]) == b"the secret"
            else:
                with pytest.raises(Refused) as caught:
                    custody.unlock(locked, brought)
                assert caught.value.code == "custody.too_few"


def test_wrong_doubled_and_forged_shares():
    """verifies that: each wrong share is refused by a code of its own, and its bringer named."""
    locked = custody.lock(b"s", CIRCLE, purpose="test", random=os.urandom)
    other = custody.lock(b"s", CIRCLE, purpose="test", random=os.urandom)
    ada, bo = shares(locked, "ada", "bo")
    attempts: list[tuple[type[MoorlineError], str, list[Share]]] = [
        (Conflict, "custody.share_twice", [ada, ada]),
        (NotAuthentic, "custody.share_forged", [ada, replace(bo, value=os.urandom(32))]),
        (NotAuthentic, "custody.share_forged", [ada, replace(ada, custodian="bo")]),
        (Refused, "custody.other_secret", [ada, *shares(other, "bo")]),
        (Refused, "custody.stranger", [ada, replace(bo, custodian="eve")]),
    ]
    for kind, code, brought in attempts:
        with pytest.raises(kind) as caught:
            custody.unlock(locked, brought)
        assert caught.value.code == code
        assert bo.value.hex() not in str(caught.value)
    assert bo.value.hex() not in repr(bo)
    with pytest.raises(NotAuthentic) as caught:
        custody.take_share(locked, "ada", OWN["bo"][1])
    assert caught.value.code == "custody.other_key"


def test_a_record_that_some_quorum_could_not_open_is_refused():
    """verifies that: a lock that is missing, doubled or in another's place is found by whoever reads it, not at a loss."""
    locked = custody.lock(b"s", CIRCLE, purpose="test", random=os.urandom)
    first, second, third = locked.locks
    for locks in ((first, second), (first, second, second), (second, first, third), ()):
        with pytest.raises(Malformed) as caught:
            custody.take_share(replace(locked, locks=locks), "ada", OWN["ada"][1])
        assert caught.value.code == "custody.incomplete"


@pytest.mark.parametrize(
    "circle",
    [
        replace(CIRCLE, quorum=1),
        replace(CIRCLE, quorum=4),
        replace(CIRCLE, custodians=CIRCLE.custodians[:1]),
        replace(CIRCLE, custodians=(*CIRCLE.custodians, CIRCLE.custodians[0])),
        replace(CIRCLE, custodians=(*CIRCLE.custodians, replace(CIRCLE.custodians[0], name="eve"))),
    ],
)
def test_no_circle_in_which_one_person_is_enough(circle):
    """verifies that: a quorum of one, more than there are, and one person under two names are refused."""
    with pytest.raises(Malformed) as caught:
        custody.lock(b"s", circle, purpose="test", random=os.urandom)
    assert caught.value.code == "custody.circle"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_record_never_opens_to_something_else(data):
    """verifies that: whatever byte of a custody record is changed, a quorum gets the secret or a refusal, nothing else."""
    encoded = schema.encode(custody.lock(b"the secret", CIRCLE, purpose="test", random=os.urandom))
    original = schema.decode(custody.Locked, encoded)
    place = data.draw(st.integers(0, len(encoded) - 1))
    changed = encoded[:place] + bytes([encoded[place] ^ data.draw(st.integers(1, 255))]) + encoded[place + 1 :]
    with contextlib.suppress(MoorlineError):
        assert custody.unlock(schema.decode(custody.Locked, changed), shares(original, "ada", "bo")) == b"the secret"


# -- a whole HSM -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An HSM with custodians that worked for a while, and its backup."""
    directory = tmp_path_factory.mktemp("saved")
    made = ceremony.initialise(directory / "t", label="alpha", circle=CIRCLE)
    with open_token(made.location) as token:
        sealed = token.seal(WRAPPING, b"storage key", b"place")
        for _ in range(3):
            token.advance(COUNTER)
        token.import_mac_key("launch-key-3", os.urandom(32))
    kept = backup.load_custody(made.location)
    written = backup.create(made.location, shares(kept, "ada", "cy"), directory / "alpha.backup", now=NOW)
    return directory, made, sealed, written


def test_an_empty_token_issues_again(saved, tmp_path):
    """verifies that: a restored HSM issues under the same certificate, opens what was sealed, and counts ahead."""
    directory, made, sealed, written = saved
    assert written.not_included == ("launch-key-3",)
    data = (directory / "alpha.backup").read_bytes()
    location = backup.restore(data, made.keys.identity, shares(written.key, "bo", "cy"), tmp_path / "new")
    assert not (tmp_path / "new.restoring").exists()
    with open_token(location) as token:
        assert ceremony.public_keys(token) == made.keys
        assert token.unseal(WRAPPING, sealed, b"place") == b"storage key"
        assert token.counter(COUNTER) == backup.COUNTER_STRIDE
        provider = make_provider(made.keys)
        ca = issuing_ca(token, provider.signed.issuing_ca, provider.above)
        public = keys.public_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
        leaf = ca.issue(public, SpiffeId(trust_domain=DOMAIN, role=Role.DEVICE, segments=("d-1",)), NOW)
        leaf.certificate.verify_directly_issued_by(provider.signed.issuing_ca)
    # And it can be backed up again, by the same people.
    again = backup.create(location, shares(backup.load_custody(location), "ada", "bo"), tmp_path / "again", now=NOW)
    assert {each.label for each in again.keys} == {each.label for each in written.keys}


def test_a_restored_token_voids_what_was_leased(saved, tmp_path, store):
    """verifies that: the broker on a restored token stops launching until its operator opens an epoch."""
    from moorline.hsm.launch_keys import LaunchKeys, Terms

    directory, made, _, written = saved
    data = (directory / "alpha.backup").read_bytes()
    location = backup.restore(data, made.keys.identity, shares(written.key, "ada", "bo"), tmp_path / "new")
    with open_token(location) as token:
        launch_keys = LaunchKeys(token, store, Terms(epoch_s=3600, grace_s=60, lease_count=10, lease_s=1800))
        assert not launch_keys.reconcile(NOW)
        with pytest.raises(MoorlineError) as caught:
            launch_keys.current(NOW)
        assert caught.value.code == "launch.halted"
        assert launch_keys.open_epoch(NOW).epoch > backup.COUNTER_STRIDE


def test_the_pin_alone_takes_no_key_out(saved):
    """verifies that: with the user's PIN a recoverable key is not readable, not wrappable, and stays marked."""
    from pkcs11 import Attribute, Mechanism, MechanismFlag, ObjectClass
    from pkcs11.exceptions import AttributeReadOnly, AttributeSensitive, KeyNotWrappable
    from pkcs11.mechanisms import KeyType

    _, made, _, _ = saved

    def attempt(lane):
        found = lane.find(ObjectClass.PRIVATE_KEY, ISSUING_CA)
        with pytest.raises(AttributeSensitive):
            found[Attribute.VALUE]
        own = lane.session.generate_key(KeyType.AES, 256, store=False, capabilities=MechanismFlag.WRAP)
        with pytest.raises(KeyNotWrappable):
            own.wrap_key(found, mechanism=Mechanism.AES_KEY_WRAP_PAD)
        for act in (
            lambda: found.__setitem__(Attribute.WRAP_WITH_TRUSTED, False),  # noqa: FBT003
            lambda: found.copy({Attribute.WRAP_WITH_TRUSTED: False, Attribute.TOKEN: False}),
            lambda: own.__setitem__(Attribute.TRUSTED, True),  # noqa: FBT003
        ):
            with pytest.raises(AttributeReadOnly):
                act()

    with open_token(made.location) as token:
        token.sessions.run(attempt)
        facts = {each.label: each for each in token.inspect() if each.kind in ("private", "secret")}
    assert facts[ISSUING_CA].trust_needed
    assert facts["launch-key-3"].extractable is False


def test_what_is_not_recoverable_is_not_backed_up(tmp_path):
    """verifies that: a token without custodians refuses a backup, by design and by name."""
    location = initialise_softhsm(tmp_path / "t", label="plain")
    with pytest.raises(Misconfigured) as caught:
        backup.create(location, [], tmp_path / "b", now=NOW)
    assert caught.value.code == "custody.none"
    assert not (tmp_path / "b").exists()


def test_a_backup_that_is_not_ours_or_changed(saved, tmp_path):
    """verifies that: another identity, any changed byte and a place that is not empty are refused, and nothing is left."""
    directory, made, _, written = saved
    data = (directory / "alpha.backup").read_bytes()
    both = shares(written.key, "ada", "bo")
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(NotAuthentic):
        backup.restore(data, stranger, both, tmp_path / "x")
    for place in range(0, len(data), 97):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises((NotAuthentic, Malformed)):
            backup.verify(changed, made.keys.identity)
    with pytest.raises(Refused):
        backup.restore(data, made.keys.identity, both[:1], tmp_path / "x")
    (tmp_path / "full").mkdir()
    with pytest.raises(Misconfigured) as caught:
        backup.restore(data, made.keys.identity, both, tmp_path / "full")
    assert caught.value.code == "backup.not_empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_backup_is_signed_by_the_identity_that_is_asked_for_or_not_made(saved, tmp_path):
    """verifies that: a certificate that is not of this token's identity makes no backup that nobody could verify."""
    _, made, _, _ = saved
    brought = shares(backup.load_custody(made.location), "ada", "bo")
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(NotAuthentic) as caught:
        backup.create(made.location, brought, tmp_path / "b", now=NOW, identity=stranger)
    assert caught.value.code == "backup.other_identity"
    assert list(tmp_path.iterdir()) == []
    backup.create(made.location, brought, tmp_path / "b", now=NOW, identity=made.keys.identity)
    backup.verify((tmp_path / "b").read_bytes(), made.keys.identity)


@pytest.mark.parametrize(("one", "other"), [(ISSUING_CA, VERIFIER), (KEM, VERIFIER), (HSM_IDENTITY, ISSUING_CA)])
def test_a_restored_key_does_what_its_public_half_says_or_there_is_no_token(saved, tmp_path, one, other):
    """verifies that: a well signed backup in which two keys changed places is refused, and no key of it is left."""
    _, made, _, written = saved
    wrapped = {each.label: each.wrapped for each in written.keys}
    moved = {one: wrapped[other], other: wrapped[one]}
    lying = replace(written, keys=tuple(replace(each, wrapped=moved.get(each.label, each.wrapped)) for each in written.keys))
    with open_token(made.location) as token:
        data = cose.sign(backup.PURPOSE, schema.encode(lying), keys.KeySigner(TokenEcKey(token, HSM_IDENTITY)))
    with pytest.raises(NotAuthentic) as caught:
        backup.restore(data, made.keys.identity, shares(written.key, "ada", "bo"), tmp_path / "x")
    assert caught.value.code == "backup.key_damaged"
    assert list(tmp_path.iterdir()) == []


def test_the_shares_of_another_token_open_no_officer(saved, tmp_path):
    """verifies that: shares of one token's officer PIN are refused by another token's record before any PIN is tried."""
    _, made, _, _ = saved
    other = ceremony.initialise(tmp_path / "t", label="beta", circle=CIRCLE)
    theirs = shares(backup.load_custody(other.location), "ada", "bo")
    with pytest.raises(Refused) as caught:
        backup.create(made.location, theirs, tmp_path / "b", now=NOW)
    assert caught.value.code == "custody.other_secret"


KILLED = """
import sys, pickle
from pathlib import Path
from moorline.clock import Instant
from moorline.hsm import backup, custody
from moorline.hsm.token.softhsm import location_in
what, *rest = sys.argv[1:]
shares = [custody.parse_share(Path(each).read_bytes()) for each in rest[2:]]
if what == "create":
    backup.create(location_in(Path(rest[0])), shares, Path(rest[1]), now=Instant(1_800_000_000))
else:
    from moorline.wire import keys
    identity = keys.parse_public(Path(rest[0]).with_suffix(".public").read_bytes())
    backup.restore(Path(rest[0]).read_bytes(), identity, shares, Path(rest[1]))
"""


def killed(step: str, *arguments: object) -> int:
    environment = {**os.environ, "MOOR_KILL_AT": step}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.run(command, env=environment, timeout=60, check=False).returncode


def share_files(directory: Path, locked, *names: str) -> list[Path]:
    written = []
    for share in shares(locked, *names):
        written.append(directory / f"{share.custodian}.share")
        written[-1].write_bytes(schema.encode(share))
    return written


@pytest.mark.parametrize("step", ["hsm.backup.wrapped", "file.beside", "hsm.backup.written"])
def test_a_backup_that_is_killed(saved, tmp_path, step):
    """verifies that: kill -9 at any step leaves no backup or a whole one, and the token as it was."""
    _, made, _, _ = saved
    files = share_files(tmp_path, backup.load_custody(made.location), "ada", "bo")
    where = made.location.pin_file.parent
    assert killed(step, "create", where, tmp_path / "out.backup", *files) == -9
    if (tmp_path / "out.backup").exists():
        assert step == "hsm.backup.written"
        backup.verify((tmp_path / "out.backup").read_bytes(), made.keys.identity)
    with open_token(made.location) as token:
        assert {each.label for each in token.inspect()} >= {ISSUING_CA, WRAPPING}
        assert not any(each.label == "backup-wrapping" for each in token.inspect())
    again = backup.create(made.location, shares(backup.load_custody(made.location), "ada", "bo"), tmp_path / "2", now=NOW)
    assert len(again.keys) == 5


@pytest.mark.parametrize("step", ["file.beside", "hsm.restore.token", "hsm.restore.keys", "hsm.restore.proven"])
def test_a_restore_that_is_killed(saved, tmp_path, step):
    """verifies that: kill -9 at any step leaves nothing that looks like a token, and the next attempt succeeds."""
    directory, made, sealed, written = saved
    from moorline.wire import keys

    file = tmp_path / "alpha.backup"
    file.write_bytes((directory / "alpha.backup").read_bytes())
    file.with_suffix(".public").write_bytes(keys.public_bytes(made.keys.identity))
    files = share_files(tmp_path, written.key, "ada", "cy")
    assert killed(step, "restore", file, tmp_path / "new", *files) == -9
    assert not (tmp_path / "new").exists()
    assert killed("", "restore", file, tmp_path / "new", *files) == 0
    from moorline.hsm.token.softhsm import location_in

    with open_token(location_in(tmp_path / "new")) as token:
        assert token.unseal(WRAPPING, sealed, b"place") == b"storage key"
