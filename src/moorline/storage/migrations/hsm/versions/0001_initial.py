"""Keys with their states and dates, approvals by custodians, and tenants of a virtual HSM with their logs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hsm_keys",
        sa.Column("label", sa.String(128), primary_key=True),
        sa.Column("role", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("active", sa.BigInteger),
        sa.Column("retiring", sa.BigInteger),
        sa.Column("retire_after", sa.BigInteger),
        sa.Column("retired", sa.BigInteger),
        sa.Column("destroyed", sa.BigInteger),
        sa.Column("certificate", sa.LargeBinary),
    )
    op.create_table(
        "hsm_requests",
        sa.Column("id", sa.LargeBinary(16), primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("used", sa.BigInteger),
    )
    op.create_table(
        "hsm_approvals",
        sa.Column("request", sa.LargeBinary(16), primary_key=True),
        sa.Column("custodian", sa.String(63), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("signed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "hsm_tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("token", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("uid", sa.BigInteger, nullable=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.Column("keys", sa.Integer, nullable=False),
        sa.Column("operations", sa.Integer, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.Column("proof", sa.LargeBinary),
    )
    op.create_table(
        "hsm_tenant_log",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
