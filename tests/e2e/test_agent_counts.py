"""What `edge-agent run` counts and samples, as a process: simulated bus on a pty, real Mosquitto, a real collector."""

import importlib.util
import json
import signal
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import jsonschema_rs
import pytest

from edge_agent.clock import from_iso
from edge_agent.contract import messages, topics
from edge_agent.contract.messages import Alert, DriftCounts, Sample
from edge_agent.contract.samples import unpack
from tests.brokers import Broker, Collector, broker, wait_for
from tests.conftest import ROOT
from tests.e2e.test_agent import SPEED, VEHICLE, AgentProcess, adapter, collector, drive, small_bundle
from tests.vehicles import Ecu, SlcanPty, write_config

__all__ = ["adapter", "broker", "collector"]
pytestmark = pytest.mark.e2e
PUBLISH_S = 120.0  # instead of an hour: two real seconds of this drive


@pytest.fixture(scope="module")
def asyncapi() -> ModuleType:
    spec = importlib.util.spec_from_file_location("asyncapi_document", ROOT / "docs" / "asyncapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(collector: Collector) -> list[tuple[messages.Event, messages.EventData]]:
    return [messages.decode_event(payload, VEHICLE) for payload in list(collector.stored.values())]


def counts(collector: Collector) -> list[DriftCounts]:
    return sorted((d for _, d in events(collector) if isinstance(d, DriftCounts)), key=lambda d: d.first_time)


def check_spans(found: list[DriftCounts]) -> None:
    for c in found:
        assert from_iso(c.last_time) - from_iso(c.first_time) < PUBLISH_S
        assert all(sum(v.counts) in (c.windows, 20 * c.windows) for v in c.variables), "frames of a stride, or windows"
    assert all(from_iso(a.last_time) < from_iso(b.first_time) for a, b in pairwise(found))


def test_counts_leave_by_the_hour_and_at_sigterm_samples_around_an_alert_and_the_sum_is_every_scored_window(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path, asyncapi: ModuleType
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path, bundle=small_bundle(tmp_path))
    config.write_text(config.read_text() + f"[drift]\npublish_s = {PUBLISH_S}\n[samples]\nrandom_share = 0\n")
    agent, ecu = AgentProcess(tmp_path, config, "--speed", str(SPEED)), Ecu()
    try:
        wait_for(lambda: agent.says("bus", "state=open") and agent.says("link", "state=up"), what="start")
        drive(adapter, ecu, 200, voltage=400.0, temperature=20.0)
        drive(adapter, ecu, 60, voltage=900.0, temperature=20.0)  # the tiny bundle's first type: voltage above half
        drive(adapter, ecu, 200, voltage=400.0, temperature=20.0)
        wait_for(lambda: counts(collector), what="counts while it runs")
        while_running = len(counts(collector))
        assert agent.end() < 5
        assert agent.process.returncode == 0
        wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "offline", what="farewell")
    finally:
        agent.end(signal.SIGKILL)
    status = collector.statuses(VEHICLE)[-1]
    assert isinstance(status.counters, dict)
    found = counts(collector)
    assert len(found) > while_running, "what was counted since leaves at SIGTERM"
    assert sum(c.windows for c in found) == status.counters["windows_scored"] == status.counters["drift_windows"] > 10
    assert status.counters["drift_messages"] == len(found)
    check_spans(found)
    alert = next(d for _, d in events(collector) if isinstance(d, Alert) and d.origin == "model")
    samples = [d for _, d in events(collector) if isinstance(d, Sample)]
    assert {(s.reason, s.alert_id, s.state_id, s.model_release) for s in samples} == {
        ("alert", alert.alert_id, "tiny-1", 1)
    }
    assert len(samples) == 4 == status.counters["samples.alert"], "at it, two before it, one after it"
    assert (
        sum(len(p) for t, p, _ in collector.received if t == topics.sample(VEHICLE)) <= status.counters["sample_bytes"]
    )
    for sample in samples:
        window = unpack(sample.payload)
        assert window.values.shape == (60, 2)
        assert window.state.keys() == {"seconds", "cells_seen"}
    for topic, payload, _ in collector.received:
        if payload:
            schema = asyncapi.schema_of(topics.parse(topic), payload)
            jsonschema_rs.validator_for(schema).validate(json.loads(payload))


def test_a_killed_agent_counts_no_window_twice_and_loses_none_that_was_published_or_came_after(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = write_config(tmp_path, port=broker.port, channel=adapter.path, bundle=small_bundle(tmp_path))
    config.write_text(config.read_text() + f"[drift]\npublish_s = {PUBLISH_S}\n")
    ecu, said = Ecu(), 0
    scored: list[int] = []
    published: list[int] = []
    for turn, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        agent = AgentProcess(tmp_path, config, "--speed", str(SPEED))
        try:
            wait_for(lambda a=agent, n=turn: a.text().count("state=open") == n, what="the bus")  # type: ignore[misc]
            wait_for(lambda a=agent, n=turn: a.text().count("state=up") == n, what="the link")  # type: ignore[misc]
            drive(adapter, ecu, 240, voltage=400.0, temperature=20.0)
            wait_for(lambda: counts(collector), what="counts")
            agent.end(number)
        finally:
            agent.end(signal.SIGKILL)
        published.append(sum(c.windows for c in counts(collector)))
        scored.append(agent.text().count(" window vehicle=") - said)
        said += scored[-1]
    wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "offline", what="the farewell")
    status = collector.statuses(VEHICLE)[-1]
    assert isinstance(status.counters, dict)
    counted = sum(c.windows for c in counts(collector))
    assert 0 < published[0] < scored[0], "the kill came in the middle of a span"
    assert published[0] + scored[1] <= counted <= sum(scored)
    assert sum(scored) - counted <= status.counters["drift_windows_lost_at_most"]
