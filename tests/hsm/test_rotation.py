"""The wrapping key is rotated under work: everything sealed stays readable and is sealed again, killed or not."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import moorline
from moorline.clock import Instant
from moorline.errors import Conflict, NotAuthentic
from moorline.hsm import lifecycle, rotation
from moorline.hsm.keys import WRAPPING
from moorline.hsm.launch_keys import COUNTER, LaunchKeys, Terms
from moorline.hsm.pool import KeyPool, Watermarks
from moorline.hsm.rotation import OVERLAP_S, RotatingToken, require_done, rewrap
from moorline.hsm.token import initialise_softhsm, open_token
from moorline.storage.broker_store import BrokerStore
from moorline.storage.hsm_store import HsmStore
from moorline.storage.sealed_rows import SealedRow, SealedRows

NOW = Instant(1_800_000_000)
SEALED_BY = {
    "hsm/pool.py": {"pool", "launches"},
    "hsm/launch_keys.py": {"epochs", "storage_keys"},
    "services/broker_enrolment.py": {"enrolment_code_secrets"},
}
"""Which module seals what is in which tables. Whoever adds a place that seals adds its table to storage.sealed_rows."""


def test_every_place_that_seals_is_known():
    """verifies that: no module seals under the wrapping key something that a rotation would not find."""
    root = Path(moorline.__file__).parent
    found = set()
    for path in (each for each in root.rglob("*.py") if "WRAPPING" in each.read_text("utf-8")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "seal":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Name) and first.id == "WRAPPING":
                    found.add(str(path.relative_to(root)))
    assert found == set(SEALED_BY)
    assert set().union(*SEALED_BY.values()) == set(SealedRows.tables)


def prepare(directory: Path) -> None:
    """A token and a database in which something is sealed in every table."""
    location = initialise_softhsm(directory / "t", label="alpha")
    with open_token(location) as token:
        token.generate_wrapping_key(WRAPPING)
    with opened(directory) as parts:
        token, store, hsm = parts
        hsm.put_keys((lifecycle.adopted(WRAPPING, WRAPPING, NOW),))
        pool = KeyPool(token, store, Watermarks(low=3, high=3))
        pool.refill("records", "tls")
        LaunchKeys(token, store, Terms(epoch_s=3600, grace_s=60, lease_count=10, lease_s=60)).open_epoch(NOW)
        with store.transaction() as c:
            import sqlalchemy as sa

            place = b"whatever"
            from moorline.digest import tagged
            from moorline.hsm.launch_keys import storage_place
            from moorline.hsm.pool import entry_place

            place = entry_place("records", "tls", b"public")
            c.execute(
                sa.text(
                    "INSERT INTO launches (launcher, epoch, sequence, kem_digest, signing_digest, session, service, profile,"
                    " tenant, instance, generation, host, public, wrapped, state, at) VALUES (:b, 1, 0, :b, :c, 's',"
                    " 'records', 'tls', 'clinic', 'i-1', 1, 'h1', :p, :w, 'consumed', 1)"
                ),
                {"b": b"1" * 32, "c": b"2" * 32, "p": b"public", "w": token.seal(WRAPPING, b"key", place)},
            )
            sealed = token.seal(WRAPPING, b"storage", storage_place("alpha", "clinic", "records", "i-1", 1))
            c.execute(sa.text("INSERT INTO storage_keys VALUES ('i-1', 1, :w)"), {"w": sealed})
            code = token.seal(WRAPPING, b"code", tagged("enrolment-code-secret", b"d-1"))
            c.execute(sa.text("INSERT INTO enrolment_code_secrets (device, sealed) VALUES ('d-1', :w)"), {"w": code})


class opened:  # noqa: N801 - a context
    """Token, broker's store and HSM's store of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self):
        from moorline.hsm.token.softhsm import location_in

        url = f"sqlite:///{self.directory / 'broker.db'}"
        self.store, self.hsm = BrokerStore.open(url), HsmStore.open(url)
        self.token = RotatingToken(open_token(location_in(self.directory / "t")), self.hsm)
        return self.token, self.store, self.hsm

    def __exit__(self, *_):
        self.token.close()
        self.store.close()
        self.hsm.close()


