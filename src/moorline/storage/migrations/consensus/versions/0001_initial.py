"""What an authority of the CometBFT engine keeps beside CometBFT's own data."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "consensus_blocks",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("time_ms", sa.BigInteger, nullable=False),
        sa.Column("app_hash", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.LargeBinary),
    )
    op.create_table(
        "consensus_anchors",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("anchor", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "consensus_set_changes",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("authorities", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "consensus_transactions",
        sa.Column("id", sa.LargeBinary, primary_key=True),
        sa.Column("height", sa.BigInteger, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "consensus_records",
        sa.Column("key", sa.String(400), primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "consensus_nonces",
        sa.Column("nonce", sa.LargeBinary, primary_key=True),
        sa.Column("valid_until", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "consensus_misbehaviour",
        sa.Column("height", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("address", sa.LargeBinary, primary_key=True),
        sa.Column("kind", sa.String(32), primary_key=True),
        sa.Column("authority", sa.String(63), nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
