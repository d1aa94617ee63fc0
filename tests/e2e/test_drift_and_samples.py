"""Drift counts and samples from the bus to the collector: each scored window counted once, raw ones around an alert.

The agent runs as a process on a bus at sixty times real time, on a real Mosquitto; what it says is held against
docs/asyncapi.yaml and against its own status.
"""

import re
import signal
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from edge_agent.clock import from_iso
from edge_agent.contract import messages, topics
from edge_agent.contract.messages import Alert, DriftCounts, Sample
from edge_agent.contract.samples import unpack
from tests.brokers import Broker, Collector, broker, wait_for
from tests.contract.test_asyncapi import asyncapi, check
from tests.e2e.test_agent import SPEED, VEHICLE, AgentProcess, adapter, collector, drive, small_bundle
from tests.vehicles import Ecu, SlcanPty, write_config

__all__ = ["adapter", "asyncapi", "broker", "collector"]
pytestmark = pytest.mark.e2e
SETTLED_S = 0.5  # so long after the last frame nothing of it is under way in the agent
WINDOW_S, STRIDE_S = 60.0, 20.0  # of `small_bundle`


def config_of(folder: Path, broker: Broker, adapter: SlcanPty, publish_s: int) -> Path:
    bundle = small_bundle(folder)
    return write_config(folder, port=broker.port, channel=adapter.path, bundle=bundle,
                        extra=f"[drift]\npublish_s = {publish_s}\n")  # fmt: skip


def started(folder: Path, config: Path, times: int = 1) -> AgentProcess:
    agent = AgentProcess(folder, config, "--speed", str(SPEED))
    wait_for(lambda: agent.text().count("state=open") == times and agent.text().count("state=up") == times)
    return agent


def said(collector: Collector) -> list[object]:
    return [messages.decode_event(payload, VEHICLE)[1] for payload in list(collector.stored.values())]


def counts(collector: Collector) -> list[DriftCounts]:
    return [data for data in said(collector) if isinstance(data, DriftCounts)]


def samples(collector: Collector) -> list[Sample]:
    return [data for data in said(collector) if isinstance(data, Sample)]


def last_counters(collector: Collector) -> dict[str, int]:
    wait_for(lambda: collector.statuses(VEHICLE)[-1].state == "offline", what="the last status")
    counters = collector.statuses(VEHICLE)[-1].counters
    assert isinstance(counters, dict)
    return counters


def scored_in_log(agent: AgentProcess) -> int:
    return len(re.findall(r"\bwindow vehicle=", agent.text()))


def assert_adds_up(found: list[DriftCounts], windows: int) -> None:
    """Every variable that counts once a window adds up to `windows`."""
    for name in ("anomaly_score", "share_present"):
        assert sum(sum(v.counts) for c in found for v in c.variables if v.name == name) == windows
    assert sum(c.windows for c in found) == windows


def test_counts_and_samples_are_published_fit_the_document_and_add_up_to_the_scored_windows(
    broker: Broker, collector: Collector, adapter: SlcanPty, asyncapi: ModuleType, tmp_path: Path
) -> None:
    agent, ecu = started(tmp_path, config_of(tmp_path, broker, adapter, publish_s=120)), Ecu()
    try:
        drive(adapter, ecu, 230, voltage=400.0, temperature=25.0)
        drive(adapter, ecu, 60, voltage=900.0, temperature=25.0)  # the tiny bundle's first type
        drive(adapter, ecu, 140, voltage=400.0, temperature=25.0)
        wait_for(lambda: len([s for s in samples(collector) if s.reason == "alert"]) >= 4, what=agent.text())
        wait_for(lambda: counts(collector), what="counts of a span that is over")
        before = len(counts(collector))
        assert agent.end() < 5, "SIGTERM ends it, its last counts sent"
        assert agent.process.returncode == 0
        counters = last_counters(collector)
        wait_for(lambda: len(counts(collector)) > before, 5, what="the counts of the span that was open")
        assert counters["windows_scored"] == scored_in_log(agent) == counters["drift_windows"] > 10
        assert counters["drift_messages"] == len(counts(collector))
        assert_adds_up(counts(collector), counters["windows_scored"])
        spans = sorted((from_iso(c.first_time), from_iso(c.last_time)) for c in counts(collector))
        assert all(last < first for (_, last), (first, _) in pairwise(spans)), spans
        raised = next(d for d in said(collector) if isinstance(d, Alert) and d.transition == "raised")
        around = [s for s in samples(collector) if s.reason == "alert"]
        assert {(s.alert_id, s.failure_type) for s in around} == {(raised.alert_id, raised.failure_type)}
        ends = sorted(from_iso(s.end_time) for s in around)
        assert all(b - a >= WINDOW_S - 0.1 for a, b in pairwise(ends)), "none of them overlap"
        assert len([end for end in ends if end < ends[2]]) == 2
        for sample in samples(collector):
            assert unpack(sample.payload).values.shape == (60, 2)
        kinds = {check(asyncapi, topic, payload) for topic, payload, _ in collector.received if payload}
        assert kinds >= {"alert", "drift", "sample", "status", "current"}
        sizes = [len(p) for t, p, _ in collector.received if topics.parse(t).kind == "sample"]
        assert 0 < counters["sample_bytes"] <= sum(sizes) * 1.3
    finally:
        agent.end(signal.SIGKILL)


def test_after_a_sigkill_no_window_is_counted_twice_and_a_counter_says_what_may_be_lost(
    broker: Broker, collector: Collector, adapter: SlcanPty, tmp_path: Path
) -> None:
    config = config_of(tmp_path, broker, adapter, publish_s=120)
    agent, ecu = started(tmp_path, config), Ecu()
    try:
        drive(adapter, ecu, 280, voltage=400.0, temperature=25.0)
        wait_for(lambda: counts(collector), what="counts before the kill")
        time.sleep(SETTLED_S)
        agent.end(signal.SIGKILL)
        before, scored_before = sum(c.windows for c in counts(collector)), scored_in_log(agent)
        agent = started(tmp_path, config, times=2)
        drive(adapter, ecu, 200, voltage=400.0, temperature=25.0)
        time.sleep(SETTLED_S)
        assert agent.end() < 5
        counters, scored = last_counters(collector), scored_in_log(agent)
        wait_for(lambda: sum(c.windows for c in counts(collector)) >= counters["windows_scored"], 5)
        assert_adds_up(counts(collector), counters["windows_scored"])
        counted = counters["windows_scored"]
        assert before + scored - scored_before <= counted, "what came after the restart is all there"
        assert 0 < scored - counted <= counters["drift_windows_lost_at_most"] <= 600 / STRIDE_S
    finally:
        agent.end(signal.SIGKILL)
