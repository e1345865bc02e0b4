"""The only room that knows SQL: SQLite by default, PostgreSQL at scale, migrations by Alembic."""
