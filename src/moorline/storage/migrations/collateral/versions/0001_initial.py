"""Items of collateral, and for each name how far it has come. Marks outlive items: that is what they are for."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "items",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("record", sa.LargeBinary, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "marks",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("issued", sa.BigInteger, nullable=False),
        sa.Column("evaluation", sa.BigInteger, nullable=True),
        # a CRL number has up to 20 octets (RFC 5280 5.2.3): more than any integer column holds
        sa.Column("number", sa.LargeBinary, nullable=True),
        sa.Column("content", sa.LargeBinary, nullable=True),
    )
