"""A release from the publisher's command to the deciding slot: the cloud's server, Mosquitto, the agent, its updater.

Everything is a process and speaks over the network; what is pretended is the vehicle's bus, by a serial line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract import messages, topics
from edge_agent.contract.bundle import Decision, WindowSpec
from tests.brokers import Broker, broker, free_port, wait_for
from tests.bundles import build_bundle
from tests.e2e.test_agent import SPEED, VEHICLE, AgentProcess, adapter
from tests.vehicles import Ecu, SlcanPty, catalogue, write_config

__all__ = ["adapter", "broker"]
pytestmark = pytest.mark.e2e
TYPES = ("battery_degradation", "motor_bearing_wear")


def fleet_cloud(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "cloud", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


class Cloud:
    """The publisher's commands and the server."""

    def __init__(self, folder: Path, broker_port: int) -> None:
        self.folder = folder
        self.options = ("--repository", str(folder / "models"), "--offline-keys", str(folder / "offline"),
                        "--online-keys", str(folder / "online"))  # fmt: skip
        fleet_cloud("models", "init", *self.options)
        self.root = folder / "models" / "metadata" / "1.root.json"
        self.port = free_port()
        with (folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cloud", "serve", "--port", str(self.port),
                 "--broker", f"127.0.0.1:{broker_port}",
                 "--database", f"sqlite:///{folder}/store.db", "--lake", str(folder / "lake"),
                 "--models", str(folder / "models"), "--model-keys", str(folder / "online")],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def publish(self, bundle: Path) -> None:
        schema = bundle.parent / "small.json"
        fleet_cloud("models", "publish", str(bundle), *self.options, "--schema", str(schema))

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Desk:
    """Says on MQTT what is desired, and hears what really runs."""

    def __init__(self, port: int) -> None:
        self.heard: list[messages.ModelState] = []
        self.statuses: list[messages.Status] = []
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="desk", protocol=paho.MQTTv5)
        self.client.on_message = self._take
        self.client.connect("127.0.0.1", port)
        self.client.subscribe([(topics.model_state(VEHICLE), 1), (topics.status(VEHICLE), 1)])
        self.client.loop_start()

    def _take(self, _: object, __: object, message: paho.MQTTMessage) -> None:
        if message.topic == topics.status(VEHICLE):
            self.statuses.append(messages.decode_status(bytes(message.payload)))
        else:
            self.heard.append(messages.decode_model_state(bytes(message.payload)))

    def want(self, counter: int) -> None:
        desired = messages.Desired(
            target=f"bundles/tiny-{counter}-{counter}.tar", counter=counter, rollout_id="r1",
            time="2026-11-24T00:00:00.000Z",
        )  # fmt: skip
        self.client.publish(topics.model_desired(VEHICLE), messages.encode(desired), qos=1, retain=True)

    def saw(self, state: str, counter: int | None, reason: str = "") -> bool:
        return any((s.state, s.counter, s.reason) == (state, counter, reason) for s in self.heard)


