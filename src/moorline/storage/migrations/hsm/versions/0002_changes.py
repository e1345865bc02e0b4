"""A counter of changes to the keys, by which processes that share the database learn of one another's rotations; a turn."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    facts = op.create_table(
        "hsm_facts",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(facts, [{"name": "key-changes", "value": 0}, {"name": "calendar-turn", "value": 0}])
