"""State in subtrees, the log's edge with each block; terms of sequencers, seals of proposals, evidence."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _place(key: str) -> bytes:
    fields = (b"moorline/state-key/v1", key.encode())
    return hashlib.sha256(b"".join(len(one).to_bytes(8, "big") + one for one in fields)).digest()


def upgrade() -> None:
    connection = op.get_bind()
    old = connection.execute(sa.text("SELECT key, value FROM records")).all()
    op.drop_table("records")
    records = op.create_table(
        "records",
        sa.Column("place", sa.LargeBinary, primary_key=True),
        sa.Column("key", sa.String(400), nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
    if old:
        op.bulk_insert(records, [{"place": _place(key), "key": key, "value": value} for key, value in old])
    op.create_table(
        "subtrees",
        sa.Column("prefix", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("key_count", sa.BigInteger, nullable=False),
    )
    op.create_index("nonces_valid_until", "nonces", ["valid_until"])
    op.add_column("blocks", sa.Column("edge", sa.LargeBinary))  # null: this authority fills it in when it opens the database
    op.add_column("blocks", sa.Column("seal", sa.LargeBinary))
    op.create_table(
        "set_changes",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("note", sa.LargeBinary, nullable=False),
        sa.Column("authorities", sa.LargeBinary, nullable=False),
    )
    op.execute(
        "INSERT INTO set_changes (height, note, authorities) "
        "SELECT height, note, authorities FROM blocks WHERE authorities IS NOT NULL"
    )
    op.drop_column("blocks", "authorities")
    op.add_column("signed", sa.Column("time_s", sa.BigInteger))  # null: made by the version before, which kept the line
    op.add_column("signed", sa.Column("seal", sa.LargeBinary))
    op.drop_column("signed", "line")
    op.add_column("proposed", sa.Column("seal", sa.LargeBinary))
    op.add_column("proposed", sa.Column("first_seal", sa.LargeBinary))
    op.create_table(
        "terms",
        sa.Column("term", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("sequencer", sa.String(63), nullable=False),
        sa.Column("certificate", sa.LargeBinary),
    )
    op.create_table(
        "evidence",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("height", sa.BigInteger, nullable=False),
        sa.Column("found_ms", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "marks",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
