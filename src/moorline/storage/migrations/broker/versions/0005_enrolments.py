"""Ways in for devices besides one-time codes: installers' accounts, manufacturers' identities; what waits for a person."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "enrolment_code_secrets",
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "enrolment_accounts",
        sa.Column("account", sa.String(255), primary_key=True),
        sa.Column("salt", sa.LargeBinary, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("prefix", sa.String(63), nullable=False),
        sa.Column("remaining", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("approval", sa.Boolean, nullable=False),
    )
    op.create_table(
        "manufactured_devices",
        sa.Column("issuer", sa.String(400), primary_key=True),
        sa.Column("serial_number", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(63), nullable=False, unique=True),
    )
    op.create_table(
        "waiting_enrolments",
        sa.Column("device", sa.String(63), primary_key=True),
        sa.Column("key_digest", sa.LargeBinary, nullable=False),
        sa.Column("applicant", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "server_keys",
        sa.Column("serial", sa.String(48), primary_key=True),
        sa.Column("device", sa.String(63), nullable=False),
    )
    op.create_index("server_keys_by_device", "server_keys", ["device"])
