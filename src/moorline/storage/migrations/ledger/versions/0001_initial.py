"""An authority's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "blocks",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("note", sa.LargeBinary, nullable=False),
        sa.Column("leaf", sa.LargeBinary, nullable=False),
        sa.Column("authorities", sa.LargeBinary),
    )
    op.create_table(
        "records",
        sa.Column("key", sa.String(400), primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "nonces",
        sa.Column("nonce", sa.LargeBinary, primary_key=True),
        sa.Column("valid_until", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "transactions",
        sa.Column("id", sa.LargeBinary, primary_key=True),
        sa.Column("height", sa.BigInteger, sa.ForeignKey("blocks.height"), nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "proposed",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "signed",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("line", sa.Text),
    )
    op.create_table(
        "cosignatures",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("authority", sa.String(63), primary_key=True),
        sa.Column("line", sa.Text, nullable=False),
    )
