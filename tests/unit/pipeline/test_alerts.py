import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract import messages
from edge_agent.pipeline.alerts import alert_id, alert_message, iso, model_evidence
from edge_agent.pipeline.bundle_dir import load_bundle
from edge_agent.pipeline.outcomes import AlertChange, Reason, Scores
from tests.bundles import build_bundle
from tests.telemetry import CATALOGUE

SCORES = Scores(
    features=np.array([0.5, np.nan], np.float32),
    feature_deviation=np.array([-7.5, 0.0], np.float32),
    failure_probability=1.0000001,
    type_probability=np.array([0.1, 0.95], np.float32),
    severity=np.array([[0.25] * 4, [0, 0, 0.9, 0.1]], np.float32),
    reconstruction_error=np.arange(23, dtype=np.float32),
    anomaly_score=0.7,
    worst_cell=13,
    worst_cell_deviation_v=-0.12,
)
CHANGE = AlertChange(
    time_s=1000.5, since_s=940.5, failure_type="motor_bearing_wear", transition="raised", severity="high",
    origin="model", key="boot/940500", scores=SCORES, type_index=1, windows_over_threshold=2, windows_considered=3,
)  # fmt: skip


def test_a_change_made_twice_is_the_same_message() -> None:
    assert alert_message(CHANGE, vehicle_id="EV_1") == alert_message(CHANGE, vehicle_id="EV_1")


def test_an_alert_keeps_its_id_and_every_event_has_its_own() -> None:
    later = dataclasses.replace(CHANGE, time_s=2000.0, transition="cleared", since_s=123.0)
    first, second = alert_message(CHANGE, vehicle_id="EV_1"), alert_message(later, vehicle_id="EV_1")
    assert first[0] == second[0]
    assert first[1] != second[1]
    for other in (
        dataclasses.replace(CHANGE, key="boot/1000000"),
        dataclasses.replace(CHANGE, origin="guard"),
        dataclasses.replace(CHANGE, failure_type="charging_fault"),
    ):
        assert alert_id(other, "EV_1") != first[0]
    assert alert_id(CHANGE, "EV_2") != first[0]


def test_numpy_numbers_and_float_error_do_not_reach_the_wire() -> None:
    _, _, alert = alert_message(CHANGE, vehicle_id="EV_1", offset_s=1.6e9)
    decoded = messages.msgspec.json.decode(messages.encode(alert), type=messages.Alert)
    assert decoded == alert
    assert decoded.failure_probability == 1.0
    assert decoded.since == "2020-09-13T12:42:20.500Z"
    assert decoded.severity_probability["high"] == pytest.approx(0.9)
    assert decoded.type_probability == pytest.approx(0.95)
    assert (decoded.worst_cell, decoded.worst_cell_deviation_v) == (13, -0.12)


def test_a_guards_alert_names_its_rule_and_no_model(tmp_path: Path) -> None:
    manifest = load_bundle(build_bundle(tmp_path, CATALOGUE), CATALOGUE).manifest
    change = AlertChange(
        time_s=10.0, since_s=9.0, failure_type="thermal_runaway_risk", transition="raised", severity="critical",
        origin="guard", rule="temperature_jump", evidence=(Reason("probe", float("nan"), unit="celsius"),),
    )  # fmt: skip
    _, _, alert = alert_message(change, vehicle_id="EV_1", manifest=manifest)
    assert (alert.rule, alert.model_release, alert.model_name) == ("temperature_jump", None, "")
    assert alert.evidence[0].value is None
    assert messages.encode(alert)


def test_evidence_is_what_deviates_most_and_the_worst_cell(tmp_path: Path) -> None:
    manifest = load_bundle(build_bundle(tmp_path, CATALOGUE), CATALOGUE).manifest
    found = model_evidence(SCORES, manifest)
    assert [r.name for r in found] == [
        "share_present",
        *(f"reconstruction_error.{manifest.signals[i].name}" for i in (22, 21, 20)),
        "Vehicle.Powertrain.TractionBattery.CellVoltage.CellVoltages[13] against the pack's median",
    ]
    assert found[0].deviation == -7.5


def test_times_are_written_in_utc_to_the_millisecond() -> None:
    assert iso(0.0) == "1970-01-01T00:00:00.000Z"
    assert iso(1_700_000_000.9996) == "2023-11-14T22:13:21.000Z"
    assert iso(1e300) == "9999-12-31T23:59:59.000Z"
