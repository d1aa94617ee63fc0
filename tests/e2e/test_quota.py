"""Weeks without a broker, in short: what is over the quota is shed and recorded, and everything else arrives."""

import signal
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract import messages
from edge_agent.contract.bundle import Decision, WindowSpec
from tests.brokers import Broker, Collector, broker, wait_for
from tests.bundles import build_bundle
from tests.e2e.test_agent import SPEED, VEHICLE, AgentProcess, adapter, drive
from tests.vehicles import Ecu, SlcanPty, catalogue, write_config

__all__ = ["adapter", "broker"]
pytestmark = pytest.mark.e2e


def test_over_the_quota_samples_and_counts_are_shed_and_recorded_and_every_alert_arrives(
    adapter: SlcanPty, tmp_path: Path
) -> None:
    late = Broker(tmp_path / "broker")
    build_bundle(
        tmp_path / "bundle", catalogue(), spec=WindowSpec(frames=60, stride_s=20, vector_period_s=10),
        decision=Decision(k=1, n=1, clear_windows=1), failure_types=("battery_degradation", "motor_bearing_wear"),
    )  # fmt: skip
    extra = (
        "[outbox]\nmax_bytes = 65536\n[drift]\npublish_s = 60\n[samples]\nrandom_share = 1.0\nbytes_a_day = 10000000\n"
    )
    config = write_config(tmp_path, port=late.port, channel=adapter.path, bundle="bundle", extra=extra)
    agent, ecu = AgentProcess(tmp_path, config, "--speed", str(SPEED)), Ecu()
    try:
        wait_for(lambda: agent.says("bus", "state=open"))
        for _ in range(8):
            drive(adapter, ecu, 100, voltage=400.0, temperature=25.0)
            drive(adapter, ecu, 60, voltage=900.0, temperature=25.0)
        late.start()
        collector = Collector(late.port)
        wait_for(lambda: collector.statuses(VEHICLE) and sum(collector.statuses(VEHICLE)[-1].outbox.values()) == 0, 60)
        counters: Any = collector.statuses(VEHICLE)[-1].counters
        said = [messages.decode_event(p, VEHICLE)[1] for p in collector.stored.values()]
        alerts = [d for d in said if isinstance(d, messages.Alert)]
        assert len(alerts) == agent.text().count(" alert vehicle=") >= 2
        losses = [d for d in said if isinstance(d, messages.Loss)]
        assert {loss.stream for loss in losses} <= {"sample", "drift"}
        assert sum(loss.count for loss in losses if loss.stream == "sample") == counters["outbox_shed_sample"] > 0
        assert counters.get("outbox_shed_alert", 0) == 0
        collector.close()
    finally:
        agent.end(signal.SIGKILL)
        late.stop()
