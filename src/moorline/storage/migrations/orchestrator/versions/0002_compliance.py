"""Compliance: why a function was halted, what its clean-up destroyed, guests that may be left, and the secure log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("functions", sa.Column("placed", sa.BigInteger))
    op.add_column("functions", sa.Column("broker_url", sa.String(512)))
    op.add_column("functions", sa.Column("halt", sa.Text))
    op.add_column("functions", sa.Column("clean_ups", sa.Text, nullable=False, server_default="[]"))
    op.add_column("events", sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"))
    op.add_column("events", sa.Column("host", sa.String(63)))
    op.add_column("events", sa.Column("at_ms", sa.BigInteger))
    op.create_table(
        "left_guests",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("host", sa.String(63), primary_key=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
