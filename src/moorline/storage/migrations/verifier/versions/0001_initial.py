"""The verifier's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("host", sa.String(63), primary_key=True),
        sa.Column("ek_digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("ak_public", sa.LargeBinary, nullable=False),
        sa.Column("root", sa.String(16), nullable=False),
        sa.Column("enrolled", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "enrolments",
        sa.Column("enrolment", sa.LargeBinary, primary_key=True),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("ek_digest", sa.LargeBinary, nullable=False),
        sa.Column("ak_public", sa.LargeBinary, nullable=False),
        sa.Column("root", sa.String(16), nullable=False),
        sa.Column("secret_digest", sa.LargeBinary, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    op.create_index("enrolments_by_host", "enrolments", ["host", "expires"])
    op.create_table(
        "challenges",
        sa.Column("nonce", sa.LargeBinary, primary_key=True),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
    )
    op.create_index("challenges_by_host", "challenges", ["host", "expires"])
    op.create_table(
        "progress",
        sa.Column("host", sa.String(63), sa.ForeignKey("hosts.host"), primary_key=True),
        sa.Column("clock", sa.BigInteger, nullable=False),
        sa.Column("reset_count", sa.BigInteger, nullable=False),
        sa.Column("restart_count", sa.BigInteger, nullable=False),
        sa.Column("safe", sa.Boolean, nullable=False),
        sa.Column("ima_count", sa.BigInteger, nullable=False),
        sa.Column("ima_running", sa.LargeBinary, nullable=False),
        sa.Column("reference", sa.LargeBinary, nullable=False),
        sa.Column("standing", sa.LargeBinary, nullable=False),
        sa.Column("event_log", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "results",
        sa.Column("host", sa.String(63), sa.ForeignKey("hosts.host"), primary_key=True),
        sa.Column("ear", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("code", sa.String(128)),
        sa.Column("issued", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.BigInteger, nullable=False),
        sa.Column("withdrawn", sa.String(128)),
    )
    op.create_table(
        "reference_serials",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("serial", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "facts", sa.Column("name", sa.String(64), primary_key=True), sa.Column("value", sa.LargeBinary, nullable=False)
    )