def rotate(token: RotatingToken, hsm: HsmStore) -> str:
    row = lifecycle.begun(hsm.key_rows(), WRAPPING, NOW)
    token.inner.generate_wrapping_key(row.label)
    hsm.put_keys((row,))
    hsm.put_keys(lifecycle.activated(hsm.key_rows(), row.label, NOW, overlap_s=OVERLAP_S))
    token.refresh()
    return row.label


def everything(token, rows: SealedRows) -> list[SealedRow]:
    return [row for table in rows.tables for row in rows.batch(table, None)]


def opened_under(token: RotatingToken, rows: SealedRows, label: str) -> int:
    from moorline.hsm.rotation import _place

    count = 0
    for row in everything(token, rows):
        try:
            token.inner.unseal(label, row.sealed, _place(row, "alpha"))
            count += 1
        except NotAuthentic:
            pass
    return count


def test_rotation_under_work(tmp_path):
    """verifies that: after a rotation old rows open, new ones are under the new key, and a pass moves all."""
    prepare(tmp_path)
    with opened(tmp_path) as (token, store, hsm):
        rows = SealedRows(store)
        total = len(everything(token, rows))
        assert {row.table for row in everything(token, rows)} == set(rows.tables)
        old = token.seal(WRAPPING, b"old", b"x")
        label = rotate(token, hsm)
        assert token.unseal(WRAPPING, old, b"x") == b"old"
        sealed = token.seal(WRAPPING, b"new", b"x")
        assert token.inner.unseal(label, sealed, b"x") == b"new"
        KeyPool(token, store, Watermarks(low=5, high=5)).refill("records", "tls")
        assert opened_under(token, rows, WRAPPING) == total
        assert opened_under(token, rows, label) == 2

        done = rewrap(token, rows, provider="alpha")
        assert (done.sealed_again, done.already, done.unreadable) == (total, 2, 0)
        with pytest.raises(NotAuthentic) as caught:
            require_done(done, WRAPPING, NOW)
        assert caught.value.code == "key.still_in_use"
        again = rewrap(token, rows, provider="alpha")
        require_done(again, WRAPPING, NOW)
        assert opened_under(token, rows, label) == total + 2

        later = Instant(NOW + OVERLAP_S)
        hsm.put_keys((lifecycle.retired(hsm.key_rows(), WRAPPING, later),))
        token.refresh()
        assert token.labels() == (label,)
        token.inner.destroy_secret(WRAPPING)
        assert rewrap(token, rows, provider="alpha").complete


def test_a_row_that_changes_meanwhile_is_left(tmp_path):
    """verifies that: a row another process replaced between reading and writing keeps what that process wrote."""
    prepare(tmp_path)
    with opened(tmp_path) as (token, store, hsm):
        rows = SealedRows(store)
        row = rows.batch("pool", None)[0]
        assert rows.replace(row, b"by another process")
        assert not rows.replace(row, b"by us")
        assert rows.batch("pool", None)[0].sealed == b"by another process"
        rotate(token, hsm)
        done = rewrap(token, rows, provider="alpha")
        assert done.unreadable == 1
        assert not done.complete


def test_a_rotation_in_another_process_is_learnt_of(tmp_path):
    """verifies that: a broker that does not know of a rotation opens what the other sealed under the new key."""
    prepare(tmp_path)
    with opened(tmp_path) as (token, _, hsm):
        other = RotatingToken(token.inner, hsm)
        rotate(token, hsm)
        assert other.labels() == (WRAPPING,)
        assert other.unseal(WRAPPING, token.seal(WRAPPING, b"m", b"x"), b"x") == b"m"
        assert len(other.labels()) == 2
        with pytest.raises(NotAuthentic):
            other.unseal(WRAPPING, bytes(40), b"x")


