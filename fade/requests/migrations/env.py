"""Alembic's entry: runs the migrations in the transaction that the ledger has opened."""

from alembic import context

from fade.requests.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
