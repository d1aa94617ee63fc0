"""What a healthy vehicle sends in a day, in bytes, with a trained bundle and the default limits."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.contract import messages
from edge_agent.contract.signals import default_catalogue
from edge_agent.mappings import read_mapping
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.reports import Report, reports
from edge_agent.sources.replay import open_recording
from tests.conftest import ROOT

pytestmark = pytest.mark.e2e
DAYS = 5
UUID = "00000000-0000-4000-8000-000000000000"


def size(report: Report) -> int:
    """Bytes of the event as it goes over the wire."""
    return len(messages.encode(messages.event(
        report.data, event_id=report.event_id, vehicle_id="EV_0001", time=report.time, stream_id=UUID, seq=100_000,
        boot_id=UUID, clock_trusted=True, subject=report.subject,
    )))  # fmt: skip


def test_a_healthy_vehicle_that_drives_an_hour_and_a_half_a_day_sends_less_than_sixty_kilobytes_a_day(
    bundle: Path, tmp_path: Path
) -> None:
    subprocess.run(
        [sys.executable, "-m", "firmware_sim", "generate", "--output", str(tmp_path), "--vehicles", "2", "--days",
         str(DAYS), "--hours", "1.5", "--faulty", "0", "--workers", "1", "--seed", "11"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    catalogue = default_catalogue()
    loaded = load_bundle(bundle, catalogue)
    mapping = read_mapping(ROOT / "edge_agent" / "mappings" / "ev_catalogue.toml")
    for path in sorted(tmp_path.glob("raw_frames/*/part-0.parquet")):
        recording = open_recording(path, mapping.mapping, catalogue, origin=mapping.origin)
        vehicle_id = path.parent.name.partition("=")[2]
        pipeline = Pipeline(
            catalogue, vehicle_id=vehicle_id, cells=recording.bound.cells(), probes=recording.bound.probes(),
            bundle=loaded, expected=tuple(mapping.mapping.signals),
        )  # fmt: skip
        outcomes = [o for block in recording.blocks() for o in pipeline.push(block)] + pipeline.flush()
        sent: Counter[str] = Counter()
        for report in (r for o in outcomes for r in reports(o, vehicle_id=vehicle_id, bundle=loaded)):
            sent[report.stream] += size(report)
        assert sent["drift"] > 0
        assert sent.total() / DAYS < 60_000, dict(sent)
        assert pipeline.counters["drift_windows"] == pipeline.counters["windows_scored"] > 400
