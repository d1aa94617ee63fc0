"""A store that an earlier release filled: brought to today's tables on both databases, with everything it held."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cloud.collector import ingest
from cloud.store import connect, tables
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.items import Item
from cloud.store.migrate import configuration, migrate
from edge_agent.contract import messages, topics
from tests.databases import database_url, postgres_uri
from tests.windows import TIME, drift_counts, event_bytes, sample_items

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
TYPE = "charging_fault"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def first(database_url: str) -> AsyncIterator[FleetStore]:
    """A store as the first release made it."""
    store = FleetStore.over(database_url)
    engine = connect.open_engine(database_url)
    await migrate(engine, "0001")
    await engine.dispose()
    yield store
    await store.close()


def everything() -> list[Item]:
    """One of every kind that the first release stored."""
    alert = messages.Alert(
        alert_id="a1", transition="raised", failure_type=TYPE, severity="high", origin="model", since=TIME
    )
    loss = messages.Loss(stream_id="s9", stream="sample", first_seq=3, last_seq=None, count=40, reason="quota")
    current = messages.Current(alert_id="a1", failure_type=TYPE, severity="high", since=TIME, time=TIME)
    told = event_bytes(alert, 1)
    return [
        ingest.decide(topics.alert("EV_1", TYPE), told),
        ingest.decide(topics.notice("EV_1"), event_bytes(loss, 2)),
        ingest.decide(topics.current("EV_1", TYPE), messages.encode(current)),
        ingest.decide(topics.status("EV_1"), messages.encode(messages.Status(state="online", make="sim"))),
        ingest.decide(topics.alert("EV_1", TYPE), told.replace(b'"schemaversion":"1.0"', b'"schemaversion":"2.0"')),
        ingest.decide(topics.alert("EV_1", TYPE), b"{"),
    ]


async def contents(store: FleetStore, names: list[str]) -> dict[str, list[Any]]:
    """Every row of these tables, as the code of today reads them."""
    found = {}
    async with store.reading() as connection:
        for name in names:
            table = tables.metadata.tables[name]
            rows = await connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            found[name] = [tuple(row) for row in rows]
    return found


async def test_a_filled_store_of_the_first_release_is_upgraded_with_everything_it_held(first: FleetStore) -> None:
    async with first.reading() as connection:
        names = await connection.run_sync(lambda c: sorted(set(sa.inspect(c).get_table_names()) - {"alembic_version"}))
    assert "sample" not in names
    await first.commit(everything(), received_at_s=NOW)
    async with first.writing() as connection:
        values = {"make": "sim", "period_s": 1.0, "cells": 2, "probes": 1, "snapshot": b"\x00\xff", "updated_at_s": NOW}
        await connection.execute(sa.insert(tables.pipeline_state).values(vehicle_id="EV_1", **values))
    before = await contents(first, names)
    assert all(before.values()), "every table of the first release holds something"

    for _ in range(2):  # a second start changes nothing
        await first.prepare()
        assert await contents(first, names) == before

    newest = ScriptDirectory.from_config(configuration()).get_current_head()
    async with first.reading() as connection:
        assert await connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == newest
        assert await connection.run_sync(_difference) == []
    again = await first.commit(everything(), received_at_s=NOW + 1)
    assert (again.stored, again.duplicates) == (0, 2)
    drift = ingest.decide(topics.drift("EV_1"), event_bytes(drift_counts(), 3))
    new = await first.commit([drift, *sample_items("s1", stream_id="s2")], received_at_s=NOW + 1)
    assert new.stored == 2


def _difference(connection: sa.Connection) -> object:
    return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), tables.metadata)


async def test_an_upgrade_that_fails_midway_leaves_the_store_as_it_was(first: FleetStore) -> None:
    await first.commit(everything(), received_at_s=NOW)
    async with first.writing() as connection:
        await connection.execute(sa.text("CREATE TABLE training_run (other INTEGER)"))  # in the way of the upgrade
    with pytest.raises((sa.exc.DBAPIError, StoreAwayError), match="training_run"):
        await first.prepare()
    async with first.reading() as connection:
        assert await connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == "0001"
        there = await connection.run_sync(lambda c: set(sa.inspect(c).get_table_names()))
    assert "sample" not in there
    async with first.writing() as connection:
        await connection.execute(sa.text("DROP TABLE training_run"))
    await first.prepare()
    assert len((await contents(first, ["event"]))["event"]) == 2
