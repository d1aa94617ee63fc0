"""A real Mosquitto as a child process, and a collector that acknowledges as the cloud's does."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.contract import messages, topics


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], timeout_s: float = 15.0, what: str = "condition") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout_s} s: {what}")
        time.sleep(0.02)


def mosquitto_path() -> str:
    """Where the broker's binary is; skips without it, but fails in CI, where such a skip would hide everything."""
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = "no mosquitto on this machine (apt-get install mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class Broker:
    """Mosquitto on a free port of 127.0.0.1, with persistence, that can be killed and started again."""

    def __init__(self, folder: Path, *extra: str) -> None:
        self.path = mosquitto_path()
        self.port = free_port()
        self.folder = folder
        self.extra = extra
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        lines = [
            f"listener {self.port} 127.0.0.1", "allow_anonymous true", "persistence true",
            f"persistence_location {self.folder}/", "max_queued_messages 100000", "user root", *self.extra,
        ]  # fmt: skip
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([self.path, "-c", str(config), "-v"], stdout=log, stderr=log)
        log.close()
        wait_for(self._listens, what="mosquitto listens")

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
            return True
        return False

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path / "broker")
    running.start()
    yield running
    running.stop()


class Collector:
    """Stores every event once under (vehicle, stream, seq), then acknowledges: on MQTT after that, and on `ack`."""

    def __init__(self, port: int, *, acknowledge: bool = True, name: str = "collector") -> None:
        self.stored: dict[tuple[str, str, int], bytes] = {}
        self.received: list[tuple[str, bytes, bool]] = []
        self.acknowledge = acknowledge
        self.ack_time = "2026-11-01T00:00:00.000Z"
        self._lock = threading.Lock()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5, manual_ack=True)
        self.client.on_connect = self._subscribe
        self.client.on_message = self._take
        self.client.reconnect_delay_set(1, 1)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self.subscribed = threading.Event()
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.connect("127.0.0.1", port, 30, clean_start=False, properties=properties)
        self.client.loop_start()
        assert self.subscribed.wait(10)

    def _subscribe(self, client: paho.Client, *_: object) -> None:
        client.subscribe([(topics.subscription(kind), 1) for kind in ("alert", "notice", "drift", "sample")]
                         + [(topics.subscription(kind), 1) for kind in ("status", "current")])  # fmt: skip

    def _take(self, client: paho.Client, _: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        with self._lock:
            self.received.append((message.topic, payload, message.retain))
        topic = topics.parse(message.topic)
        if topic.kind in ("alert", "notice", "drift", "sample"):
            envelope, _data = messages.decode_event(payload, topic.vehicle_id)
            with self._lock:
                self.stored.setdefault((topic.vehicle_id, envelope.streamid, envelope.seq), payload)
            if self.acknowledge:
                self.ack(topic.vehicle_id, envelope.streamid, (envelope.seq, envelope.seq))
        client.ack(message.mid, message.qos)

    def ack(self, vehicle_id: str, stream_id: str, *ranges: tuple[int, int]) -> None:
        ack = messages.Ack(stream_id=stream_id, ranges=ranges, time=self.ack_time)
        self.client.publish(topics.ack(vehicle_id), messages.encode(ack), qos=1)

    def seqs(self, stream_id: str) -> list[int]:
        with self._lock:
            return sorted(seq for _, stream, seq in self.stored if stream == stream_id)

    def statuses(self, vehicle_id: str) -> list[messages.Status]:
        with self._lock:
            wanted = [p for t, p, _ in self.received if t == topics.status(vehicle_id)]
        return [messages.decode_status(payload) for payload in wanted]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
