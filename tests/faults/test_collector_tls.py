"""The collector over TLS against a real Mosquitto: it collects, and says in one line why it cannot."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloud.collector.mqtt import Collector, CollectorConfig
from cloud.collector.tls import TlsFiles, tls_context
from cloud.identity import authority as ca
from cloud.identity.names import Role
from cloud.identity.provisioning import DAYS, Wanted
from cloud.store.fleet_store import FleetStore
from edge_agent.config import BrokerConfig
from edge_agent.contract import messages, topics
from edge_agent.contract.errors import ConfigError
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox
from edge_agent.delivery.uplink import Uplink
from tests.brokers import Broker
from tests.faults.test_collector import TYPE, event_body, stored, until
from tests.faults.test_delivery import QUICK, VEHICLE, alert, envelope
from tests.identities import Identities, Peer, TlsBroker, signed

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "identity")


@pytest.fixture
def broker(identities: Identities) -> Iterator[TlsBroker]:
    running = TlsBroker(identities)
    running.start()
    yield running
    running.stop()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FleetStore]:
    opened = FleetStore.over(f"sqlite:///{tmp_path}/v.db")
    await opened.prepare()
    yield opened
    await opened.close()


def files(folder: Path) -> TlsFiles:
    return TlsFiles(folder / "ca.crt", folder / "identity.pem", folder / "identity.pem")


@contextlib.asynccontextmanager
async def running(
    store: FleetStore, port: int, tls: TlsFiles | None, host: str = "localhost"
) -> AsyncIterator[Collector]:
    config = CollectorConfig(host=host, port=port, tls=tls, retry_min_s=0.1, retry_max_s=0.3, keepalive_s=5)
    collector = Collector(store, config)
    task = asyncio.create_task(collector.run())
    try:
        yield collector
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Vehicle:
    """The agent's own outbox, uplink and link, with an identity."""

    def __init__(self, folder: Path, identity: Path, port: int) -> None:
        self.outbox = Outbox(folder, notice_topic=topics.notice(VEHICLE), build_loss=envelope)
        self.uplink = Uplink(self.outbox.stream_ids, STREAMS, lambda: 0.5, QUICK)
        pem = str(identity / "identity.pem")
        broker = BrokerConfig(
            host="localhost", port=port, keepalive_s=5, ca=str(identity / "ca.crt"), certificate=pem, key=pem
        )
        will = messages.encode(messages.Status(state="offline", boot_id="boot"))
        self.link = Link(broker, VEHICLE, self.outbox, self.uplink, client_id=f"agent-{VEHICLE}", will=will)
        self.appended = 0

    def alerts(self, count: int) -> None:
        for _ in range(count):
            self.appended += 1
            number = self.appended
            seq = self.outbox.append(
                "alert", str(number), lambda i, s, n=number: envelope(alert(n, padding=2000), i, s),
                topics.alert(VEHICLE, "inverter_overheating"),
            )  # fmt: skip
            self.link.appended("alert", seq)

    def delivered(self) -> bool:
        return self.link.idle and not self.outbox.waiting()["alert"]

    def stop(self) -> None:
        assert self.link.stop()
        self.outbox.close()


