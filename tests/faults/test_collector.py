"""The collector against a real Mosquitto: killed, locked out of its store, without a broker. Nothing is lost."""

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
import sqlalchemy as sa
from paho.mqtt.enums import CallbackAPIVersion

from cloud.api.commands import _broker_config
from cloud.collector.mqtt import Collector, CollectorConfig
from cloud.store import connect, tables
from cloud.store.fleet_store import FleetStore
from edge_agent.contract import messages, topics
from tests.brokers import Broker, broker, free_port, wait_for
from tests.databases import database_url, postgres_uri
from tests.faults.test_delivery import Vehicle as Agent

__all__ = ["broker", "database_url", "postgres_uri"]
pytestmark = pytest.mark.anyio
TYPE = "charging_fault"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Vehicle:
    """Publishes alerts and keeps what it was told was committed."""

    def __init__(self, port: int, vehicle_id: str = "EV_1", protocol: int = paho.MQTTv5) -> None:
        self.vehicle_id = vehicle_id
        self.acked: list[int] = []
        ready = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=vehicle_id, protocol=protocol)
        self.client.on_connect = lambda client, *_: client.subscribe(topics.ack(vehicle_id), 1)
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.on_message = self._told
        self.client.max_queued_messages_set(0)
        self.client.connect("127.0.0.1", port, 30)
        self.client.loop_start()
        assert ready.wait(10)

    def _told(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        ack = messages.decode_ack(bytes(message.payload))
        for first, last in ack.ranges:
            self.acked.extend(range(first, last + 1))

    def publish(self, *seqs: int, version: str = "1.0") -> None:
        for seq in seqs:
            body = event_body(self.vehicle_id, seq)
            body = body.replace(b'"schemaversion":"1.0"', f'"schemaversion":"{version}"'.encode())
            self.client.publish(topics.alert(self.vehicle_id, TYPE), body, qos=1)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def event_body(vehicle_id: str, seq: int) -> bytes:
    alert = messages.Alert(
        alert_id=f"a{seq}", transition="raised", failure_type=TYPE, severity="low", origin="guard", since="x"
    )
    return messages.encode(
        messages.event(
            alert, event_id=f"e{seq}", vehicle_id=vehicle_id, time="2026-03-01T00:00:00.000Z", stream_id="s1", seq=seq,
            boot_id="b", clock_trusted=True,
        )
    )  # fmt: skip


async def in_store(store: FleetStore) -> list[int]:
    async with store.reading() as connection:
        return list((await connection.execute(sa.select(tables.event.c.seq))).scalars())


async def in_database(url: str) -> list[int]:
    store = FleetStore.over(url)
    try:
        return await in_store(store)
    finally:
        await store.close()


def stored(file: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(file)) as database:
        return [seq for (seq,) in database.execute("SELECT seq FROM event ORDER BY ingest_id")]


def config(port: int) -> CollectorConfig:
    return CollectorConfig(port=port, retry_min_s=0.1, retry_max_s=0.3, store_retry_max_s=0.2, keepalive_s=5)


@contextlib.asynccontextmanager
async def running(store: FleetStore, port: int) -> AsyncIterator[Collector]:
    collector = Collector(store, config(port))
    task = asyncio.create_task(collector.run())
    try:
        yield collector
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: object, what: str, timeout_s: float = 15.0) -> None:
    assert callable(condition)
    await asyncio.to_thread(wait_for, condition, timeout_s, what)


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FleetStore]:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 100)
    opened = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    await opened.prepare()
    yield opened
    await opened.close()


@pytest.fixture
async def either_store(database_url: str) -> AsyncIterator[FleetStore]:
    opened = FleetStore.over(database_url)
    await opened.prepare()
    yield opened
    await opened.close()