class Road:
    """Keeps the vehicle driving in the background, at the voltage that it is told."""

    def __init__(self, adapter: SlcanPty) -> None:
        self.voltage = 400.0
        self._adapter, self._ecu = adapter, Ecu()

    def until(self, condition: Callable[[], bool], what: Callable[[], str], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what()
            self._adapter.send(self._ecu.second(self.voltage, 20.0))
            time.sleep(1 / SPEED)


@pytest.fixture
def cloud(broker: Broker, tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path, broker.port)
    yield made
    made.end()


def bundle(folder: Path, release: int, **options: object) -> Path:
    return build_bundle(
        folder / f"bundle-{release}", catalogue(), release=release, golden=True, failure_types=TYPES,
        spec=WindowSpec(frames=60, stride_s=20, vector_period_s=10), decision=Decision(k=1, n=1, clear_windows=1),
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def prepared(cloud: Cloud, adapter: SlcanPty, port: int, tmp_path: Path) -> Path:
    bundle(tmp_path, 1)
    config = write_config(tmp_path, port=port, channel=adapter.path, bundle="bundle-1")
    url = f"http://127.0.0.1:{cloud.port}/v1/models/repository/"
    config.write_text(config.read_text() + f'[update]\nrepository = "{url}"\nroot = "{cloud.root}"\n'
                      "probation_windows = 6\nwarm_up_s = 100\n")  # fmt: skip
    return config


def test_a_desired_release_is_installed_decides_and_is_said_and_a_bad_one_is_left(
    cloud: Cloud, broker: Broker, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = prepared(cloud, adapter, broker.port, tmp_path)
    cloud.publish(tmp_path / "bundle-1")
    cloud.publish(bundle(tmp_path, 2))
    cloud.publish(bundle(tmp_path, 3, trick="late_nan"))
    listed = json.loads(fleet_cloud("models", "list", "--repository", cloud.options[1], "--json"))
    hashes = {r["counter"]: r["manifest_sha256"] for r in listed["releases"]}
    desk, road = Desk(broker.port), Road(adapter)
    agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
    try:
        road.until(lambda: desk.saw("running", None), agent.text)
        assert desk.heard[-1].slot == "factory"
        desk.want(2)
        road.until(lambda: desk.saw("probation", 2), agent.text)
        road.until(lambda: desk.saw("running", 2), agent.text)
        state = desk.heard[-1]
        assert (state.sha256, state.slot, state.rollout_id) == (hashes[2], "a", "r1")
        road.until(lambda: desk.statuses[-1].model_sha256 == hashes[2], agent.text)

        desk.want(3)
        road.until(lambda: desk.saw("probation", 3), agent.text)
        road.voltage = 999.0  # what no golden vector showed
        road.until(lambda: desk.saw("rolled_back", 2, "not_finite"), agent.text)
        state = desk.heard[-1]
        assert (state.sha256, state.attempted, state.target) == (hashes[2], 3, "bundles/tiny-3-3.tar")
        road.until(lambda: any("release 3 was left" in p for p in desk.statuses[-1].problems or ()), agent.text)
        assert agent.end() < 5

        desk.heard.clear()
        agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))  # every boot says it; 3 is not tried again
        road.until(lambda: len(desk.heard) >= 1, agent.text)
        road.until(lambda: agent.says("update", "reason=bad_before"), agent.text)
        assert desk.saw("rolled_back", 2, "not_finite")
        assert not desk.saw("probation", 3)
    finally:
        agent.end(signal.SIGKILL)
        desk.client.loop_stop()


def test_a_killed_agent_in_probation_goes_back_at_its_next_start_and_says_so(
    cloud: Cloud, broker: Broker, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = prepared(cloud, adapter, broker.port, tmp_path)
    cloud.publish(tmp_path / "bundle-1")
    cloud.publish(bundle(tmp_path, 2))
    desk, road = Desk(broker.port), Road(adapter)
    agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
    try:
        road.until(lambda: desk.saw("running", None), agent.text)
        desk.want(2)
        road.until(lambda: desk.saw("probation", 2), agent.text)
        agent.end(signal.SIGKILL)
        agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
        road.until(lambda: desk.saw("rolled_back", None, "crashed"), agent.text)
        assert desk.heard[-1].slot == "factory"
    finally:
        agent.end(signal.SIGKILL)
        desk.client.loop_stop()


def test_a_release_of_another_trend_is_scored_in_shadow_then_decides(
    cloud: Cloud, broker: Broker, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = prepared(cloud, adapter, broker.port, tmp_path)
    cloud.publish(tmp_path / "bundle-1")
    cloud.publish(bundle(tmp_path, 2, state_id="tiny-2"))
    desk, road = Desk(broker.port), Road(adapter)
    agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
    try:
        road.until(lambda: desk.saw("running", None), agent.text)
        desk.want(2)
        for state, counter in (("shadow", None), ("probation", 2), ("running", 2)):
            road.until(lambda state=state, counter=counter: desk.saw(state, counter), agent.text)  # type: ignore[misc]
    finally:
        agent.end(signal.SIGKILL)
        desk.client.loop_stop()


def test_without_mqtts_pointer_the_cloud_is_asked_and_a_cloud_that_is_away_is_waited_for(
    cloud: Cloud, broker: Broker, adapter: SlcanPty, tmp_path: Path
) -> None:
    """The updater's own poll; a server that wants nothing answers 404."""
    config = prepared(cloud, adapter, broker.port, tmp_path)
    command = [sys.executable, "-m", "edge_agent", "update", "--config", str(config)]
    wait_for(lambda: "/docs" in (tmp_path / "serve.log").read_text())
    nothing = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (nothing.returncode, json.loads(nothing.stdout)["ending"]) == (0, "nothing"), nothing.stderr
    os.kill(cloud.process.pid, signal.SIGKILL)
    cloud.process.wait()
    away = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (away.returncode, json.loads(away.stdout)["reason"]) == (75, "network")
    assert len(away.stderr.splitlines()) == 1
    named = subprocess.run([*command, "--target", "bundles/tiny-1-1.tar", "--counter", "1"], capture_output=True,
                           text=True, check=False, timeout=60)  # fmt: skip
    assert (named.returncode, json.loads(named.stdout)["reason"]) == (75, "network")
    assert "connection refused" in named.stderr
