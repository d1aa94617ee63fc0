"""Bring the store to this release's tables, at start-up, under a lock, in one transaction.

Processes that start together wait for each other; one that dies midway leaves the tables as they were.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy.ext.asyncio import AsyncEngine

from cloud.store.connect import WRITE
from edge_agent.contract.errors import ConfigError

MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 0x766F6C7477617463  # "voltwatc": PostgreSQL's advisory locks are 64-bit numbers


async def migrate(engine: AsyncEngine, revision: str = "head") -> None:
    """Upgrade to `revision`. Raises `ConfigError` when a newer release has already been here."""
    async with engine.connect() as connection:
        await connection.execution_options(**WRITE)
        async with connection.begin():
            if engine.dialect.name == "postgresql":
                await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            await connection.run_sync(_upgrade, revision)


def configuration() -> Config:
    """Return Alembic's configuration: only where the migrations lie; there is no ini file."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _upgrade(connection: sa.Connection, revision: str) -> None:
    config = configuration()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, revision)
    except (CommandError, ResolutionError) as error:
        raise ConfigError(
            f"the store was written by a newer release ({error}); run that release, or restore an older backup"
        ) from error
