"""`edge-agent run` as a process: simulated bus on a pty, real Mosquitto, a collector that acknowledges."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.contract import messages, topics
from edge_agent.contract.bundle import Decision, WindowSpec
from edge_agent.delivery.outbox import Outbox
from tests.brokers import Broker, Collector, broker, free_port, wait_for
from tests.bundles import build_bundle
from tests.vehicles import Ecu, SlcanPty, catalogue, write_config

__all__ = ["broker"]
pytestmark = pytest.mark.e2e
VEHICLE = "EV_7"
SPEED = 60.0
COMMAND = [sys.executable, "-m", "edge_agent"]


class AgentProcess:
    def __init__(self, folder: Path, config: Path, *arguments: str) -> None:
        self.log = folder / "agent.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "run", "--config", str(config), *arguments], stdout=log, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.log.read_text()

    def says(self, *words: str) -> bool:
        assert self.process.poll() is None, self.text()
        return any(all(word in line for word in words) for line in self.text().splitlines())

    def end(self, number: int = signal.SIGTERM) -> float:
        """Signal it and wait; returns the seconds it took."""
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(10)
        return time.monotonic() - began


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[SlcanPty]:
    running = SlcanPty(tmp_path / "tty")
    yield running
    running.close()


@pytest.fixture
def collector(broker: Broker) -> Iterator[Collector]:
    running = Collector(broker.port)
    yield running
    running.close()


def drive(adapter: SlcanPty, ecu: Ecu, seconds: float, voltage: float, temperature: float) -> None:
    """Send one simulated second after another at the demonstration's speed."""
    begin = time.monotonic()
    for i in range(int(seconds)):
        adapter.send(ecu.second(voltage, temperature))
        time.sleep(max(0.0, begin + (i + 1) / SPEED - time.monotonic()))


def alerts_of(collector: Collector) -> list[dict[str, object]]:
    events = [json.loads(payload) for payload in list(collector.stored.values())]
    return [event["data"] for event in events if event["type"] == "io.voltwatch.alert"]


def run_once(config: Path) -> "subprocess.CompletedProcess[str]":
    command = [*COMMAND, "run", "--config", str(config)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)


def small_bundle(folder: Path) -> str:
    build_bundle(
        folder / "bundle", catalogue(), spec=WindowSpec(frames=60, stride_s=20, vector_period_s=10),
        decision=Decision(k=1, n=1, clear_windows=1), failure_types=("battery_degradation", "motor_bearing_wear"),
    )  # fmt: skip
    return "bundle"


def test_an_alert_goes_from_the_bus_to_the_collector_and_leaves_the_outbox(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path, bundle=small_bundle(tmp_path))
    agent, ecu = AgentProcess(tmp_path, config, "--speed", str(SPEED)), Ecu()
    try:
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=up"), what="start")
        drive(adapter, ecu, 150, voltage=900.0, temperature=20.0)  # the tiny bundle's first type: voltage above half
        wait_for(lambda: any(a["origin"] == "model" for a in alerts_of(collector)), what=agent.text())
        wait_for(lambda: agent.says("ack", "rows="), what="ack")
        wait_for(lambda: collector.statuses(VEHICLE)[-1].outbox == dict.fromkeys(
            ("alert", "drift", "sample", "loss", "quarantine"), 0), what="an empty outbox in the status")  # fmt: skip
        alert = next(a for a in alerts_of(collector) if a["origin"] == "model")
        assert alert["model_release"] == 1
        assert alert["severity"] in ("low", "medium", "high", "critical")
        status = collector.statuses(VEHICLE)[-1]
        assert status.state == "online"
        assert status.scores
        assert isinstance(status.counters, dict)
        assert status.counters["windows_scored"] >= 1
        assert [(t, p) for t, p, _ in collector.received if t.startswith(topics.current(VEHICLE, "")[:-1])]
        assert agent.end() < 5
        assert agent.process.returncode == 0
        wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "offline")
    finally:
        agent.end(signal.SIGKILL)


def test_without_a_usable_bundle_the_guards_still_alarm_and_the_status_says_so(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path, bundle="nowhere")
    agent, ecu = AgentProcess(tmp_path, config, "--speed", str(SPEED)), Ecu()
    try:
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=up"))
        drive(adapter, ecu, 20, voltage=400.0, temperature=25.0)
        drive(adapter, ecu, 20, voltage=400.0, temperature=120.0)
        wait_for(lambda: alerts_of(collector), what=agent.text())
        assert {a["origin"] for a in alerts_of(collector)} == {"guard"}
        problems = collector.statuses(VEHICLE)[-1].problems
        assert isinstance(problems, tuple)
        assert any("guards only" in p for p in problems)
    finally:
        agent.end(signal.SIGKILL)