async def test_a_burst_of_alerts_over_tls_is_committed_and_acknowledged_once(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    vehicle = Vehicle(tmp_path / "v", identities.vehicle(VEHICLE), broker.port)
    vehicle.alerts(400)  # many in one TLS record: what is decrypted already must not wait for the next one
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        vehicle.link.start()
        await until(vehicle.delivered, "everything acknowledged", 30)
        assert stored(tmp_path / "v.db") == list(range(1, 401))
        assert collector.link.detail == ""
    await asyncio.to_thread(vehicle.stop)


async def test_a_clone_of_the_vehicle_takes_its_connection_and_nothing_is_lost(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    identity = identities.vehicle(VEHICLE)
    vehicle = Vehicle(tmp_path / "v", identity, broker.port)
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        vehicle.link.start()
        for _ in range(8):
            vehicle.alerts(20)
            clone = await asyncio.to_thread(Peer, broker.port, identity, client_id="clone")
            assert not clone.refused
            await asyncio.sleep(0.1)
            clone.close()
        await until(vehicle.delivered, "everything acknowledged", 30)
        assert sorted(stored(tmp_path / "v.db")) == list(range(1, 161))
    assert f"Client {VEHICLE} already connected, closing old connection" in broker.log()
    await asyncio.to_thread(vehicle.stop)


async def test_two_collectors_with_one_identity_are_seen_and_nothing_is_lost(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    vehicle = Vehicle(tmp_path / "v", identities.vehicle(VEHICLE), broker.port)
    mine = files(identities.collector())
    async with running(store, broker.port, mine) as first:
        await until(lambda: first.link.connected, "connected")
        vehicle.link.start()
        async with running(store, broker.port, mine):
            seen: set[str] = set()

            def rivals() -> bool:
                vehicle.alerts(1)
                seen.add(first.link.detail)
                return any("does another process collect with this identity?" in detail for detail in seen)

            await until(rivals, "the first says that it has a rival")
        await until(vehicle.delivered, "everything acknowledged", 30)
        assert stored(tmp_path / "v.db") == list(range(1, vehicle.appended + 1))
    await asyncio.to_thread(vehicle.stop)


async def test_an_event_a_vehicle_had_retained_comes_again_and_counts_once(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    second = identities.provisioning.add([Wanted(Role.COLLECTOR, "second", 365)])[0].folder
    broker.reload()
    vehicle = await asyncio.to_thread(Peer, broker.port, identities.vehicle("EV_1"))
    vehicle.publish(topics.alert("EV_1", TYPE), event_body("EV_1", 1), retain=True)
    for identity in (identities.collector(), second):
        async with running(store, broker.port, files(identity)) as collector:
            await until(lambda collector=collector: collector.counters["acks"] == 1, "the event comes, and is acked")
            assert collector.counters["received"] == 1
            assert collector.counters["duplicates"] == int(identity == second)
    assert stored(tmp_path / "v.db") == [1]
    vehicle.close()


async def test_a_renewed_certificate_is_used_at_the_next_connection(
    store: FleetStore, identities: Identities, broker: TlsBroker
) -> None:
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        identities.provisioning.renew(Role.COLLECTOR, ["default"])
        identities.provisioning.revoke(Role.COLLECTOR, "default", "", older=True)
        broker.stop()
        await until(lambda: not collector.link.connected, "the broker is away")
        broker.start()
        await until(lambda: collector.link.connected, "connected with the new one")


# Why it cannot --------------------------------------------------------------------------------------------------


async def said(store: FleetStore, port: int, tls: TlsFiles | None, host: str = "localhost") -> str:
    async with running(store, port, tls, host) as collector:
        await until(lambda: collector.link.detail not in {"", "not connected yet"}, "a reason")
        await asyncio.sleep(0.5)  # the reason stays, and no other protocol is suspected
        assert not collector.link.connected
        assert "\n" not in collector.link.detail
        return collector.link.detail.removeprefix(f"broker {host}:{port}: ")


async def test_a_broker_of_another_authority_is_named_as_that(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    foreign = Identities(tmp_path / "foreign").collector()
    mixed = TlsFiles(
        foreign / "ca.crt", identities.collector() / "identity.pem", identities.collector() / "identity.pem"
    )
    assert await said(store, broker.port, mixed) == "the broker's certificate is not from our authority"


async def test_a_host_the_certificate_does_not_name_is_said(store: FleetStore, tmp_path: Path) -> None:
    elsewhere = Identities(tmp_path / "elsewhere", hosts=("broker.example",))
    running_there = TlsBroker(elsewhere)
    running_there.start()
    try:
        mine = files(elsewhere.collector())
        assert await said(store, elsewhere.port, mine) == "the broker's certificate does not name this host"
        told = await said(store, elsewhere.port, mine, "127.0.0.1")
        assert told == "the broker's certificate does not name this address"
    finally:
        running_there.stop()


async def test_an_expired_certificate_of_the_broker_is_said(
    store: FleetStore, identities: Identities, tmp_path: Path
) -> None:
    old = datetime.now(UTC) - timedelta(days=9)
    made = signed(identities.authority(), tmp_path / "old", "_broker-broker", Role.BROKER, at=old, days=8,
                  hosts=("localhost",))  # fmt: skip
    shutil.copy(made / "identity.pem", identities.folder / "broker" / "identity.pem")
    broker = TlsBroker(identities)
    broker.start()
    try:
        told = await said(store, broker.port, files(identities.collector()))
        assert told.startswith("the broker's certificate has expired; renew it")
    finally:
        broker.stop()


async def test_the_brokers_refusal_of_our_certificate_is_said(
    store: FleetStore, identities: Identities, broker: TlsBroker, tmp_path: Path
) -> None:
    trusted = identities.collector() / "ca.crt"
    foreign = signed(ca.new_authority(datetime.now(UTC)), tmp_path / "foreign", "_collector-default", Role.COLLECTOR)
    mine = TlsFiles(trusted, foreign / "identity.pem", foreign / "identity.pem")
    assert await said(store, broker.port, mine) == "the broker does not trust the authority of our certificate"
    assert await said(store, broker.port, TlsFiles(trusted)) == (
        "the broker asks for a certificate: --broker-certificate and --broker-key"
    )
    identities.provisioning.revoke(Role.COLLECTOR, "default", "")
    broker.reload()
    await asyncio.sleep(0.5)
    told = await said(store, broker.port, files(identities.collector()))
    assert told == "the broker says that our certificate is revoked"


async def test_a_port_that_does_not_speak_tls_is_said(
    store: FleetStore, identities: Identities, tmp_path: Path
) -> None:
    plain = Broker(tmp_path / "plain")
    plain.start()
    try:
        told = await said(store, plain.port, files(identities.collector()))
        assert "speak TLS" in told
    finally:
        plain.stop()


async def test_a_file_that_goes_bad_while_running_is_said_and_recovers(
    store: FleetStore, identities: Identities, broker: TlsBroker
) -> None:
    pem = identities.collector() / "identity.pem"
    good = pem.read_bytes()
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        pem.write_bytes(b"")
        broker.stop()
        broker.start()
        await until(lambda: "holds no certificate in PEM" in collector.link.detail, "the file is named")
        pem.write_bytes(good)
        await until(lambda: collector.link.connected, "connected again")


def bad_files(identities: Identities, folder: Path) -> dict[str, TlsFiles]:
    good = identities.collector()
    pem, trusted = good / "identity.pem", good / "ca.crt"
    other = identities.vehicle("EV_1") / "identity.pem"
    folder.mkdir()
    empty = folder / "empty"
    empty.write_bytes(b"")
    key = ca.new_key()
    only_key = folder / "key.pem"
    only_key.write_bytes(ca.key_pem(key))
    locked = folder / "locked.pem"
    locked.write_bytes(ca.key_pem(key).replace(b"PRIVATE", b"ENCRYPTED PRIVATE"))
    old = signed(identities.authority(), folder / "old", "_collector-default", Role.COLLECTOR,
                 at=datetime.now(UTC) - timedelta(days=9), days=8) / "identity.pem"  # fmt: skip
    server = identities.folder / "broker" / "identity.pem"
    return {
        "authority .*gone: no such file": TlsFiles(folder / "gone", pem, pem),
        "authority .*empty: holds no certificate": TlsFiles(empty, pem, pem),
        "certificate .*gone: no such file": TlsFiles(trusted, folder / "gone", pem),
        "certificate .*key.pem: holds no certificate": TlsFiles(trusted, only_key, pem),
        "certificate .*: expired at .*; renew it": TlsFiles(trusted, old, old),
        "certificate .*: is a server's": TlsFiles(trusted, server, server),
        "key .*gone: no such file": TlsFiles(trusted, pem, folder / "gone"),
        "key .*empty: holds no private key": TlsFiles(trusted, pem, empty),
        "key .*: does not belong to the certificate": TlsFiles(trusted, pem, other),
        "key .*: is encrypted": TlsFiles(trusted, pem, locked),
        "key .*: is a directory": TlsFiles(trusted, pem, folder),
        "certificate and key: give both": TlsFiles(trusted, pem),
    }


async def test_a_file_that_can_never_work_is_one_clear_line(identities: Identities, tmp_path: Path) -> None:
    for line, bad in bad_files(identities, tmp_path / "bad").items():
        with pytest.raises(ConfigError, match=f"^broker {line}"):
            tls_context(bad)
    tls_context(files(identities.collector()))


async def test_a_certificate_that_ends_soon_is_said_before_it_does(
    store: FleetStore, identities: Identities, broker: TlsBroker
) -> None:
    now = datetime.now(UTC).timestamp()
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        assert collector.link.warning(now) == ""
        ends = now + DAYS[Role.COLLECTOR] * 86_400
        assert collector.link.warning(ends - 31 * 86_400) == ""
        assert "the collector's certificate ends at 20" in collector.link.warning(ends - 29 * 86_400)
    async with running(store, broker.port, TlsFiles(identities.collector() / "ca.crt")) as without:
        await until(lambda: without.link.detail != "not connected yet", "a reason")
        assert without.link.warning(now) == ""


async def test_no_key_is_in_what_the_collector_logs(
    store: FleetStore, identities: Identities, broker: TlsBroker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(store, broker.port, files(identities.collector())) as collector:
        await until(lambda: collector.link.connected, "connected")
        text = repr(collector.__dict__) + repr(collector._config)
    identities.provisioning.revoke(Role.COLLECTOR, "default", "")
    broker.reload()
    await asyncio.sleep(0.5)
    await said(store, broker.port, files(identities.collector()))
    text += caplog.text
    for key in identities.private_keys():
        assert key.decode() not in "".join(text.split())
    assert "connected to localhost" in text
