"""Two real vehicles through the whole pipeline: every cell used, glitches masked, no false alarm of a guard."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_agent.mappings import read_mapping
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.chain import Pipeline
from edge_agent.pipeline.outcomes import AlertChange, NoScore, Outcome, Scored
from edge_agent.sources.replay import Recording, open_recording
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE, column

CELLS = "Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages"
PROBES = "Vehicle.Powertrain.TractionBattery.Temperature.CellTemperature"
Replayed = tuple[Recording, Pipeline, list[Outcome]]


@pytest.fixture(scope="module", params=["vehicle_a", "vehicle_b"])
def replayed(request: pytest.FixtureRequest, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    bundle = load_bundle(build_bundle(tmp_path_factory.mktemp("bundle"), CATALOGUE), CATALOGUE)
    carried = read_mapping(request.param)
    path = real_data / f"{request.param}.parquet"
    recording = open_recording(path, carried.mapping, CATALOGUE, origin=carried.origin)
    pipeline = Pipeline(
        CATALOGUE, vehicle_id=request.param, period_s=carried.mapping.source.period_s, cells=recording.bound.cells(),
        probes=recording.bound.probes(), bundle=bundle, expected=tuple(carried.mapping.signals),
    )  # fmt: skip
    outcomes: list[Outcome] = []
    for block in recording.blocks():
        outcomes += pipeline.push(block)
    return recording, pipeline, outcomes + pipeline.flush()


def windows(outcomes: list[Outcome]) -> list[Scored]:
    return [o for o in outcomes if isinstance(o, Scored)]


def test_every_row_and_every_cell_of_a_real_vehicle_is_used(replayed: Replayed) -> None:
    recording, pipeline, outcomes = replayed
    assert pipeline.counters["frames"] == recording.rows
    assert pipeline.counters.get("rows_late", 0) == 0
    assert recording.bound.cells() == {"vehicle_a": 96, "vehicle_b": 87}[pipeline.vehicle_id]
    seen = np.concatenate([s.window.cell_voltage for s in windows(outcomes)])
    assert np.isfinite(seen).any(axis=0).all()
    assert np.nanmin(seen) > 3.3
    assert np.nanmax(seen) < 4.3


def test_glitches_and_codes_of_a_real_vehicle_are_masked_and_counted(replayed: Replayed) -> None:
    recording, pipeline, outcomes = replayed
    expected = {
        "vehicle_a": {(CELLS, "invalid_code"): 1537},
        "vehicle_b": {(PROBES, "invalid_code"): 400_000, ("Vehicle.TraveledDistance", "invalid_code"): 912},
    }
    assert recording.masked.counts == expected[pipeline.vehicle_id]
    temperatures = np.concatenate([s.window.cell_temperature for s in windows(outcomes)])
    assert np.nanmin(temperatures) > 5
    assert np.nanmax(temperatures) < 50


def test_a_real_vehicle_is_scored_and_the_rest_has_a_reason(replayed: Replayed) -> None:
    _, pipeline, outcomes = replayed
    assert len(windows(outcomes)) > {"vehicle_a": 1000, "vehicle_b": 7000}[pipeline.vehicle_id]
    unscored = Counter(o.reason for o in outcomes if isinstance(o, NoScore))
    assert unscored.total() < 20
    assert set(unscored) <= {"low_coverage"}


def test_no_guard_alarms_on_a_healthy_real_vehicle(replayed: Replayed) -> None:
    assert [o for o in replayed[2] if isinstance(o, AlertChange) and o.origin == "guard"] == []


def test_current_of_a_real_vehicle_is_positive_into_the_battery(replayed: Replayed) -> None:
    outcomes = replayed[2]
    current, speed = column("pack_current"), column("speed")
    rows = np.concatenate([s.window.values[-60:] for s in windows(outcomes)])
    assert np.nanmedian(rows[rows[:, speed] > 20, current]) < 0, "driving discharges"
    charging = [s for s in windows(outcomes) if s.stratum == "charging"]
    assert len(charging) > 10
    assert np.median([np.nanmean(s.window.values[:, current]) for s in charging]) > 5
