"""Verdicts gained and lost, as events with a cursor; and which hosts stand, so that each change is told once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("cursor", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("code", sa.String(128), nullable=False),
        sa.Column("result_expires", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "standings",
        sa.Column("host", sa.String(63), sa.ForeignKey("hosts.host"), primary_key=True),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    # Hosts that stood before there were events: when their lease runs out, or their verdict changes, that is the first one.
    op.execute(
        "INSERT INTO standings (host, expires) SELECT host, expires FROM results WHERE status = 'affirming' AND withdrawn IS NULL"
    )
