"""What a healthy vehicle sends: bytes a day of drift counts and samples, with a trained bundle on simulated drives.

Status and alerts are left out: the one is bounded by its period, of the other a healthy vehicle has none.
"""

from collections import Counter
from pathlib import Path

import pytest

from edge_agent.contract import messages
from edge_agent.contract.signals import default_catalogue
from edge_agent.mappings import read_mapping
from edge_agent.pipeline.bundle_dir import LoadedBundle, load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import Outcome
from edge_agent.pipeline.reports import reports
from edge_agent.sources.replay import open_recording
from firmware_sim.fleet import FleetSpec, generate

pytestmark = pytest.mark.e2e
CATALOGUE = default_catalogue()
FLEET = FleetSpec(vehicles=2, days=4, hours=1.5, seed=11, faulty=0.0)
DRIFT_A_DAY, ALL_A_DAY = 38_000, 52_000  # 60 kB would be two megabytes a month, with the rest of what is said


class Sent:
    """Bytes and number of messages by stream, as they are encoded for the wire."""

    def __init__(self, vehicle_id: str, bundle: LoadedBundle) -> None:
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self._vehicle_id, self._bundle = vehicle_id, bundle

    def take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            for report in reports(outcome, vehicle_id=self._vehicle_id, bundle=self._bundle):
                encoded = messages.encode(
                    messages.event(
                        report.data, event_id=report.event_id, vehicle_id=self._vehicle_id, time=report.time,
                        stream_id="i" * 36, seq=10**6, boot_id="b" * 36, clock_trusted=True, subject=report.subject,
                    )
                )  # fmt: skip
                self.bytes[report.stream] += len(encoded)
                self.messages[report.stream] += 1


def test_a_healthy_vehicle_driving_an_hour_and_a_half_a_day_sends_little(bundle: Path, tmp_path: Path) -> None:
    generate(FLEET, tmp_path, workers=1, on_progress=lambda *_: None)
    loaded, carried = load_bundle(bundle, CATALOGUE), read_mapping("ev_catalogue")
    total: Counter[str] = Counter()
    files = sorted((tmp_path / "raw_frames").glob("vehicle_id=*/part-0.parquet"))
    assert len(files) == FLEET.vehicles
    for file in files:
        vehicle_id = file.parent.name.partition("=")[2]
        recording = open_recording(file, carried.mapping, CATALOGUE, origin=carried.origin)
        pipeline = Pipeline(
            CATALOGUE, vehicle_id=vehicle_id, period_s=carried.mapping.source.period_s,
            cells=recording.bound.cells(), probes=recording.bound.probes(), bundle=loaded,
            expected=tuple(carried.mapping.signals),
        )  # fmt: skip
        sent = Sent(vehicle_id, loaded)
        for block in recording.blocks():
            sent.take(pipeline.push(block))
        sent.take(pipeline.flush())
        assert pipeline.counters["windows_scored"] > 75 * FLEET.days
        assert pipeline.counters["drift_windows"] == pipeline.counters["windows_scored"]
        assert sent.messages["drift"] <= 5 * FLEET.days
        assert sent.bytes["sample"] <= pipeline.counters.get("sample_bytes", 0)
        print(vehicle_id, dict(sent.bytes), dict(sent.messages))
        total += sent.bytes
    a_day = {stream: size / FLEET.vehicles / FLEET.days for stream, size in total.items()}
    print("bytes a day and vehicle:", {stream: round(size) for stream, size in a_day.items()})
    assert 0 < a_day["drift"] < DRIFT_A_DAY
    assert a_day["drift"] + a_day.get("sample", 0.0) < ALL_A_DAY
