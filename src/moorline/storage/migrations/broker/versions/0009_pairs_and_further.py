"""How many keys of devices were derived from each pair key; certificates of devices that stand for no renewal."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pairs", sa.Column("uses", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table("further_certificates", sa.Column("serial", sa.String(48), primary_key=True))
