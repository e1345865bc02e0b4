"""Boot logs by their digest, each once; progress names the digest."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    logs = op.create_table(
        "boot_logs",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.add_column("progress", sa.Column("boot_log", sa.LargeBinary))
    progress = sa.table("progress", sa.column("host"), sa.column("event_log"), sa.column("boot_log"))
    connection = op.get_bind()
    kept: set[bytes] = set()
    for host, data in connection.execute(sa.select(progress.c.host, progress.c.event_log)).all():
        digest = hashlib.sha256(data).digest()
        if digest not in kept:
            kept.add(digest)
            connection.execute(sa.insert(logs).values(digest=digest, data=data))
        connection.execute(sa.update(progress).where(progress.c.host == host).values(boot_log=digest))
    with op.batch_alter_table("progress") as table:
        table.alter_column("boot_log", existing_type=sa.LargeBinary, nullable=False)
        table.drop_column("event_log")
    op.create_index("progress_by_boot_log", "progress", ["boot_log"])
