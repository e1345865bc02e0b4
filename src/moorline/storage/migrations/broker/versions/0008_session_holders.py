"""Which session holds an instance: of several broker processes, the one that opened the newest."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "session_holders",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("generation", sa.BigInteger, primary_key=True),
        sa.Column("nonce", sa.LargeBinary, nullable=False),
    )
