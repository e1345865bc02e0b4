"""Hosts whose IMA list comes in pieces: how many came, and since when; 0 is a list that was whole."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("progress", sa.Column("pieces", sa.Integer, nullable=False, server_default="0"))
    op.add_column("progress", sa.Column("pieces_since", sa.BigInteger, nullable=False, server_default="0"))