async def test_what_is_committed_is_acknowledged_by_ranges_and_duplicates_again(
    either_store: FleetStore, broker: Broker
) -> None:
    store = either_store
    async with running(store, broker.port) as collector:
        await until(lambda: collector.link.connected, "connected")
        assert collector.link.protocol == "MQTT 5"
        vehicles = [Vehicle(broker.port, f"EV_{n}") for n in (1, 2)]
        for vehicle in vehicles:
            vehicle.publish(*range(1, 101))
        for vehicle in vehicles:
            await until(lambda v=vehicle: sorted(v.acked) == list(range(1, 101)), "all acknowledged")
        assert collector.counters["commits"] < 100  # many messages share one fsync
        vehicles[0].publish(5, 6, 7, 5)
        await until(lambda: len(vehicles[0].acked) >= 103, "duplicates acknowledged again")
        assert set(vehicles[0].acked[100:]) == {5, 6, 7}
        for vehicle in vehicles:
            vehicle.close()
    assert sorted(await in_store(store)) == sorted([*range(1, 101)] * 2)


async def test_a_broker_away_at_the_start_or_later_is_waited_for(store: FleetStore, tmp_path: Path) -> None:
    late = Broker(tmp_path / "late")
    async with running(store, late.port) as collector:
        await until(lambda: "refused" in collector.link.detail, "says why it is not connected")
        late.start()
        await until(lambda: collector.link.connected, "connected")
        vehicle = Vehicle(late.port)
        vehicle.publish(1)
        await until(lambda: vehicle.acked == [1], "acknowledged")
        late.kill()
        await until(lambda: not collector.link.connected, "notices")
        late.start()
        await until(lambda: collector.link.connected, "connected again")
        vehicle.publish(2)
        await until(lambda: vehicle.acked == [1, 2], "acknowledged after the outage")
        vehicle.close()
    late.stop()


async def test_a_locked_store_stops_the_acknowledging_and_nothing_is_lost(
    store: FleetStore, broker: Broker, tmp_path: Path
) -> None:
    async with running(store, broker.port) as collector:
        await until(lambda: collector.link.connected, "connected")
        vehicle = Vehicle(broker.port)
        locker = sqlite3.connect(tmp_path / "v.db", isolation_level=None)
        locker.execute("BEGIN EXCLUSIVE")
        vehicle.publish(*range(1, 301))
        await until(lambda: collector.counters["store_away"] >= 3, "tries again")
        assert "locked" in collector.store_detail
        assert vehicle.acked == []
        locker.execute("ROLLBACK")
        locker.close()
        await until(lambda: sorted(vehicle.acked) == list(range(1, 301)), "all acknowledged")
        assert collector.store_detail == ""
        vehicle.close()
    assert sorted(stored(tmp_path / "v.db")) == list(range(1, 301))


async def test_a_message_the_store_cannot_hold_stops_no_other_and_stays_with_its_vehicle(
    store: FleetStore, broker: Broker, tmp_path: Path
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
        rule = "CREATE TRIGGER no BEFORE INSERT ON event WHEN new.seq = 3 BEGIN SELECT RAISE(ABORT, 'no'); END"
        database.execute(rule)
        database.commit()
    async with running(store, broker.port) as collector:
        await until(lambda: collector.link.connected, "connected")
        vehicle = Vehicle(broker.port)
        vehicle.publish(*range(1, 7))
        await until(lambda: len(vehicle.acked) >= 5, "the others are acknowledged")
        assert sorted(vehicle.acked) == [1, 2, 4, 5, 6]
        vehicle.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
        assert database.execute("SELECT reason, count FROM refused").fetchall() == [("store_refused", 1)]


async def test_a_newer_major_is_parked_and_not_acknowledged_to_the_vehicle(
    store: FleetStore, broker: Broker, tmp_path: Path
) -> None:
    async with running(store, broker.port) as collector:
        await until(lambda: collector.link.connected, "connected")
        vehicle = Vehicle(broker.port)
        vehicle.publish(1, 1, version="2.0")
        vehicle.publish(2)
        await until(lambda: vehicle.acked == [2], "the one it understands")
        vehicle.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "v.db")) as database:
        assert database.execute("SELECT count(*) FROM parked").fetchone() == (1,)
    assert stored(tmp_path / "v.db") == [2]


