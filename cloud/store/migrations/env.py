"""Run migrations on the connection that `cloud.store.migrate` hands in; it holds the lock and the transaction."""

from alembic import context

from cloud.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True, compare_type=True
)
with context.begin_transaction():
    context.run_migrations()
