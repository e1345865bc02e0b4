"""Rows of one block side by side: its nonces in one row, its transactions by the last block they could stand in.

And packed subtrees of the state (ledger.packs), which are made as they are written. Ids of transactions were keyed by their
hash alone before: of those it is not known what they were valid until, which 0 says.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    connection = op.get_bind()
    op.create_table(
        "applied",
        sa.Column("valid_until", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.LargeBinary, primary_key=True),
        sa.Column("height", sa.BigInteger, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO applied (valid_until, id, height, position) SELECT 0, id, height, position FROM transactions ORDER BY id"
    )
    op.drop_table("transactions")
    block_nonces = op.create_table(
        "block_nonces",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("nonces", sa.LargeBinary, nullable=False),
    )
    old = connection.execute(sa.text("SELECT nonce, valid_until FROM nonces")).all()
    if old:
        together = b"".join(bytes(nonce) + until.to_bytes(8, "big") for nonce, until in old)
        last = max(until for _, until in old)
        op.bulk_insert(block_nonces, [{"height": 0, "last": last, "nonces": together}])
    op.drop_table("nonces")
    op.create_table(
        "packs",
        sa.Column("prefix", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("pack", sa.LargeBinary, nullable=False),
    )
