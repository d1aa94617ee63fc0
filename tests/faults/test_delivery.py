"""The link against a real Mosquitto: what is lost when the broker, the collector or the acks are."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.config import BrokerConfig
from edge_agent.contract import messages, topics
from edge_agent.delivery.mqtt import Link
from edge_agent.delivery.outbox import STREAMS, Outbox
from edge_agent.delivery.uplink import Limits, Uplink
from tests.brokers import Broker, Collector, broker, free_port, wait_for

__all__ = ["broker"]
VEHICLE = "EV_9"
QUICK = Limits(ack_timeout_s=0.5, ack_timeout_max_s=1.0, backoff_first_s=0.05, backoff_max_s=0.2, backlog_per_s=5000)


def envelope(data: messages.EventData, stream_id: str, seq: int) -> bytes:
    return messages.encode(
        messages.event(
            data, event_id=f"{stream_id}/{seq}", vehicle_id=VEHICLE, time="2026-11-01T00:00:00.000Z",
            stream_id=stream_id, seq=seq, boot_id="boot", clock_trusted=True,
        )
    )  # fmt: skip


def alert(number: int, padding: int = 0) -> messages.Alert:
    return messages.Alert(
        alert_id=f"a{number}", transition="raised", failure_type="inverter_overheating", severity="high",
        origin="model", since="2026-11-01T00:00:00.000Z", model_name="x" * padding,
    )  # fmt: skip


class Vehicle:
    """An outbox, an uplink and a link, as the agent wires them."""

    def __init__(
        self, folder: Path, port: int, limits: Limits = QUICK, protocol: int = 5, keepalive_s: int = 5
    ) -> None:
        self.outbox = Outbox(folder, notice_topic=topics.notice(VEHICLE), build_loss=envelope)
        self.uplink = Uplink(self.outbox.stream_ids, STREAMS, lambda: 0.5, limits)
        will = messages.encode(messages.Status(state="offline", boot_id="boot"))
        broker = BrokerConfig(port=port, keepalive_s=5)
        self.link = Link(broker, VEHICLE, self.outbox, self.uplink, client_id=f"agent-{VEHICLE}", will=will)
        self.stream_id = self.outbox.stream_ids["alert"]
        self.appended = 0

    def start(self) -> "Vehicle":
        self.link.start()
        return self

    def alert(self, padding: int = 0) -> int:
        self.appended += 1
        number = self.appended
        seq = self.outbox.append(
            "alert", str(number), lambda i, s: envelope(alert(number, padding), i, s),
            topics.alert(VEHICLE, "inverter_overheating"),
        )  # fmt: skip
        self.link.appended("alert", seq)
        return seq

    def delivered(self) -> bool:
        return self.link.idle and not self.outbox.waiting()["alert"]

    def stop(self) -> None:
        assert self.link.stop()
        self.outbox.close()


@pytest.fixture
def collector(broker: Broker) -> Iterator[Collector]:
    running = Collector(broker.port)
    yield running
    running.close()


def test_rows_leave_the_outbox_only_by_the_collectors_ack(broker: Broker, tmp_path: Path) -> None:
    deaf = Collector(broker.port, acknowledge=False)
    vehicle = Vehicle(tmp_path / "v", broker.port, Limits(ack_timeout_s=60)).start()
    wait_for(lambda: vehicle.link.state == "up")
    for _ in range(5):
        vehicle.alert()
    wait_for(lambda: vehicle.uplink.counters["pubacks"] == 5, what="five PUBACKs")
    wait_for(lambda: deaf.seqs(vehicle.stream_id) == [1, 2, 3, 4, 5])
    assert vehicle.outbox.waiting()["alert"] == [1, 2, 3, 4, 5]
    deaf.ack(VEHICLE, vehicle.stream_id, (2, 3))
    wait_for(lambda: vehicle.outbox.waiting()["alert"] == [1, 4, 5], what="exactly what was acknowledged is gone")
    vehicle.stop()
    deaf.close()


def test_no_broker_at_start_keeps_everything_until_one_comes(tmp_path: Path) -> None:
    late = Broker(tmp_path / "broker")
    vehicle = Vehicle(tmp_path / "v", late.port).start()
    for _ in range(50):
        vehicle.alert()
    wait_for(lambda: "refused" in vehicle.link.problem, what=vehicle.link.problem)
    late.start()
    collector = Collector(late.port)
    wait_for(vehicle.delivered)
    assert collector.seqs(vehicle.stream_id) == list(range(1, 51))
    assert all(json.loads(p)["replayed"] for p in collector.stored.values())
    vehicle.stop()
    collector.close()
    late.stop()


def test_a_live_alert_is_not_marked_as_replayed(broker: Broker, collector: Collector, tmp_path: Path) -> None:
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    vehicle.alert()
    wait_for(vehicle.delivered)
    assert [json.loads(p)["replayed"] for p in collector.stored.values()] == [False]
    vehicle.stop()


def test_broker_killed_after_puback_loses_nothing(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")
    broker.start()
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    for _ in range(3):
        taken = vehicle.uplink.counters["pubacks"]
        for _ in range(20):
            vehicle.alert()
        wait_for(lambda taken=taken: vehicle.uplink.counters["pubacks"] >= taken + 20, what="PUBACKs")
        broker.kill()  # with persistence on; its store is written every half hour
        broker.start()
        wait_for(lambda: vehicle.link.state == "up")
    collector = Collector(broker.port)
    wait_for(vehicle.delivered)
    assert collector.seqs(vehicle.stream_id) == list(range(1, 61))
    vehicle.stop()
    collector.close()
    broker.stop()


def test_collector_away_and_more_messages_than_a_broker_queues_loses_nothing(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker", "max_queued_messages 100")
    broker.start()
    Collector(broker.port).close()  # its session exists, it is away
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    for _ in range(400):
        vehicle.alert()
    wait_for(lambda: vehicle.uplink.counters["pubacks"] >= 64)
    collector = Collector(broker.port)
    wait_for(vehicle.delivered, 30)
    assert collector.seqs(vehicle.stream_id) == list(range(1, 401))
    vehicle.stop()
    collector.close()
    broker.stop()


def test_a_lost_ack_means_a_resend_that_is_stored_once(broker: Broker, tmp_path: Path) -> None:
    collector = Collector(broker.port, acknowledge=False)
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    vehicle.alert()
    wait_for(lambda: len([t for t, _, _ in collector.received if "/alert/" in t]) >= 2, what="a resend")
    collector.acknowledge = True
    wait_for(vehicle.delivered)
    assert collector.seqs(vehicle.stream_id) == [1]
    vehicle.stop()
    collector.close()


def test_poison_over_the_brokers_limit_is_set_aside_and_the_rest_flows(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker", "max_packet_size 2000")
    broker.start()
    collector = Collector(broker.port)
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    vehicle.alert()
    poison = vehicle.alert(padding=3000)
    for _ in range(5):
        vehicle.alert()
    wait_for(lambda: len(collector.seqs(vehicle.stream_id)) >= 7, what="six alerts and the loss record")
    wait_for(vehicle.delivered)
    assert poison not in collector.seqs(vehicle.stream_id)
    losses = [json.loads(p)["data"] for p in collector.stored.values() if json.loads(p)["type"].endswith("loss")]
    assert [(loss["first_seq"], loss["last_seq"], loss["count"]) for loss in losses] == [(poison, poison, 1)]
    assert vehicle.outbox.rows_waiting()["quarantine"] == 1
    vehicle.stop()
    collector.close()
    broker.stop()


def test_a_message_the_broker_refuses_by_reason_code_is_set_aside_and_the_rest_flows(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker", "message_size_limit 2000")
    broker.start()
    collector = Collector(broker.port)
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    poison = vehicle.alert(padding=3000)
    deadline = time.monotonic() + 30
    while not vehicle.outbox.rows_waiting()["quarantine"]:
        vehicle.alert()  # proof that others get through
        time.sleep(0.1)
        assert time.monotonic() < deadline, dict(vehicle.uplink.counters)
    wait_for(vehicle.delivered)
    # the poison was number one; its loss record stands among the alerts
    assert collector.seqs(vehicle.stream_id) == list(range(poison + 1, vehicle.appended + 2))
    vehicle.stop()
    collector.close()
    broker.stop()


def test_status_says_online_then_offline_by_will_and_by_farewell(
    broker: Broker, collector: Collector, tmp_path: Path
) -> None:
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    vehicle.link.publish_retained(topics.status(VEHICLE), messages.encode(messages.Status(state="online")))
    wait_for(lambda: [s.state for s in collector.statuses(VEHICLE)] == ["online"])
    sock = vehicle.link._client.socket()  # type: ignore[union-attr]
    assert sock is not None
    vehicle.link._stop_s = 0.0  # ends the thread without a farewell, as a crash does
    sock.shutdown(2)
    wait_for(lambda: [s.state for s in collector.statuses(VEHICLE)] == ["online", "offline"], what="the last will")
    vehicle.outbox.close()
    again = Vehicle(tmp_path / "v", broker.port).start()
    again.link.publish_retained(topics.status(VEHICLE), messages.encode(messages.Status(state="online")))
    wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "online")
    assert again.link.stop(messages.encode(messages.Status(state="offline", agent_version="farewell")))
    wait_for(lambda: collector.statuses(VEHICLE)[-1].agent_version == "farewell")
    again.outbox.close()


def test_current_is_kept_over_reconnects_and_cleared_once(broker: Broker, collector: Collector, tmp_path: Path) -> None:
    topic = topics.current(VEHICLE, "charging_fault")
    vehicle = Vehicle(tmp_path / "v", broker.port)
    vehicle.outbox.set_retained(topic, b'{"x":1}')
    vehicle.start()
    wait_for(lambda: (topic, b'{"x":1}', False) in collector.received)
    vehicle.outbox.set_retained(topic, b"")
    vehicle.link.publish_retained(topic, b"")
    wait_for(lambda: not vehicle.outbox.retained(), what="forgotten once the broker cleared it")
    vehicle.stop()


def test_stopping_with_the_link_down_takes_less_than_five_seconds(tmp_path: Path) -> None:
    vehicle = Vehicle(tmp_path / "v", free_port()).start()
    vehicle.alert()
    began = time.monotonic()
    vehicle.stop()
    assert time.monotonic() - began < 5
    again = Outbox(tmp_path / "v", notice_topic="n", build_loss=envelope)
    assert again.waiting()["alert"] == [1]
    again.close()


def test_fifty_reconnects_leak_no_descriptor(broker: Broker, collector: Collector, tmp_path: Path) -> None:
    vehicle = Vehicle(tmp_path / "v", broker.port).start()
    wait_for(lambda: vehicle.link.state == "up")
    counts = []
    for turn in range(50):
        before = vehicle.uplink.counters["connects"]
        sock = vehicle.link._client.socket()  # type: ignore[union-attr]
        assert sock is not None
        sock.shutdown(2)
        wait_for(lambda before=before: vehicle.uplink.counters["connects"] > before, what=f"reconnect {turn}")
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts[25:]) <= max(counts[:25]) + 1
    vehicle.stop()