def test_a_rotation_in_another_process_is_followed_in_time(tmp_path, monkeypatch):
    """verifies that: within REFRESH_S, before the overlap ends, every process seals under the new key, whatever it opens."""
    assert rotation.REFRESH_S < OVERLAP_S
    prepare(tmp_path)
    passed = [1000.0]
    monkeypatch.setattr(rotation.time, "monotonic", lambda: passed[0])
    with opened(tmp_path) as (token, _, hsm):
        other = RotatingToken(token.inner, hsm)
        label = rotate(token, hsm)
        passed[0] += rotation.REFRESH_S - 1
        assert token.inner.unseal(WRAPPING, other.seal(WRAPPING, b"m", b"x"), b"x") == b"m"
        passed[0] += 1
        assert token.inner.unseal(label, other.seal(WRAPPING, b"m", b"x"), b"x") == b"m"


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_rotation as t
with t.opened(Path(sys.argv[2])) as (token, store, hsm):
    if len(hsm.key_rows()) == 1:
        t.rotate(token, hsm)
    done = t.rewrap(token, t.SealedRows(store), provider="alpha")
    print(done.sealed_again, done.already, done.unreadable)
"""


def acted(directory: Path, kill_at: str = "") -> tuple[int, str]:
    environment = {**os.environ, "MOOR_KILL_AT": kill_at}
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode, done.stdout.strip()


def test_rewrapping_that_is_killed_goes_on(tmp_path):
    """verifies that: kill -9 behind every single row loses nothing; the next run goes on behind it."""
    prepare(tmp_path)
    with opened(tmp_path) as (token, store, _):
        total = len(everything(token, SealedRows(store)))
    assert acted(tmp_path, "hsm.rewrap.row")[0] == -9
    assert acted(tmp_path)[1] == f"{total - 1} 1 0"
    with opened(tmp_path) as (token, store, _):
        assert rewrap(token, SealedRows(store), provider="alpha").complete


def test_the_counter_passes_through(tmp_path):
    """verifies that: only the wrapping key has generations; everything else is the token's own."""
    prepare(tmp_path)
    with opened(tmp_path) as (token, _, hsm):
        before = token.counter(COUNTER)
        assert token.advance(COUNTER) == before + 1
        assert token.has_secret(WRAPPING)
        rows = hsm.key_rows()
        assert replace(rows[0], certificate=None) == rows[0]


RECORDED = """
import sys
from pathlib import Path
from moorline.clock import Instant
from moorline.storage.hsm_store import HsmStore
from moorline.hsm import lifecycle, rotation
store = HsmStore.open(sys.argv[1])
if sys.argv[2] == "keys":
    row = lifecycle.begun(store.key_rows(), "wrapping", Instant(5))
    store.put_keys((row,))
    store.put_keys(lifecycle.activated(store.key_rows(), row.label, Instant(6), overlap_s=1))
if sys.argv[2] == "approval": store.add_approval(bytes(16), "ada", 5, b"signed")
if sys.argv[2] == "use": store.use_request(bytes(16), Instant(5))
"""


@pytest.mark.parametrize(
    ("step", "what"),
    [("hsm.keys.recorded", "keys"), ("hsm.approval.recorded", "approval"), ("hsm.request.used", "use")],
)
def test_what_was_recorded_survives_the_kill(tmp_path, step, what):
    """verifies that: states, approvals and uses are durable before anything goes on; nothing is used twice."""
    url = f"sqlite:///{tmp_path / 'hsm.db'}"
    store = HsmStore.open(url)
    store.put_keys((lifecycle.adopted(WRAPPING, WRAPPING, NOW),))
    store.add_request(bytes(16), b"request")
    store.close()
    command = [sys.executable, "-c", RECORDED, url, what]
    done = subprocess.run(command, env={**os.environ, "MOOR_KILL_AT": step}, timeout=60, check=False)
    assert done.returncode == -9
    store = HsmStore.open(url)
    if what == "keys":
        assert {row.label: row.state for row in store.key_rows()} == {"wrapping": "active", "wrapping@2": "pre-active"}
    elif what == "approval":
        assert [name for name, _, _ in store.approvals(bytes(16))] == ["ada"]
    else:
        with pytest.raises(Conflict):
            store.use_request(bytes(16), NOW)
    store.close()
