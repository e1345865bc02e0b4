"""A database as a collateral store, for services: several processes, one file, marks and items in one transaction."""

from __future__ import annotations

import hashlib
from typing import Final

import sqlalchemy as sa

from moorline.clock import Instant
from moorline.storage.collateral_store import (
    CollateralStore,
    ItemRecord,
    Put,
    StoredItem,
    item_of,
    number_bytes,
    number_of,
    record_of,
)
from moorline.storage.database import open_database
from moorline.storage.transactions import reading, retried, writing
from moorline.verification.collateral import ItemName, Mark, advance
from moorline.wire import schema

_ITEMS: Final = sa.table("items", sa.column("name"), sa.column("record"), sa.column("data"))
_MARKS: Final = sa.table(
    "marks", sa.column("name"), sa.column("issued"), sa.column("evaluation"), sa.column("number"), sa.column("content")
)


@retried
class SqliteStore(CollateralStore):
    """The store at a database URL. Raises as `open_database`."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, "collateral")

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def names(self) -> tuple[ItemName, ...]:
        """As the port says."""
        with reading(self._engine) as connection:
            return tuple(sorted(ItemName.parse(row.name) for row in connection.execute(sa.select(_ITEMS.c.name))))

    def get(self, name: ItemName) -> StoredItem | None:
        """As the port says."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(_ITEMS).where(_ITEMS.c.name == str(name))).one_or_none()
        if row is None:
            return None
        return item_of(schema.decode(ItemRecord, row.record), row.data, hashlib.sha256(row.data).digest())

    def mark(self, name: ItemName) -> Mark | None:
        """As the port says."""
        with reading(self._engine) as connection:
            return _mark(connection, name)

    def put(self, item: StoredItem) -> Put:
        """As the port says."""
        text = str(item.name)
        record = record_of(item, hashlib.sha256(item.data).digest())
        with writing(self._engine) as connection:
            # Writers are one after the other, so the second of two that store at once sees the mark of the first.
            mark = advance(_mark(connection, item.name), item.judged)
            before = connection.execute(sa.select(_ITEMS.c.record).where(_ITEMS.c.name == text)).scalar_one_or_none()
            connection.execute(sa.delete(_MARKS).where(_MARKS.c.name == text))
            connection.execute(sa.delete(_ITEMS).where(_ITEMS.c.name == text))
            connection.execute(sa.insert(_ITEMS).values(name=text, record=schema.encode(record), data=item.data))
            connection.execute(
                sa.insert(_MARKS).values(
                    name=text,
                    issued=mark.issued,
                    evaluation=mark.evaluation,
                    number=number_bytes(mark.number),
                    content=mark.content,
                )
            )
        unchanged = before is not None and schema.decode(ItemRecord, before).digest == record.digest
        return Put.UNCHANGED if unchanged else Put.STORED

    def drop(self, name: ItemName) -> None:
        """As the port says."""
        with writing(self._engine) as connection:
            connection.execute(sa.delete(_ITEMS).where(_ITEMS.c.name == str(name)))


def _mark(connection: sa.Connection, name: ItemName) -> Mark | None:
    row = connection.execute(sa.select(_MARKS).where(_MARKS.c.name == str(name)).with_for_update()).one_or_none()
    if row is None:
        return None
    return Mark(issued=Instant(row.issued), evaluation=row.evaluation, number=number_of(row.number), content=row.content)
