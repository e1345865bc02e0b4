"""The broker's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table("facts", sa.Column("name", sa.String(64), primary_key=True), sa.Column("value", sa.BigInteger, nullable=False))
    op.create_table("documents", sa.Column("name", sa.String(64), primary_key=True), sa.Column("value", sa.LargeBinary, nullable=False))
    op.create_table(
        "epochs",
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("opened", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("accept_until", sa.BigInteger, nullable=False),
        sa.Column("wrapped", sa.LargeBinary),
    )
    op.create_table(
        "launchers",
        sa.Column("launcher", sa.LargeBinary, primary_key=True),
        sa.Column("ticket", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("measurement", sa.LargeBinary, nullable=False),
        sa.Column("chip", sa.LargeBinary, nullable=False),
        sa.Column("admitted", sa.BigInteger, nullable=False),
        sa.Column("revoked", sa.BigInteger),
    )
    op.create_table(
        "leases",
        sa.Column("launcher", sa.LargeBinary, sa.ForeignKey("launchers.launcher"), primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True),
        sa.Column("first", sa.BigInteger, primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("void", sa.Boolean, nullable=False),
    )
    op.create_table(
        "pool",
        sa.Column("entry", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("profile", sa.String(32), nullable=False),
        sa.Column("public", sa.LargeBinary, nullable=False),
        sa.Column("wrapped", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("pool_by_service", "pool", ["service", "profile", "entry"])
    op.create_table(
        "launches",
        sa.Column("launcher", sa.LargeBinary, primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("kem_digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("signing_digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("profile", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("instance", sa.String(63), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("public", sa.LargeBinary, nullable=False),
        sa.Column("wrapped", sa.LargeBinary),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "instances",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "alarms",
        sa.Column("alarm", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("says", sa.Text, nullable=False),
        sa.Column("first", sa.Text, nullable=False),
        sa.Column("second", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "enrolment_codes",
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("code_digest", sa.LargeBinary, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("key_digest", sa.LargeBinary),
    )
    op.create_table(
        "devices",
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("key_digest", sa.LargeBinary, nullable=False),
        sa.Column("enrolled", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(48), primary_key=True),
        sa.Column("spiffe_id", sa.Text, nullable=False),
        sa.Column("key_digest", sa.LargeBinary, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("der", sa.LargeBinary, nullable=False),
    )
    op.create_index("certificates_by_name", "certificates", ["spiffe_id", "not_after"])
    op.create_table(
        "peers",
        sa.Column("provider", sa.String(63), primary_key=True),
        sa.Column("hsm", sa.String(63), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("transcript", sa.LargeBinary, nullable=False),
        sa.Column("bundle", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
