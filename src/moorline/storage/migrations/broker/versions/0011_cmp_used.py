"""CMP transactions that were used: a request that was recorded and is sent again gets nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "cmp_used",
        sa.Column("transaction", sa.LargeBinary, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_index("cmp_used_at", "cmp_used", ["at"])
