"""The store, on SQLite and on a real PostgreSQL: what is stored once, what is folded, what a full one says."""

import asyncio
import itertools
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cloud.collector import ingest
from cloud.store import connect, reading, tables, writing
from cloud.store.fleet_store import FleetStore, StoreAwayError
from cloud.store.items import EventItem, Item, PipelineState, ServerEvent, TelemetryCommit
from cloud.store.reading import AlertFilter
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError
from tests.databases import database_url, postgres_uri

__all__ = ["database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
NOW = 1_772_000_000.0
TYPE = "inverter_overheating"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[FleetStore]:
    opened = FleetStore.over(database_url)
    await opened.prepare()
    yield opened
    await opened.close()


def told(
    seq: int, *, transition: str = "raised", severity: str = "high", alert_id: str = "a1", vehicle_id: str = "EV_1",
    stream_id: str = "s1", time: str = "2026-03-01T00:00:00.000Z",
) -> Item:  # fmt: skip
    alert = messages.Alert(
        alert_id=alert_id, transition=transition, failure_type=TYPE, severity=severity, origin="model",  # type: ignore[arg-type]
        since="2026-03-01T00:00:00.000Z",
    )  # fmt: skip
    envelope = messages.event(
        alert, event_id=f"{stream_id}/{seq}", vehicle_id=vehicle_id, time=time, stream_id=stream_id, seq=seq,
        boot_id="b", clock_trusted=True,
    )  # fmt: skip
    return ingest.decide(topics.alert(vehicle_id, TYPE), messages.encode(envelope))


async def all_alerts(store: FleetStore, **wanted: object) -> list[reading.Row]:
    async with store.reading() as connection:
        return await reading.alerts(connection, AlertFilter(**wanted), before=None, limit=500)  # type: ignore[arg-type]


async def test_a_message_is_stored_once_however_often_it_comes(store: FleetStore) -> None:
    batch = [told(1), told(2, transition="escalated", severity="critical"), told(1)]
    first = await store.commit(batch, received_at_s=NOW)
    again = await store.commit(batch, received_at_s=NOW + 1)
    assert (first.stored, first.duplicates) == (2, 1)
    assert (again.stored, again.duplicates) == (0, 3)
    async with store.reading() as connection:
        rows = (await connection.execute(sa.select(tables.event).order_by(tables.event.c.ingest_id))).all()
    assert [(r.vehicle_id, r.stream_id, r.seq, r.received_at_s) for r in rows] == [
        ("EV_1", "s1", 1, NOW), ("EV_1", "s1", 2, NOW),
    ]  # fmt: skip


async def test_the_same_numbers_of_other_vehicles_and_streams_are_other_messages(store: FleetStore) -> None:
    batch = [told(1), told(1, vehicle_id="EV_2"), told(1, stream_id="s2", alert_id="a2")]
    assert (await store.commit(batch, received_at_s=NOW)).stored == 3


async def test_the_very_bytes_are_kept_with_fields_of_a_newer_minor_version(store: FleetStore) -> None:
    item = told(1)
    assert isinstance(item, EventItem)
    newer = item.body.replace(b'"schemaversion":"1.0"', b'"schemaversion":"1.9","novelty":{"x":[1]}')
    kept = ingest.decide(item.topic, newer)
    await store.commit([kept], received_at_s=NOW)
    async with store.reading() as connection:
        assert await connection.scalar(sa.select(tables.event.c.body)) == newer


async def test_an_alert_is_the_same_whatever_order_its_transitions_come_in(store: FleetStore) -> None:
    def history(alert_id: str) -> list[Item]:
        return [
            told(1, alert_id=alert_id, stream_id=alert_id, severity="low"),
            told(2, alert_id=alert_id, stream_id=alert_id, transition="escalated", severity="critical"),
            told(3, alert_id=alert_id, stream_id=alert_id, transition="cleared", severity="low",
                 time="1970-01-01T00:00:09.000Z"),
        ]  # fmt: skip

    for number, order in enumerate(itertools.permutations(range(3))):
        for place in order:
            await store.commit([history(f"a{number}")[place]], received_at_s=NOW + number)
    rows = await all_alerts(store)
    folded = {tuple(row[n] for n in ("state", "severity", "transitions", "cleared_time", "since")) for row in rows}
    assert len(rows) == 6
    assert folded == {("cleared", "critical", 3, "1970-01-01T00:00:09.000Z", "2026-03-01T00:00:00.000Z")}


async def test_alerts_are_listed_by_arrival_whatever_the_vehicles_clock_says(store: FleetStore) -> None:
    years = ["2036-01-01T00:00:00.000Z", "1970-01-01T00:00:00.000Z", "2026-01-01T00:00:00.000Z"]
    for seq, time in enumerate(years, start=1):
        await store.commit([told(seq, alert_id=f"a{seq}", time=time)], received_at_s=NOW + seq)
    assert [row["alert_id"] for row in await all_alerts(store)] == ["a3", "a2", "a1"]
    await store.commit([told(4, alert_id="a1", transition="escalated", severity="critical")], received_at_s=NOW + 9)
    assert [row["alert_id"] for row in await all_alerts(store)] == [
        "a3",
        "a2",
        "a1",
    ]
    assert [row["alert_id"] for row in await all_alerts(store, severity="critical")] == ["a1"]
    assert [row["alert_id"] for row in await all_alerts(store, since_s=NOW + 2)] == ["a3", "a2"]


async def test_the_last_will_marks_a_vehicle_offline_and_forgets_nothing_else(store: FleetStore) -> None:
    online = messages.Status(
        state="online", boot_id="b1", time="2026-03-01T00:00:00.000Z", clock_trusted=True, make="sim",
        model_release=7, model_name="m", counters={"frames": 12}, scores={"failure_probability": 0.25, "x": None},
    )  # fmt: skip
    topic = topics.status("EV_1")
    await store.commit([ingest.decide(topic, messages.encode(online))], received_at_s=NOW)
    will = messages.Status(state="offline", boot_id="b1")
    await store.commit([ingest.decide(topic, messages.encode(will))], received_at_s=NOW + 5)
    async with store.reading() as connection:
        (row,) = await reading.vehicles(connection, after=None, limit=5)
    assert (row["state"], row["make"], row["model_release"], row["clock_trusted"]) == ("offline", "sim", 7, True)
    assert row["last_seen_at_s"] == NOW + 5
    assert '"frames":12' in row["status"]
    assert row["scores"] == '{"failure_probability":0.25,"x":null}'


async def test_a_retained_status_does_not_mean_that_the_vehicle_was_seen_now(store: FleetStore) -> None:
    body = messages.encode(messages.Status(state="online"))
    await store.commit([ingest.decide(topics.status("EV_1"), body)], received_at_s=NOW)
    await store.commit([ingest.decide(topics.status("EV_1"), body, retained=True)], received_at_s=NOW + 99)
    async with store.reading() as connection:
        (row,) = await reading.vehicles(connection, after=None, limit=5)
    assert row["last_seen_at_s"] == NOW


async def test_losses_newer_messages_and_refused_ones_are_on_record(store: FleetStore) -> None:
    loss = messages.Loss(stream_id="s9", stream="sample", first_seq=3, last_seq=None, count=40, reason="quota")
    envelope = messages.event(
        loss, event_id="l1", vehicle_id="EV_1", time="2026-03-01T00:00:00.000Z", stream_id="s1", seq=5, boot_id="b",
        clock_trusted=False,
    )  # fmt: skip
    newer = told(1)
    assert isinstance(newer, EventItem)
    parked = ingest.decide(newer.topic, newer.body.replace(b'"schemaversion":"1.0"', b'"schemaversion":"2.0"'))
    bad = ingest.decide(newer.topic, b'{"a":\x00\xff}')
    batch = [ingest.decide(topics.notice("EV_1"), messages.encode(envelope)), parked, bad, bad]
    for _ in range(2):
        await store.commit(batch, received_at_s=NOW)
    async with store.reading() as connection:
        assert await reading.loss_totals(connection) == (1, 40)
        assert await reading.parked_count(connection) == 1
        (row,) = await reading.refused(connection)
    assert (row["reason"], row["count"], row["last_topic"]) == ("malformed", 4, newer.topic)
    assert bytes(row["last_payload"]) == b'{"a":\x00\xff}'


async def test_present_states_are_set_and_cleared(store: FleetStore) -> None:
    state = messages.Current(alert_id="a1", failure_type=TYPE, severity="low", since="x", time="y")
    topic = topics.current("EV_1", TYPE)

    async def present() -> list[str]:
        async with store.reading() as connection:
            return list((await connection.execute(sa.select(tables.current.c.alert_id))).scalars())

    await store.commit([ingest.decide(topic, messages.encode(state))], received_at_s=NOW)
    assert await present() == ["a1"]
    await store.commit([ingest.decide(topic, b"")], received_at_s=NOW)
    assert await present() == []


def step(*events: ServerEvent, snapshot: bytes | None = b"s") -> TelemetryCommit:
    return TelemetryCommit(
        vehicle_id="EV_1", make="sim", period_s=1.0, cells=2, probes=1, snapshot=snapshot, last_arrival="t",
        scores={"failure_probability": None}, model_release=3, model_name="m", model_sha256="", events=events,
    )  # fmt: skip


def server_event(name: str, transition: str = "raised") -> ServerEvent:
    def build(stream_id: str, seq: int) -> messages.Event:
        alert = messages.Alert(
            alert_id=name, transition=transition, failure_type=TYPE, severity="low", origin="guard", since="x",  # type: ignore[arg-type]
        )  # fmt: skip
        return messages.event(
            alert, event_id=f"{name}-{transition}", vehicle_id="EV_1", time="2026-03-01T00:00:00.000Z",
            stream_id=stream_id, seq=seq, boot_id="server", clock_trusted=True,
        )  # fmt: skip

    return ServerEvent(f"{name}-{transition}", topics.alert("EV_1", TYPE), build)


async def test_the_servers_own_events_are_numbered_once_across_restarts(store: FleetStore, database_url: str) -> None:
    await store.commit_telemetry(step(server_event("a"), server_event("b")), received_at_s=NOW)
    restarted = FleetStore.over(database_url)
    written = await restarted.commit_telemetry(step(server_event("b"), server_event("b", "cleared")), received_at_s=NOW)
    assert (written.stored, written.duplicates) == (1, 1)
    async with restarted.reading() as connection:
        rows = (await connection.execute(sa.select(tables.event).order_by(tables.event.c.ingest_id))).all()
        state = await reading.pipeline_state(connection, "EV_1")
    assert [(r.stream_id, r.seq, r.event_id) for r in rows] == [
        (writing.SERVER_STREAM, 1, "a-raised"), (writing.SERVER_STREAM, 2, "b-raised"),
        (writing.SERVER_STREAM, 3, "b-cleared"),
    ]  # fmt: skip
    assert state == PipelineState("sim", 1.0, 2, 1, b"s")
    await restarted.close()


async def test_the_migrations_make_exactly_the_tables_of_the_code(store: FleetStore) -> None:
    def difference(connection: sa.Connection) -> object:
        return compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), tables.metadata)

    async with store.engine.connect() as connection:
        assert await connection.run_sync(difference) == []


