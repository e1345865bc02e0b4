"""Databases with bytes flipped in every kind of page: an authority does not open them, and says what is wrong."""

import shutil
import sqlite3
import struct

import pytest

from moorline.errors import Misconfigured
from moorline.storage import damage
from moorline.storage.database import open_database
from moorline.storage.ledger_store import LedgerStore, StateWrites, StoredBlock

PAGE = 4096


def block(height):
    return StoredBlock(height=height, body=bytes(600), note=b"note", leaf=bytes(32), edge=bytes(64))


def filled(file, heights):
    """The store of an authority with so many blocks, still open."""
    store = LedgerStore(open_database(f"sqlite:///{file}", "ledger"))
    for height in heights:
        records = {bytes([height % 256]) + bytes(30) + bytes([one]): (f"key/{height}/{one}", bytes(300)) for one in range(9)}
        writes = StateWrites(records=records, subtrees={height: (bytes(32), 1)}, nonces={})
        store.commit(block(height), writes, transactions=[(height.to_bytes(32, "big"), height + 9)], authorities=None)
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A database with every kind of page in it, no write-ahead log beside it."""
    file = tmp_path_factory.mktemp("damage") / "whole.db"
    filled(file, range(1, 80)).close()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE gone (data BLOB)")
        connection.executemany("INSERT INTO gone VALUES (?)", [(bytes(3000),)] * 20)
        connection.commit()
        connection.execute("DROP TABLE gone")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    damage.judge(f"sqlite:///{file}")
    return file


def pages_of(file, kinds):
    """The numbers of the pages whose first byte says one of these kinds of b-tree page."""
    data = file.read_bytes()
    return [at // PAGE for at in range(PAGE, len(data), PAGE) if data[at] in kinds]


def trunk(file):
    """The first page of the list of free pages (SQLite, "Database File Format", 1.3.6)."""
    return struct.unpack(">I", file.read_bytes()[32:36])[0] - 1


@pytest.mark.parametrize("kind", ["header", "interior", "leaf", "freelist"])
def test_a_damaged_page_of_every_kind_is_found_before_anything_is_served(whole, tmp_path, kind):
    """verifies that: flipped bytes in the file's header, an inner page, a leaf and the free list keep an authority out."""
    file = tmp_path / "damaged.db"
    shutil.copy(whole, file)
    data = bytearray(file.read_bytes())
    page = {
        "header": lambda: 0,
        "interior": lambda: pages_of(whole, {2, 5})[0],
        "leaf": lambda: pages_of(whole, {10, 13})[5],
        "freelist": lambda: trunk(whole),
    }[kind]()
    places = range(16, 40) if kind == "header" else range(page * PAGE, page * PAGE + 12)
    for at in places:
        data[at] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(Misconfigured, match=r"ledger.database_corrupt") as caught:
        damage.judge(f"sqlite:///{file}")
    assert "moor ledger repair" in caught.value.remedy
    if kind in {"interior", "leaf"}:
        assert f"Page {page + 1}:" in caught.value.got or "malformed" in caught.value.got


@pytest.fixture
def logged(tmp_path):
    """A copy of a database whose last transactions are in its write-ahead log, as after a kill."""
    store = filled(tmp_path / "open.db", range(1, 12))
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"open.db{suffix}", tmp_path / f"killed.db{suffix}")
    store.close()
    return tmp_path / "killed.db"


def test_a_log_left_by_a_kill_is_taken_up(logged):
    damage.judge(f"sqlite:///{logged}")
    store = LedgerStore(open_database(f"sqlite:///{logged}", "ledger"))
    assert store.head().height == 11
    store.close()


@pytest.mark.parametrize("where", ["header", "salt", "page", "checksum"])
def test_a_damaged_log_is_not_taken_for_a_shorter_one(logged, where):
    """verifies that: SQLite alone would forget what was committed behind the damage; an authority refuses to."""
    log = logged.with_name("killed.db-wal")
    data = bytearray(log.read_bytes())
    frame = 32 + 3 * (PAGE + 24)
    data[{"header": 17, "salt": frame + 9, "page": frame + 24 + 100, "checksum": frame + 17}[where]] ^= 1
    log.write_bytes(data)
    with pytest.raises(Misconfigured, match=r"ledger.database_corrupt.*write-ahead log"):
        damage.judge(f"sqlite:///{logged}")


def test_a_frame_that_was_being_written_is_no_damage(logged):
    """verifies that: what a killed process did not finish was never acknowledged, and is let go."""
    log = logged.with_name("killed.db-wal")
    data = log.read_bytes()
    log.write_bytes(data[: len(data) - PAGE // 2])
    damage.judge(f"sqlite:///{logged}")


def test_a_read_of_a_damaged_page_says_which_table(whole, tmp_path):
    """verifies that: a file too large to be read at the start is refused where it is read, by the table's name."""
    file = tmp_path / "damaged.db"
    shutil.copy(whole, file)
    data = bytearray(file.read_bytes())
    with sqlite3.connect(whole) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'blocks'").fetchone()
    connection.close()
    for at in range((root - 1) * PAGE, (root - 1) * PAGE + 12):
        data[at] ^= 0xFF
    file.write_bytes(data)
    store = LedgerStore(open_database(f"sqlite:///{file}", "ledger"))
    with pytest.raises(Misconfigured, match=r"ledger.database_corrupt.*in table blocks"):
        store.head()
    store.close()


def test_what_is_no_file_is_not_judged(tmp_path):
    damage.judge(f"sqlite:///{tmp_path / 'none.db'}")
    damage.judge("postgresql+pg8000://user@/name?unix_sock=/nowhere")
