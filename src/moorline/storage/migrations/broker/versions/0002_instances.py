"""Each generation of an instance with its own storage key, what was revoked and retired, and which hosts lost their verdict."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "generations",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("code", sa.String(128), nullable=False),
        sa.Column("commitment", sa.LargeBinary, nullable=False),
        sa.Column("destroyed", sa.String(128), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_index("generations_by_host", "generations", ["host", "state"])
    op.create_table(
        "storage_keys",
        sa.Column("instance", sa.String(63), primary_key=True),
        sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("wrapped", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "revocations",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("instance", sa.String(63), nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("code", sa.String(128), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary),
        sa.Column("height", sa.BigInteger),
    )
    op.create_table(
        "host_losses",
        sa.Column("host", sa.String(63), primary_key=True),
        sa.Column("cursor", sa.BigInteger, nullable=False),
        sa.Column("code", sa.String(128), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    # Instances from before have no commitment here, so they cannot resume a session; they can be halted, retired and revoked.
    empty = "x''" if op.get_bind().dialect.name == "sqlite" else "''::bytea"
    op.execute(
        "INSERT INTO generations (instance, generation, service, host, state, code, commitment, destroyed, at) "
        f"SELECT instance, generation, service, host, 'live', '', {empty}, '', at FROM launches"
    )
