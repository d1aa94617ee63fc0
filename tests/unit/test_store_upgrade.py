"""A store that the first release filled is upgraded and read by this one, on SQLite and on a real PostgreSQL.

The rows are what that release wrote, spelled out here: they must not follow a later change of the code that writes.
That each row is still there after the upgrade is `test_migrations`'s.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cloud.alert_work.life_cycle import Action
from cloud.collector import ingest
from cloud.store import reading, work_rows
from cloud.store.fleet_store import FleetStore
from cloud.store.items import PipelineState
from cloud.store.migrate import migrate
from cloud.store.reading import AlertFilter
from edge_agent.contract import messages, topics
from tests.databases import database_url, postgres_uri
from tests.windows import sample_items

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
TYPE = "inverter_overheating"
TOPIC = f"voltwatch/v1/EV_1/alert/{TYPE}"
ALERTS = 450  # more than a page


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def body(seq: int) -> bytes:
    """An event as the first release's vehicles encode it."""
    alert = messages.Alert(
        alert_id=f"a{seq}", transition="raised", failure_type=TYPE, severity="high", origin="model",
        since="2026-03-01T00:00:00.000Z", model_release=1, model_name="first",
    )  # fmt: skip
    return messages.encode(
        messages.event(
            alert, event_id=f"s1/{seq}", vehicle_id="EV_1", time="2026-03-01T00:00:00.000Z", stream_id="s1", seq=seq,
            boot_id="b", clock_trusted=True,
        )
    )  # fmt: skip


def old_rows() -> dict[str, list[dict[str, Any]]]:
    events = [
        {"vehicle_id": "EV_1", "stream_id": "s1", "seq": seq, "event_id": f"s1/{seq}",
         "type": "org.voltwatch.alert.v1", "topic": TOPIC, "time": "2026-03-01T00:00:00.000Z", "boot_id": "b",
         "clock_trusted": True, "replayed": False, "alert_id": f"a{seq}", "received_at_s": NOW + seq,
         "body": body(seq)}
        for seq in range(1, ALERTS + 1)
    ]  # fmt: skip
    alerts = [
        {"vehicle_id": "EV_1", "alert_id": f"a{seq}", "ingest_id": seq, "last_ingest_id": seq,
         "received_at_s": NOW + seq, "updated_at_s": NOW + seq, "failure_type": TYPE, "origin": "model", "rule": "",
         "state": "raised", "severity": "high", "since": "2026-03-01T00:00:00.000Z",
         "time": "2026-03-01T00:00:00.000Z", "cleared_time": None, "transitions": 1, "clock_trusted": True,
         "replayed": False, "model_release": 1, "model_name": "first", "body": body(seq).decode()}
        for seq in range(1, ALERTS + 1)
    ]  # fmt: skip
    return {
        "event": events,
        "alert": alerts,
        "vehicle": [
            {"vehicle_id": "EV_1", "first_seen_at_s": NOW, "last_seen_at_s": NOW + 9, "channel": "mqtt",
             "state": "online", "make": "sim", "source": "can", "model_release": 1, "model_name": "first",
             "model_sha256": "ab", "clock_trusted": True, "last_arrival": "2026-03-01T00:00:00.000Z", "scores": "{}",
             "status": "{}"}
        ],
        "loss": [
            {"ingest_id": 1, "vehicle_id": "EV_1", "stream_id": "s0", "stream": "sample", "first_seq": 1,
             "last_seq": 5, "count": 5, "reason": "quota", "time": "2026-03-01T00:00:00.000Z"}
        ],
        "current": [
            {"vehicle_id": "EV_1", "failure_type": TYPE, "alert_id": "a1", "severity": "high", "received_at_s": NOW,
             "body": b"{}"}
        ],
        "parked": [
            {"vehicle_id": "EV_1", "topic": TOPIC, "body_sha256": "cd" * 32, "body": b"newer", "received_at_s": NOW}
        ],
        "pipeline_state": [
            {"vehicle_id": "EV_1", "make": "sim", "period_s": 1.0, "cells": 2, "probes": 1, "snapshot": b"s",
             "updated_at_s": NOW}
        ],
        "refused": [
            {"reason": "malformed", "count": 3, "last_topic": TOPIC, "last_detail": "no", "last_payload": b"x",
             "last_at_s": NOW}
        ],
    }  # fmt: skip


async def fill(store: FleetStore) -> None:
    """Make the first release's tables, as its own migration makes them, and put its rows in."""
    await migrate(store.engine, "0001")
    async with store.writing() as connection:
        there = sa.MetaData()
        await connection.run_sync(there.reflect)
        assert set(there.tables) - {"alembic_version"} == set(old_rows())
        for name, rows in old_rows().items():
            await connection.execute(sa.insert(there.tables[name]), rows)


@pytest.fixture
async def filled(database_url: str) -> AsyncIterator[FleetStore]:
    store = FleetStore.over(database_url)
    await fill(store)
    yield store
    await store.close()


async def test_a_filled_store_of_the_first_release_is_read_by_this_one(filled: FleetStore) -> None:
    await filled.prepare()
    async with filled.reading() as connection:
        listed = await reading.alerts(connection, AlertFilter(state="open", work="new"), before=None, limit=500)
        (vehicle,) = await reading.vehicles(connection, after=None, limit=10)
        said = await reading.transitions(connection, "EV_1", "a7", limit=10)
        (refused,) = await reading.refused(connection)
        assert await reading.loss_totals(connection) == (1, 5)
        assert await reading.parked_count(connection) == 1
        assert await reading.newest_ingest_id(connection) == ALERTS
    assert [row["alert_id"] for row in listed] == [f"a{seq}" for seq in range(ALERTS, 0, -1)]
    assert (vehicle["vehicle_id"], vehicle["model_name"]) == ("EV_1", "first")
    assert said == [(7, NOW + 7, body(7))]
    assert (refused["reason"], refused["count"]) == ("malformed", 3)
    assert await filled.pipeline_state("EV_1") == PipelineState("sim", 1.0, 2, 1, b"s")


async def test_an_upgraded_store_goes_on_where_the_first_release_stopped(filled: FleetStore) -> None:
    await filled.prepare()
    again = [ingest.decide(topics.alert("EV_1", TYPE), body(seq)) for seq in (1, ALERTS, ALERTS + 1)]
    written = await filled.commit([*again, *sample_items("s")], received_at_s=NOW + 1_000)
    assert (written.stored, written.duplicates) == (2, 2), "what the first release acknowledged is known"
    async with filled.writing() as connection:
        (target,) = await work_rows.found(connection, "a7", "EV_1", lock=True)
        judged = Action(action="confirm", actor="anna", reason="seen", at_s=NOW, failure_type=None, severity=None)
        assert isinstance(await work_rows.act(connection, target, judged), work_rows.Done)
    async with filled.reading() as connection:
        confirmed = await reading.alerts(connection, AlertFilter(verdict="confirmed"), before=None, limit=10)
        assert await reading.newest_ingest_id(connection) > ALERTS
    assert [row["alert_id"] for row in confirmed] == ["a7"]


def test_a_file_of_the_first_release_is_sound_after_the_upgrade(tmp_path: Path) -> None:
    async def upgrade() -> None:
        store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
        await fill(store)
        await store.prepare()
        await store.close()

    asyncio.run(upgrade())
    with sqlite3.connect(tmp_path / "v.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()
