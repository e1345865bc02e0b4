"""The orchestrator's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table("facts", sa.Column("name", sa.String(64), primary_key=True), sa.Column("value", sa.LargeBinary, nullable=False))
    op.create_table(
        "packages",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("csar", sa.LargeBinary, nullable=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("use_case", sa.String(8), nullable=False),
        sa.Column("jurisdiction", sa.String(64), nullable=False),
        sa.Column("memory_mib", sa.Integer, nullable=False),
        sa.Column("pids", sa.Integer, nullable=False),
        sa.Column("signer", sa.LargeBinary, nullable=False),
        sa.Column("signer_name", sa.Text, nullable=False),
        sa.Column("onboarded", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "functions",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("hsm", sa.String(63), nullable=False),
        sa.Column("package", sa.LargeBinary, sa.ForeignKey("packages.digest"), nullable=False),
        sa.Column("contracts", sa.Text, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("requested", sa.BigInteger, nullable=False),
        sa.Column("placement", sa.Text),
        sa.Column("host", sa.String(63)),
        sa.Column("configuration", sa.LargeBinary),
        sa.Column("intent", sa.LargeBinary),
        sa.Column("reply_key", sa.LargeBinary),
        sa.Column("broker", sa.String(256)),
        sa.Column("launch_fields", sa.LargeBinary),
        sa.Column("token", sa.LargeBinary),
        sa.Column("launcher", sa.String(256)),
        sa.Column("address", sa.String(256)),
        sa.Column("spiffe_id", sa.String(512)),
        sa.Column("problem", sa.Text),
    )
    op.create_index("functions_by_state", "functions", ["state"])
    op.create_table(
        "events",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("instance", sa.String(63), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("says", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_instance", "events", ["instance", "number"])
