"""The certificates that hosts enrolled with, and why a host is refused whose TPM was revoked by its maker."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ek_chains",
        sa.Column("host", sa.String(63), sa.ForeignKey("hosts.host"), primary_key=True),
        sa.Column("certificates", sa.LargeBinary, nullable=False),
    )
    op.add_column("hosts", sa.Column("refused", sa.String(128)))
    op.add_column("enrolments", sa.Column("chain", sa.LargeBinary, nullable=False, server_default=""))
