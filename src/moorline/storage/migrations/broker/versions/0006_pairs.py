"""Pair keys with other providers' HSMs, keys of the no-PFS profile that were claimed, and what peers told."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pairs",
        sa.Column("provider", sa.String(63), primary_key=True),
        sa.Column("hsm", sa.String(63), primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("initiator", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("peer_point", sa.LargeBinary),
        sa.Column("own_signed", sa.LargeBinary),
        sa.Column("peer_signed", sa.LargeBinary),
        sa.Column("transcript", sa.LargeBinary),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("height", sa.BigInteger),
    )
    op.create_table(
        "device_keys",
        sa.Column("key_id", sa.LargeBinary, primary_key=True),
        sa.Column("instance", sa.String(63), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("contract", sa.String(63), nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "peer_news",
        sa.Column("provider", sa.String(63), primary_key=True),
        sa.Column("hsm", sa.String(63), primary_key=True),
        sa.Column("revoked_up_to", sa.BigInteger, nullable=False),
        sa.Column("revoked", sa.BigInteger, nullable=False),
        sa.Column("contracts", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
