"""Revoked certificates and the number of the newest CRL."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "revoked_certificates",
        sa.Column("serial", sa.String(48), primary_key=True),
        sa.Column("spiffe_id", sa.Text, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("data", sa.LargeBinary),
        sa.Column("height", sa.BigInteger),
    )