async def test_processes_that_start_together_migrate_once(database_url: str) -> None:
    stores = [FleetStore.over(database_url) for _ in range(4)]
    await asyncio.gather(*(store.prepare() for store in stores))
    assert (await stores[3].commit([told(1)], received_at_s=NOW)).stored == 1
    for store in stores:
        await store.close()


async def test_a_store_that_a_newer_release_wrote_is_left_alone(store: FleetStore) -> None:
    async with store.engine.begin() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer release"):
        await store.prepare()


async def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database at all, but long enough to be looked at " * 20)
    store = FleetStore.over(f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(ConfigError, match="not a database"):
        await store.prepare()
    await store.close()
    assert (tmp_path / "notes.txt").read_text().startswith("no database at all")


async def test_a_locked_store_says_so_and_takes_the_same_batch_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    await store.prepare()
    other = sqlite3.connect(tmp_path / "v.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreAwayError, match="locked"):
        await store.commit([told(1)], received_at_s=NOW)
    other.execute("ROLLBACK")
    other.close()
    assert (await store.commit([told(1)], received_at_s=NOW)).stored == 1
    await store.close()


async def test_a_full_store_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    await store.prepare()
    await store.commit([told(1)], received_at_s=NOW)

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # SQLite takes the present size: not one page more

    await store.engine.dispose()
    sa.event.listen(store.engine.sync_engine, "connect", limit)
    many = [told(n, alert_id=f"a{n}") for n in range(2, 400)]
    with pytest.raises(StoreAwayError, match="full"):
        await store.commit(many, received_at_s=NOW)
    assert [row["alert_id"] for row in await all_alerts(store)] == ["a1"]
    sa.event.remove(store.engine.sync_engine, "connect", limit)
    await store.engine.dispose()
    assert (await store.commit(many, received_at_s=NOW)).stored == 398
    await store.close()


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("postgres://u:p@h/n", "postgresql+asyncpg"), ("postgresql://u:p@h/n", "postgresql+asyncpg"),
        ("postgresql+psycopg2://h/n", "postgresql+asyncpg"), ("sqlite:///x.db", "sqlite+aiosqlite"),
    ],
)  # fmt: skip
def test_every_usual_spelling_of_a_database_url_is_understood(given: str, driver: str) -> None:
    assert connect.async_url(given).drivername == driver


