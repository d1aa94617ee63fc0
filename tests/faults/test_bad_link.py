"""A bad link between agent and broker: cut in the middle of a packet, a silent one, one byte at a time, MQTT 3.1.1."""

import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import Broker, Collector, broker, free_port, wait_for
from tests.faults.test_delivery import VEHICLE, Vehicle

__all__ = ["broker"]


class Proxy:
    """A TCP relay whose upward direction can be cut after n bytes, slowed down, or made to swallow everything."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.cut_after: int | None = None
        self.bytes_per_s = 0.0
        self.blackhole = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.closing = False
        self.connections = 0
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while not self.closing:
            if select.select([self.listener], [], [], 0.05)[0]:
                client, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        carried = 0
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            while not self.closing:
                for ready in select.select([client, server], [], [], 0.05)[0]:
                    try:
                        data = ready.recv(4096 if self.bytes_per_s == 0 or ready is server else 1)
                    except OSError:
                        return
                    if not data:
                        return
                    if self.blackhole:
                        continue
                    if ready is server:
                        client.sendall(data)
                        continue
                    if self.cut_after is not None and carried + len(data) > self.cut_after:
                        server.sendall(data[: self.cut_after - carried])
                        return
                    carried += len(data)
                    server.sendall(data)
                    if self.bytes_per_s:
                        time.sleep(1 / self.bytes_per_s)

    def close(self) -> None:
        self.closing = True
        self.thread.join()
        self.listener.close()


@pytest.fixture
def proxy(broker: Broker) -> Iterator[Proxy]:
    running = Proxy(broker.port)
    yield running
    running.close()


def test_a_link_cut_anywhere_in_a_publish_loses_nothing(broker: Broker, proxy: Proxy, tmp_path: Path) -> None:
    collector = Collector(broker.port)
    vehicle = Vehicle(tmp_path / "v", proxy.port)
    for _ in range(3):
        vehicle.alert()
    vehicle.start()
    wait_for(vehicle.delivered)
    for cut in range(150, 1400, 83):  # from the SUBSCRIBE's end into the third publish
        proxy.cut_after = cut
        before = proxy.connections
        sock = vehicle.link._client.socket() if vehicle.link._client else None
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
        for _ in range(3):
            vehicle.alert()
        wait_for(lambda before=before: proxy.connections > before, what="a connection that will be cut")
        time.sleep(0.05)
        proxy.cut_after = None
    wait_for(vehicle.delivered, 30, what=str(vehicle.uplink.counters))
    assert collector.seqs(vehicle.stream_id) == list(range(1, vehicle.appended + 1))
    assert vehicle.outbox.rows_waiting()["quarantine"] == 0
    vehicle.stop()
    collector.close()


def test_a_silent_link_is_given_up_within_one_and_a_half_keepalives(
    broker: Broker, proxy: Proxy, tmp_path: Path
) -> None:
    vehicle = Vehicle(tmp_path / "v", proxy.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    proxy.blackhole = True
    began = time.monotonic()
    vehicle.alert()
    wait_for(lambda: vehicle.link.state != "up", 15, what="the keepalive of 5 s")
    assert time.monotonic() - began < 5 * 1.5 + 1.5  # paho looks once a second
    proxy.blackhole = False
    collector = Collector(broker.port)
    wait_for(vehicle.delivered, 20)
    vehicle.stop()
    collector.close()


def test_a_slow_link_delivers_and_sets_nothing_aside(broker: Broker, proxy: Proxy, tmp_path: Path) -> None:
    collector = Collector(broker.port)
    proxy.bytes_per_s = 600
    vehicle = Vehicle(tmp_path / "v", proxy.port).start()
    for _ in range(3):
        vehicle.alert()
    wait_for(vehicle.delivered, 30, what=str(vehicle.uplink.counters))
    assert collector.seqs(vehicle.stream_id) == [1, 2, 3]
    vehicle.stop()
    collector.close()


@pytest.fixture
def embedded() -> Iterator[tuple[int, int]]:
    """The broker in a wheel: ports of its MQTT 5 and its MQTT 3.1.1 listener."""
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "cloud", "broker", "--port", str(ports[0]), "--port-v4", str(ports[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "MQTT 5 broker" in process.stdout.readline()
        yield ports
        process.terminate()


def test_a_broker_that_speaks_only_mqtt_3_1_1_is_used_with_a_warning(
    embedded: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collector = Collector(embedded[0])
    vehicle = Vehicle(tmp_path / "v", embedded[1]).start()
    wait_for(lambda: vehicle.link.state == "up", what=vehicle.link.problem)
    assert vehicle.link.problem == "broker speaks MQTT 3.1.1 only"
    assert "protocol" in caplog.messages
    vehicle.alert()
    wait_for(vehicle.delivered)
    assert collector.seqs(vehicle.stream_id) == [1]
    vehicle.stop()
    collector.close()


def test_the_embedded_broker_carries_alerts_acks_and_the_last_will(embedded: tuple[int, int], tmp_path: Path) -> None:
    collector = Collector(embedded[0])
    vehicle = Vehicle(tmp_path / "v", embedded[0]).start()
    wait_for(lambda: vehicle.link.state == "up")
    assert vehicle.link.problem == ""
    for _ in range(100):
        vehicle.alert()
    wait_for(vehicle.delivered)
    assert collector.seqs(vehicle.stream_id) == list(range(1, 101))
    sock = vehicle.link._client.socket()  # type: ignore[union-attr]
    assert sock is not None
    vehicle.link._stop_s = 0.0  # ends the thread without a farewell, as a crash does
    sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: [s.state for s in collector.statuses(VEHICLE)] == ["offline"])
    vehicle.outbox.close()
    collector.close()
