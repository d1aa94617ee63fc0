"""From a database URL to an async engine, set up so that a commit that returned survives a power cut.

SQLite: WAL, synchronous=FULL (an ack follows the commit), a busy timeout, BEGIN IMMEDIATE for writers so that two of
them wait for each other instead of failing midway. PostgreSQL: its own defaults, which are as strict.
"""

import inspect
import sqlite3
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from edge_agent.contract.errors import ConfigError, UnavailableError

DEFAULT_URL = "sqlite:///var/voltwatch.db"
BUSY_TIMEOUT_MS = 5_000  # a migration or a backup holds the lock for less
# a server that hangs, or a network that swallows everything, counts as away: nobody waits for ever
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 15.0  # a batch or a page takes milliseconds; a migration has an engine of its own
POOL_TIMEOUT_S = 10.0
WRITE = {"voltwatch_write": True}  # execution option: this transaction writes
_DRIVERS = {
    "sqlite": "sqlite+aiosqlite", "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg", "postgresql": "postgresql+asyncpg", "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg": "postgresql+asyncpg", "postgresql+psycopg2": "postgresql+asyncpg",
}  # fmt: skip
# of a URL's query; prepared_statement_cache_size=0 is for a server behind PgBouncer
_PARAMETERS = {*inspect.signature(asyncpg.connect).parameters, "prepared_statement_cache_size"}
# PostgreSQL's error classes that are not the statement's fault: connection, rolled back (deadlock), resources (disk
# full, too many connections), an operator or a restart, the system, internal; then a lock not to be had, a standby
_AWAY_STATES = ("08", "40", "53", "57", "58", "XX", "55P03", "25006")
_WRONG_STATES = ("28", "3D", "42501")  # no such user or wrong password, no such database, no permission


def async_url(text: str) -> URL:
    """Turn any usual spelling into the URL of the async driver. Raises `ConfigError` for another kind of database."""
    try:
        url = sa.make_url(text)
    except ArgumentError as error:
        raise ConfigError(
            "DATABASE_URL is not a database URL; write sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"
        ) from error
    driver = _DRIVERS.get(url.drivername)
    if driver is None:
        raise ConfigError(f"DATABASE_URL: {url.drivername!r} is not supported; use sqlite:///… or postgresql://…")
    url = url.set(drivername=driver)
    if driver.startswith("postgresql") and "sslmode" in url.query:  # libpq's word; asyncpg calls it ssl
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": str(url.query["sslmode"])})
    unknown = sorted(set(url.query) - _PARAMETERS) if driver.startswith("postgresql") else []
    if unknown:
        raise ConfigError(f"DATABASE_URL: {unknown[0]!a} is no parameter of the PostgreSQL driver (asyncpg)")
    return url


def open_engine(text: str, *, patient: bool = False) -> AsyncEngine:
    """Make the engine; for SQLite also the directory of its file.

    `patient`: a PostgreSQL statement may take as long as it takes, which only migrations need.
    Raises `ConfigError` for a URL that cannot be used, `UnavailableError` when the directory cannot be made.
    """
    url = async_url(text)
    if url.get_backend_name() != "sqlite":
        return create_async_engine(
            url, pool_pre_ping=True, pool_size=5, max_overflow=5, pool_timeout=POOL_TIMEOUT_S,
            connect_args={"timeout": CONNECT_TIMEOUT_S, "command_timeout": None if patient else COMMAND_TIMEOUT_S},
        )  # fmt: skip
    if not url.database or url.database == ":memory:":
        raise ConfigError("DATABASE_URL: a store in memory would forget what was acknowledged; name a file")
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"store {url.database}: its directory cannot be made: {error.strerror}") from error
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    sa.event.listen(engine.sync_engine, "connect", _set_up_sqlite)
    sa.event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # pysqlite would begin by itself, and only at the first write
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"journal_size_limit={64 * 2**20}",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("voltwatch_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def store_name(engine: AsyncEngine) -> str:
    """Name the store for a log line or a health page, without its password."""
    return engine.url.render_as_string(hide_password=True)


def store_identity(engine: AsyncEngine) -> str:
    """Name the store the same from every directory it is opened from, without its password."""
    if engine.url.get_backend_name() != "sqlite":
        return store_name(engine)
    return f"sqlite:///{Path(engine.url.database or '').resolve()}"


def file_identity(engine: AsyncEngine) -> tuple[int, int] | None:
    """Return device and inode of SQLite's file, (0, 0) where there is none; None for a database with a server."""
    if engine.url.get_backend_name() != "sqlite":
        return None
    try:
        found = Path(engine.url.database or "").stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def is_away(error: BaseException) -> bool:
    """Whether this fault is the store's (locked, full, unreachable: try again) and not the statement's."""
    if isinstance(error, OSError | TimeoutError | sa.exc.TimeoutError):
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if "integer overflow" in str(error.orig):  # SQLite's SUM: an OperationalError that no waiting mends
        return False
    if error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return True
    if _state(error).startswith((*_AWAY_STATES, *_WRONG_STATES)):
        return True
    # a full or read-only disk, corruption: SQLite says DatabaseError
    return type(error.orig) is sqlite3.DatabaseError or isinstance(error.orig, sqlite3.OperationalError)


def is_misconfigured(error: BaseException | None) -> bool:
    """Whether somebody has to change the URL, or the server's roles, before this store can be used."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if "not a database" in str(error.orig):  # SQLITE_NOTADB
        return True
    cause = error.orig.__cause__ if error.orig is not None else None
    return _state(error).startswith(_WRONG_STATES) or isinstance(cause, asyncpg.exceptions.ClientConfigurationError)


def _state(error: sa.exc.DBAPIError) -> str:
    """Return PostgreSQL's five-letter SQLSTATE; empty for another database, or where there was no answer."""
    return getattr(error.orig, "sqlstate", None) or ""
