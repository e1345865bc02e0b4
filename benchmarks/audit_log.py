"""Secure log: entries appended and verified, against the two hashes an entry costs at least; and checkpoints of it.

Targets (ARCHITECTURE.md): 50,000 entries/s appended in memory, 1,000,000 verified in 10 s. In a service an append also waits
for the database transaction it is part of, which is measured by what the transaction is for.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from moorline.audit import log, merkle
from moorline.clock import Instant
from moorline.storage import audit_store
from moorline.storage.database import open_database

ENTRIES: Final = 1_000_000
APPENDED: Final = 200_000
DURABLE: Final = 200
DOMAIN: Final = "broker"
DETAILS: Final = {"launcher": "ab" * 32, "epoch": "3", "sequence": "17", "instance": "records-1", "host": "h1"}


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def written(count: int) -> tuple[log.SecureLog, list[bytes]]:
    """A log of so many launches."""
    chain, entries = log.SecureLog(domain=DOMAIN), []
    for number in range(count):
        chain, data = chain.appended(
            time=Instant(1_790_000_000 + number), event="launch-consumed", subject=f"records-{number}", details=DETAILS
        )
        entries.append(data)
    return chain, entries


def hashed(entries: list[bytes]) -> None:
    """The digest of each entry and of its leaf: the least that a chain under a Merkle root takes."""
    for data in entries:
        hashlib.sha256(b"\x00" + data).digest()
        hashlib.sha256(b"\x01" + data).digest()


def durable(folder: Path) -> float:
    """Entries a second, each in a transaction of its own, as a service writes them (SQLite, synchronous=FULL)."""
    engine = open_database(f"sqlite:///{folder / 'verifier.db'}", "verifier")

    def work() -> None:
        for number in range(DURABLE):
            with engine.begin() as connection:
                audit_store.append(connection, DOMAIN, at=Instant(number), event="launch-consumed", body=DETAILS)

    return DURABLE / seconds(work)


def main() -> None:
    appended = APPENDED / seconds(lambda: written(APPENDED))
    chain, entries = written(ENTRIES)
    checkpoint = chain.checkpoint()
    verified = seconds(lambda: log.verify(entries, domain=DOMAIN, checkpoints=(checkpoint,)))
    bare = seconds(lambda: hashed(entries))
    leaves = log.leaves_of(entries)
    proof = seconds(lambda: merkle.consistency_proof(leaves, ENTRIES - 1000))
    with tempfile.TemporaryDirectory() as name:
        stored = durable(Path(name))
    print(f"entries of {len(entries[0])} bytes")
    print(f"appended in memory          {appended:>10,.0f} /s          (target 50,000/s)")
    print(f"1,000,000 verified          {verified:>10.2f} s  {verified / bare:>5.1f}   (target 10 s)")
    print(f"their two hashes alone      {bare:>10.2f} s  {1.0:>5.1f}")
    print(f"consistency proof of them   {proof:>10.2f} s")
    print(f"appended, own transaction   {stored:>10,.0f} /s")


if __name__ == "__main__":
    main()
