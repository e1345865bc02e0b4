"""What hosts are asked to show at once, and which challenge was given after which question."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "asks",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("host", sa.String(63), sa.ForeignKey("hosts.host"), nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("says", sa.String(256), nullable=False),
        sa.Column("asked_by", sa.String(256), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("until", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("asks_by_host", "asks", ["host"])
    op.add_column("challenges", sa.Column("ask", sa.BigInteger, nullable=False, server_default="0"))