async def test_a_broker_of_mqtt_3_only_is_met_with_mqtt_3(store: FleetStore, tmp_path: Path) -> None:
    iotcore = pytest.importorskip("iotcore")
    v5, v4 = free_port(), free_port()
    toml = tmp_path / "broker.toml"
    toml.write_text(_broker_config("127.0.0.1", v5, v4))
    with iotcore.Broker(config_path=str(toml)):
        async with running(store, v4) as collector:
            await until(lambda: collector.link.connected, "connected")
            assert collector.link.protocol == "MQTT 3.1.1"
            vehicle = Vehicle(v4, protocol=paho.MQTTv311)
            vehicle.publish(1, 2)
            await until(lambda: sorted(vehicle.acked) == [1, 2], "acknowledged")
            vehicle.close()


async def test_the_agents_own_link_delivers_everything_through_a_broker_that_is_killed(
    store: FleetStore, broker: Broker, tmp_path: Path
) -> None:
    """Both real ends: the vehicle's outbox empties, and the store has each message once."""
    async with running(store, broker.port) as collector:
        await until(lambda: collector.link.connected, "connected")
        agent = Agent(tmp_path / "agent", broker.port).start()
        for number in range(120):
            agent.alert()
            if number in (40, 80):
                broker.kill()  # whatever it had acknowledged and not passed on is gone
                await asyncio.sleep(0.2)
                broker.start()
        await until(agent.delivered, "the outbox is empty", timeout_s=40)
        await asyncio.to_thread(agent.stop)
    assert sorted(stored(tmp_path / "v.db")) == list(range(1, 121))


COLLECTOR = """
    import asyncio, sys
    from cloud.collector.mqtt import Collector, CollectorConfig
    from cloud.store.fleet_store import FleetStore

    async def main() -> None:
        store = FleetStore.over(sys.argv[2])
        await store.prepare()
        config = CollectorConfig(port=int(sys.argv[1]), batch_messages=7, retry_min_s=0.05, retry_max_s=0.1)
        collector = Collector(store, config)
        task = asyncio.create_task(collector.run())
        while not collector.counters["received"]:
            await asyncio.sleep(0.005)
        print("receiving", flush=True)
        await task

    asyncio.run(main())
"""


async def prepare(url: str) -> None:
    store = FleetStore.over(url)
    await store.prepare()
    await store.close()


def test_kill_of_the_collector_between_receive_and_commit_loses_nothing(broker: Broker, database_url: str) -> None:
    """What the vehicle was told is stored, is stored; what it was not told comes again, and is stored once."""

    def stored() -> list[int]:
        return asyncio.run(in_database(database_url))

    asyncio.run(prepare(database_url))
    command = [sys.executable, "-c", textwrap.dedent(COLLECTOR), str(broker.port), database_url]
    vehicle = Vehicle(broker.port)
    chance = random.Random(5)
    rounds, each, cut_short = 8, 60, 0
    for number in range(1, rounds + 1):
        total = each * number
        with subprocess.Popen(command, stdout=subprocess.PIPE) as collector:
            assert collector.stdout is not None
            if number == 1:  # the session exists from here on, whoever is away
                wait_for(lambda: b"voltwatch-collector" in (broker.folder / "log").read_bytes(), what="first session")
                time.sleep(0.3)
            vehicle.publish(*range(total - each + 1, total + 1))
            assert collector.stdout.readline() == b"receiving\n"
            if number < rounds:
                time.sleep(chance.uniform(0, 0.06))
                collector.kill()
            else:
                wait_for(lambda: len(stored()) == each * rounds, what="everything stored in the end")
                collector.terminate()
        acked = set(vehicle.acked)
        cut_short += len(acked) < total
        assert acked <= set(stored()), "acknowledged, but not there"
    assert sorted(stored()) == list(range(1, each * rounds + 1))
    assert cut_short >= 3, "the kills came too late to show anything"
    vehicle.close()