def test_no_broker_at_start_then_one_and_the_alert_arrives(adapter: SlcanPty, tmp_path: Path) -> None:
    late = Broker(tmp_path / "broker")
    config = write_config(tmp_path, port=late.port, channel=adapter.path)
    agent, ecu = AgentProcess(tmp_path, config, "--speed", str(SPEED)), Ecu()
    try:
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=down", "refused"))
        drive(adapter, ecu, 20, voltage=400.0, temperature=25.0)
        drive(adapter, ecu, 20, voltage=400.0, temperature=120.0)
        wait_for(lambda: agent.says("alert", "origin=guard"), what=agent.text())
        late.start()
        collector = Collector(late.port)
        wait_for(lambda: alerts_of(collector), 45, what=agent.text())  # the first resend comes after 20 s
        assert all(json.loads(p)["replayed"] for p in collector.stored.values())
        collector.close()
    finally:
        agent.end(signal.SIGKILL)
        late.stop()


def test_sigterm_with_the_link_down_ends_it_within_five_seconds(adapter: SlcanPty, tmp_path: Path) -> None:
    config = write_config(tmp_path, port=free_port(), channel=adapter.path)
    agent = AgentProcess(tmp_path, config)
    try:
        wait_for(lambda: agent.says("link", "state=down"))
        assert agent.end() < 5
        assert agent.process.returncode == 0
    finally:
        agent.end(signal.SIGKILL)


def test_a_killed_agent_goes_on_where_it_was_and_does_not_raise_the_alert_again(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path)
    ecu = Ecu()
    agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
    try:
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=up"))
        drive(adapter, ecu, 10, voltage=400.0, temperature=25.0)
        drive(adapter, ecu, 10, voltage=400.0, temperature=120.0)
        wait_for(lambda: alerts_of(collector), what=agent.text())
        agent.end(signal.SIGKILL)
        wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "offline", what="the last will")
        agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
        wait_for(lambda: agent.text().count("state=open") == 2 and agent.text().count("state=up") == 2)
        assert agent.says("restored")
        drive(adapter, ecu, 60, voltage=400.0, temperature=120.0)
        wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "online")
        time.sleep(1.0)
        assert len([a for a in alerts_of(collector) if a["transition"] == "raised"]) == 1
    finally:
        agent.end(signal.SIGKILL)


def test_a_second_agent_on_one_data_directory_is_refused(adapter: SlcanPty, tmp_path: Path) -> None:
    config = write_config(tmp_path, port=free_port(), channel=adapter.path)
    agent = AgentProcess(tmp_path, config)
    try:
        wait_for(lambda: agent.says("start"))
        second = run_once(config)
        assert second.returncode == 69
        assert second.stderr.startswith("edge-agent: error: data directory ")
        assert "in use by another agent" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        agent.end(signal.SIGKILL)


def test_a_corrupt_queue_is_moved_aside_and_the_agent_runs(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path)
    data = tmp_path / "data"
    old = Outbox(data, notice_topic="n", build_loss=lambda *_: b"")
    ids = old.stream_ids
    old.close()
    (data / "outbox.db").write_bytes(os.urandom(4096))
    agent = AgentProcess(tmp_path, config)
    try:
        wait_for(lambda: len(collector.stored) >= 3, what="three loss records")
        losses = [messages.decode_event(p, VEHICLE)[1] for p in collector.stored.values()]
        assert {loss.stream_id for loss in losses if isinstance(loss, messages.Loss)} == set(ids.values())
        assert (data / "outbox.db.corrupt-1").exists()
    finally:
        agent.end(signal.SIGKILL)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (("vehicle_id =", "vehicel_id ="), 78, "unknown key 'vehicel_id'; did you mean 'vehicle_id'?"),
        (('mapping = "small.toml"', 'mapping = "none.toml"'), 78, "none.toml: no such file"),
        (('dbc = "small.dbc"', 'dbc = "none.dbc"'), 78, "none.dbc: no such file"),
        (('interface = "slcan"', 'interface = "slcn"'), 78, "did you mean 'slcan'?"),
        (("keepalive_s = 5", "keepalive_s = 1"), 78, "keepalive_s"),
        (('vehicle_id = "EV_7"', 'vehicle_id = "a/b"'), 78, "vehicle id 'a/b' is not allowed"),
        (('data_dir = "data"', 'data_dir = "/proc/none"'), 69, "data directory /proc/none"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_clear_line(
    tmp_path: Path, change: tuple[str, str], code: int, says: str
) -> None:
    config = write_config(tmp_path, port=1883, channel="none")
    config.write_text(config.read_text().replace(*change))
    ended = run_once(config)
    assert (ended.returncode, ended.stderr.count("\n")) == (code, 1), ended.stderr
    assert ended.stderr.startswith("edge-agent: error: ")
    assert says in ended.stderr


def test_without_python_can_run_is_one_clear_line_and_replay_needs_it_not(tmp_path: Path) -> None:
    config = write_config(tmp_path, port=1883, channel="none")
    hide = "import sys; sys.modules['can'] = None; from edge_agent.__main__ import main; sys.exit(main(sys.argv[1:]))"

    def ended(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", hide, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)

    run = ended("run", "--config", str(config))
    assert (run.returncode, run.stderr.count("\n")) == (78, 1), run.stderr
    assert "pip install 'voltwatch[can]'" in run.stderr
    replay = ended("replay", "none.csv", "--map", str(tmp_path / "small.toml"), "--bundle", "nowhere")
    assert (replay.returncode, replay.stderr.count("\n")) == (65, 1), replay.stderr
