"""Every row of a broker's database that holds something sealed under the token's wrapping key, for sealing it again.

A table that is missing here would lose its content when a wrapping key is destroyed; tests/hsm/test_rotation.py compares
this list with what the source seals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from moorline.storage.broker_store import BrokerStore

_BATCH: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedRow:
    """A row: where it is, what is sealed, and the columns that say what it is bound to."""

    table: str
    key: tuple[object, ...]
    sealed: bytes
    facts: dict[str, Any]

    def text(self, name: str) -> str:
        """A text column."""
        return str(self.facts[name])

    def number(self, name: str) -> int:
        """An integer column."""
        return int(self.facts[name])

    def bytes(self, name: str) -> bytes:
        """A binary column."""
        return bytes(self.facts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    keys: tuple[str, ...]
    sealed: str
    facts: tuple[str, ...]


_SOURCES: Final = {
    "pool": _Source(keys=("entry",), sealed="wrapped", facts=("service", "profile", "public")),
    "launches": _Source(keys=("launcher", "epoch", "sequence"), sealed="wrapped", facts=("service", "profile", "public")),
    "epochs": _Source(keys=("epoch",), sealed="wrapped", facts=("epoch",)),
    "storage_keys": _Source(keys=("instance", "generation"), sealed="wrapped", facts=("instance", "generation")),
    "enrolment_code_secrets": _Source(keys=("device",), sealed="sealed", facts=("device",)),
}


class SealedRows:
    """The rows of one broker's store."""

    tables: Final = tuple(_SOURCES)

    def __init__(self, store: BrokerStore) -> None:
        self._store = store

    def batch(self, table: str, after: tuple[object, ...] | None) -> tuple[SealedRow, ...]:
        """The next rows of a table behind a key, in order of keys."""
        source = _SOURCES[table]
        columns = dict.fromkeys((*source.keys, source.sealed, *source.facts))
        named = sa.table(table, *(sa.column(name) for name in columns))
        keys = [named.c[name] for name in source.keys]
        query = sa.select(named).where(named.c[source.sealed].is_not(None)).order_by(*keys).limit(_BATCH)
        if after is not None:
            query = query.where(sa.tuple_(*keys) > sa.tuple_(*(sa.literal(value) for value in after)))
        with self._store.reading() as c:
            found = [dict(row) for row in c.execute(query).mappings()]
            if table == "storage_keys":
                for row in found:
                    row.update(_names_of(c, row["instance"], row["generation"]))
        return tuple(
            SealedRow(
                table=table,
                key=tuple(row[name] for name in source.keys),
                sealed=bytes(row[source.sealed]),
                facts={name: value for name, value in row.items() if name != source.sealed},
            )
            for row in found
        )

    def replace(self, row: SealedRow, sealed: bytes) -> bool:
        """Put what was sealed again in the place of what was read; False if the row holds something else by now."""
        source = _SOURCES[row.table]
        named = sa.table(row.table, *(sa.column(name) for name in (*source.keys, source.sealed)))
        where = [named.c[name] == value for name, value in zip(source.keys, row.key, strict=True)]
        with self._store.transaction() as c:
            done = c.execute(
                sa.update(named).where(*where, named.c[source.sealed] == row.sealed).values({source.sealed: sealed})
            )
            return done.rowcount == 1


def _names_of(c: sa.Connection, instance: str, generation: int) -> dict[str, str]:
    launches = sa.table("launches", *(sa.column(name) for name in ("tenant", "service", "instance", "generation")))
    row = c.execute(
        sa.select(launches.c.tenant, launches.c.service).where(
            launches.c.instance == instance, launches.c.generation == generation
        )
    ).first()
    return {"tenant": "", "service": ""} if row is None else {"tenant": str(row.tenant), "service": str(row.service)}
