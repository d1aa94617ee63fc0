"""What only PostgreSQL does: a user, a name or a parameter it does not take, and a server that is there and says no."""

import asyncio
import uuid

import asyncpg
import pytest
import sqlalchemy as sa

from cloud.store.fleet_store import FleetStore, StoreAwayError
from edge_agent.contract.errors import ConfigError
from tests.databases import postgres_uri
from tests.windows import sample_items

__all__ = ["postgres_uri"]
NOW = 1_772_000_000.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def with_parts(uri: str, **parts: str) -> str:
    return sa.make_url(uri).set(**parts).render_as_string(hide_password=False)  # type: ignore[arg-type]


async def told(uri: str, *statements: str) -> None:
    connection = await asyncpg.connect(uri)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def prepared(url: str) -> None:
    store = FleetStore.over(url)
    try:
        await store.prepare()
    finally:
        await store.close()


@pytest.mark.anyio
async def test_what_the_server_does_not_take_is_one_line_and_never_waited_for(postgres_uri: str) -> None:
    role = f"guest_{uuid.uuid4().hex[:8]}"
    await told(postgres_uri, f"CREATE ROLE {role} LOGIN")
    for url, said in (
        (with_parts(postgres_uri, database="nowhere"), 'database "nowhere" does not exist'),
        (with_parts(postgres_uri, username="nobody"), 'role "nobody" does not exist'),
        (with_parts(postgres_uri, username=role), "permission denied"),
        (f"{postgres_uri}&sslmode=perhaps", "must be one of"),
        (f"{postgres_uri}&speed=high", "'speed' is no parameter"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            await prepared(url)
        assert "\n" not in str(error.value)
        assert "DATABASE_URL" in str(error.value)


@pytest.mark.anyio
async def test_a_server_without_a_free_connection_is_waited_for(postgres_uri: str) -> None:
    name, role = f"full_{uuid.uuid4().hex[:8]}", f"owner_{uuid.uuid4().hex[:8]}"
    await told(postgres_uri, f"CREATE ROLE {role} LOGIN", f"CREATE DATABASE {name} OWNER {role} CONNECTION LIMIT 0")
    store = FleetStore.over(with_parts(postgres_uri, database=name, username=role))
    with pytest.raises(StoreAwayError, match="too many connections"):
        await store.prepare()
    await told(postgres_uri, f"ALTER DATABASE {name} CONNECTION LIMIT 10")
    await store.prepare()
    assert (await store.commit(sample_items("s"), received_at_s=NOW)).stored == 1
    await store.close()


@pytest.mark.anyio
async def test_a_standby_and_a_connection_that_was_ended_are_away_and_lose_nothing(postgres_uri: str) -> None:
    name = f"switched_{uuid.uuid4().hex[:8]}"
    await told(postgres_uri, f"CREATE DATABASE {name}")
    store = FleetStore.over(with_parts(postgres_uri, database=name))
    await store.prepare()
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608 - our own
    await told(postgres_uri, f"ALTER DATABASE {name} SET default_transaction_read_only = on", end)
    with pytest.raises(StoreAwayError, match="read-only"):
        await store.commit(sample_items("s"), received_at_s=NOW)
    await told(postgres_uri, f"ALTER DATABASE {name} SET default_transaction_read_only = off", end)
    assert (await store.commit(sample_items("s"), received_at_s=NOW)).stored == 1  # the pool has noticed by itself
    await store.close()


@pytest.mark.anyio
async def test_writers_that_meet_over_the_same_vehicles_in_any_order_store_everything(postgres_uri: str) -> None:
    name = f"met_{uuid.uuid4().hex[:8]}"
    await told(postgres_uri, f"CREATE DATABASE {name}")
    stores = [FleetStore.over(with_parts(postgres_uri, database=name)) for _ in range(4)]
    await stores[0].prepare()

    async def write(number: int, store: FleetStore) -> None:
        vehicles = [f"EV_{n}" for n in range(10)]
        for turn in range(5):
            batch = [
                sample_items(f"{turn}", vehicle_id=vehicle, parts=4, stream_id=f"t{turn}")[number]
                for vehicle in (vehicles if number % 2 else vehicles[::-1])
            ]
            while True:
                try:
                    await store.commit(batch, received_at_s=NOW)
                    break
                except StoreAwayError:  # as the collector does; a deadlock would be one
                    await asyncio.sleep(0.01)

    await asyncio.gather(*(write(number, store) for number, store in enumerate(stores)))
    async with stores[0].reading() as connection:
        states = await connection.execute(sa.text("SELECT state, count(*) FROM sample GROUP BY state"))
        assert [tuple(row) for row in states] == [("whole", 50)]
    for store in stores:
        await store.close()
