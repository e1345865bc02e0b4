"""Decisions about releases and renewals, for who asks why: the newest of each identity and session, pruned by age."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "decisions",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("identity", sa.String(128), nullable=False),
        sa.Column("session", sa.String(512), nullable=False),
        sa.Column("instance", sa.String(63), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("identity", "session"),
        sqlite_autoincrement=True,
    )
    op.create_index("decisions_instance", "decisions", ["instance"])
    op.create_index("decisions_at", "decisions", ["at"])
