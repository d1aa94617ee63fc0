"""The loop is closed on real processes: counts, samples and alerts come back as drift, labels and advice."""

import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud.demo.command import FAILING, went_all_the_way
from cloud.demo.processes import Processes
from cloud.lake.lake import Lake
from edge_agent.contract.samples import unpack
from tests.fleets import Fleet

pytestmark = pytest.mark.e2e


def raised(fleet: Fleet) -> dict[str, Any]:
    """Drive a vehicle until an alert of a model has gone all the way."""
    fleet.vehicle(FAILING, "--mode", "failure", "--fault", "motor_bearing_wear", "--fault-after", "60", "--seed", "1")
    fleet.processes.wait_for(
        "no alert went all the way", lambda: bool(went_all_the_way(fleet.api.vehicles(), fleet.api.alerts())), 90
    )
    alert = fleet.alert(FAILING)
    assert alert is not None
    return alert


def metrics(fleet: Fleet) -> dict[str, float]:
    """Scrape; returns the sum of each sample's values by its name."""
    with urllib.request.urlopen(fleet.api.address + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_an_alert_becomes_advice_a_label_and_training_data(processes: Processes, tmp_path: Path, bundle: Path) -> None:
    fleet = Fleet(processes, tmp_path, bundle)
    alert = raised(fleet)
    path = f"/v1/alerts/{alert['alert_id']}"

    advice = fleet.get(f"{path}/advice")
    assert advice["safety"], "safety comes with every advice"
    assert advice["sections"], "a known failure type has its sections"
    assert all(section["id"] for section in (*advice["safety"], *advice["sections"]))

    status, body = fleet.post(f"{path}/confirm", {"by": "workshop 7", "reason": "outer race pitted, bearing replaced"})
    assert status == 200, body
    seen = fleet.get(path)
    assert seen["work"]["verdict"] == "confirmed"
    assert fleet.get("/v1/labels")["labels"][0]["alert_id"] == alert["alert_id"]

    def of_this_alert() -> list[Any]:
        return [s for s in Lake(str(fleet.lake)).read() if s.alert_id == alert["alert_id"]]

    processes.wait_for("no window around the alert reached the lake", lambda: bool(of_this_alert()), 60)
    window = unpack(of_this_alert()[0].packed)
    assert window.values.shape == (300, 23)
    assert window.state, "the model's state before the window travels along"

    agent = processes.named(f"{FAILING}-agent")
    os.kill(agent.pid, signal.SIGTERM)  # its counts leave with its last words
    agent.wait(10)
    processes.wait_for(
        "no drift counts reached the store",
        lambda: bool(fleet.get(f"/v1/drift?vehicle_id={FAILING}")["references"]),
        30,
    )
    drift = fleet.get(f"/v1/drift?vehicle_id={FAILING}")
    (release,) = drift["references"]
    assert release["model_release"] == alert["model_release"]
    assert drift["verdict"] == "too_few", "minutes of driving say nothing about drift yet"
    assert drift["unknown_references"] == drift["set_aside"] == []

    due = {t["name"]: t for t in fleet.get("/v1/retraining")["triggers"]}
    assert len(due) == 4
    found = metrics(fleet)
    assert found["voltwatch_store_up"] == 1
