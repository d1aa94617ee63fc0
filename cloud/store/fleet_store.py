"""The store as the rest of the cloud sees it: open it, commit a batch, read a page.

A commit that returned survives SIGKILL and power loss. One that raised `StoreAwayError` may be tried again with the
same items: nothing is stored twice. Nothing here retries by itself; who calls knows how long to wait.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from cloud.store import connect, reading, writing
from cloud.store.items import Item, PipelineState, TelemetryCommit, Written
from cloud.store.migrate import migrate
from edge_agent.contract.errors import ConfigError, UnavailableError

CLOSE_TIMEOUT_S = 2.0


class StoreAwayError(UnavailableError):
    """The store is locked, full or unreachable; the same call may succeed later."""


class FleetStore:
    """One store over one engine. Every method raises `StoreAwayError` when the store cannot be used now."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.name = connect.store_name(engine)
        self.identity = connect.store_identity(engine)
        self.dialect = engine.dialect.name
        self._file: tuple[int, int] | None = None  # device and inode of SQLite's file since the tables are ready

    @classmethod
    def over(cls, url: str) -> "FleetStore":
        """Make a store over a database URL without touching the database. Raises `ConfigError` for a wrong URL."""
        return cls(connect.open_engine(url))

    async def prepare(self) -> None:
        """Create or upgrade the tables.

        Raises `ConfigError` when a newer release has been here, when the file is no database of ours, and for a user,
        password or database name that the server does not take.
        """
        try:
            with self._away():
                await self._migrate()
            self._file = connect.file_identity(self.engine)
        except StoreAwayError as error:
            if connect.is_misconfigured(error.__cause__):  # waiting would not help
                what = "file" if self.dialect == "sqlite" else "one"
                raise ConfigError(f"{error}; name another {what} in --database or DATABASE_URL") from error
            raise

    async def _migrate(self) -> None:
        """Migrate on connections that wait as long as it takes: another process may migrate, an index may be large."""
        patient = connect.open_engine(self.engine.url.render_as_string(hide_password=False), patient=True)
        try:
            await migrate(patient)
        finally:
            await patient.dispose()

    async def commit(self, items: Sequence[Item], *, received_at_s: float) -> Written:
        """Store a batch in one transaction."""
        async with self.writing() as connection:
            return await writing.write(connection, items, received_at_s)

    async def commit_telemetry(self, step: TelemetryCommit, *, received_at_s: float) -> Written:
        """Store one step of a server-side pipeline: its events, its state and the vehicle's row, or nothing."""
        async with self.writing() as connection:
            return await writing.write_telemetry(connection, step, received_at_s)

    async def pipeline_state(self, vehicle_id: str) -> PipelineState | None:
        """Return what the server-side pipeline of a vehicle continues from."""
        async with self.reading() as connection:
            return await reading.pipeline_state(connection, vehicle_id)

    async def check(self) -> None:
        """Ask the store for one row."""
        async with self.reading() as connection:
            await connection.execute(sa.text("SELECT 1"))

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection that sees one state of the store; hand it to the functions of `reading`."""
        self._check_file()
        with self._away():
            async with self.engine.connect() as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that writes: committed when the block ends, rolled back when it raises."""
        self._check_file()
        with self._away():
            async with self.engine.connect() as connection:
                await connection.execution_options(**connect.WRITE)
                async with connection.begin():
                    yield connection
        self._check_file()  # removed meanwhile: what was committed is nowhere, and must not be acknowledged

    def _check_file(self) -> None:
        """Raise `StoreAwayError` where SQLite's file was removed or replaced: what its open handle takes is lost."""
        if self._file is not None and connect.file_identity(self.engine) != self._file:
            raise StoreAwayError(
                f"store {self.name}: its file was removed or replaced; put it back, or restart to begin anew"
            )

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        try:
            yield
        except (OSError, TimeoutError, sa.exc.SQLAlchemyError) as error:
            if connect.is_away(error):
                raise StoreAwayError(f"store {self.name}: {_short(error)}") from error
            raise

    async def close(self) -> None:
        """Close every connection; one whose server does not answer is left to the system."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.engine.dispose()


def _short(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
