"""Which processes of a verifier live, and which part of the fleet each of them watches."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "watchers",
        sa.Column("process", sa.String(32), primary_key=True),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("ready", sa.Boolean, nullable=False),
    )
    op.create_table(
        "watched",
        sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("process", sa.String(32), nullable=False),
    )