@pytest.mark.parametrize("given", ["mysql://h/n", "nonsense", "", "sqlite://", "sqlite:///:memory:"])
def test_a_database_that_cannot_be_used_is_one_clear_line(given: str) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        connect.open_engine(given)


async def test_sqlite_is_set_up_so_that_a_commit_survives_a_power_cut(tmp_path: Path) -> None:
    store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    async with store.engine.connect() as connection:
        assert await connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert await connection.scalar(sa.text("PRAGMA synchronous")) == 2  # FULL
        assert await connection.scalar(sa.text("PRAGMA busy_timeout")) == connect.BUSY_TIMEOUT_MS
    await store.close()


async def test_a_sqlite_file_that_was_removed_counts_as_away_until_it_is_back(tmp_path: Path) -> None:
    store = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    await store.prepare()
    try:
        await store.check()
        (tmp_path / "v.db").rename(tmp_path / "elsewhere.db")
        for use in (store.check(), store.commit([], received_at_s=1.0)):
            with pytest.raises(StoreAwayError, match="was removed or replaced"):
                await use
        (tmp_path / "v.db").write_bytes((tmp_path / "elsewhere.db").read_bytes())
        with pytest.raises(StoreAwayError, match="was removed or replaced"):
            await store.check()
        (tmp_path / "elsewhere.db").rename(tmp_path / "v.db")
        await store.check()
    finally:
        await store.close()
